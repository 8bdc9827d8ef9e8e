"""Scans that are written out with whole tensors, as trees of products and sums of their parts.

Doubling (Hillis and Steele 1986), out of place or in place, in as many rounds as the length has binary digits,

    z = z + f * shift(z, k),    f = f * shift(f, k),    k = 1, 2, 4, ...

and the tree that ``associative_scan`` with ``combine_mode="generic"`` becomes (Blelloch 1990), under a vmap for each
level.  Every node is read in the order of the graph as :mod:`.spans`; where at last every place holds the state of all
steps up to its own, that is the recurrence.  With fewer rounds than reach back to the first step a state has a window,
which is another function.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

from torch import fx

from structfly import compat
from structfly.patterns.linear_recurrence import spans as algebra
from structfly.patterns.linear_recurrence.expressions import Expression
from structfly.patterns.linear_recurrence.menu import doubled
from structfly.patterns.linear_recurrence.recurrence import Recurrence
from structfly.patterns.linear_recurrence.spans import OTHER, ZERO, Piece, Spans
from structfly.patterns.linear_recurrence.whole import WholeSite, whole_site
from structfly.records import Miss, Stage
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.region import Region, example, example_tensors, qualified_name
from structfly.rewriter.writes import written

_ZEROS = ("zeros", "zeros_like", "new_zeros")
_ONES = ("ones", "ones_like", "new_ones")
_BATCHED = -1
"""Time's dimension inside a vmap over it."""


class _View(NamedTuple):
    """Places of a node's tensor."""

    owner: fx.Node
    dim: int
    start: int
    places: int
    step: int


def read_trees(region: Region, rule: str) -> Iterator[WholeSite | Miss]:
    """The states that are made by such trees, or why they are not those of the recurrence."""
    reader = _Reader(region)
    for node in region.graph.nodes:
        reader.read(node)
    for node in reader.states():
        yield _site(node, reader, region, rule)


class _Reader:
    """What the nodes hold: of owners in ``spans``, along ``dims``; of views, places of those."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.spans: dict[fx.Node, Spans] = {}
        self.dims: dict[fx.Node, int] = {}
        self.views: dict[fx.Node, _View] = {}
        self.writes: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self.used: set[fx.Node] = set()  # nodes that are read beside those above
        self._terms: dict[fx.Node, tuple[Spans, Spans]] = {}
        self._clones: dict[fx.Node, fx.Node] = {}
        self._lost: set[fx.Node] = set()
        self._stored: dict[int, set[fx.Node]] = defaultdict(set)
        self._continued: set[fx.Node] = set()

    # ------------------------------------------------------------------------------------------------ what was found

    def states(self) -> list[fx.Node]:
        """Nodes that hold states of all steps, or of a window of four or more, and of which no others are made."""
        return [
            node
            for node, spans in self.spans.items()
            if node not in self._continued
            and self._is_whole(spans, self.dims[node])
            and (algebra.is_complete(spans) or algebra.reach(spans) >= 4)
        ]

    def _is_whole(self, spans: Spans, dim: int) -> bool:
        """Whether there are states in as many places as there are inputs."""
        tensor = example(spans.input)
        return tensor is not None and dim != _BATCHED and algebra.length(spans.pieces) == tensor.shape[dim]

    def nodes_of(self, node: fx.Node) -> set[fx.Node]:
        """What ``node`` is made by, and what is made of that and used by nobody."""
        spans = self.spans[node]
        found: set[fx.Node] = set()
        pending = [node]
        while pending:
            each = pending.pop()
            if each not in found and each not in (spans.gate, spans.input) and self._is_read(each):
                found.add(each)
                pending += [*each.all_input_nodes, *self.writes.get(each, ())]
        for each in reversed(self.region.graph.nodes):
            if each not in found and self._is_read(each) and found.issuperset(each.users):
                found.add(each)
        return found.difference((spans.gate, spans.input))

    def _is_read(self, node: fx.Node) -> bool:
        return node in self.used or node in self.spans or node in self.views or node in self._terms

    # -------------------------------------------------------------------------------------------------------- reading

    def read(self, node: fx.Node) -> None:
        """Reads one node; those before it in the graph are read."""
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
        elif call.op in ("cat", "pad", "flatten"):
            self._arrange(call)
        else:
            made = self._computed(call)
            if made is not None:
                self._own(node, *made)

    def _own(self, node: fx.Node, spans: Spans, dim: int) -> None:
        self.spans[node], self.dims[node] = spans, dim
        self._store(node)

    def _store(self, node: fx.Node) -> None:
        for tensor in example_tensors(node):
            self._stored[compat.storage_key(tensor)].add(node)

    def content(self, node: object, dim: int) -> Spans | None:
        """What a node holds along ``dim``; of one that nothing is known of, itself."""
        if not isinstance(node, fx.Node) or node in self._lost:
            return None
        view = self.views.get(node)
        if view is not None:
            owned = self.spans.get(view.owner)
            if owned is None or view.dim != dim:
                return None
            return owned._replace(pieces=algebra.part(owned.pieces, view.start, view.places, view.step))
        if node not in self.spans:
            tensor = example(node)
            if tensor is None or not 0 <= dim < tensor.ndim or not isinstance(tensor.shape[dim], int):
                return None
            if node in self._terms or tensor.shape[dim] == 0:
                return None
            self._own(node, algebra.steps(self._clones.get(node, node), tensor.shape[dim]), dim)
        return self.spans[node] if self.dims[node] == dim else None

    def _is_known(self, node: object) -> TypeGuard[fx.Node]:
        return node in self.views or node in self.spans

    def _dim(self, *nodes: object) -> int | None:
        """Time's dimension, where one of the nodes has one and all have as many dimensions."""
        found = [
            self.views[each].dim if each in self.views else self.dims[each] for each in nodes if self._is_known(each)
        ]
        ranks = {tensor.ndim for each in nodes if (tensor := example(each)) is not None}
        return found[0] if found and (len(ranks) == 1 or found[0] == _BATCHED) else None

    def _view(self, node: fx.Node, of: fx.Node, dim: int, start: int, count: int, step: int) -> None:
        below = self.views.get(of)
        if below is not None:
            start, step, of = below.start + start * below.step, step * below.step, below.owner
        self.views[node] = _View(of, dim, start, count, step)

    def _slice(self, call: Call) -> None:
        found = _sliced(call)
        if found is None or self.content(call["input"], found[0]) is None:
            return
        self._view(call.node, call["input"], *found)
        content = self.content(call.node, found[0])
        if content is not None and self._is_whole(content, found[0]):  # what was padded is cut off
            self._continued.add(self._owner(call.node))
            del self.views[call.node]
            self._own(call.node, content, found[0])

    def _clone(self, node: fx.Node, source: fx.Node) -> None:
        dim = self._dim(source)
        if dim is None:
            self._clones[node] = self._clones.get(source, source)
            self._store(node)
            self.used.add(node)
        elif (content := self.content(source, dim)) is not None:
            self._own(node, content, dim)

    def _map(self, node: fx.Node, source: fx.Node, dim: int, opens: bool) -> None:
        inside, outside = (_BATCHED, dim) if opens else (dim, _BATCHED)
        content = self.content(source, outside)
        if content is None:
            return
        if opens or source in self.views:
            self._view(node, source, inside, 0, algebra.length(content.pieces), 1)
            self.views[node] = self.views[node]._replace(dim=inside)
        else:
            self._own(node, content, inside)
            self._continued.add(source)

    def _arrange(self, call: Call) -> None:
        """Joins, with zeros and ones as well, and what is interleaved."""
        if call.op == "flatten":
            self._interleave(call)
            return
        node, tensor = call.node, example(call.node)
        if tensor is None:
            return
        parts: list[algebra.Pieces | fx.Node]
        if call.op == "pad":
            padded = _padded(call, tensor.ndim)
            if padded is None:
                return
            dim, front, amount, fill = padded
            filled = (Piece(amount, fill, fill),)
            parts = [filled, call["input"]] if front else [call["input"], filled]
        else:
            values, dim = call["tensors"], call.get("dim", 0)
            if not isinstance(values, (tuple, list)) or not isinstance(dim, int):
                return
            dim %= tensor.ndim
            if not any(map(self._is_known, values)):
                return
            parts = [self._filled(value, dim) or value for value in values]
        contents = [part if isinstance(part, tuple) else self.content(part, dim) for part in parts]
        kinds = [each for each in contents if isinstance(each, Spans)]
        if None in contents or not kinds:
            return
        kind = algebra.kind(kinds)
        if kind is None:
            return
        pieces = [each.pieces if isinstance(each, Spans) else each for each in contents if each is not None]
        self._own(node, Spans(*kind, algebra.joined(piece for each in pieces for piece in each)), dim)
        self._continued.update(map(self._owner, parts))
        self.used.update(part for part in call.node.all_input_nodes if not self._is_known(part))

    def _filled(self, node: fx.Node, dim: int) -> algebra.Pieces | None:
        """A tensor of zeros, or of ones."""
        tensor = example(node)
        if tensor is None or node in self._lost or not isinstance(tensor.shape[dim], int):
            return None
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        call = read(node)
        if call is not None and call.op in ("full", "full_like"):
            fill = {0: ZERO, 1: OTHER}.get(call["fill_value"])
        else:
            fill = ZERO if name in _ZEROS else OTHER if name in _ONES else None
        return None if fill is None else (Piece(tensor.shape[dim], fill, fill),)

    def _interleave(self, call: Call) -> None:
        stack = read(call["input"])
        if stack is None or stack.op != "stack" or len(stack["tensors"]) != 2:
            return
        dim = call.get("start_dim", 0)
        contents = [self.content(each, dim) for each in stack["tensors"] if self._is_known(each)]
        if len(contents) != 2 or call.get("end_dim") != dim + 1 or stack.get("dim", 0) != dim + 1:
            return
        one, other = contents
        if one is None or other is None:
            return
        kind, pieces = algebra.kind((one, other)), algebra.interleaved(one.pieces, other.pieces)
        if kind is None or pieces is None or algebra.length(one.pieces) != algebra.length(other.pieces):
            return
        self._own(call.node, Spans(*kind, pieces), dim)
        self._continued.update(map(self._owner, stack["tensors"]))
        self.used.add(stack.node)

    def _owner(self, node: Any) -> Any:
        return self.views[node].owner if node in self.views else node

    def _computed(self, call: Call) -> tuple[Spans, int] | None:
        """Products and sums."""
        if call.op == "mul":
            dim = self._dim(call["input"], call["other"])
            factors = None if dim is None else [self.content(each, dim) for each in (call["input"], call["other"])]
            if dim is None or factors is None or factors[0] is None or factors[1] is None:
                return None
            if not written(call.node):
                self._terms[call.node] = (factors[0], factors[1])
                self._store(call.node)
            self._continued.update(map(self._owner, (call["input"], call["other"])))
            made = algebra.product(factors[0], factors[1])
            return None if made is None else (made, dim)
        if call.op == "add" and call.get("alpha", 1) == 1:
            for one, term in ((call["input"], call["other"]), (call["other"], call["input"])):
                if term in self._terms and (dim := self._dim_of_sum(one, term)) is not None:
                    made = self._state(one, self._terms[term], dim)
                    if made is not None:
                        return made, dim
        if call.op == "addcmul" and call.get("value", 1) == 1:
            operands = call["input"], call["tensor1"], call["tensor2"]
            dim = self._dim(*operands)
            factors = None if dim is None else [self.content(each, dim) for each in operands[1:]]
            if dim is not None and factors is not None and factors[0] is not None and factors[1] is not None:
                made = self._state(operands[0], (factors[0], factors[1]), dim)
                if made is not None:
                    self._continued.update(map(self._owner, operands))
                return None if made is None else (made, dim)
        return None

    def _dim_of_sum(self, one: object, term: fx.Node) -> int | None:
        product = read(term)
        assert product is not None
        return self._dim(one, product["input"], product["other"])

    def _state(self, node: object, factors: tuple[Spans, Spans], dim: int) -> Spans | None:
        behind = self.content(node, dim)
        if behind is None:
            return None
        made = algebra.state(behind, *factors) or algebra.state(behind, *factors[::-1])
        if made is not None:
            self._continued.add(self._owner(node))
        return made

    # --------------------------------------------------------------------------------------------------------- writes

    def _write(self, node: fx.Node, targets: list[fx.Node]) -> None:
        target = targets[0]
        owner, call = self._owner(target), read(node)
        new: tuple[int, Spans] | None = None
        if (len(targets) == 1 and self._is_known(target)) or (call is not None and call.op == "setitem"):
            new = self._new(call, node, target)
            owner = self._owner(target)
        old = self.spans.get(owner)
        spans = None if new is None or old is None else algebra.written(old, *new)
        for key in {compat.storage_key(tensor) for each in targets for tensor in example_tensors(each)}:
            for each in self._stored[key]:
                self._terms.pop(each, None)
                if each is not owner:
                    self._lose(each)
        if spans is None:
            self._lose(owner)
            return
        self.spans[owner] = spans
        self._continued.discard(owner)
        self.writes[owner].append(node)
        self.used.add(node)

    def _new(self, call: Call | None, node: fx.Node, target: fx.Node) -> tuple[int, Spans] | None:
        """Where a write begins, and what is there then."""
        view: _View | None
        if call is not None and call.op == "setitem":
            found = _sliced(Call("getitem", node, {"input": target, "index": call["index"]}))
            if found is None or self.content(target, found[0]) is None:
                return None
            self._view(node, target, *found)
            view, value = self.views.pop(node), self.content(call["value"], found[0])
        else:
            dim = self._dim(target)
            content = None if dim is None else self.content(target, dim)
            if dim is None or content is None:
                return None
            view = self.views.get(target, _View(target, dim, 0, algebra.length(content.pieces), 1))
            self.views[node] = view  # what a write in place returns
            if node.target == "copy_":
                value = self.content(node.args[1], dim)
            else:
                computed = None if call is None else self._computed(call)
                value = None if computed is None else computed[0]
        if value is None or view.step != 1 or algebra.length(value.pieces) != view.places:
            return None
        return view.start, value

    def _lose(self, node: fx.Node) -> None:
        self.spans.pop(node, None)
        self._lost.add(node)


# --------------------------------------------------------------------------------------------------------------- slices


def _sliced(call: Call) -> tuple[int, int, int, int] | None:
    """Dimension, first place, how many, and step, if of one dimension alone a part is taken."""
    tensor = example(call["input"])
    if tensor is None or not isinstance(call["input"], fx.Node):
        return None
    if call.op == "getitem":
        entries = _entries(call["index"], tensor.ndim)
        if entries is None:
            return None
        cut = [dim for dim, entry in enumerate(entries) if entry != slice(None)]
        if len(cut) != 1:
            return None
        dim, taken = cut[0], entries[cut[0]]
    elif call.op == "narrow":
        dim, start, count = call["dim"], call["start"], call["length"]
        if not isinstance(start, int) or not isinstance(count, int) or start < 0:
            return None
        taken = slice(start, start + count)
    else:
        dim = call.get("dim", 0)
        taken = slice(call.get("start"), call.get("end"), call.get("step"))
    dim %= tensor.ndim
    bounds = (taken.start, taken.stop, taken.step)
    if not isinstance(tensor.shape[dim], int) or not all(each is None or isinstance(each, int) for each in bounds):
        return None
    places = range(tensor.shape[dim])[taken]
    return (dim, places.start, len(places), places.step) if places.step > 0 and len(places) else None


def _entries(index: Any, ndim: int) -> list[slice] | None:
    entries = list(flat(index)) if isinstance(index, tuple) else [index]
    places = [place for place, entry in enumerate(entries) if entry is Ellipsis]
    if places:
        entries[places[0] : places[0] + 1] = [slice(None)] * (ndim - len(entries) + 1)
    entries += [slice(None)] * (ndim - len(entries))
    return entries if all(isinstance(entry, slice) for entry in entries) else None


def _padded(call: Call, ndim: int) -> tuple[int, bool, int, int] | None:
    """Dimension, whether in front, how many places, and what they hold."""
    amounts = list(call["pad"])
    places = [place for place, amount in enumerate(amounts) if amount != 0]
    if call.get("mode", "constant") != "constant" or len(places) != 1 or not isinstance(amounts[places[0]], int):
        return None
    value = call.get("value")
    if amounts[places[0]] < 0 or value not in (None, 0, 1):
        return None
    return ndim - 1 - places[0] // 2, places[0] % 2 == 0, amounts[places[0]], OTHER if value == 1 else ZERO


# ------------------------------------------------------------------------------------------------------ the whole of it


def _site(node: fx.Node, reader: _Reader, region: Region, rule: str) -> WholeSite | Miss:
    spans, dim = reader.spans[node], reader.dims[node]
    assert spans.gate is not None
    assert spans.input is not None

    def miss(reason: str) -> Miss:
        return Miss(rule, node, reason, 1, node, qualified_name(node))

    steps, reach = algebra.length(spans.pieces), algebra.reach(spans)
    if reach < steps:
        return miss(
            f"doubling in {reach.bit_length() - 1} rounds reaches back {reach} of {steps} steps: a state has a window, "
            "and is no recurrence; go on until the reach is the length"
        )
    nodes = reader.nodes_of(node)
    writes = [each for each in nodes if written(each)]
    last = max(writes, key=region.order.__getitem__, default=None)
    if last is not None:
        for each in nodes:
            for user in each.users:
                if user not in nodes and (each is not node or region.order[user] < region.order[last]):
                    return miss(
                        f"{user.name} uses {each.name}, which the doubling writes into; use a copy, or its result"
                    )

    def kept(recurrence: Recurrence, steps: int) -> tuple[Stage, ...]:
        return doubled(recurrence, steps, (steps - 1).bit_length())

    gate, input = (spans.gate, _itself), (spans.input, _itself)
    return whole_site(node, gate, input, dim, frozenset(nodes), kept, region, rule, last)


def _itself(value: Expression) -> Expression:
    return value
