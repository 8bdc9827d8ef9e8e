"""Which entries of a matrix are known to be 0: those that constant masks, or constants with zeros, leave out.

Zeros follow products, ``masked_fill`` and ``where`` from the mask, and views and casts from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from structfly import compat
from structfly.patterns.batched_chain.axes import viewed
from structfly.patterns.masked_linear.masks import maskings
from structfly.rewriter.calls import Call, read
from structfly.rewriter.constants import Constant, read_constant
from structfly.rewriter.linear import is_cast
from structfly.rewriter.region import Region, example, example_tensors, needs_gradient
from structfly.rewriter.writes import writes_in

# Of the constants' values: bool, False where an entry is known to be 0.
Kept = Callable[[Sequence[Tensor]], Tensor]


@dataclass
class Zeros:
    """What is known of some matrices.

    Attributes:
        region: where they stand.
        constants: what it is known from, by node, in the order in which :data:`Kept` takes their values.
        reasons: why something that a matrix is multiplied by is no constant.
    """

    region: Region
    constants: dict[fx.Node, Constant] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def kept(self, node: fx.Node) -> Kept | None:
        """Which entries of ``node``'s value are not known to be 0; None if nothing is known."""
        call = read(node)
        if call is None or self._is_written(node):
            return None
        if call.op == "mul":
            return _both(*(self._operand(each) for each in (call["input"], call["other"])), call=call)
        for weight, mask, inverted in maskings(call):
            return _both(self._operand(weight), self._condition(mask, inverted), call=call)
        if is_cast(call):
            return self.kept(call["input"])
        return self._view(call) if viewed(node) is not None else None

    def _is_written(self, node: fx.Node) -> bool:
        """Whether something is written into a value after it was made, zeros perhaps included."""
        storages = {compat.storage_key(value) for value in example_tensors(node)}
        for _, writer, target in writes_in(self.region):
            if not storages.isdisjoint(compat.storage_key(value) for value in example_tensors(target)):
                self.reasons.append(f"{writer.name} writes into {target.name}")
                return True
        return False

    def _view(self, call: Call) -> Kept | None:
        source = call["input"]
        below = self.kept(source)
        others = [operand for operand in call.node.all_input_nodes if operand is not source]
        if below is None or others:
            return None
        node, arguments, of = call.node, (call.node.args, call.node.kwargs), below

        def made(values: Sequence[Tensor]) -> Tensor:
            value = of(values)
            positional, named = fx.node.map_arg(arguments, lambda _: value)
            if node.op == "call_method":
                viewing: Tensor = getattr(positional[0], str(node.target))(*positional[1:], **named)
            else:
                assert callable(node.target)
                viewing = node.target(*positional, **named)
            return viewing

        return made

    def _operand(self, node: object) -> Kept | None:
        if not isinstance(node, fx.Node) or _is_learned(node):
            return None
        number = self._constant(node)
        return self.kept(node) if number is None else lambda values: values[number] != 0

    def _condition(self, mask: fx.Node, inverted: bool) -> Kept | None:
        number = self._constant(mask)
        return None if number is None else lambda values: ~values[number] if inverted else values[number]

    def _constant(self, node: fx.Node) -> int | None:
        if node not in self.constants:
            found: Constant | str = read_constant(node, self.region)
            if node.op != "placeholder" and _is_returned(node):
                found = f"{node.name} is returned, and may be written where the graph does not see it"
            if not isinstance(found, Constant):
                value = example(node)
                if value is not None and sum(size != 1 for size in value.shape) > 1:  # less is a scale
                    self.reasons.append(found)
                return None
            self.constants[node] = found
        return list(self.constants).index(node)


def _both(*operands: Kept | None, call: Call) -> Kept | None:
    known = [each for each in operands if each is not None]
    shape = example(call.node)
    if not known or shape is None:
        return None
    size = tuple(shape.shape)

    def made(values: Sequence[Tensor]) -> Tensor:
        first, *others = (each(values).expand(size) for each in known)
        for other in others:
            first = first & other
        return first

    return made


def _is_returned(node: fx.Node) -> bool:
    """Whether the graph gives a value, or a view of it, to its caller."""
    return any(user.op == "output" or (viewed(user) is not None and _is_returned(user)) for user in node.users)


def _is_learned(node: fx.Node) -> bool:
    """Whether a value is a parameter that gradients may change, under views and casts: its zeros are no mask's."""
    while (call := read(node)) is not None and (viewed(node) is not None or is_cast(call)):
        node = call["input"]
    return node.op == "placeholder" and needs_gradient(node)
