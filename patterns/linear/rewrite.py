"""Writing a structure into the graph: its factors are further inputs, and its op stands where each linear stood."""

from __future__ import annotations

import torch
from torch import fx

from structfly.patterns.head.operands import cast
from structfly.patterns.linear.projection import Projections, Wanted
from structfly.patterns.linear.reads import transposes
from structfly.patterns.linear.site import LinearSite
from structfly.patterns.structure import Structure
from structfly.rewriter.editor import Editor
from structfly.rewriter.inputs import InputLike
from structfly.rewriter.linear import read_linear
from structfly.rewriter.region import example_of


def rewrite_layer(site: LinearSite, structure: Structure, editor: Editor) -> None:
    """Put ``structure`` in the place of the site's linears; the factors are of the dtype that the products run in."""
    factors = {dtype: _factors(site, structure, dtype, editor) for dtype in site.dtypes}
    for node in site.dead_nodes:
        call = read_linear(node)  # again, for what it takes may have been rewritten since it was found
        assert call is not None
        editor.before(node)
        dtype = example_of(node).dtype
        x, bias = cast(call.x, dtype, editor), None if call.bias is None else cast(call.bias, dtype, editor)
        with torch.no_grad():  # so that the op keeps nothing for a backward
            y = editor.trace(structure.apply, site.layer, factors[dtype], x, bias)
        editor.replace(node, y)
        editor.erase([*transposes(call), node])


def _factors(site: LinearSite, structure: Structure, dtype: torch.dtype, editor: Editor) -> dict[str, fx.Node]:
    projections = Projections(Wanted(structure, dtype, site.transposed))
    name = f"{site.calls[0].weight.name}_{str(dtype).removeprefix('torch.')}"
    factors = structure.factors(site.layer)
    inputs = {
        f"{name}_{factor}": InputLike(shape, dtype if learned else torch.int32, site.device)
        for factor, (shape, learned) in factors.items()
    }
    place = site.place  # of the site, which holds the weight, nothing else goes into what is kept
    nodes = editor.add_inputs(inputs, lambda arguments: projections.of(arguments[place]))
    return dict(zip(factors, nodes.values(), strict=True))
