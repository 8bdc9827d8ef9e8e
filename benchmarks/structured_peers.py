"""What else makes a linear layer cheaper, from torch or from a package of its own, which must be installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.structured_layers import TWO_PRODUCTS, Place, Provider, monarch, rank_of_share
from structfly.records.layer import LayerSizes

_DENSITIES = (0.11, 0.25)  # of the block-sparse peers, about those of structfly's Pixelfly


class TwoProducts(nn.Module):
    """W = left right, as two linears."""

    def __init__(self, sizes: LayerSizes, place: Place) -> None:
        super().__init__()
        rank = rank_of_share(sizes)
        self.right = nn.Linear(sizes.in_features, rank, bias=False, device=place.device, dtype=place.dtype)
        self.left = nn.Linear(rank, sizes.out_features, bias=False, device=place.device, dtype=place.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(self.right(x))
        return y

    def to_dense(self) -> Tensor:
        return self.left.weight @ self.right.weight


class BatchedMonarch(nn.Module):
    """Two torch.bmm with a transposition between them and one after, as Monarch is commonly written."""

    def __init__(self, blocks: int, sizes: LayerSizes, place: Place) -> None:
        super().__init__()
        rank = monarch(blocks)(sizes).block_rank
        inputs, outputs = sizes.in_features // blocks, sizes.out_features // blocks
        if (inputs * blocks, outputs * blocks) != tuple(sizes):
            raise ValueError(f"{blocks} blocks do not divide {sizes.in_features} -> {sizes.out_features}")
        self.blocks = blocks
        first = torch.randn(blocks, inputs, blocks * rank, device=place.device) / inputs**0.5
        second = torch.randn(blocks, blocks * rank, outputs, device=place.device) / (3 * blocks * rank) ** 0.5
        self.first, self.second = (nn.Parameter(each.to(place.dtype)) for each in (first, second))

    def forward(self, x: Tensor) -> Tensor:
        count, blocks = len(x), self.blocks
        inner = torch.bmm(x.view(count, blocks, -1).transpose(0, 1), self.first)  # (k, count, l rank)
        inner = inner.view(blocks, count, blocks, -1).permute(2, 1, 0, 3).reshape(blocks, count, -1)
        return torch.bmm(inner, self.second).permute(1, 2, 0).reshape(count, -1)

    def to_dense(self) -> Tensor:
        first = self.first.unflatten(2, (self.blocks, -1))  # (k, in, l, rank)
        second = self.second.unflatten(1, (self.blocks, -1))  # (l, k, rank, out)
        return torch.einsum("kilr,lkro->olki", first, second).flatten(2).flatten(0, 1)


class SparseWeight(nn.Module):
    """F.linear with a weight of one of torch's sparse formats; forward alone."""

    def __init__(self, dense: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.dense = nn.Buffer(dense)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def to_dense(self) -> Tensor:
        return self.dense

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseWeight:
        return SparseWeight(self.dense, self.weight)  # not all formats can be copied, and nothing writes to them


def _random_blocks(sizes: LayerSizes, side: int, density: float, place: Place) -> tuple[Tensor, Tensor]:
    """A weight (out, in) of blocks at random places, and the mask of those: every row of blocks keeps as many."""
    rows, columns = sizes.out_features // side, sizes.in_features // side
    if (columns * side, rows * side) != tuple(sizes):
        raise ValueError(f"blocks of {side} do not divide {sizes.in_features} -> {sizes.out_features}")
    kept = torch.zeros(rows, columns, dtype=torch.bool, device=place.device)
    count = max(1, round(density * columns))
    kept.scatter_(1, torch.rand(rows, columns, device=place.device).topk(count, dim=1).indices, True)
    weight = torch.randn(*reversed(sizes), device=place.device) / (3 * count * side) ** 0.5
    mask = kept.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return (weight * mask).to(place.dtype), kept


def _bsr(side: int, density: float) -> Provider:
    """torch's block-sparse rows."""

    def build(sizes: LayerSizes, place: Place) -> nn.Module:
        dense, _ = _random_blocks(sizes, side, density, place)
        return SparseWeight(dense, dense.to_sparse_bsr((side, side)))

    return Provider(build, None, trains=False)


def _semi_structured(sizes: LayerSizes, place: Place) -> nn.Module:
    """Two of every four inputs."""
    if place.device == "cpu":
        raise ValueError("torch has 2:4 sparse products for GPUs alone")
    kept = torch.tensor([0, 0, 1, 1], device=place.device).tile(sizes.out_features, sizes.in_features // 4)
    weight = torch.randn(sizes.out_features, sizes.in_features, device=place.device) / (1.5 * sizes.in_features) ** 0.5
    dense = (weight * kept).to(place.dtype)
    convert: Any = import_module("torch.sparse").to_sparse_semi_structured
    return SparseWeight(dense, convert(dense))


def _torch_structured(blocks: int) -> Provider:
    """torch-structured's layer."""

    def build(sizes: LayerSizes, place: Place) -> nn.Module:
        module: Any = import_module("torch_structured.monarch.monarch_linear")

        class Monarch(module.MonarchLinear):  # type: ignore[misc]
            def to_dense(self) -> Tensor:
                weight: Tensor = self.convert_to_dense_weight()
                return weight

        made: nn.Module = Monarch(*sizes, nblocks=blocks, bias=False)
        return made.to(place.device, place.dtype)  # its factors are made where nothing is said of device and dtype

    return Provider(build, None)


class Blksprs(nn.Module):
    """blksprs: both operands in blocks, those of x and of the result all there."""

    def __init__(self, dense: Tensor, kept: Tensor, side: int) -> None:
        super().__init__()
        self.side = side
        self.layout = nn.Buffer(kept.t()[None].contiguous())  # W^T's
        turned = _blksprs_ops().to_sparse(dense.t()[None].contiguous(), self.layout, side)
        self.values = nn.Parameter(turned.as_subclass(Tensor).clone())
        self.known: dict[str, dict[str, Any]] = {"x": {}, "product": {}, "y": {}}

    def forward(self, x: Tensor) -> Tensor:
        count, (_, columns, rows) = len(x) // self.side, self.layout.shape
        of_x, of_y = (torch.ones(1, count, n, dtype=torch.bool, device=x.device) for n in (columns, rows))
        side, known, ops = self.side, self.known, _blksprs_ops()
        blocks = ops.to_sparse(x[None], of_x, side, layout_cache=known["x"])
        made = ops.matmul(blocks, of_x, self.values, self.layout, of_y, side, layout_cache=known["product"])
        y: Tensor = ops.to_dense(made, of_y, side, layout_cache=known["y"])[0]
        return y.as_subclass(Tensor)

    def to_dense(self) -> Tensor:
        """By its places, in plain torch, so that it can be in any dtype."""
        _, rows, columns = self.layout.nonzero(as_tuple=True)
        whole = self.values.new_zeros(*self.layout.shape[1:], self.side, self.side)
        whole = whole.index_put((rows, columns), self.values)
        return whole.transpose(1, 2).reshape(self.layout.shape[1] * self.side, -1).t()


def _blksprs_ops() -> Any:
    return import_module("blksprs").ops


def _blksprs(side: int, density: float) -> Provider:
    def build(sizes: LayerSizes, place: Place) -> nn.Module:
        return Blksprs(*_random_blocks(sizes, side, density, place), side)

    return Provider(build, None)


def _batched_monarch(blocks: int) -> Callable[[LayerSizes, Place], nn.Module]:
    return lambda sizes, place: BatchedMonarch(blocks, sizes, place)


PEERS: Mapping[str, Provider] = {
    TWO_PRODUCTS: Provider(TwoProducts, "inductor"),
    **{f"two bmm, {blocks} blocks": Provider(_batched_monarch(blocks), "inductor") for blocks in (4, 16)},
    **{f"torch-structured, {blocks} blocks": _torch_structured(blocks) for blocks in (4, 16)},
    **{f"torch BSR {side}, {share:.0%}": _bsr(side, share) for side in (64, 128) for share in _DENSITIES},
    "torch 2:4": Provider(_semi_structured, None, trains=False),
    **{f"blksprs 64, {share:.0%}": _blksprs(64, share) for share in _DENSITIES},
}
