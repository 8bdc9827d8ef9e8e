"""How the head's generated products are cut: one answer for the run-time loop and for the planner.

Tiles depend on the hidden units, the classes and how the weight lies, but on no number of rows: rows are taken a chunk
or a block at a time, as many as suit the tiles.  So what the planner says of memory is true of every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from structfly.lowering.gemm import Cut, Tiles
from structfly.lowering.tuning.choice import shipped_tiles_for, tiles_for
from structfly.lowering.tuning.products import Layout, ProductClass, size_class
from structfly.records import DeviceModel


@dataclass(frozen=True)
class HeadClass:
    """Heads whose products are cut alike.

    Attributes:
        hidden, classes: rounded up to powers of two.
        transposed: whether the weight's columns are contiguous, classes along rows of hidden units.
        nonlinear: whether the slope of the pointwise chain, but for masks of classes at its end, differs from class to
            class.
    """

    device: DeviceModel
    hidden: int
    classes: int
    transposed: bool
    nonlinear: bool

    @property
    def losses(self) -> ProductClass:
        """The logits, of which sums are kept."""
        return self._logits()

    @property
    def exponentials(self) -> ProductClass:
        """The logits, whose exponentials are kept."""
        return self._logits("stored")

    @property
    def hidden_product(self) -> ProductClass:
        """Exponentials times weight."""
        return self._of("linear_cross_entropy_hidden", (), self._times_weight, None, self.hidden, self.classes)

    @property
    def hidden_product_of_all(self) -> ProductClass:
        """The same where no row can be left out."""
        template, hooks = "linear_cross_entropy_hidden", ("every row",)
        return self._of(template, hooks, self._times_weight, None, self.hidden, self.classes)

    @property
    def weight_sum(self) -> ProductClass:
        """The weight's gradient of all classes, summed over chunks; where it lies transposed, so does what is made."""
        m, n = (self.hidden, self.classes) if self.transposed else (self.classes, self.hidden)
        return self._of("linear_cross_entropy_sum", ("rows inside",), "tn", m, n, None)

    @property
    def block(self) -> ProductClass:
        """The logits' gradient of some classes."""
        return self._of("linear_cross_entropy_block", self._chain, self._times_transpose, None, None, self.hidden)

    @property
    def block_hidden_sum(self) -> ProductClass:
        """The hidden states' gradient, summed over blocks."""
        return self._of("linear_cross_entropy_sum", (), self._times_weight, None, self.hidden, None)

    @property
    def block_weight_sum(self) -> ProductClass:
        """The weight's gradient of a block's classes, summed over blocks."""
        m, n = (self.hidden, None) if self.transposed else (None, self.hidden)
        return self._of("linear_cross_entropy_sum", ("rows inside",), "tn", m, n, None)

    @property
    def _times_weight(self) -> Layout:
        return "nt" if self.transposed else "nn"

    @property
    def _times_transpose(self) -> Layout:
        return "nn" if self.transposed else "nt"

    @property
    def _chain(self) -> tuple[str, ...]:
        return ("nonlinear",) if self.nonlinear else ()

    def _logits(self, *hooks: str) -> ProductClass:
        template, hooks = "linear_cross_entropy_exponentials", (*hooks, *self._chain)
        return self._of(template, hooks, self._times_transpose, None, self.classes, self.hidden)

    def _of(
        self, template: str, hooks: tuple[str, ...], layout: Layout, m: int | None, n: int | None, k: int | None
    ) -> ProductClass:
        return ProductClass(self.device, template, hooks, "bfloat16", layout, m, n, k)


PRODUCTS = (
    "losses",
    "exponentials",
    "hidden_product",
    "hidden_product_of_all",
    "weight_sum",
    "block",
    "block_hidden_sum",
    "block_weight_sum",
)
"""A head's products, as :class:`HeadClass` and :class:`HeadTiles` name them."""


@dataclass(frozen=True)
class HeadTiles:
    """The tiles of a head's products, each as :class:`HeadClass` describes it."""

    transposed: bool
    losses: Tiles
    exponentials: Tiles
    hidden_product: Cut
    hidden_product_of_all: Cut
    weight_sum: Tiles
    block: Tiles
    block_hidden_sum: Tiles
    block_weight_sum: Tiles

    @cached_property
    def block_rows(self) -> int:
        """What a block's rows are a multiple of: whole tiles of its own, and of the sum that they are rows of."""
        return max(self.block.m, self.block_hidden_sum.m)  # both are powers of two

    @cached_property
    def block_classes(self) -> int:
        """What a block's classes are a multiple of: whole tiles of its own, and of the sum that they are a side of."""
        of_sum = self.block_weight_sum
        return max(self.block.n, of_sum.n if self.transposed else of_sum.m)

    def with_one(self, name: str, tiles: Cut) -> HeadTiles:
        """The same but for the product that :data:`PRODUCTS` names."""
        return HeadTiles(**{**{field.name: getattr(self, field.name) for field in fields(self)}, name: tiles})


@lru_cache(maxsize=256)
def head_tiles(head: HeadClass) -> HeadTiles:
    """The tiles that the tables have for these heads.

    Raises:
        ConfigError: the user's table has something wrong in it.
    """
    return _tiles_by(head, tiles_for)


def shipped_head_tiles(head: HeadClass) -> HeadTiles:
    """The same without the user's table."""
    return _tiles_by(head, shipped_tiles_for)


def _tiles_by(head: HeadClass, choose: Callable[[ProductClass], Cut]) -> HeadTiles:
    cuts: dict[str, Any] = {name: choose(getattr(head, name)) for name in PRODUCTS}
    return HeadTiles(head.transposed, **cuts)


def head_class(device: DeviceModel, *, hidden: int, classes: int, weight_row: int, nonlinear: bool) -> HeadClass:
    """The class of a head of these sizes.

    Args:
        weight_row: entries of the rows that its weight lies in, of hidden units or of classes; a square weight counts
            as not transposed.
    """
    return HeadClass(device, size_class(hidden), size_class(classes), weight_row != hidden, nonlinear)
