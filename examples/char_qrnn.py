"""Train a character language model of quasi-recurrent layers on this repository's own documents, and let it write.

    python -m examples.char_qrnn --steps 300

One step of training is compiled by structfly: recurrences run parallel over time, and the head's logits never exist.
Writing goes a character at a time, from the state of the one before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structfly.nn import QRNN
from structfly.nn.qrnn import QRNNState

ROOT = Path(__file__).parents[1]


def text() -> str:
    """README.md and the documents."""
    return "".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))


class CharacterModel(nn.Module):
    """Embedding, quasi-recurrent layers with fo-pooling, the first with a window of 2, and a head.

    Args:
        characters: how many different ones there are.
        width: units of every layer.
        layers: how many.
    """

    def __init__(self, characters: int, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.layers = nn.ModuleList(QRNN(width, width, window=2 if n == 0 else 1) for n in range(layers))
        self.head = nn.Linear(width, characters)

    def hidden(self, tokens: Tensor, states: Sequence[QRNNState | None]) -> tuple[Tensor, list[QRNNState]]:
        """(B, T, width) of (B, T) tokens, and every layer's state, to go on from."""
        x, left = self.embedding(tokens), []
        for layer, state in zip(self.layers, states, strict=True):
            h, new = layer(x, state)
            x = x + h
            left.append(new)
        return x, left

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean cross-entropy of every character given those before, in nats; tokens are (B, T + 1)."""
        hidden, _ = self.hidden(tokens[:, :-1], [None] * len(self.layers))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def write(self, prompt: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """``prompt`` (T) and ``count`` characters that the model draws behind it."""
        tokens, fed = prompt, prompt
        states: Sequence[QRNNState | None] = [None] * len(self.layers)
        for _ in range(count):
            hidden, states = self.hidden(fed[None], states)
            fed = torch.multinomial(self.head(hidden[0, -1]).softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, fed])
        return tokens


def train(model: CharacterModel, tokens: Tensor, *, steps: int, batch: int, length: int, options: Any) -> list[float]:
    """The losses of ``steps`` steps of Adam on random excerpts of ``length`` characters."""
    compiled = torch.compile(model, backend="structfly", options=options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        first = torch.randint(0, len(tokens) - length, (batch, 1), generator=generator)
        loss = compiled(tokens[first + torch.arange(length + 1)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: Sequence[str] | None = None, options: Any = None) -> list[float]:
    """Train, print the losses and what the model writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--batch", type=int, default=16, help="excerpts of a step")
    parser.add_argument("--length", type=int, default=256, help="characters of an excerpt")
    parser.add_argument("--write", type=int, default=200, help="characters to write afterwards")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    read = text()
    alphabet = sorted(set(read))
    number = {character: n for n, character in enumerate(alphabet)}
    tokens = torch.tensor([number[character] for character in read])
    model = CharacterModel(len(alphabet))
    losses = train(model, tokens, steps=chosen.steps, batch=chosen.batch, length=chosen.length, options=options)
    print(f"{len(read)} characters, {len(alphabet)} different; loss {losses[0]:.3f} -> {losses[-1]:.3f} nats")
    written = model.write(tokens[:20], chosen.write, torch.Generator().manual_seed(0))
    print("".join(alphabet[n] for n in written.tolist()))
    return losses


if __name__ == "__main__":
    main()
