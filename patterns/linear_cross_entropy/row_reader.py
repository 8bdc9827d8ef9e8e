"""Reading a scalar that is a sum over rows or groups of rows: from its node back to the statistics, into a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from structfly.compat import expression, storage_key
from structfly.patterns.head.gradients import carries_gradient, may_ask_for_gradients
from structfly.patterns.head.logits import example_of
from structfly.patterns.linear_cross_entropy.class_values import shape_of
from structfly.patterns.linear_cross_entropy.consumers import StatisticForm
from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.patterns.linear_cross_entropy.picks import PICKS, is_split, read_picks
from structfly.patterns.linear_cross_entropy.row_axes import (
    Axis,
    Dims,
    OfConsumer,
    OfReshape,
    RowAxes,
    Size,
    leaves,
    leaves_of,
    part_of,
    reshaped,
)
from structfly.patterns.linear_cross_entropy.row_loss import NoRowLoss, Operand, RowLoss, Term
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.linear import changes_dtype
from structfly.rewriter.region import Region, example, example_tensors, needs_gradient
from structfly.rewriter.writes import writes_in, written

# Canonical call -> the program's operation, and the call's operands in its order.
_POINTWISE: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: (name, ("input", "other")) for name in ("add", "sub", "mul", "div", "pow")},
    **{name: (name, ("input", "other")) for name in ("gt", "ge", "lt", "le", "eq", "ne", "and", "or")},
    **{name: (name, ("input",)) for name in ("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square")},
    **{name: (name, ("input",)) for name in ("reciprocal", "tanh", "sigmoid", "logsigmoid", "relu", "detach", "not")},
    "minimum": ("min", ("input", "other")),
    "maximum": ("max", ("input", "other")),
    "softplus": ("softplus", ("input",)),
    "where": ("where", ("condition", "input", "other")),
    "masked_fill": ("where", ("mask", "value", "input")),
}
# What must be absent, or have this value, for a call to mean its operation.
_PLAIN = {"alpha": 1, "rounding_mode": None, "beta": 1, "threshold": 20, "inplace": False, "dtype": None, "out": None}
_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_COPIES = ("contiguous", "clone")


End = tuple[fx.Node, LossForm | StatisticForm]


def read_row_loss(ends: Sequence[End], choices: Mapping[int, int], region: Region) -> RowLoss | NoRowLoss:
    """The scalar that differentiated statistics end in, as a program.

    Args:
        ends: the consumers' anchors.
        choices: the column of ``chosen`` of each consumer that has one, by its place in ``ends``.
    """
    root = _common_scalar([end for end, _ in ends if carries_gradient(end, region)], region)
    if root is None:
        return NoRowLoss("D", "values of rows that are differentiated do not end in one scalar")
    reader = _Reader(ends, choices, region, root)
    try:
        return reader.read()
    except _NoProgramError as failure:
        return failure.why


def _common_scalar(ends: Sequence[fx.Node], region: Region) -> fx.Node | None:
    """The first scalar that all gradients of ``ends`` come through."""
    order = region.order
    reached, pending = set(ends), list(ends)
    while pending:
        for user in pending.pop().users:
            if user not in reached and carries_gradient(user, region):
                reached.add(user)
                pending.append(user)
    last_user = -1
    for node in sorted(reached, key=order.__getitem__):
        if last_user <= order[node] and order[node] >= max(map(order.__getitem__, ends)):
            value = example(node)
            if value is not None and value.ndim == 0 and value.is_floating_point():
                return node
        for user in node.users:
            if may_ask_for_gradients(user, region):
                return None
            if user in reached:
                last_user = max(last_user, order[user])
    return None


class _NoProgramError(Exception):
    def __init__(self, coefficient_class: str, reason: str) -> None:
        super().__init__(reason)
        self.why = NoRowLoss(coefficient_class, reason)


@dataclass(frozen=True)
class _Value:
    """A value that depends on statistics.

    Attributes:
        token: how the program calls it; for a sum, its summands.
        dims: its axes.
        over: for a sum, the axes that it goes over, which its summands have besides.
        summed: it is a sum over rows.
        live: gradients come back through it.
        flag: it is a truth value.
        terms: what is added to a sum.
    """

    token: str
    dims: Dims
    over: tuple[Axis, ...] = ()
    summed: bool = False
    live: bool = True
    flag: bool = False
    terms: tuple[Term, ...] = ()

    @property
    def axes(self) -> frozenset[Axis]:
        """Those of the value, or of a sum's summands."""
        return frozenset((*leaves_of(self.dims), *leaves(self.over)))


@dataclass
class _Reader:
    """Reads from the root back to the consumers, writing instructions on the way out."""

    ends: Sequence[End]
    choices: Mapping[int, int]
    region: Region
    root: fx.Node
    rows: RowAxes | None = None
    instructions: list[tuple[str | Axis, ...]] = field(default_factory=list)
    operands: list[Operand] = field(default_factory=list)
    known: dict[fx.Node, _Value] = field(default_factory=dict)

    def read(self) -> RowLoss:
        depends = self._dependent()
        self._refuse_writes(depends)
        for node in depends:
            if node in dict(self.ends):
                self.known[node] = self._end(node)
            elif not is_split(node):
                self.known[node] = self._node(node, depends)
        value = self.known[self.root]
        if not value.summed and any(value.dims):
            raise _NoProgramError("D", f"{self.root.name} is not a sum over rows")
        if not value.live:
            raise _NoProgramError("D", f"{self.root.name} has no gradient in the statistics")
        if not value.token.startswith("%") or value.token != f"%{len(self.instructions) - 1}":
            self._emit("mul", value.token, "1.0")
        anchors = dict(self.ends)
        nodes = tuple(node for node in depends if node not in anchors)
        assert self.rows is not None
        return RowLoss(self.root, self._program(self.rows.inner), self.rows, tuple(self.operands), value.terms, nodes)

    def _program(self, inner: tuple[Axis, ...]) -> str:
        """The instructions, with a group's dimensions counted from 1."""
        words = (
            (str(inner.index(word) + 1) if isinstance(word, Axis) else word for word in line)
            for line in self.instructions
        )
        return ";".join(map(" ".join, words))

    def _refuse_writes(self, depends: Sequence[fx.Node]) -> None:
        """A write through another tensor into the memory of a value would pass the program by."""
        memory = {storage_key(tensor): node for node in depends for tensor in example_tensors(node)}
        for _, writer, target in writes_in(self.region):
            for tensor in example_tensors(target):
                node = memory.get(storage_key(tensor))
                if node is not None and writer not in depends:
                    raise _NoProgramError("D", f"{writer.name} writes into the memory of {node.name}")

    def _dependent(self) -> list[fx.Node]:
        """The nodes that the root needs and that depend on a consumer, in the order of the graph."""
        anchors, needed, pending = dict(self.ends), {self.root}, [self.root]
        while pending:
            node = pending.pop()
            if node in anchors:
                continue
            fresh = [operand for operand in node.all_input_nodes if operand not in needed]
            needed.update(fresh)
            pending.extend(fresh)
        depends: set[fx.Node] = set()
        ordered = sorted(needed, key=self.region.order.__getitem__)
        for node in ordered:
            if node in anchors or depends.intersection(node.all_input_nodes):
                depends.add(node)
        return [node for node in ordered if node in depends]

    # ------------------------------------------------------------------------------------------- consumers

    def _end(self, node: fx.Node) -> _Value:
        place = next(number for number, (end, _) in enumerate(self.ends) if end is node)
        form = self.ends[place][1]
        dims, summed = self._dims_of_end(node, form), False
        over: tuple[Axis, ...] = ()
        if isinstance(form, StatisticForm):
            token = self._statistic(form, place)
        else:
            token = "loss"
            if place in self.choices:
                token = self._emit("sub", "lse", f"chosen{self.choices[place]}")
                if form.ignore_index is not None:
                    token = self._emit("where", self._operand(Operand(loss=form, live=True)), token, "0.0")
            token = self._emit("neg", token) if form.negated else token
            summed = form.reduction != "none"
            if summed:
                dims, over = (), leaves_of(dims)
            if form.reduction == "mean":
                token = self._emit("div", token, self._operand(Operand(loss=form)))
        live = needs_gradient(node)
        if not live and token != "argmax":
            token = self._emit("detach", token)
        return _Value(token, dims, over, summed, live)

    def _dims_of_end(self, node: fx.Node, form: LossForm | StatisticForm) -> Dims:
        """The axes of a consumer's rows; the first consumer's are those of all rows."""
        sizes = list(example_of(form.target if isinstance(form, LossForm) else node).shape)
        if isinstance(form, LossForm) and form.target_dim is not None:
            del sizes[form.target_dim]
        if self.rows is None:
            dims = tuple(() if size == 1 else (Axis(size, OfConsumer(node, d)),) for d, size in enumerate(sizes))
            self.rows = RowAxes(leaves_of(dims))
            return dims
        return self._reshaped(node, (self.rows.given,), sizes, lambda dim: OfConsumer(node, dim))

    def _reshaped(
        self, node: fx.Node, source: Dims, sizes: Sequence[Size], origin: Callable[[int], OfConsumer | OfReshape]
    ) -> Dims:
        dims = reshaped(source, sizes, origin)
        if dims is None:
            raise _NoProgramError(
                "D", f"{node.name} has another shape of the rows, in which their places are not known"
            )
        return dims

    def _statistic(self, form: StatisticForm, place: int) -> str:
        if form.kind == "chosen":
            return f"chosen{self.choices[place]}"
        token = self._emit("sub", "lse", "entropy") if form.kind == "mean_logit" else form.kind
        return self._emit("neg", token) if form.negated else token

    # ------------------------------------------------------------------------------------------- one node

    def _node(self, node: fx.Node, depends: Collection[fx.Node]) -> _Value:
        call, result = read(node), example(node)
        if call is None or result is None:
            raise _NoProgramError("D", f"{node.name} is not an operation on values of single rows")
        if result.dtype == torch.float64 != example_of(self.ends[0][1].logits).dtype:
            raise _NoProgramError("D", f"{node.name} is float64, which the program does not compute in")
        for target in written(node):
            if target not in depends or len(target.users) > 1 or self._has_alias(target, node, depends):
                raise _NoProgramError("D", f"{node.name} writes into {target.name}, which something else uses as well")
        for name, plain in _PLAIN.items():
            given = call.get(name, plain)
            if given != plain and not (name == "dtype" and result.is_floating_point()):
                raise _NoProgramError("D", f"{node.name} with {name}={given} is not read for values of single rows")
        if call.op in ("sum", "mean"):
            value = self._sum(call, self._carrier(call))
        elif call.op in _RESHAPES:
            value = self._carrier(call)
            source = value.dims
            dims = self._reshaped(node, source, result.shape, lambda dim: OfReshape(node, source, dim))
            value = replace(value, dims=dims)
        elif call.op in _COPIES or changes_dtype(call):
            value = self._cast(call, self._carrier(call))
        elif call.op in PICKS:
            value = self._picked(call)
        else:
            value = self._pointwise(call)
        if value.live and not result.requires_grad and not value.flag:
            if self._over_all(value):
                raise _NoProgramError("D", f"{node.name} takes a sum over rows out of the gradient")
            value = self._whole(value) if value.summed else value
            return replace(value, token=self._emit("detach", value.token), live=False)
        return value

    def _class(self, call: Call) -> str:
        """C if sums over some rows go in, else D."""
        inputs = [node for node in call.node.all_input_nodes if node in self.known and self.known[node].summed]
        return "C" if any(shape_of(node) != () for node in inputs) else "D"

    def _has_alias(self, target: fx.Node, node: fx.Node, depends: Collection[fx.Node]) -> bool:
        """Whether something else that shares the memory of ``target`` was made before ``node`` writes into it."""
        order, value = self.region.order, example_of(target)
        earlier = (other for other in depends if order[other] < order[node] and other is not target)
        shared = [tensor for other in earlier for tensor in example_tensors(other)]
        return any(storage_key(tensor) == storage_key(value) for tensor in shared)

    def _carrier(self, call: Call) -> _Value:
        value = self.known.get(call["input"])
        if value is None:
            raise _NoProgramError("D", f"{call.node.name} takes values of rows in an unknown place")
        return value

    def _cast(self, call: Call, value: _Value) -> _Value:
        before, after = example_of(call["input"]), example_of(call.node)
        if after.is_floating_point() and after.dtype.itemsize < 2:
            raise _NoProgramError("D", f"{call.node.name} rounds values of rows to {after.dtype}")
        if value.flag and after.is_floating_point():
            return replace(value, token=self._emit("number", value.token), flag=False)
        if before.is_floating_point() != after.is_floating_point():
            raise _NoProgramError("D", f"{call.node.name} casts values of rows from {before.dtype} to {after.dtype}")
        return value

    def _sum(self, call: Call, value: _Value) -> _Value:
        source = example_of(call["input"])
        dims = flat(call["dim"]) if call.get("dim") is not None else tuple(range(source.ndim))
        if not all(isinstance(dim, int) for dim in dims):
            raise _NoProgramError("D", f"{call.node.name} goes over dimensions that are not constants")
        dims = tuple(sorted(dim % max(source.ndim, 1) for dim in dims)) if source.ndim else ()
        token = self._emit("number", value.token) if value.flag else value.token
        over = tuple(value.dims[dim] for dim in dims)
        keeps = bool(call.get("keepdim", False))
        left = tuple(() if dim in dims else axes for dim, axes in enumerate(value.dims) if keeps or dim not in dims)
        terms = value.terms
        if call.op == "mean":
            sizes = [source.shape[dim] for dim in dims]
            if all(isinstance(size, int) for size in sizes):
                count: str = repr(float(math.prod(sizes)))
            else:
                count = self._operand(Operand(dims=over, count=True))
            if terms:
                raise _NoProgramError("D", f"{call.node.name} is a mean of a sum to which something was added")
            token = self._emit("div", token, count)
        return _Value(token, left, (*value.over, *leaves_of(over)), summed=True, live=value.live, terms=terms)

    def _whole(self, value: _Value) -> _Value:
        """A sum over some rows as a value of its own: what it goes over is inside a group."""
        return replace(value, token=self._summed(value.token, value.over), over=(), summed=False)

    def _over_all(self, value: _Value) -> bool:
        """Whether it is a sum over all rows."""
        assert self.rows is not None
        return value.summed and set(self.rows.given).issubset(leaves(value.over))

    def _summed(self, token: str, over: Iterable[Axis]) -> str:
        assert self.rows is not None
        gone = leaves(over)
        for axis in self.rows.given:
            if axis not in gone:
                continue
            axis.inner = True
            token = self._emit("sum", token, axis)
        return token

    def _picked(self, call: Call) -> _Value:
        """One of equal parts of the rows, or a place among few."""
        pick = read_picks(call)
        if pick is None:
            raise _NoProgramError("D", f"{call.node.name} picks rows in a way that is not read")
        value = self.known.get(pick.source)
        if value is None:
            raise _NoProgramError("D", f"{call.node.name} takes values of rows in an unknown place")
        dims, token = list(value.dims), value.token
        for each in pick.intervals:
            part = part_of(dims[each.dim], each.size, each.start, each.count, each.step)
            if part is None:
                raise _NoProgramError("D", f"{call.node.name} does not cut the rows in equal parts")
            token = self._emit("part", token, part.axis, str(part.place))
            dims[each.dim] = part.rest
        left = tuple(() if dim is None else dims[dim] for dim in pick.result)
        return replace(value, token=token, dims=left)

    # ------------------------------------------------------------------------------------------- pointwise

    def _pointwise(self, call: Call) -> _Value:
        names: tuple[str, ...]
        if call.op == "clamp" and not any(isinstance(call.get(bound), fx.Node) for bound in ("min", "max")):
            operation, names = "clamp", ("input", "min", "max")
        elif call.op in ("min", "max") and isinstance(call.get("dim"), fx.Node):
            operation, names = call.op, ("input", "dim")
        elif call.op in _POINTWISE:
            operation, names = _POINTWISE[call.op]
        else:
            raise _NoProgramError(self._class(call), f"{call.node.name} is not an operation on values of single rows")
        given = [call.get(name) for name in names]
        values = [self.known.get(each) if isinstance(each, fx.Node) else None for each in given]
        found = [value for value in values if value is not None]
        if any(value.summed for value in found):
            try:
                return self._linear(call, operation, given, values)
            except _NoProgramError:
                if any(self._over_all(value) for value in found):
                    raise
            values = [self._whole(value) if value is not None and value.summed else value for value in values]
            found = [value for value in values if value is not None]
        if operation in ("and", "or", "not") and not all(value.flag for value in found):
            raise _NoProgramError("D", f"{call.node.name} works on the bits of numbers")
        dims = self._met(call, found)
        defaults = ("0.0", "-inf", "inf")
        tokens = [
            defaults[place] if each is None else self._token(call, each, value, dims)
            for place, (each, value) in enumerate(zip(given, values, strict=True))
        ]
        flag = example_of(call.node).dtype == torch.bool
        live = any(value.live for value in found) and not flag and operation != "detach"
        return _Value(self._emit(operation, *tokens), dims, live=live, flag=flag)

    def _met(self, call: Call, found: Sequence[_Value]) -> Dims:
        """The axes of what values make together; operands may spread it over an axis that is inside the groups."""
        shape = shape_of(call.node) or ()
        sizes = example_of(call.node).shape
        dims: list[tuple[Axis, ...]] = []
        for place in range(-len(shape), 0):
            there = {leaves(value.dims[place]) for value in found if -place <= len(value.dims)} - {()}
            if len(there) > 1:
                raise _NoProgramError("D", f"{call.node.name} takes rows in different places")
            dims.append(there.pop() if there else self._spread(call, sizes[place], found))
        every = leaves_of(tuple(dims))
        if len(set(every)) < len(every):
            raise _NoProgramError("D", f"{call.node.name} spreads values of rows over others")
        return tuple(dims)

    def _spread(self, call: Call, size: Size, found: Sequence[_Value]) -> tuple[Axis, ...]:
        """An axis of ``size`` along which no value changes yet."""
        if size == 1:
            return ()
        assert self.rows is not None
        used = frozenset[Axis]().union(*(value.axes for value in found))
        free = [axis for axis in self.rows.inner if axis not in used and expression(axis.size) == expression(size)]
        if not free:
            raise _NoProgramError("D", f"{call.node.name} spreads values of rows over others")
        return (free[0],)

    def _linear(self, call: Call, operation: str, given: Sequence[Any], values: Sequence[_Value | None]) -> _Value:
        """What may be done to sums."""
        node = call.node
        sums = [value for value in values if value is not None]
        if not all(value.summed for value in sums):
            raise _NoProgramError("D", f"{node.name} takes both values of single rows and a sum over rows")
        first = values[0]
        shape = shape_of(node)
        if operation == "neg" and first is not None:
            terms = tuple(term.then("mul", -1.0) for term in first.terms)
            return replace(first, token=self._emit("neg", first.token), terms=terms)
        if operation in ("add", "sub") and len(sums) == 2:
            return self._added(call, operation, sums)
        if len(sums) == 1 and operation in ("add", "sub") and shape == ():
            return self._with_term(operation, given, values)
        (value,) = sums[:1]
        operand = next((each for each, v in zip(given, values, strict=True) if v is None), None)
        plain = operation == "mul" or (operation == "div" and first is not None)
        carrier = given[0] if first is not None else given[1] if len(given) > 1 else None
        if len(sums) != 1 or not plain or operand is None or shape_of(carrier) != shape:
            raise _NoProgramError(self._class(call), f"{node.name} is not linear in a sum over rows")
        token = self._token(call, operand, None, value.dims)
        terms = tuple(term.then(operation, operand) for term in value.terms)
        return replace(value, token=self._emit(operation, value.token, token), terms=terms)

    def _added(self, call: Call, operation: str, sums: Sequence[_Value]) -> _Value:
        first, second = sums
        shapes = {shape_of(each) for each in (call.node, call["input"], call["other"])}
        one, other = first.axes, second.axes
        if shapes != {()} and (len(shapes) > 1 or leaves_of(first.dims) != leaves_of(second.dims) or one != other):
            raise _NoProgramError("C", f"{call.node.name} adds sums over different rows")
        terms = second.terms if operation == "add" else tuple(term.then("mul", -1.0) for term in second.terms)
        assert self.rows is not None
        both = [axis for axis in self.rows.given if axis in one and axis in other]
        tokens = [self._summed(value.token, value.axes.difference(both)) for value in sums]
        token = self._emit(operation, *tokens)
        dims = first.dims
        over = tuple(axis for axis in both if axis not in leaves_of(dims))
        return _Value(token, dims, over, True, first.live or second.live, terms=(*first.terms, *terms))

    def _with_term(self, operation: str, given: Sequence[Any], values: Sequence[_Value | None]) -> _Value:
        """A sum, and something else added to it or subtracted, or it from that."""
        place = 0 if values[0] is not None else 1
        value, other = values[place], given[1 - place]
        assert value is not None
        terms, token = value.terms, value.token
        if operation == "sub" and place == 1:
            token = self._emit("neg", token)
            terms = tuple(term.then("mul", -1.0) for term in terms)
        if not isinstance(other, fx.Node):
            raise _NoProgramError("D", "a number is added to a sum over rows")
        term = Term(other)
        return replace(
            value, token=token, terms=(*terms, term.then("mul", -1.0) if operation == "sub" and place == 0 else term)
        )

    # ------------------------------------------------------------------------------------------- writing

    def _token(self, call: Call, given: Any, value: _Value | None, dims: Dims) -> str:
        if value is not None:
            return value.token
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            return repr(float(given))
        if not isinstance(given, fx.Node):
            raise _NoProgramError("D", f"{call.node.name} takes {given!r}")
        tensor = example(given)
        if tensor is not None and tensor.requires_grad:
            raise _NoProgramError("D", f"{given.name}, an operand of {call.node.name}, needs a gradient itself")
        scalar = tensor is None or tensor.ndim == 0
        if tensor is None and not isinstance(given.meta.get("example_value"), (torch.SymInt, torch.SymFloat)):
            raise _NoProgramError("D", f"{given.name} is no tensor")
        return self._operand(Operand(given, None if scalar else dims))

    def _operand(self, operand: Operand) -> str:
        if operand not in self.operands:
            self.operands.append(operand)
        return f"r{self.operands.index(operand)}"

    def _emit(self, *words: str | Axis) -> str:
        self.instructions.append(words)
        return f"%{len(self.instructions) - 1}"
