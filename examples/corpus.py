"""Real text for the demo: the Python standard library's own sources, under a byte-level BPE trained on them.

The corpus differs between Python releases, so results name its hash.  The tokenised form is cached under it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # the trainer numbers special tokens first
_FORMAT = b"corpus 1"  # part of the hash: change it with anything that changes what a cached folder holds


class Corpus(NamedTuple):
    """Tokenised documents.

    Attributes:
        tokens: [number of tokens] uint16; every document ends with ``END_OF_TEXT_ID``.
        tokenizer: the BPE that made them.
        digest: hash of the documents and the vocabulary size, in hexadecimal.
    """

    tokens: npt.NDArray[np.uint16]
    tokenizer: Tokenizer
    digest: str


def load(documents: list[str], *, vocabulary: int = 32_768, cache: Path | None = None) -> Corpus:
    """Train the BPE and encode the documents, or read both from the cache.

    Args:
        documents: the texts.
        vocabulary: number of tokens, at most 65,536; the corpus must be large enough to fill it.
        cache: folder to keep the result in; default: ``structfly/corpus`` in the user's cache folder.

    Raises:
        ValueError: if the vocabulary is too large for the documents, or for uint16.
    """
    cache = cache or _user_cache()
    digest = _digest(documents, vocabulary)
    folder = cache / digest
    if not folder.exists():
        tokenizer = train_tokenizer(documents, vocabulary)
        tokens = encode(tokenizer, documents)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:  # renamed when complete: no reader sees half of it
            unfinished = Path(name) / digest
            unfinished.mkdir()
            tokenizer.save(str(unfinished / "tokenizer.json"))
            np.save(unfinished / "tokens.npy", tokens, allow_pickle=False)
            shutil.move(unfinished, folder)
    return Corpus(
        np.load(folder / "tokens.npy", allow_pickle=False),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        digest,
    )


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of exactly ``vocabulary`` tokens, each of whose merges occurs at least twice."""
    if vocabulary > 2**16:
        raise ValueError(f"a vocabulary of {vocabulary} does not fit uint16; ask for at most {2**16}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(
            f"these documents give a vocabulary of {tokenizer.get_vocab_size()}, not {vocabulary}; "
            "ask for a smaller one that is at least 257, or pass more text"
        )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> npt.NDArray[np.uint16]:
    """All documents as one array [number of tokens], each followed by ``END_OF_TEXT_ID``."""
    parts = [np.array([*encoding.ids, END_OF_TEXT_ID], np.uint16) for encoding in tokenizer.encode_batch(documents)]
    return np.concatenate(parts)


def _digest(documents: list[str], vocabulary: int) -> str:
    digest = hashlib.sha256(_FORMAT + str(vocabulary).encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()[:16]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structfly" / "corpus"
