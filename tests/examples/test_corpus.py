"""The demo's corpus: what it reads, and that the BPE loses nothing."""

from pathlib import Path

import numpy as np
import pytest

from examples import corpus
from examples.sources import python_sources

DOCUMENTS = [
    "def add(a, b):\n    return a + b\n" * 20,
    "class Point:\n\tdef __init__(self, x, y):\r\n        self.x, self.y = x, y\n" * 20,
    "naïve = 'größer — 漢字 🙂'\n" * 20,
]
VOCABULARY = 300


def test_tokens_decode_to_the_documents(tmp_path: Path) -> None:
    text = corpus.load(DOCUMENTS, vocabulary=VOCABULARY, cache=tmp_path)
    ends = np.flatnonzero(text.tokens == corpus.END_OF_TEXT_ID)
    parts = np.split(text.tokens, ends + 1)
    assert [text.tokenizer.decode(part[:-1].tolist()) for part in parts[:-1]] == DOCUMENTS
    assert len(parts[-1]) == 0
    assert len(text.tokens) < sum(len(document.encode()) for document in DOCUMENTS) * 0.6


def test_vocabulary_is_as_asked(tmp_path: Path) -> None:
    text = corpus.load(DOCUMENTS, vocabulary=VOCABULARY, cache=tmp_path)
    assert text.tokenizer.get_vocab_size() == VOCABULARY
    assert text.tokenizer.token_to_id(corpus.END_OF_TEXT) == corpus.END_OF_TEXT_ID
    assert text.tokens.dtype == np.uint16
    assert text.tokens.max() < VOCABULARY


@pytest.mark.parametrize(("vocabulary", "message"), [(32_768, "not 32768"), (2**17, "does not fit uint16")])
def test_a_vocabulary_out_of_reach_is_refused(tmp_path: Path, vocabulary: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus.load(DOCUMENTS, vocabulary=vocabulary, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_cache_serves_the_same_documents_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = corpus.load(DOCUMENTS, vocabulary=VOCABULARY, cache=tmp_path)
    other = corpus.load([*DOCUMENTS, "# more\n"], vocabulary=VOCABULARY, cache=tmp_path)
    assert first.digest != other.digest
    assert len(first.tokens) != len(other.tokens)

    def refuse(*arguments: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(corpus, "train_tokenizer", refuse)
    again = corpus.load(DOCUMENTS, vocabulary=VOCABULARY, cache=tmp_path)
    np.testing.assert_array_equal(again.tokens, first.tokens)
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    with pytest.raises(AssertionError, match="trained again"):
        corpus.load(DOCUMENTS, vocabulary=VOCABULARY + 1, cache=tmp_path)


def test_sources_leave_out_tests_packages_and_other_encodings(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a/test/x.py", "site-packages/p/y.py", "a/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes("# größer".encode("latin-1"))
    assert python_sources(tmp_path) == ["# a/z.py\n", "# b.py\n"]


def test_the_standard_library_is_large_enough() -> None:
    documents = python_sources()
    assert sum(map(len, documents)) > 5_000_000  # what it takes to fill 32,768 tokens, with room to spare
