"""Writing one op in the place of a chain of products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from structfly.lowering.kronecker.op import KRONECKER
from structfly.patterns.batched_chain.axes import Dims
from structfly.patterns.batched_chain.factors import OrderedFactor
from structfly.patterns.batched_chain.menu import grouped
from structfly.patterns.batched_chain.merging import in_groups, merged, widened
from structfly.patterns.batched_chain.product import whole
from structfly.patterns.batched_chain.site import ChainSite
from structfly.patterns.head.operands import cast
from structfly.records import Candidate
from structfly.rewriter.editor import Editor


def rewrite_chain(site: ChainSite, candidate: Candidate, editor: Editor) -> None:
    """Replace the chain; views before it go where nothing else reads them."""
    chain = site.chain
    editor.before(chain.result)
    in_order = [
        editor.trace(_in_order, product.factor, dims, factor)
        for product, dims, factor in zip(chain.products, chain.dims, chain.factors, strict=True)
    ]
    groups = in_groups(in_order, len(grouped(site.shapes)[candidate.name]))
    factors = [cast(_merged(group, site, editor), site.dtype, editor) for group in groups]
    x = cast(chain.x, site.dtype, editor)
    with torch.set_grad_enabled(site.learns):  # the op keeps what a backward takes, and else nothing
        y = editor.trace(_applied, site, x, factors)
    if site.shape is not None:
        shape = [editor.size(chain.x, int(size)) if isinstance(size, str) else size for size in site.shape]
        y = editor.call(torch.reshape, y, tuple(shape))
    editor.replace(chain.result, y)
    editor.erase(site.dead_nodes)


def _merged(factors: Sequence[fx.Node], site: ChainSite, editor: Editor) -> fx.Node:
    """The one factor that neighbours are together."""
    first, *others = factors
    if others:
        first = cast(first, widened(site.dtype), editor)
    for other in others:
        first = editor.trace(merged, first, cast(other, widened(site.dtype), editor))
    return first


def _in_order(given: Tensor | list[list[Tensor]], dims: Dims, ordered: OrderedFactor) -> Tensor:
    """The factor with its axes as :class:`~structfly.lowering.kronecker.reference.FactorShape` has them."""
    factor, axes = whole(given), [axis for dim in dims for axis in dim]
    order = [axes.index(axis) for segment in ordered.segments for axis in segment]
    return factor.reshape([int(axis.size) for axis in axes]).permute(order).reshape(ordered.shape)


def _applied(site: ChainSite, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    rows = site.chain.rows
    flat = x if x.ndim == rows + 1 else x.flatten(rows)
    return KRONECKER(flat, factors, None, [site.chain.out_features])
