"""The tiles of a product's matrices that are not known to be 0, found when a mask is first seen and when it changed.

What is compiled holds for masks that need as many groups and tiles, whichever they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from structfly.errors import ArgumentError
from structfly.patterns.factored_linear.reader import Factored, Matrix
from structfly.patterns.factored_linear.zeros import Kept, Zeros
from structfly.patterns.followed import Followed
from structfly.patterns.gblr_tiles import GPU_TILES, USUAL_TILES, Cut, cut_to_tiles
from structfly.patterns.linear.projection import plainly
from structfly.rewriter.constants import Constant
from structfly.rewriter.inputs import UnfitError
from structfly.rewriter.region import Region, example_of


@dataclass(frozen=True)
class Masks:
    """What is known to be 0 of a product's matrices.

    Attributes:
        constants: what it is known from, by node.
        left, right: of their values: which entries of left (out, rank) and right (rank, in) are kept; None for all.
        shapes: of left and right.
        cut: the tiles when the graph is compiled.
    """

    constants: dict[fx.Node, Constant]
    left: Kept | None
    right: Kept | None
    shapes: tuple[tuple[int, int], tuple[int, int]]
    cut: Cut = field(repr=False)

    def values(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The constants, of the values of :attr:`places`."""
        return _values(self.constants, leaves)

    @property
    def places(self) -> tuple[int, ...]:
        """The numbers of the graph inputs that the constants are made of, constant by constant."""
        return tuple(place for each in self.constants.values() for place in each.places)


def masks_of(found: Factored, region: Region) -> Masks | str:
    """What masks leave of the matrices, or why nothing is known to be 0, "" where nobody need be told.

    Of two products as they stand both are masked; where one is, it is a masked linear of its own.
    """
    zeros = Zeros(region)
    left, right = (_as_matrix(zeros.kept(matrix.node), matrix) for matrix in (found.left, found.right))
    if (left is None and right is None) or not (found.weight_first or (left and right)):
        return zeros.reasons[0] if zeros.reasons else ""
    shapes = found.left.shape, found.right.shape
    leaves = [leaf for each in zeros.constants.values() for leaf in each.leaves]
    with plainly(example_of(found.node)):
        values = _values(zeros.constants, leaves)
        if all(kept is None or bool(kept(values).all()) for kept in (left, right)):
            return ""
        try:
            cut = _cut(left, right, shapes, values)
        except ArgumentError as error:
            return str(error)
    return Masks(zeros.constants, left, right, shapes, cut)


def followed(masks: Masks, computed: Sequence[fx.Node], name: str) -> Followed:
    """For every module that one site is run with: those of the constants, and a cut's tensors."""
    replaced = [list(masks.constants).index(node) for node in computed]
    whose = f"the masks of {name or 'a linear'}"

    def made(values: Sequence[Tensor], cut: Cut) -> list[Tensor]:
        return [*(values[place].contiguous() for place in replaced), *cut[1:]]

    def make(leaves: Sequence[Tensor]) -> list[Tensor]:
        values = masks.values(leaves)
        try:
            cut = _cut(masks.left, masks.right, masks.shapes, values)
        except ArgumentError as error:
            raise UnfitError(f"{whose} have changed: {error}") from error
        if cut.structure != masks.cut.structure:
            raise UnfitError(f"{whose} need {cut.structure}; compiled was {masks.cut.structure}")
        return made(values, cut)

    compiled = made(masks.values([]), masks.cut) if not masks.places else []
    return Followed(masks.places, compiled, make)


def _values(constants: dict[fx.Node, Constant], leaves: Sequence[Tensor]) -> list[Tensor]:
    waiting = iter(leaves)
    return [each.value([next(waiting) for _ in each.places]) for each in constants.values()]


def _as_matrix(kept: Kept | None, matrix: Matrix) -> Kept | None:
    return None if kept is None else lambda values: matrix.of(kept(values))


def _cut(
    left: Kept | None,
    right: Kept | None,
    shapes: tuple[tuple[int, int], tuple[int, int]],
    values: Sequence[Tensor],
) -> Cut:
    device = values[0].device
    rows, columns = (
        torch.ones(shape, dtype=torch.bool, device=device) if kept is None else kept(values)
        for kept, shape in zip((left, right), shapes, strict=True)
    )
    return cut_to_tiles(rows, columns, *(GPU_TILES if device.type == "cuda" else USUAL_TILES))
