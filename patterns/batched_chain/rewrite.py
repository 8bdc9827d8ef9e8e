"""Writing one op in the place of a chain of products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structfly.lowering.kronecker.op import KRONECKER
from structfly.patterns.batched_chain.axes import Dims
from structfly.patterns.batched_chain.factors import OrderedFactor
from structfly.patterns.batched_chain.site import ChainSite
from structfly.patterns.head.operands import cast
from structfly.rewriter.editor import Editor


def rewrite_chain(site: ChainSite, editor: Editor) -> None:
    """Replace the chain; views before it go where nothing else reads them."""
    chain = site.chain
    editor.before(chain.result)
    factors = [
        cast(editor.trace(_in_order, product.factor, dims, factor), site.dtype, editor)
        for product, dims, factor in zip(chain.products, chain.dims, chain.factors, strict=True)
    ]
    x = cast(chain.x, site.dtype, editor)
    with torch.set_grad_enabled(site.learns):  # the op keeps what a backward takes, and else nothing
        y = editor.trace(_applied, site, x, factors)
    if site.shape is not None:
        shape = [editor.size(chain.x, int(size)) if isinstance(size, str) else size for size in site.shape]
        y = editor.call(torch.reshape, y, tuple(shape))
    editor.replace(chain.result, y)
    editor.erase(site.dead_nodes)


def _in_order(factor: Tensor, dims: Dims, ordered: OrderedFactor) -> Tensor:
    """The factor with its axes as :class:`~structfly.lowering.kronecker.reference.FactorShape` has them."""
    axes = [axis for dim in dims for axis in dim]
    order = [axes.index(axis) for segment in ordered.segments for axis in segment]
    return factor.reshape([int(axis.size) for axis in axes]).permute(order).reshape(ordered.shape)


def _applied(site: ChainSite, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    rows = site.chain.rows
    flat = x if x.ndim == rows + 1 else x.flatten(rows)
    return KRONECKER(flat, factors, None, [site.chain.out_features])
