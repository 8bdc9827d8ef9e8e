"""The layers under test, dense and structured, and what the structured ones must reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gblr_training import layers_of
from structfly import StructuredLinear
from structfly.patterns.blast import Blast
from structfly.patterns.gblr_learned import GaudiGBLR
from structfly.patterns.low_rank import LowRank
from structfly.patterns.monarch import Monarch
from structfly.patterns.pixelfly import Pixelfly
from structfly.patterns.structure import Structure
from structfly.records.layer import LayerSizes

DENSE = "dense"
LOW_RANK_SHARE = GBLR_SHARE = 1 / 4  # of the dense parameters
_RANK_MULTIPLE = 32
_REMATERIALISED = "nothing kept"
"""For the backward, which makes again what stands between a layer's products."""


class Place(NamedTuple):
    """Of a layer's parameters."""

    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Provider:
    """One way to make and run a linear layer without bias.

    Attributes:
        build: makes the layer for sizes, at a place.  It has ``to_dense``, or is an :class:`torch.nn.Linear`.  It
            raises whatever fits if it cannot be had for these sizes, or there.
        backend: what compiles it, None for eager.
        trains: whether it has a backward.
    """

    build: Callable[[LayerSizes, Place], nn.Module]
    backend: str | None
    trains: bool = True


def dense_weight(layer: nn.Module) -> Tensor:
    """W (out, in), differentiable."""
    weight: Tensor = layer.weight if isinstance(layer, nn.Linear) else layer.to_dense()  # type: ignore[operator]
    return weight


def monarch(blocks: int, *, rematerialise: bool = False) -> Callable[[LayerSizes], Monarch]:
    """With as many numbers between the factors as the smaller side has, as in fly's and torch-structured's layers.

    Outputs of a block are neighbours, which no weight that is learned or projected so minds.
    """

    def setting(sizes: LayerSizes) -> Monarch:
        rank = max(1, min(sizes) // blocks**2)
        own = {"blocks_in": blocks, "blocks_out": blocks, "block_rank": rank}
        return Monarch(**own, strided=False, rematerialise=rematerialise)

    return setting


def rank_of_share(sizes: LayerSizes) -> int:
    """The rank, a multiple of 32 where there is one, of about a quarter of the dense parameters."""
    exact = LOW_RANK_SHARE * sizes.parameters / sum(sizes)
    return max(round(exact / _RANK_MULTIPLE) * _RANK_MULTIPLE, 1)


SETTINGS: Mapping[str, Callable[[LayerSizes], Structure]] = {
    "monarch, 4 blocks": monarch(4),
    "monarch, 16 blocks": monarch(16),
    "pixelfly, grid 8, 2 factors, rank 64": lambda _: Pixelfly(grid=8, n_factors=2, rank=64),
    "pixelfly, grid 16, 3 factors, rank 128": lambda _: Pixelfly(grid=16, n_factors=3, rank=128),
    "pixelfly, grid 64, 6 factors, rank 128": lambda _: Pixelfly(grid=64, n_factors=6, rank=128),
    "blast, 16 x 16 blocks, rank 512": lambda _: Blast(rank=512, row_blocks=16, column_blocks=16),
    **{f"monarch, {blocks} blocks, {_REMATERIALISED}": monarch(blocks, rematerialise=True) for blocks in (4, 16)},
    f"blast, 16 x 16 blocks, rank 512, {_REMATERIALISED}": lambda _: Blast(
        rank=512, row_blocks=16, column_blocks=16, rematerialise=True
    ),
    "low rank, a quarter": lambda sizes: LowRank(rank=rank_of_share(sizes)),
}
"""Structures with settings, by the name of the provider, for layers of any sizes that they fit."""

GBLR = "gblr, masks of a quarter"
_GBLR_AGAIN = f"{GBLR}, {_REMATERIALISED}"
OURS = (*SETTINGS, GBLR, _GBLR_AGAIN)
TWO_PRODUCTS = "two products"  # of torch.mm: the peer that low rank must be no slower than


def of_setting(setting: Callable[[LayerSizes], Structure]) -> Callable[[LayerSizes, Place], nn.Module]:
    """Layers as ``restructure_`` puts them in the place of a linear."""

    def build(sizes: LayerSizes, place: Place) -> nn.Module:
        return StructuredLinear(setting(sizes), *sizes, bias=False, device=place.device, dtype=place.dtype)

    return build


def of_masks(masks: Path | None, *, rematerialise: bool = False) -> Callable[[LayerSizes, Place], nn.Module]:
    """Generalised block low rank, finalised: of learned masks, or of equally wide ones at random places.

    Args:
        masks: the JSON of :mod:`benchmarks.gblr_training`; sizes that it has no layer of get random places.
    """

    def build(sizes: LayerSizes, place: Place) -> nn.Module:
        for layer in () if masks is None else layers_of(masks, place.device, place.dtype).values():
            if (layer.in_features, layer.out_features) == tuple(sizes):
                return layer.finalise(rematerialise=rematerialise)
        components = min(sizes)
        width = min(1.0, GBLR_SHARE * sizes.parameters / (components * sum(sizes)))
        layer = GaudiGBLR(*sizes, components, bias=False, width=width, device=place.device, dtype=place.dtype)
        return layer.finalise(rematerialise=rematerialise)

    return build


def structured(masks: Path | None) -> dict[str, Provider]:
    """structfly's providers; see :func:`of_masks`."""
    made = {name: Provider(of_setting(setting), "structfly") for name, setting in SETTINGS.items()}
    of_gblr = {GBLR: of_masks(masks), _GBLR_AGAIN: of_masks(masks, rematerialise=True)}
    return {**made, **{name: Provider(build, "structfly") for name, build in of_gblr.items()}}


def dense() -> Provider:
    """What the others are measured against."""

    def build(sizes: LayerSizes, place: Place) -> nn.Module:
        return nn.Linear(*sizes, bias=False, device=place.device, dtype=place.dtype)

    return Provider(build, "inductor")


class Bar(NamedTuple):
    """How many times as fast as ``base`` a provider must be, forward, and forward and backward.

    ``of_fill`` is the part that it must reach of what the multiply-adds that it makes allow, as well.
    """

    forward: float
    training: float
    base: str = DENSE
    of_fill: float = 0.0


# Both are the same two products: equal within what a time that is measured twice differs by.
_AS_TWO_PRODUCTS = Bar(0.98, 0.98, base=TWO_PRODUCTS)
_OF_MASKS = Bar(1.5, 1.4, of_fill=0.75)

BARS: Mapping[str, Mapping[str, Bar]] = {
    "16384x4096x4096": {
        "monarch, 4 blocks": Bar(1.7, 1.6),
        "monarch, 16 blocks": Bar(3.3, 2.8),
        "pixelfly, grid 16, 3 factors, rank 128": Bar(2.1, 1.9),
        "pixelfly, grid 64, 6 factors, rank 128": Bar(3.0, 2.6),
        GBLR: _OF_MASKS,
        "blast, 16 x 16 blocks, rank 512": Bar(2.0, 1.7),
        "low rank, a quarter": _AS_TWO_PRODUCTS,
    },
    "16384x4096x16384": {
        "monarch, 4 blocks": Bar(2.6, 2.4),
        "monarch, 16 blocks": Bar(6.0, 5.0),
        "pixelfly, grid 16, 3 factors, rank 128": Bar(2.1, 1.9),
        "pixelfly, grid 64, 6 factors, rank 128": Bar(3.4, 3.0),
        GBLR: _OF_MASKS,
        "blast, 16 x 16 blocks, rank 512": Bar(4.0, 3.5),
        "low rank, a quarter": _AS_TWO_PRODUCTS,
    },
    "32768x768x3072": {
        "pixelfly, grid 8, 2 factors, rank 64": Bar(1.3, 1.2),
        "low rank, a quarter": _AS_TWO_PRODUCTS,
    },
}
"""By shape (tokens x in x out) and provider, in bfloat16 on an H100."""
