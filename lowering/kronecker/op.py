"""``structfly::kronecker_v1``: see :mod:`structfly.lowering.kronecker.reference`.

With z_t = w_t z_(t-1) for t = 1..T, z_0 = x, and g_t the gradient with respect to z_t, in the small matrices of w_t

    dw_t = g_t z_(t-1)^T,    g_(t-1) = w_t^T g_t,

and what the forward keeps is z_1 .. z_(T-1).  On GPUs the products are generated where
:func:`~structfly.lowering.kronecker.generated.why_not` has nothing against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structfly.lowering.kronecker import aten, generated
from structfly.lowering.kronecker.reference import FactorShape
from structfly.lowering.layer_op import Applied, LayerOp


def _between(call: Applied) -> list[Tensor]:
    return aten.between(call) if generated.why_not(call.factors) else generated.between(call)


def _finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    return aten.finish(call, between) if generated.why_not(call.factors) else generated.finish(call, between)


def _backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    plain = bool(generated.why_not(call.factors)) or torch.is_grad_enabled()  # with it on, this is differentiated
    return (aten.backward if plain else generated.backward)(grad, call, between, wanted)


def _kept_shapes(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> list[tuple[int, ...]]:
    return [(d * a, i * q, rows) for d, a, i, q, _, _ in shapes[:-1]]


def _multiply_adds(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> tuple[int, int]:
    *first, last = (rows * FactorShape(*map(int, shape)).parameters for shape in shapes)
    return sum(first), last


KRONECKER = LayerOp(
    "kronecker_v1",
    between=_between,
    finish=_finish,
    backward=_backward,
    out_features=lambda _, static: static[0],
    kept_shapes=_kept_shapes,
    multiply_adds=_multiply_adds,
    adds_bias=True,
)
"""Takes the factors, the first applied first, of six axes each as :class:`FactorShape` has them, and in ``static`` the
number of output features."""
