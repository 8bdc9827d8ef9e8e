"""What the operations of a graph do to what its tensors hold along time: slices, joins, products, sums and writes."""

from __future__ import annotations

from torch import fx

from structfly import compat
from structfly.patterns.linear_recurrence import spans as algebra
from structfly.patterns.linear_recurrence.contents import BATCHED, Contents
from structfly.patterns.linear_recurrence.places import Taken, filled, padding, taken
from structfly.patterns.linear_recurrence.spans import Pieces, Spans
from structfly.rewriter.calls import Call, read
from structfly.rewriter.region import Region, example
from structfly.rewriter.writes import written


class TreeReader:
    """Reads a region's nodes in their order.

    Attributes:
        region: it.
        contents: what its nodes hold.
    """

    def __init__(self, region: Region) -> None:
        self.region, self.contents = region, Contents()
        self._used: set[fx.Node] = set()
        for node in region.graph.nodes:
            self._read(node)

    def has_read(self, node: fx.Node) -> bool:
        """Whether it is known what a node does."""
        return node in self._used or node in self.contents.terms or self.contents.is_known(node)

    def _read(self, node: fx.Node) -> None:
        targets = written(node)
        if targets:
            self._write(node, targets)
            return
        mapped = compat.batched(node)
        if mapped is not None:
            self._map(node, *mapped)
            return
        call = read(node)
        if call is None:
            return
        if call.op in ("getitem", "narrow", "slice"):
            self._slice(call)
        elif call.op == "clone" and isinstance(call["input"], fx.Node):
            self._clone(node, call["input"])
        elif call.op == "pad":
            self._pad(call)
        elif call.op == "cat":
            self._join(call)
        elif call.op == "flatten":
            self._interleave(call)
        else:
            made = self._computed(call)
            if made is not None:
                self.contents.own(node, *made)

    # ------------------------------------------------------------------------------------------------- arrangements

    def _slice(self, call: Call) -> None:
        part = taken(call) if isinstance(call["input"], fx.Node) else None
        if part is None or self.contents.of(call["input"], part.dim) is None:
            return
        view = self.contents.view(call["input"], part)
        self.contents.views[call.node] = view
        content = self.contents.of(call.node, part.dim)
        if content is not None and self.contents.is_whole(content, part.dim):  # what was padded is cut off
            del self.contents.views[call.node]
            self.contents.own(call.node, content, part.dim)

    def _clone(self, node: fx.Node, source: fx.Node) -> None:
        dim = self.contents.dim(source)
        if dim is None:
            self.contents.copy(node, source)
            self._used.add(node)
        elif (content := self.contents.of(source, dim)) is not None:
            self.contents.own(node, content, dim)

    def _map(self, node: fx.Node, source: fx.Node, dim: int, opens: bool) -> None:
        """Into a vmap over time, or out of it."""
        inside, outside = (BATCHED, dim) if opens else (dim, BATCHED)
        content = self.contents.of(source, outside)
        if content is None:
            return
        if opens or source in self.contents.views:
            view = self.contents.view(source, Taken(inside, 0, algebra.length(content.pieces), 1))
            self.contents.views[node] = view
        else:
            self.contents.own(node, content, inside)

    def _pad(self, call: Call) -> None:
        added = padding(call)
        if added is not None:
            parts: list[fx.Node | Pieces] = [call["input"], added.pieces]
            self._put_together(call.node, parts[::-1] if added.in_front else parts, added.dim)

    def _join(self, call: Call) -> None:
        tensor, values, dim = example(call.node), call["tensors"], call.get("dim", 0)
        if tensor is None or not isinstance(values, (tuple, list)) or not isinstance(dim, int):
            return
        if any(map(self.contents.is_known, values)):
            dim %= tensor.ndim
            self._put_together(call.node, [filled(value, dim) or value for value in values], dim)

    def _put_together(self, node: fx.Node, parts: list[fx.Node | Pieces], dim: int) -> None:
        """Tensors, and places that are known, behind one another."""
        contents = [part if isinstance(part, tuple) else self.contents.of(part, dim) for part in parts]
        kinds = [each for each in contents if isinstance(each, Spans)]
        kind = algebra.kind(kinds) if kinds and None not in contents else None
        if kind is not None:
            pieces = [each.pieces if isinstance(each, Spans) else each for each in contents if each is not None]
            self.contents.own(node, Spans(*kind, algebra.joined(piece for each in pieces for piece in each)), dim)
            self._used.update(part for part in node.all_input_nodes if not self.contents.is_known(part))

    def _interleave(self, call: Call) -> None:
        """A place of one tensor after a place of another: stacked behind time, two dimensions become one."""
        stack = read(call["input"])
        if stack is None or stack.op != "stack" or len(stack["tensors"]) != 2:
            return
        dim = call.get("start_dim", 0)
        if call.get("end_dim") != dim + 1 or stack.get("dim", 0) != dim + 1:
            return
        if not all(map(self.contents.is_known, stack["tensors"])):
            return
        one, other = (self.contents.of(each, dim) for each in stack["tensors"])
        if one is None or other is None or algebra.length(one.pieces) != algebra.length(other.pieces):
            return
        kind, pieces = algebra.kind((one, other)), algebra.interleaved(one.pieces, other.pieces)
        if kind is not None and pieces is not None:
            self.contents.own(call.node, Spans(*kind, pieces), dim)
            self._used.add(stack.node)

    # --------------------------------------------------------------------------------------------------- operations

    def _computed(self, call: Call) -> tuple[Spans, int] | None:
        """What a product or a sum holds, and along which dimension."""
        if call.op == "mul":
            return self._product(call)
        if call.op == "add" and call.get("alpha", 1) == 1:
            for one, other in ((call["input"], call["other"]), (call["other"], call["input"])):
                term = self.contents.terms.get(other)
                if term is not None and (term.dim == BATCHED or _rank(one) == _rank(other)):
                    made = self._state(one, term.factors, term.dim)
                    if made is not None:
                        return made, term.dim
        if call.op == "addcmul" and call.get("value", 1) == 1:
            factors = call["tensor1"], call["tensor2"]
            dim = self.contents.dim(call["input"], *factors)
            contents = self._factors(*factors, dim)
            made = None if dim is None or contents is None else self._state(call["input"], contents, dim)
            if dim is not None and made is not None:
                return made, dim
        return None

    def _product(self, call: Call) -> tuple[Spans, int] | None:
        factors = call["input"], call["other"]
        dim = self.contents.dim(*factors)
        contents = self._factors(*factors, dim)
        if dim is None or contents is None:
            return None
        if not written(call.node):
            self.contents.multiply(call.node, contents, dim)
        made = algebra.product(*contents)
        return None if made is None else (made, dim)

    def _factors(self, one: object, other: object, dim: int | None) -> tuple[Spans, Spans] | None:
        contents = None if dim is None else (self.contents.of(one, dim), self.contents.of(other, dim))
        if contents is None or contents[0] is None or contents[1] is None:
            return None
        return contents[0], contents[1]

    def _state(self, node: object, factors: tuple[Spans, Spans], dim: int) -> Spans | None:
        """``node`` plus a product of those."""
        behind = self.contents.of(node, dim)
        if behind is None:
            return None
        return algebra.state(behind, *factors) or algebra.state(behind, *factors[::-1])

    # ------------------------------------------------------------------------------------------------------- writes

    def _write(self, node: fx.Node, targets: list[fx.Node]) -> None:
        call, new = read(node), None
        if call is not None and call.op == "setitem":
            new = self._set(call, targets[0])
        elif len(targets) == 1 and self.contents.is_known(targets[0]):
            new = self._made_in_place(call, node, targets[0])
        if self.contents.write(node, targets, new):
            self._used.add(node)

    def _set(self, call: Call, target: fx.Node) -> tuple[int, Spans] | None:
        """Where ``target[index] = value`` begins, and what is there then."""
        part = taken(Call("getitem", call.node, {"input": target, "index": call["index"]}))
        if part is None or self.contents.of(target, part.dim) is None:
            return None
        place, value = self.contents.view(target, part).taken, self.contents.of(call["value"], part.dim)
        return _fits(place, value)

    def _made_in_place(self, call: Call | None, node: fx.Node, target: fx.Node) -> tuple[int, Spans] | None:
        dim = self.contents.dim(target)
        content = None if dim is None else self.contents.of(target, dim)
        if dim is None or content is None:
            return None
        view = self.contents.view(target, Taken(dim, 0, algebra.length(content.pieces), 1))
        self.contents.views[node] = view  # what a write in place returns
        if node.target == "copy_":
            value = self.contents.of(node.args[1], dim)
        else:
            computed = None if call is None else self._computed(call)
            value = None if computed is None else computed[0]
        return _fits(view.taken, value)


def _rank(node: object) -> int | None:
    tensor = example(node)
    return None if tensor is None else tensor.ndim


def _fits(place: Taken, value: Spans | None) -> tuple[int, Spans] | None:
    """A value, if it is for consecutive places and for all of them."""
    if value is None or place.step != 1 or algebra.length(value.pieces) != place.places:
        return None
    return place.start, value
