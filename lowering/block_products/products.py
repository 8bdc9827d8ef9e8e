"""Launches of the template ``block_sums``."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.block_products.listing import Listing
from structfly.lowering.block_products.ready import REMEMBERED, Ready, ready
from structfly.lowering.block_products.support import with_inner_side_last
from structfly.lowering.block_products.tiles import Summing
from structfly.lowering.block_products.turns import turns
from structfly.lowering.descriptor import Boxes, Form, form
from structfly.lowering.gemm import Tiles, launched
from structfly.lowering.remembered import remembered
from structfly.lowering.template import Parameter


def block_sums(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    members: Listing,
    *,
    cut: Summing,
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
        cut: in which tiles they are made.
        rows: int32 (parts * side_n,), the row of ``c`` where each column of the result lies, or None.
        beside: (tokens, rank), or if ``a_turned`` (rank, tokens), and (parts, side_n, rank), or if ``turned``
            (rank, parts, side_n): a product of low rank that is added, or None.
        bias: (parts, side_n), or None.
        activation: of :data:`~structfly.lowering.activations.ACTIVATIONS`, applied to the float32 sums, or "".

    Raises:
        UnsupportedError: an operand's layout has no tensor descriptor.
    """
    if not c.numel():
        return
    sources, blocks, starts, each = members
    if turned and b.dtype == torch.float32:
        b, turned = with_inner_side_last(b), False
        beside = beside and (beside[0], with_inner_side_last(beside[1].transpose(0, 1)))
    if not len(b):  # of which there is no descriptor
        b, sources = b.new_zeros(1, *b.shape[1:]), sources.new_zeros(1)
        blocks = None if blocks is None else sources
    kind = _Sums(
        each=each,
        parts=c.shape[1] if rows is None else len(rows) // b.shape[2 if turned else 1],
        blocks_listed=blocks is not None,
        turned=turned,
        a_turned=a_turned,
        scattered=rows is not None,
        swapped=cut.swapped,
        bias=None if bias is None else bias.dtype,
        activation=activation,
    )
    made = _ready(form(a), form(b), form(c), beside and (form(beside[0]), form(beside[1])), kind, cut.tiles)
    by_starts = () if each else (starts, remembered(turns, starts, *made.turns))
    listed = [each for each in (sources, blocks, *by_starts, bias) if each is not None]
    made.sums(a, b, *(beside or ()), *listed, *(() if rows is None else (rows, c.stride(0))), c)


class _Sums(NamedTuple):
    """What of sums their kernel depends on beside their tensors' forms: see the template; ``bias`` is its dtype."""

    each: int
    parts: int
    blocks_listed: bool
    turned: bool
    a_turned: bool
    scattered: bool
    swapped: bool
    bias: torch.dtype | None
    activation: str


class _Made(NamedTuple):
    """What is made once for tensors of some forms: their launch, and what :func:`turns` takes beside ``starts``."""

    sums: Ready
    turns: tuple[int, ...]


@lru_cache(maxsize=REMEMBERED)
def _ready(of_a: Form, of_b: Form, of_c: Form, of_beside: tuple[Form, Form] | None, kind: _Sums, tiles: Tiles) -> _Made:
    """A launch for tensors of such forms, in the order of the template's arguments."""
    a, b, c = of_a.like(), of_b.like(), of_c.like()
    turned, a_turned = kind.turned, kind.a_turned
    tokens, side_n, side_k = a.shape[2 if a_turned else 0], b.shape[2 if turned else 1], b.shape[1 if turned else 2]
    box_b = (1, tiles.k, tiles.n) if turned else (1, tiles.n, tiles.k)
    box_a = (1, tiles.k, tiles.m) if a_turned else (1, tiles.m, tiles.k)
    box_c = (1, tiles.m // tiles.parts, tiles.n) if kind.swapped else (1, tiles.m, tiles.part)
    operands = [Boxes(a if a_turned else a.transpose(0, 1), box_a, operand=True), Boxes(b, box_b, operand=True)]
    rank = 0
    if of_beside is not None:
        left, right = (each.like() for each in of_beside)
        rank = left.shape[0 if a_turned else 1]
        thin = right.transpose(0, 1) if turned else right
        operands += [Boxes(left[None], box_a, operand=True), Boxes(thin, box_b, operand=True)]
    parameters: dict[str, Parameter] = {
        **kind._asdict(),
        "bias": kind.bias is not None,
        "side_n": side_n,
        "side_k": side_k,
        "rank": rank,
    }
    del parameters["parts"]
    plain = (1 + kind.blocks_listed + 2 * (not kind.each) + (kind.bias is not None)) * [None]
    written = [None, None, None] if kind.scattered else [Boxes(c.transpose(0, 1), box_c)]
    tall, across = -(-tokens // tiles.m), -(-side_n // tiles.n)
    count, takes = tall * across * kind.parts, [*operands, *plain, *written]
    steps, more = -(-side_k // tiles.k), -(-rank // tiles.k)
    return _Made(
        ready("block_sums", takes, (tokens, kind.parts, 0), count, parameters, tiles, a.dtype, of_a.device),
        (tall, across, steps, more, tiles.group, launched(of_a.device, tiles, count)),
    )
