"""Which gradients a head has to make, read from which values of the graph take part in differentiation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from structfly.lowering.head.linear import Wanted
from structfly.patterns.head.chain import TensorOperand
from structfly.patterns.head.logits import LogitsPath
from structfly.rewriter.region import example_tensors, needs_gradient


def wanted_gradients(paths: Sequence[LogitsPath], ends: Sequence[fx.Node]) -> Wanted | tuple[fx.Node, str]:
    """Which of the operands of the linear and of the chain need a gradient.

    Args:
        paths: the ways from one linear to its losses.
        ends: the values that a rewrite replaces.

    Returns:
        the gradients, or the node and the reason why one op cannot have eager's gradients.
    """
    constant = [end for end in ends if not needs_gradient(end)]
    if len(constant) == len(ends):
        return Wanted(operands=(False,) * len(paths[0].chain.operands))
    if constant:
        return constant[0], "one of several losses on this linear is computed without gradient, another with"
    cut = next((node for path in paths for node in sorted(path.nodes, key=str) if _cuts(node)), None)
    if cut is not None:
        return cut, f"{cut.name} stops the gradient between the linear's operands and the loss"
    path, linear = paths[0], paths[0].linear
    adapter = linear.adapter
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


def _cuts(node: fx.Node) -> bool:
    """Whether something that requires a gradient goes in and nothing that does comes out, as under no_grad."""
    results = example_tensors(node)
    goes_in = any(value.requires_grad for operand in node.all_input_nodes for value in example_tensors(operand))
    return goes_in and bool(results) and not any(value.requires_grad for value in results)
