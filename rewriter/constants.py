"""Values that a graph makes of module state alone, known when it is compiled and made again when the state changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from structfly import compat
from structfly.rewriter.calls import read
from structfly.rewriter.region import Region, example_tensors, needs_gradient
from structfly.rewriter.writes import writes_in, written

# Operations that compute the same of the same, and nothing else.
_PURE = frozenset(
    (
        *("to", "type_as", "float", "half", "bfloat16", "double", "bool", "contiguous", "detach", "clone"),
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "movedim", "t"),
        *("getattr", "getitem", "select", "narrow", "expand", "expand_as", "repeat_interleave", "kron", "cat", "stack"),
        *("tril", "triu", "ones", "zeros", "full", "arange", "zeros_like", "ones_like", "full_like", "tensor"),
        *("add", "sub", "mul", "div", "neg", "abs", "minimum", "maximum", "where", "masked_fill"),
        *("gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not"),
        *("exp", "pow", "square", "round", "clamp", "hardshrink", "sinc", "irfft"),
    )
)


@dataclass(frozen=True)
class Constant:
    """What one node's value is made of.

    Attributes:
        places: the numbers of the graph inputs that it is made of.
        leaves: their values when the graph is compiled.
        program: makes it of them, in order.
    """

    places: tuple[int, ...]
    leaves: tuple[Tensor, ...]
    program: fx.GraphModule

    def value(self, leaves: Sequence[Tensor]) -> Tensor:
        """The value for these inputs; recorded by no mode that the caller stands in."""
        made: Tensor = self.program(*leaves)
        return made


def read_constant(node: fx.Node, region: Region) -> Constant | str:
    """What ``node`` is made of, if that is state of modules and known when the graph is compiled; else why it is not.

    The state needs no gradient, or belongs to a graph without any.  The graph writes into none of it, nor into what is
    made of it, but for writes of constants into what the graph itself made before anything but constants is made of it.
    """
    needed = {node}
    reason = _gather([node], needed, region) or _gather_writers(needed, region)
    if reason:
        return reason
    inputs = region.graph.find_nodes(op="placeholder")
    leaves = [each for each in inputs if each in needed]
    program = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for each in region.graph.nodes:
        if each in needed:
            copies[each] = program.node_copy(each, copies.__getitem__)
    program.output(copies[node])
    values = tuple(value for each in leaves if (value := compat.value_of_input(each)) is not None)
    places = tuple(inputs.index(each) for each in leaves)
    return Constant(places, values, fx.GraphModule(region.owner, program))


def _gather(nodes: Iterable[fx.Node], needed: set[fx.Node], region: Region) -> str:
    """Add to ``needed`` what these of it are made of; why that is no constant, or ""."""
    pending = list(nodes)
    while pending:
        each = pending.pop()
        reason = _why_not(each, region)
        if reason:
            return reason
        new = [operand for operand in each.all_input_nodes if operand not in needed]
        needed.update(new)
        pending.extend(new)
    return ""


def _gather_writers(needed: set[fx.Node], region: Region) -> str:
    """Add to ``needed`` what writes into it, and what that is made of; why it may not, or ""."""
    writes = [(writer, target) for _, writer, target in writes_in(region)]
    while True:
        storages = _storages(needed)
        new = [each for each in writes if each[0] not in needed and not storages.isdisjoint(_storages(each[1:]))]
        if not new:
            return _why_seen(writes, needed, region)
        given = _storages(each for each in needed if each.op != "call_function" and each.op != "call_method")
        for writer, target in new:
            call = read(writer)
            if call is None or call.op != "setitem" or not given.isdisjoint(_storages([target])):
                return f"{writer.name} writes into {target.name}"
        needed.update(writer for writer, _ in new)
        operands = {operand for writer, _ in new for operand in writer.all_input_nodes} - needed
        needed.update(operands)
        reason = _gather(operands, needed, region)
        if reason:
            return reason


def _why_seen(writes: Iterable[tuple[fx.Node, fx.Node]], needed: set[fx.Node], region: Region) -> str:
    """Why something that is not ``needed`` sees what is before it is written; "" if nothing does."""
    for writer, target in writes:
        if writer in needed:
            written_into = _storages([target])
            sharing = [each for each in needed if not written_into.isdisjoint(_storages([each]))]
            readers = {user for each in sharing for user in each.users} - needed
            if any(region.order[user] < region.order[writer] for user in readers):
                return f"{writer.name} writes into {target.name}"
    return ""


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    return {compat.storage_key(value) for node in nodes for value in example_tensors(node)}


def _why_not(node: fx.Node, region: Region) -> str:
    if region.trains and needs_gradient(node):
        return f"{node.name} needs a gradient"
    if node.op == "get_attr":
        return ""
    if node.op == "placeholder":
        return _why_no_state(node, region)
    call = read(node)
    if call is None or call.op not in _PURE or written(node):
        return f"{node.name} is not known to be made of constants alone"
    return ""


def _why_no_state(node: fx.Node, region: Region) -> str:
    if region.body:
        return f"{node.name} is given to a checkpoint or a subgraph, where its value is not known"
    if not compat.is_state(node):
        return f"{node.name} is an argument of the compiled function, another at each call perhaps; keep it in a module"
    value = compat.value_of_input(node)
    if value is None:
        return f"the value of {node.name} is not known when the graph is compiled"
    if compat.wrapper_subclass(value):
        return f"{node.name} is a {compat.wrapper_subclass(value)}"
    if value.is_inference():
        return f"{node.name} was made under torch.inference_mode(), which does not count how often it is written"
    return ""
