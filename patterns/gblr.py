"""Generalised block low rank (Lee and Kim, ICLR 2024, arXiv 2309.06656), with its components cut to tiles.

W = L P R^T, where a group of ``group`` components, columns of R or of L that lie side by side, is zero but for some
tiles of inputs in R, or of outputs in L, mostly an interval of them.  The permutation P lets each side have its
components in the order in which they need fewest tiles.  Low-rank, block-low-rank and block-sparse weights are special
cases.
:class:`structfly.patterns.gblr_learned.GaudiGBLR` learns the intervals, and its ``finalise`` gives this structure; or
they are chosen by :meth:`GBLR.project`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Self

import sympy
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from structfly.lowering.gblr.op import GBLR as OP
from structfly.lowering.gblr.tile_products import dense_of
from structfly.patterns.gblr_projection import Component, Interval, Projection, Shape
from structfly.patterns.menus import worth_offering
from structfly.patterns.structure import Factor, Factors, Structure
from structfly.records.cost import Stage
from structfly.records.layer import NO_STATISTICS, TOKENS, LayerCost, LayerSizes, LayerStatistics

_DENSITIES = (0.1, 0.2, 0.35, 0.5, 0.75)  # parameters that a menu offers, relative to the dense weight's
_SHARES = (0.25, 0.5)  # of a side that an interval has on average
_GOLDEN = 0.6180339887498949


class GBLR(Structure):
    """W = L P R^T, L (out, groups * group) and R (in, groups * group) tile-sparse, P a permutation."""

    name: ClassVar[str] = "gblr"

    tile: int = Field(ge=1)
    """Inputs, and outputs, of a tile."""

    group: int = Field(ge=1)
    """Components that have the same tiles."""

    groups: int = Field(ge=1)
    """How many groups there are."""

    right_tiles: int = Field(ge=1)
    """Tiles of inputs that all groups have together."""

    left_tiles: int = Field(ge=1)
    """Tiles of outputs that all groups have together."""

    rematerialise: bool = False
    """Whether backward makes ``R^T x`` again rather than keep it."""

    sweeps: int = Field(default=6, ge=1)
    """How often a projection fits all groups again."""

    def why_not(self, sizes: LayerSizes) -> str:
        inputs, outputs = self._places(sizes)
        for side, count, places in (("right", self.right_tiles, inputs), ("left", self.left_tiles, outputs)):
            most = self.groups * places
            if not self.groups <= count <= most:
                return f"{side}_tiles is from {self.groups}, one for each group, to {most} there"
        return ""

    def factors(self, sizes: LayerSizes) -> Mapping[str, Factor]:
        return {
            "right": Factor((self.right_tiles, self.tile, self.group)),
            "right_index": Factor((2, self.right_tiles), learned=False),
            "left": Factor((self.left_tiles, self.tile, self.group)),
            "left_index": Factor((2, self.left_tiles), learned=False),
            "order": Factor((self.components,), learned=False),
        }

    @property
    def components(self) -> int:
        """Columns of R and of L."""
        return self.groups * self.group

    def cost(self, sizes: LayerSizes, dtype: torch.dtype) -> LayerCost:
        tiles = self.right_tiles + self.left_tiles
        parameters = tiles * self.tile * self.group
        rows = sympy.ceiling(TOKENS / 8) * 8  # to which they are padded
        between = rows * self.components * dtype.itemsize
        wide = torch.promote_types(dtype, torch.float32).itemsize
        # Besides the components: those in the other order, or sums in float32, of them or of the outputs.
        narrow = wide > dtype.itemsize
        sums = (
            sympy.Max(between, rows * self.components * wide, TOKENS * sizes.out_features * wide) if narrow else between
        )
        return LayerCost(
            parameters=parameters,
            flops=2 * TOKENS * parameters,
            weight_bytes=parameters * dtype.itemsize + (2 * tiles + self.components) * torch.int32.itemsize,
            saved_bytes=0 if self.rematerialise else between,
            transient_bytes=between + sums,
            stages=(self._stage(self.right_tiles, dtype), self._stage(self.left_tiles, dtype)),
        )

    def _stage(self, tiles: int, dtype: torch.dtype) -> Stage:
        """One tile-sparse product; a tile moves what it multiplies, and each group its components."""
        moved = tiles * (TOKENS * self.tile + self.tile * self.group) + TOKENS * self.groups * self.group
        return Stage(2 * TOKENS * tiles * self.tile * self.group, moved * dtype.itemsize, 1, dtype, TOKENS)

    def initial(self, sizes: LayerSizes, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Intervals as equal as they can be: those of inputs follow each other, those of outputs are spread by the
        golden section, so that the rectangles cover the weight evenly."""
        inputs, outputs = self._places(sizes)
        columns, rows, covered, place = list[list[int]](), list[list[int]](), 0.0, 0
        for number in range(self.groups):
            width, height = (_even(count, self.groups, number) for count in (self.right_tiles, self.left_tiles))
            top = int((number * _GOLDEN) % 1 * outputs)
            columns.append(sorted((place + step) % inputs for step in range(width)))
            rows.append(sorted((top + step) % outputs for step in range(height)))
            place += width
            covered += (width / inputs) * (height / outputs)
        # An entry is a sum over the components that reach it: covered * group of them on average.
        right = torch.randn(self.right_tiles, self.tile, self.group, generator=generator) / sizes.in_features**0.5
        left = torch.randn(self.left_tiles, self.tile, self.group, generator=generator)
        return {
            "right": right,
            "right_index": index_of(columns),
            "left": left / (3 * self.group * covered) ** 0.5,
            "left_index": index_of(rows),
            "order": torch.arange(self.components, dtype=torch.int32),
        }

    @classmethod
    def project_each(
        cls, choices: Iterable[Self], weight: Tensor, statistics: LayerStatistics = NO_STATISTICS
    ) -> Iterator[dict[str, Tensor]]:
        """A greedy choice of rectangles, then least squares; see :mod:`structfly.patterns.gblr_projection`."""
        projection = Projection(weight, statistics)
        for each in choices:
            shape = Shape(each.tile, each.group, each.groups, each.left_tiles, each.right_tiles)
            components = sorted(projection(shape, each.sweeps), key=_place)
            yield {
                "right": each._tiles([c.right for c in components]),
                "right_index": index_of([range(*c.columns) for c in components]).to(weight.device),
                "left": each._tiles([c.left for c in components]),
                "left_index": index_of([range(*c.rows) for c in components]).to(weight.device),
                "order": torch.arange(each.components, dtype=torch.int32, device=weight.device),
            }

    def _tiles(self, parts: list[Tensor]) -> Tensor:
        padded = [F.pad(part, (0, 0, 0, -len(part) % self.tile)) for part in parts]
        return torch.cat(padded).view(-1, self.tile, self.group)

    def to_dense(self, sizes: LayerSizes, factors: Factors) -> Tensor:
        right = dense_of(factors["right"], factors["right_index"], sizes.in_features, self.groups)
        left = dense_of(factors["left"], factors["left_index"], sizes.out_features, self.groups)
        return left[:, factors["order"]] @ right.t()

    def apply(self, sizes: LayerSizes, factors: Factors, x: Tensor, bias: Tensor | None) -> Tensor:
        in_order = [factors[name] for name in self.factors(sizes)]
        return OP(x, in_order, bias, [sizes.out_features], rematerialise=self.rematerialise)

    @classmethod
    def menu(cls, sizes: LayerSizes) -> list[Self]:
        offered = []
        tile = min(32, *(max(1, features // 8) for features in sizes))
        inputs, outputs = (-(-features // tile) for features in sizes)
        group = min(16, tile)
        for share in _SHARES:
            for density in _DENSITIES:
                tiles = density * sizes.parameters / (tile * group)
                groups = max(1, round(tiles / (share * (inputs + outputs))))
                right, left = (
                    min(max(groups, round(tiles * n / (inputs + outputs))), groups * n) for n in (inputs, outputs)
                )
                offered.append(cls(tile=tile, group=group, groups=groups, right_tiles=right, left_tiles=left))
        return worth_offering(offered, sizes)

    def _places(self, sizes: LayerSizes) -> LayerSizes:
        """Tiles along the inputs and along the outputs."""
        return LayerSizes(-(-sizes.in_features // self.tile), -(-sizes.out_features // self.tile))


def index_of(places: Iterable[Iterable[int]]) -> Tensor:
    """(2, tiles) int32 of every group's tiles: the groups, the tiles."""
    pairs = [(group, place) for group, of_group in enumerate(places) for place in of_group]
    return torch.tensor(pairs, dtype=torch.int32).t().contiguous()


def _place(component: Component) -> tuple[Interval, Interval]:
    return component.rows, component.columns


def _even(count: int, parts: int, number: int) -> int:
    """Of ``count`` things, how many the part of that number gets."""
    return count * (number + 1) // parts - count * number // parts
