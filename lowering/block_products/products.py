"""Launches of the template ``block_sums``, and what launches of all products of blocks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structfly.lowering.block_products.listing import Listing
from structfly.lowering.block_products.support import with_inner_side_last
from structfly.lowering.descriptor import descriptor, operand
from structfly.lowering.gemm import Tiles, launch_of
from structfly.lowering.launch import Launch, on_device
from structfly.lowering.template import Parameter


def block_sums(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    members: Listing,
    *,
    tiles: Tiles,
    turned: bool = False,
    a_turned: bool = False,
    rows: Tensor | None = None,
    beside: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    activation: str = "",
) -> None:
    """c[:, i] = sum over the members m of part i of a[:, sources[m]] b[blocks[m]]^T, + beside, + bias[i].

    Args:
        a: (tokens, sources, side_k), or if ``a_turned`` (sources, side_k, tokens).
        b: (blocks, side_n, side_k), or if ``turned`` (blocks, side_k, side_n), which is then not transposed.
        c: (tokens, parts, side_n), written; with ``rows`` (parts * side_n, at least tokens),
            all of it written.
        members: which blocks and parts of ``a`` each part is the sum of.
        tiles: how the products are cut.
        rows: int32 (parts * side_n,), the row of ``c`` where each column of the result lies, or None.
        beside: (tokens, rank), or if ``a_turned`` (rank, tokens), and (parts, side_n, rank), or if ``turned``
            (rank, parts, side_n): a product of low rank that is added, or None.
        bias: (parts, side_n), or None.
        activation: of :data:`~structfly.lowering.activations.ACTIVATIONS`, applied to the float32 sums, or "".

    Raises:
        UnsupportedError: an operand's layout has no tensor descriptor.
    """
    tokens, side_n, side_k = a.shape[2 if a_turned else 0], b.shape[2 if turned else 1], b.shape[1 if turned else 2]
    parts = c.shape[1] if rows is None else len(rows) // side_n
    if not c.numel():
        return
    sources, blocks, starts, each = members
    if turned and b.dtype == torch.float32:
        b, turned = with_inner_side_last(b), False
        beside = beside and (beside[0], with_inner_side_last(beside[1].transpose(0, 1)))
    if not len(b):  # of which there is no descriptor
        b, sources = b.new_zeros(1, *b.shape[1:]), sources.new_zeros(1)
        blocks = None if blocks is None else sources
    arguments = [tensor for tensor in (sources, blocks, None if each else starts, bias) if tensor is not None]
    parameters: dict[str, Parameter] = {
        "side_n": side_n,
        "side_k": side_k,
        "each": each,
        "blocks_listed": blocks is not None,
        "turned": turned,
        "a_turned": a_turned,
        "scattered": rows is not None,
        "rank": 0 if beside is None else beside[0].shape[0 if a_turned else 1],
        "bias": bias is not None,
        "activation": activation,
    }
    box_b = (1, tiles.k, tiles.n) if turned else (1, tiles.n, tiles.k)
    box_a = (1, tiles.k, tiles.m) if a_turned else (1, tiles.m, tiles.k)
    operands = [operand(a if a_turned else a.transpose(0, 1), *box_a), operand(b, *box_b)]
    if beside is not None:
        thin = beside[1].transpose(0, 1) if turned else beside[1]
        operands += [operand(beside[0][None], *box_a), operand(thin, *box_b)]
    written = [descriptor(c.transpose(0, 1), 1, tiles.m, tiles.part)] if rows is None else [rows, c.stride(0), c]
    count = -(-tokens // tiles.m) * parts * -(-side_n // tiles.n)
    launch_product("block_sums", operands, [*arguments, *written], (tokens, parts, 0), count, parameters, tiles, a)


def launch_product(
    template: str,
    operands: list[Any],
    arguments: list[Any],
    sizes: tuple[int, int, int],
    count: int,
    parameters: dict[str, Parameter],
    tiles: Tiles,
    like: Tensor,
    split: int = 1,
) -> None:
    """Launch a template on the device of ``like``.

    Args:
        operands: descriptors of a and b.
        arguments: the template's own.
        sizes: M, N and K.
        count: tiles, whatever they are split in.
        parameters: the template's own.
        split: programs that share the inner dimension of a tile.
    """
    launch = product_launch(template, count, parameters, tiles, like, split)
    with on_device(like.device):
        launch(*operands, *arguments, *sizes)


def product_launch(
    template: str,
    count: int,
    parameters: dict[str, Parameter],
    tiles: Tiles,
    like: Tensor,
    split: int = 1,
) -> Launch:
    """The launch of a template; arguments as in :func:`launch_product`."""
    shared: dict[str, Parameter] = {
        "interpreted": not like.is_cuda,
        "bfloat16": like.dtype == torch.bfloat16 and split == 1,
    }
    return launch_of(template, {**shared, **parameters}, tiles, count, split, like.device)
