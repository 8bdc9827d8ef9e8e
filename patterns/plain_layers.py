"""Structured layers that are torch's own products, written into the graph as such.

An op hides from Inductor what it does: its call takes the host longer than the products it is made of, and what the
forward keeps for it lives until its backward has ended.  Where an op has nothing of its own to offer, Inductor gets the
products themselves.  It comes last: rules, such as that of merged weights, know layers by their ops.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from structfly.lowering.layer_op import FORWARD_OPS
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import needs_gradient, regions_of


def write_out_plain_layers(gm: fx.GraphModule) -> None:
    """Replace the calls of such ops by what they do, in a graph and its bodies, in place.

    Layers that make again in backward what they could have kept stay ops: torch's products would keep it.
    """
    for region in regions_of(gm):
        if region.closed:
            continue
        calls = [node for node in region.graph.nodes if node.op == "call_function" and node.target in FORWARD_OPS]
        written = [call for call in calls if _write_out(call, region.graph)]
        if written:
            region.owner.recompile()


def _write_out(call: fx.Node, graph: fx.Graph) -> bool:
    op = FORWARD_OPS[call.target]
    arguments: Any = call.args
    x, factors, bias, static, keep, *_ = arguments
    y = next((user for user in call.users if user.args[1] == 0), None)
    others = [user for user in call.users if user is not y]
    if op.plain is None or y is None or any(map(_is_read, others)) or (not keep and needs_gradient(y)):
        return False
    editor = Editor(graph, call)
    editor.replace(y, editor.trace(op.plain, x, factors, bias, static))
    editor.erase([call, *others, *(part for other in others for part in other.users)])
    editor.commit()
    return True


def _is_read(output: fx.Node) -> bool:
    """Whether anything is done with what is kept; a checkpoint's body takes it apart, and no more."""
    return any(part.users or part.target is not operator.getitem for part in output.users)
