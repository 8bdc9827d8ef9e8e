"""A head as found: what its rule binds before anything is decided."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from structfly.compat import expression
from structfly.lowering.head.epilogue import Epilogue
from structfly.lowering.head.linear import Wanted
from structfly.patterns.head.menu import contiguous_row
from structfly.patterns.head.path import LogitsPath
from structfly.records import Site
from structfly.rewriter.linear import LinearLike
from structfly.rewriter.region import example_of


@dataclass(frozen=True)
class HeadSite(Site):
    """A linear whose logits only feed what the op computes of them: a :class:`~structfly.patterns.head.menu.Head`.

    Attributes:
        path: from the linear to the (first) reader of its logits.
        gradients: which of the operands of the linear and of the chain need one.
        coefficient_class: how a row's coefficient, the factor of what is differentiated of it, depends on logits: "A"
            not at all, "B" on those of the row, "C" on those of a group of rows, "D" in another way or not known.
        recompute: why gradients cannot or should not be made in the forward pass, or "".
        rows, hidden, classes, rank: N, H, C and the adapter's R (0 without one).
        dtype: of the logits: what the matrix products run in.
        loss_dtype: of the value that is replaced.
    """

    path: LogitsPath
    gradients: Wanted
    coefficient_class: str
    recompute: str
    rows: sympy.Expr = field(repr=False)
    hidden: sympy.Expr = field(repr=False)
    classes: sympy.Expr = field(repr=False)
    rank: sympy.Expr = field(repr=False)
    dtype: torch.dtype
    loss_dtype: torch.dtype

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the op gives beside gradients."""
        return ("loss",)

    @property
    def epilogue(self) -> Epilogue:
        return self.path.chain.epilogue

    @property
    def adapter(self) -> bool:
        return self.path.linear.adapter is not None

    @property
    def weight_row(self) -> int:
        return contiguous_row(example_of(self.path.linear.weight))

    @property
    def weight_name(self) -> str:
        return self.path.linear.weight.name


def row_count(logits: fx.Node, class_dim: int) -> sympy.Expr:
    """How many rows logits have whose classes are dimension ``class_dim``."""
    sizes = (expression(size) for dim, size in enumerate(example_of(logits).shape) if dim != class_dim)
    return sympy.expand(math.prod(sizes, start=sympy.Integer(1)))


def class_count(path: LogitsPath) -> sympy.Expr:
    """How many classes count."""
    if path.num_classes is not None:
        return sympy.Integer(path.num_classes)
    return sympy.sympify(expression(example_of(path.linear.node).shape[path.linear.class_dim]))


def hidden_size(linear: LinearLike) -> sympy.Expr:
    """How many hidden units a linear takes."""
    return sympy.sympify(expression(example_of(linear.x).shape[linear.hidden_dim]))


def adapter_rank(path: LogitsPath) -> sympy.Expr:
    """The width of the linear's low-rank update, 0 without one."""
    adapter = path.linear.adapter
    return sympy.Integer(0) if adapter is None else hidden_size(adapter)
