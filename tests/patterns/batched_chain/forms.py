"""Monarch's pairs of products and their like, as programs write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from structfly.patterns.batched_chain import menu, rule
from structfly.records import Menu

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_bmm(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The forward of fly's blockdiag_butterfly_multiply."""
    batch, n = x.shape[:-1], x.shape[-1]
    k, _, p = w1.shape
    l, s, r = w2.shape  # noqa: E741
    rows = x.reshape(-1, n).shape[0]
    out1 = torch.bmm(x.reshape(rows, k, p).transpose(0, 1), w1.transpose(-1, -2))
    out1 = out1.transpose(0, 1).reshape(rows, r, l).transpose(-1, -2).contiguous().transpose(0, 1)
    out2 = torch.bmm(out1, w2.transpose(-1, -2))
    return out2.permute(1, 2, 0).reshape(*batch, s * l)


def by_einsum(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """fly's reference, with its rearrangements as views."""
    k, _, p = w1.shape
    l, _, r = w2.shape  # noqa: E741
    out1 = torch.einsum("...kp,kqp->...kq", x.unflatten(-1, (k, p)), w1)
    out1 = out1.flatten(-2).unflatten(-1, (r, l)).mT
    return torch.einsum("lsr,...lr->...sl", w2, out1).flatten(-2)


def by_matmul(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Broadcast products of vectors."""
    k, _, p = w1.shape
    l, s, r = w2.shape  # noqa: E741
    out1 = (x.reshape(*x.shape[:-1], k, 1, p) @ w1.mT).squeeze(-2)
    out1 = out1.reshape(*x.shape[:-1], r, l).transpose(-1, -2).unsqueeze(-2)
    return torch.matmul(out1, w2.transpose(1, 2)).squeeze(-2).transpose(-1, -2).reshape(*x.shape[:-1], s * l)


def from_the_left(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Columns for rows: the factor is the first operand."""
    k, _, p = w1.shape
    l, s, r = w2.shape  # noqa: E741
    columns = x.reshape(-1, k, p).permute(1, 2, 0)
    out1 = torch.bmm(w1, columns)
    out1 = out1.reshape(r, l, -1).transpose(0, 1)
    out2 = w2.bmm(out1)
    return out2.transpose(0, 1).reshape(s * l, -1).transpose(0, 1).reshape(*x.shape[:-1], s * l)


def of_neighbours(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Outputs of a block lie side by side: block low rank."""
    k, _, p = w1.shape
    l, s, r = w2.shape  # noqa: E741
    out1 = torch.einsum("nkp,kqp->nkq", x.reshape(-1, k, p), w1)
    out1 = out1.reshape(-1, r, l)
    return torch.einsum("nrl,lsr->nls", out1, w2).reshape(*x.shape[:-1], l * s)


def padded_and_cut(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """MonarchLinear's way with sizes that the blocks do not divide."""
    fewer = x[..., :-1] if x.shape[-1] > 1 else x
    padded = F.pad(fewer, (0, x.shape[-1] - fewer.shape[-1]))
    made = by_bmm(padded, w1, w2)
    return made[..., : max(1, made.shape[-1] - 1)]


FORMS: Mapping[str, Form] = {
    "bmm": by_bmm,
    "einsum": by_einsum,
    "matmul": by_matmul,
    "from the left": from_the_left,
    "of neighbours": of_neighbours,
    "padded and cut": padded_and_cut,
}


@contextmanager
def only(name: str) -> Iterator[None]:
    """Nothing else is offered than a candidate, and leaving a site alone."""

    def offered(site: Any, profile: Any) -> Menu:
        whole = menu.chain_menu(site, profile)
        return replace(whole, candidates=tuple(c for c in whole.candidates if c.name == name or not c.rewrites))

    with patch.object(rule, "chain_menu", offered):
        yield
