"""Neighbouring factors of a chain that are one factor of larger matrices: a butterfly's stages, a few at a time.

Of two factors, ``right`` applied before ``left``, with p = q = 1, the features between them are ordered (a, i, d) for
the one and (a', j', d') for the other.  Where a' divides a and d divides d', with A = a / a' and D = d' / d, these are
the axes (a', A, r, D, d), if j' = A r and i = r D.  The product takes (a', A, j, d) and gives (a', i', D, d):

    w[d, a'; (i', D), (A, j)] = sum over r of left[(D, d), a'; i', (A, r)] right[d, (a', A); (r, D), j].

Where a divides a' and d' divides d, with A = a' / a and D = d / d', they are (a, A, r, D, d'), if i = A r and j' = r D.
The product takes (a, j, D, d') and gives (a, A, i', d'):

    w[d', a; (A, i'), (j, D)] = sum over r of left[d', (a, A); i', (r, D)] right[(D, d'), a; (A, r), j].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from structfly.lowering.kronecker.reference import FactorShape

T = TypeVar("T")


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype that factors are merged in, rounded once then."""
    return torch.promote_types(dtype, torch.float32)


def merged_shape(right: FactorShape, left: FactorShape) -> FactorShape | None:
    """Of the product of two factors, or None where it is none."""
    if max(right.p, right.q, left.p, left.q) > 1:
        return None
    if right.a % left.a == 0 and left.d % right.d == 0:
        columns, rows = right.a // left.a, left.d // right.d
        if left.j % columns or right.i % rows or left.j // columns != right.i // rows:
            return None
        return FactorShape(right.d, left.a, left.i * rows, 1, columns * right.j, 1)
    if left.a % right.a == 0 and right.d % left.d == 0:
        rows, columns = left.a // right.a, right.d // left.d
        if right.i % rows or left.j % columns or right.i // rows != left.j // columns:
            return None
        return FactorShape(left.d, right.a, rows * left.i, 1, right.j * columns, 1)
    return None


def merged(right: Tensor, left: Tensor) -> Tensor:
    """The factor that two are together, as :func:`merged_shape` has it."""
    one, two = FactorShape(*right.shape), FactorShape(*left.shape)
    shape = merged_shape(one, two)
    assert shape is not None
    if one.a % two.a == 0 and two.d % one.d == 0:
        across, along = one.a // two.a, two.d // one.d
        # left (D, d, a', i', A, r), right (d, a', A, r, D, j)
        later = left.reshape(along, one.d, two.a, two.i, across, two.j // across)
        earlier = right.reshape(one.d, two.a, across, one.i // along, along, one.j)
        product = torch.einsum("DdaiAr,daArDj->daiDAj", later, earlier)
    else:
        across, along = two.a // one.a, one.d // two.d
        # left (d', a, A, i', r, D), right (D, d', a, A, r, j)
        later = left.reshape(two.d, one.a, across, two.i, two.j // along, along)
        earlier = right.reshape(along, two.d, one.a, across, one.i // across, one.j)
        product = torch.einsum("daAirD,DdaArj->daAijD", later, earlier)
    return product.reshape(shape)


def grouped_shapes(shapes: Sequence[FactorShape], groups: int) -> list[FactorShape] | None:
    """Of factors in so many groups of neighbours, as equal as they can be, each merged; None where one cannot be."""
    made = []
    for members in in_groups(shapes, groups):
        shape: FactorShape | None = members[0]
        for each in members[1:]:
            shape = None if shape is None else merged_shape(shape, each)
        if shape is None:
            return None
        made.append(shape)
    return made


def in_groups(values: Sequence[T], groups: int) -> list[Sequence[T]]:
    """``values`` in so many runs, as equal as they can be."""
    bounds = [len(values) * n // groups for n in range(groups + 1)]
    return [values[first:last] for first, last in pairwise(bounds)]
