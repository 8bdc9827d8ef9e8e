"""Writing a block-sparse product in the place of a masked linear.

The kept blocks are chosen of the weight inside the graph, so that its gradient is that of the blocks, and 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from structfly.lowering.block_sparse.op import BLOCK_SPARSE
from structfly.patterns.head.operands import cast
from structfly.patterns.masked_linear.layouts import layouts_of, placed
from structfly.patterns.masked_linear.site import MaskedSite
from structfly.rewriter.editor import Editor
from structfly.rewriter.inputs import InputLike
from structfly.rewriter.linear import read_linear


def rewrite_masked(site: MaskedSite, editor: Editor) -> None:
    """Replace the linear; what made its weight goes where nothing else reads it."""
    call = read_linear(site.node)  # again, for what it takes may have been rewritten since it was found
    assert call is not None
    names = ("blocks", "columns", "starts")
    inputs = {
        f"{site.node.name}_{name}": InputLike(tuple(tensor.shape), tensor.dtype, tensor.device)
        for name, tensor in zip(names, placed(site.grid, site.layout), strict=False)
    }
    numbers, *layout = editor.add_inputs(inputs, layouts_of(site).of).values()
    editor.before(site.node)
    values = editor.trace(_kept, site, site.masked.weight, numbers)
    for dtype in (*site.masked.dtypes, site.dtype):
        values = cast(values, dtype, editor)
    x = cast(call.x, site.dtype, editor)
    bias = None if call.bias is None else cast(call.bias, site.dtype, editor)
    editor.replace(site.node, editor.trace(_product, site, x, [values, *layout], bias))
    editor.erase([*site.dead_nodes, *site.masked.nodes])


def _kept(site: MaskedSite, weight: Tensor, numbers: Tensor) -> Tensor:
    """The kept blocks (nnz, block_out, block_in) of the weight."""
    blocks = site.grid.split(weight.t() if site.masked.transposed else weight)
    return blocks.flatten(0, 1).index_select(0, numbers)


def _product(site: MaskedSite, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return BLOCK_SPARSE(x, factors, bias, [site.layer.out_features, site.grid.columns])
