"""Linears with factored weights as programs write them, masked and not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structfly.patterns.factored_linear import menu, rule
from structfly.records import Menu

# Of x, U (out, rank) and V (rank, in), as they are or as masks leave them, and a bias.
Form = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def added(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


FORMS: Mapping[str, Form] = {
    "weight first": lambda x, u, v, b: F.linear(x, u @ v, b),
    "weight first, transposed": lambda x, u, v, b: added(x @ (v.t() @ u.mT), b),
    "weight first, turned": lambda x, u, v, b: F.linear(x, torch.mm(v.t(), u.t()).t(), b),
    "weight first, einsum": lambda x, u, v, b: F.linear(x, torch.einsum("ok,ki->oi", u, v), b),
    "weight first, components first": lambda x, u, v, b: F.linear(x, torch.einsum("ko, ki -> oi", u.t(), v), b),
    "weight first, in and out": lambda x, u, v, b: added(x @ torch.einsum("ki,ok->io", v, u), b),
    "weight first, by linear": lambda x, u, v, b: F.linear(x, F.linear(u, v.t()), b),
    "one by one": lambda x, u, v, b: F.linear(F.linear(x, v), u, b),
    "one by one, matmul": lambda x, u, v, b: added(x @ v.t() @ u.t(), b),
    "one by one, einsum": lambda x, u, v, b: F.linear(torch.einsum("...i,ki->...k", x, v), u, b),
}


# How a matrix is masked, of the mask as bool and in the matrix's dtype.
MASKINGS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "times": lambda w, kept, mask: w * mask,
    "filled": lambda w, kept, mask: w.masked_fill(~kept, 0),
    "where": lambda w, kept, mask: torch.where(kept, w, 0.0),
    "scaled": lambda w, kept, mask: 0.5 * (mask * w),
    "of three dimensions": lambda w, kept, mask: (w.unsqueeze(1) * mask.unsqueeze(1)).reshape(w.shape),
    "transposed": lambda w, kept, mask: (w.t() * mask.t()).permute(1, 0),
}


def intervals(count: int, features: int, width: int, seed: int) -> Tensor:
    """Masks (count, features), bool, each an interval of so many on a circle."""
    starts = torch.randint(features, (count, 1), generator=torch.Generator().manual_seed(seed))
    masks: Tensor = (torch.arange(features) - starts) % features < width
    return masks


class Factored(nn.Module):
    """y = (U * rows) (V * columns) x + b."""

    rows: Tensor
    columns: Tensor

    def __init__(
        self, rows: Tensor, columns: Tensor, form: str, masking: str | None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.form, self.masking = form, masking
        self.u = nn.Parameter(torch.randn(rows.shape, dtype=dtype) / rows.shape[1] ** 0.5)
        self.v = nn.Parameter(torch.randn(columns.shape, dtype=dtype) / columns.shape[1] ** 0.5)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def apply_to(self, x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with these matrices."""
        if self.masking is not None:
            masked = MASKINGS[self.masking]
            u, v = masked(u, self.rows, self.rows.to(u.dtype)), masked(v, self.columns, self.columns.to(v.dtype))
        return FORMS[self.form](x, u, v, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(x, self.u, self.v, None)


@contextmanager
def only(candidate: str) -> Iterator[None]:
    """Nothing else is offered than a candidate, and leaving a site alone."""

    def offered(site: Any) -> Menu:
        whole = menu.factored_menu(site)
        return replace(whole, candidates=tuple(c for c in whole.candidates if c.name == candidate or not c.rewrites))

    with patch.object(rule, "factored_menu", offered):
        yield
