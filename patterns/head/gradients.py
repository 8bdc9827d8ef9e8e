"""Which gradients a head has to make, read from which values of the graph take part in differentiation."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from structfly.lowering.head.linear import Wanted
from structfly.patterns.head.chain import TensorOperand
from structfly.patterns.head.path import LogitsPath
from structfly.rewriter.calls import read
from structfly.rewriter.region import Region, example_tensors, needs_gradient


def no_gradients(path: LogitsPath) -> Wanted:
    """None of the operands of the linear and of the chain."""
    return Wanted(operands=(False,) * len(path.chain.operands))


def wanted_gradients(path: LogitsPath, between: Iterable[fx.Node]) -> Wanted | tuple[fx.Node, str]:
    """Which of the operands of the linear and of the chain need a gradient.

    Args:
        path: from the linear to something that is differentiated.
        between: all nodes between the linear's operands and what is differentiated.

    Returns:
        the gradients, or the node and the reason why one op cannot have eager's gradients.
    """
    cut = next((node for node in sorted(set(between), key=str) if _cuts(node)), None)
    if cut is not None:
        return cut, f"{cut.name} stops the gradient between the linear's operands and the loss"
    linear, adapter = path.linear, path.linear.adapter
    return Wanted(
        x=needs_gradient(linear.x),
        weight=needs_gradient(linear.weight),
        bias=needs_gradient(path.bias),
        adapter_x=adapter is not None and needs_gradient(adapter.x),
        adapter_weight=adapter is not None and needs_gradient(adapter.weight),
        operands=tuple(
            isinstance(operand, TensorOperand) and not operand.condition and needs_gradient(operand.node)
            for operand in path.chain.operands
        ),
    )


def carries_gradient(node: fx.Node, region: Region) -> bool:
    """Whether a gradient may come back to ``node``: it takes part in differentiation, and so does something made of
    it, and so on to where gradients are asked for."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        here = pending.pop()
        if here in seen or not _differentiated(here):
            continue
        seen.add(here)
        for user in here.users:
            if may_ask_for_gradients(user, region):
                return True
            pending.append(user)
    return False


def may_ask_for_gradients(node: fx.Node, region: Region) -> bool:
    """Whether ``node`` may differentiate what it takes, though it has no gradient itself: the graph's output, and
    operations that nothing is known of, as long as gradients are recorded there."""
    if node.op == "output" or node.meta.get("example_value") is None:
        return True
    numbers = [value for value in example_tensors(node) if value.is_floating_point()]
    if not numbers or any(value.requires_grad for value in numbers):
        return False
    return read(node) is None and region.modes[node][0] is None


def _differentiated(node: fx.Node) -> bool:
    return any(value.requires_grad for value in example_tensors(node))


def _cuts(node: fx.Node) -> bool:
    """Whether something that requires a gradient goes in and numbers come out that do not, as under no_grad."""
    results = [value for value in example_tensors(node) if value.is_floating_point()]
    goes_in = any(map(_differentiated, node.all_input_nodes))
    return goes_in and bool(results) and not any(value.requires_grad for value in results)
