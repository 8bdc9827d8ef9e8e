"""A small model with a layer of every kind, and data for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structfly.restructure import Distillation

CLASSES, HIDDEN, WIDE, OUT = 50, 32, 64, 24


class Net(nn.Module):
    """An embedding, two linears with a residual, a 1x1 convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, HIDDEN)
        self.up = nn.Linear(HIDDEN, WIDE)
        self.down = nn.Linear(WIDE, HIDDEN)
        self.conv = nn.Conv2d(HIDDEN, OUT, 1)
        self.lm_head = nn.Linear(OUT, CLASSES, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        hidden = hidden + self.down(torch.relu(self.up(hidden)))
        hidden = self.conv(hidden.movedim(-1, 1)[..., None])[..., 0].movedim(1, -1)
        logits: Tensor = self.lm_head(torch.tanh(hidden))
        return logits


def make() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(CLASSES, (8, 10), generator=generator) for _ in range(count)]


def logits(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(batch)
    return found


DISTILLATION = Distillation(logits, "logits")
