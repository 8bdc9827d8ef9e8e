"""``structfly::kronecker_v3``: see :mod:`structfly.lowering.kronecker.reference`.

With z_t = w_t z_(t-1) for t = 1..T, z_0 = x, and g_t the gradient with respect to z_t, in the small matrices of w_t

    dw_t = g_t z_(t-1)^T,    g_(t-1) = w_t^T g_t,

and what the forward keeps is z_1 .. z_(T-1).  On GPUs the products are generated, those with
Monarch's factors in large tiles, where :func:`~structfly.lowering.kronecker.monarch.why_not` has nothing against it, or
along axes, where :func:`~structfly.lowering.kronecker.lattice.why_not` has nothing and outputs that stand apart are not
worth a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from structfly.lowering.kronecker import aten, lattice, monarch
from structfly.lowering.kronecker.reference import FactorShape
from structfly.lowering.layer_op import LayerOp
from structfly.lowering.layer_products import Applied, InChunks, Products, chosen

_BY_TORCH = Products(aten.between, aten.finish, aten.backward)
_WITH_MONARCH = Products(monarch.between, monarch.finish, monarch.backward)
_ALONG_AXES = Products(lattice.between, lattice.finish, lattice.backward)


def _generated(call: Applied) -> Products | None:
    factors, tf32 = call.factors, call.tf32
    if not monarch.why_not(factors, tf32) and (monarch.worth_a_copy(factors) or lattice.why_not(factors, tf32)):
        return _WITH_MONARCH
    return None if lattice.why_not(factors, tf32) else _ALONG_AXES


def _why_no_epilogue(call: Applied) -> str:
    return "" if _generated(call) else lattice.why_not(call.factors, call.tf32)


def _why_not_again(call: Applied) -> str:
    made = _generated(call) is _WITH_MONARCH
    return "" if made else "what is between the factors is made at once"


def _kept_shapes(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> list[tuple[int, ...]]:
    return [(d * a, i * q, rows) for d, a, i, q, _, _ in shapes[:-1]]


def _multiply_adds(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> tuple[int, int]:
    *first, last = (rows * FactorShape(*map(int, shape)).parameters for shape in shapes)
    return sum(first), last


KRONECKER = LayerOp(
    "kronecker_v3",
    **chosen(_generated, _BY_TORCH)._asdict(),
    out_features=lambda _, static: static[0],
    kept_shapes=_kept_shapes,
    multiply_adds=_multiply_adds,
    adds_bias=True,
    why_no_epilogue=_why_no_epilogue,
    in_chunks=InChunks(_why_not_again, monarch.backward_again),
)
"""Takes the factors, the first applied first, of six axes each as :class:`FactorShape` has them, and in ``static`` the
number of output features."""
