"""Which linears of a graph read which weight, and why a weight cannot be replaced by factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, fx, nn

from structfly import compat
from structfly.lowering.layer_op import DEVICES
from structfly.patterns.head.chain import describe
from structfly.records.cost import at_sizes
from structfly.rewriter.calls import read
from structfly.rewriter.linear import LinearLike, is_cast, read_linear
from structfly.rewriter.region import Region, example_of, needs_gradient

TRAINS = (
    "this graph trains, and factors made inside it would not: call structfly.restructure_(model, ...) before the "
    "optimizer is built, or if nothing is to train, run what is compiled under torch.no_grad() or inference_mode()"
)


def linears_by_weight(region: Region) -> dict[fx.Node, list[LinearLike]]:
    """The linears of a region, in graph order, by the node of their weight; of those that an adapter is added to, the
    sum, and neither product beneath it."""
    found: dict[fx.Node, LinearLike] = {}
    for node in region.graph.nodes:
        linear = read_linear(node)
        if linear is None or (linear.adapter is not None and not _is_adapter(linear.adapter)):
            continue
        if linear.adapter is not None:
            inner = _without_casts(linear.adapter.x)
            for beneath in (*linear.nodes, inner):
                found.pop(beneath, None)
        found[node] = linear
    grouped: dict[fx.Node, list[LinearLike]] = {}
    for linear in found.values():
        grouped.setdefault(linear.weight, []).append(linear)
    return grouped


def _is_adapter(update: LinearLike) -> bool:
    """Whether an update is itself a product of two: a sum of two layers' outputs looks the same otherwise."""
    return read_linear(_without_casts(update.x)) is not None


def _without_casts(node: fx.Node) -> fx.Node:
    while (call := read(node)) is not None and is_cast(call):
        node = call["input"]
    return node


def transposes(linear: LinearLike) -> list[fx.Node]:
    """What stands between a linear and its weight."""
    return [node for node in linear.node.all_input_nodes if node not in (linear.x, linear.weight, linear.bias)]


def rows_of(x: fx.Node, dims: int | None = None) -> int:
    """How many rows a layer is applied to, at the example's sizes; ``dims`` are those of rows, all but the last if
    None."""
    value = example_of(x)
    hints, sizes = compat.size_hints(value), value.shape[: -1 if dims is None else dims]
    return math.prod(int(at_sizes(compat.expression(size), hints)) for size in sizes)


def why_not(weight: fx.Node, calls: Sequence[LinearLike], region: Region) -> str | None:
    """Why a weight that ``calls`` read cannot be replaced, "" if it can; None for what is no layer but a product of two
    values, so that nobody need be told."""
    parameter = _origin(weight)
    value = None if parameter is None else compat.value_of_input(parameter)
    if not isinstance(value, nn.Parameter) and not any(_is_layer(call) for call in calls):
        return None
    if any(needs_gradient(call.node) for call in calls):
        return TRAINS
    if region.body:
        return "it stands in a checkpoint or a subgraph, whose inputs are fixed, so that no factors can be added"
    if parameter is not weight:
        return f"its weight is made in the graph, by {describe(weight)}; keep what is made as the parameter"
    if value is None:
        return "the value of its weight is not known when the graph is compiled, so there is nothing to project"
    return _why_value(weight, value) or _why_read(weight, calls) or _why_shared(weight, value, region)


def _is_layer(linear: LinearLike) -> bool:
    call = read(linear.node)
    return call is not None and call.op == "linear"


def _origin(weight: fx.Node) -> fx.Node | None:
    """The graph input that a weight is, or is made of alone."""
    while weight.op != "placeholder":
        if len(weight.all_input_nodes) != 1:
            return None
        (weight,) = weight.all_input_nodes
    return weight


def _why_value(weight: fx.Node, value: Tensor) -> str:
    sizes = example_of(weight).shape
    if not isinstance(value, nn.Parameter):
        return "its weight is no parameter of a module but a tensor that the compiled function is given"
    if compat.wrapper_subclass(value):
        return f"its weight is a {compat.wrapper_subclass(value)}, such as quantisation makes"
    if not all(isinstance(size, int) for size in sizes):
        return "its weight's sizes vary from call to call, and those of its factors cannot"
    if not value.is_floating_point() or value.dtype.itemsize < 2:
        return f"its weight is {value.dtype}"
    if value.device.type not in DEVICES:
        return f"its weight is on {value.device.type}; supported devices: {', '.join(DEVICES)}"
    if value.is_inference():
        return (
            "its weight was made under torch.inference_mode(), which does not count how often it is written; make the "
            "model outside of it"
        )
    return ""


def _why_read(weight: fx.Node, calls: Sequence[LinearLike]) -> str:
    """Of what reads a weight, in this graph."""
    if any(call.adapter is not None for call in calls):
        return "an adapter is added to it; merge the adapter first"
    if len({call.transposed for call in calls}) > 1:
        return "its weight is multiplied by as it is in one place, and transposed in another"
    linears = {call.node for call in calls}
    turned = {node for call in calls for node in transposes(call)}
    operands = {operand for call in calls for operand in (call.x, call.bias)}
    for user in weight.users:
        readers = set(user.users) if user in turned else {user}
        if weight in operands or not readers <= linears:
            return f"its weight is read by something else than linears, too: {describe(user)}"
    return ""


def _why_shared(weight: fx.Node, value: Tensor, region: Region) -> str:
    key = compat.storage_key(value)
    for node in region.graph.find_nodes(op="placeholder"):
        other = compat.value_of_input(node)
        if node is not weight and other is not None and compat.storage_key(other) == key:
            return f"its weight shares memory with another input of the graph, {node.name}"
    return ""
