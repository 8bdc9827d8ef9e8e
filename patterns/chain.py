"""What the structures that are chains of Kronecker-sparse factors share: W = last factor ... first factor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from structfly.lowering.kronecker.op import KRONECKER
from structfly.lowering.kronecker.reference import FactorShape, kronecker_reference
from structfly.patterns.chain_projection import project_chain
from structfly.patterns.structure import Factor, Factors, Structure
from structfly.records.cost import Stage
from structfly.records.layer import NO_STATISTICS, TOKENS, LayerCost, LayerSizes, LayerStatistics, product


class Chain(Structure):
    """W = the first rows and columns of factor_T ... factor_2 factor_1; each is a
    :class:`~structfly.lowering.kronecker.reference.FactorShape`."""

    rematerialise: bool = False
    """Whether backward makes what is between the factors again rather than keep it."""

    @abstractmethod
    def shapes(self, sizes: LayerSizes) -> tuple[FactorShape, ...]:
        """Of the factors, the first applied first; they take at least the layer's inputs, and give at least its
        outputs."""

    def is_worthwhile(self, sizes: LayerSizes) -> bool:
        """Whether there are fewer parameters than dense, and no more numbers between two factors than the layer takes
        and gives together."""
        shapes = self.shapes(sizes)
        widest = max((shape.features_out for shape in shapes[:-1]), default=0)
        return sum(shape.parameters for shape in shapes) < sizes.parameters and widest <= sum(sizes)

    def factors(self, sizes: LayerSizes) -> Mapping[str, Factor]:
        return {f"factor_{t}": Factor(tuple(shape)) for t, shape in enumerate(self.shapes(sizes), start=1)}

    def cost(self, sizes: LayerSizes, dtype: torch.dtype) -> LayerCost:
        cost = cost_of_chain(self.shapes(sizes), sizes, dtype)
        return replace(cost, saved_bytes=0) if self.rematerialise else cost

    def initial(self, sizes: LayerSizes, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        # Each factor keeps the variance that it is given; the last takes a third of it.  Inputs that stand for padding
        # have none, which the first makes up for.
        shapes = self.shapes(sizes)
        gains = [1.0] * len(shapes)
        gains[0] *= shapes[0].features_in / sizes.in_features
        gains[-1] /= 3
        return {
            name: torch.randn(*shape, generator=generator) * (gain / shape.columns) ** 0.5
            for name, shape, gain in zip(self.factors(sizes), shapes, gains, strict=True)
        }

    @classmethod
    def project_each(
        cls, choices: Iterable[Self], weight: Tensor, statistics: LayerStatistics = NO_STATISTICS
    ) -> Iterator[dict[str, Tensor]]:
        """By SVDs of blocks, and alternating least squares; see :mod:`structfly.patterns.chain_projection`."""
        sizes = LayerSizes(weight.shape[1], weight.shape[0])
        for each in choices:
            found = project_chain(weight, each.shapes(sizes), statistics)
            yield dict(zip(each.factors(sizes), found, strict=True))

    def to_dense(self, sizes: LayerSizes, factors: Factors) -> Tensor:
        tensors = list(factors.values())
        one = torch.eye(sizes.in_features, dtype=tensors[0].dtype, device=tensors[0].device)
        return kronecker_reference(one, tensors, sizes.out_features).t()

    def apply(self, sizes: LayerSizes, factors: Factors, x: Tensor, bias: Tensor | None) -> Tensor:
        static = [sizes.out_features]
        return KRONECKER(x, list(factors.values()), bias, static, rematerialise=self.rematerialise)


def cost_of_chain(shapes: tuple[FactorShape, ...], sizes: LayerSizes, dtype: torch.dtype) -> LayerCost:
    """What a layer costs that these factors make, the first applied first, and that keeps what is between them."""
    parameters = sum(shape.parameters for shape in shapes)
    between = sum(shape.features_out for shape in shapes[:-1])
    given = shapes[-1].features_out
    row = TOKENS * dtype.itemsize
    products = (product(s.columns, s.rows, dtype, batch=s.matrices) for s in shapes)
    return LayerCost(
        parameters=parameters,
        flops=2 * TOKENS * parameters,
        weight_bytes=parameters * dtype.itemsize,
        saved_bytes=row * between,
        transient_bytes=row * _numbers_at_once(shapes, sizes),
        stages=(*products, Stage(0, row * (given + sizes.out_features))),  # the last puts the outputs in order
    )


def _numbers_at_once(shapes: tuple[FactorShape, ...], sizes: LayerSizes) -> int:
    """The most that a forward pass holds of a row at a time besides its input and output.

    Every product is kept.  Beside it stands what it is made of, copied unless it lies in memory as the product takes
    it: once to be in order, where it is not, and once for its axes to lie side by side.  After the last product stand
    the outputs in order, and once more without those that are padding.
    """
    first = shapes[0]
    padded = first.features_in if first.features_in > sizes.in_features else 0
    held = first.features_out
    turned = first.d > 1 or first.columns == 1  # BLAS takes the input as it is in all other cases
    most = padded + (first.features_in if turned else 0) + held
    for right, left in pairwise(shapes):
        in_order = right.d == 1
        side_by_side = in_order and (left.d == 1 or left.a == left.p == 1)
        copied = 0 if side_by_side else left.features_in
        most = max(most, held + copied + max(0 if in_order else copied, left.features_out))
        held += left.features_out
    given = shapes[-1].features_out
    at_last = held + given + (sizes.out_features if given > sizes.out_features else 0)
    return max(most, at_last) - sizes.out_features


def why_not_chain(shapes: tuple[FactorShape, ...], sizes: LayerSizes) -> str:
    """Why these shapes, the first applied first, are no chain for such a layer, or "".

    Two neighbours, ``right`` applied before ``left``, have a product of the same kind, whose blocks have a fixed rank,
    if left.a divides right.a, right.d divides left.d and what is between them has the same axes on both sides: the
    chainable patterns of Le et al. (arXiv 2411.04506, up to names).
    """
    if shapes[0].features_in < sizes.in_features:
        return f"the chain takes {shapes[0].features_in} features; it must take {sizes.in_features} or more"
    if shapes[-1].features_out < sizes.out_features:
        return f"the chain gives {shapes[-1].features_out} features; it must give {sizes.out_features} or more"
    for right, left in pairwise(shapes):
        if right.a % left.a or left.d % right.d or right.q != left.p:
            return f"{left} after {right}: the first's a must divide the second's, and the second's d the first's"
        columns, rows = right.a // left.a, left.d // right.d
        if left.j % columns or right.i % rows or left.j // columns != right.i // rows:
            return (
                f"{left} after {right}: {left.j} columns must be {columns} times the rank, "
                f"and {right.i} rows {rows} times it"
            )
    return ""
