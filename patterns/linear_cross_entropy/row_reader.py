"""Reading a scalar that is a sum over rows or groups of rows: from its node back to the statistics, into a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from structfly.compat import storage_key
from structfly.patterns.head.gradients import carries_gradient
from structfly.patterns.linear_cross_entropy.consumers import StatisticForm
from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.patterns.linear_cross_entropy.picks import is_split, read_picks
from structfly.patterns.linear_cross_entropy.program_writer import ProgramWriter
from structfly.patterns.linear_cross_entropy.row_axes import OfReshape, part_of
from structfly.patterns.linear_cross_entropy.row_consumers import RowConsumer
from structfly.patterns.linear_cross_entropy.row_loss import NoRowLoss, RowLoss
from structfly.patterns.linear_cross_entropy.row_pointwise import RowPointwise
from structfly.patterns.linear_cross_entropy.row_root import common_scalar, nodes_between
from structfly.patterns.linear_cross_entropy.row_sums import RowSums
from structfly.patterns.linear_cross_entropy.row_values import NoProgramError, RowValue, reshaped_rows
from structfly.rewriter.calls import Call, read
from structfly.rewriter.linear import changes_dtype
from structfly.rewriter.region import Region, example, example_of, example_tensors
from structfly.rewriter.views import PICKS, RESHAPES
from structfly.rewriter.writes import writes_in, written

# What must be absent, or have this value, for a call to mean its operation.
_PLAIN = {"alpha": 1, "rounding_mode": None, "beta": 1, "threshold": 20, "inplace": False, "dtype": None, "out": None}
_COPIES = ("contiguous", "clone")

End = tuple[fx.Node, LossForm | StatisticForm]


def read_row_loss(ends: Sequence[End], choices: Mapping[int, int], region: Region) -> RowLoss | NoRowLoss:
    """The scalar that differentiated statistics end in, as a program.

    Args:
        ends: the consumers' anchors.
        choices: the column of ``chosen`` of each consumer that has one, by its place in ``ends``.
    """
    root = common_scalar([end for end, _ in ends if carries_gradient(end, region)], region)
    if root is None:
        return NoRowLoss("D", "values of rows that are differentiated do not end in one scalar")
    consumers = {end: RowConsumer(end, form, choices.get(place)) for place, (end, form) in enumerate(ends)}
    try:
        return _Reader(consumers, root, region).read()
    except NoProgramError as failure:
        return failure.why


class _Reader:
    """Reads the nodes from the consumers to the root, in the order of the graph."""

    def __init__(self, consumers: Mapping[fx.Node, RowConsumer], root: fx.Node, region: Region) -> None:
        self._consumers, self._root, self._region = consumers, root, region
        self._nodes = nodes_between(consumers, root, region)
        self._rows = next(consumers[node] for node in self._nodes if node in consumers).axes()
        self._known: dict[fx.Node, RowValue] = {}
        self._writer = ProgramWriter()
        self._sums = RowSums(self._rows, self._writer)
        self._pointwise = RowPointwise(self._known, self._rows, self._sums, self._writer)

    def read(self) -> RowLoss:
        self._refuse_writes()
        for node in self._nodes:
            if node in self._consumers:
                self._known[node] = self._consumers[node].value(self._rows, self._writer)
            elif not is_split(node):
                self._known[node] = self._node(node)
        root, value = self._root, self._known[self._root]
        if not value.summed and any(value.dims):
            raise NoProgramError("D", f"{root.name} is not a sum over rows")
        if not value.live:
            raise NoProgramError("D", f"{root.name} has no gradient in the statistics")
        program = self._writer.text(value.token, self._rows.inner)
        nodes = tuple(node for node in self._nodes if node not in self._consumers)
        return RowLoss(root, program, self._rows, self._writer.operands, value.terms, nodes)

    # ------------------------------------------------------------------------------------------- memory

    def _refuse_writes(self) -> None:
        """A write through another tensor into the memory of a value would pass the program by."""
        memory = {storage_key(tensor): node for node in self._nodes for tensor in example_tensors(node)}
        for _, writer, target in writes_in(self._region):
            for tensor in example_tensors(target):
                node = memory.get(storage_key(tensor))
                if node is not None and writer not in self._nodes:
                    raise NoProgramError("D", f"{writer.name} writes into the memory of {node.name}")

    def _has_alias(self, target: fx.Node, node: fx.Node) -> bool:
        """Whether something else that shares the memory of ``target`` was made before ``node`` writes into it."""
        order, value = self._region.order, example_of(target)
        earlier = (other for other in self._nodes if order[other] < order[node] and other is not target)
        shared = [tensor for other in earlier for tensor in example_tensors(other)]
        return any(storage_key(tensor) == storage_key(value) for tensor in shared)

    # ------------------------------------------------------------------------------------------- one node

    def _node(self, node: fx.Node) -> RowValue:
        call, result = read(node), example(node)
        if call is None or result is None:
            raise NoProgramError("D", f"{node.name} is not an operation on values of single rows")
        logits = next(iter(self._consumers.values())).form.logits
        if result.dtype == torch.float64 != example_of(logits).dtype:
            raise NoProgramError("D", f"{node.name} is float64, which the program does not compute in")
        for target in written(node):
            if target not in self._nodes or len(target.users) > 1 or self._has_alias(target, node):
                raise NoProgramError("D", f"{node.name} writes into {target.name}, which something else uses as well")
        for name, plain in _PLAIN.items():
            given = call.get(name, plain)
            if given != plain and not (name == "dtype" and result.is_floating_point()):
                raise NoProgramError("D", f"{node.name} with {name}={given} is not read for values of single rows")
        value = self._value(call)
        if value.live and not result.requires_grad and not value.flag:
            if self._sums.over_all(value):
                raise NoProgramError("D", f"{node.name} takes a sum over rows out of the gradient")
            value = self._sums.whole(value, node) if value.summed else value
            return replace(value, token=self._writer.emit("detach", value.token), live=False)
        return value

    def _value(self, call: Call) -> RowValue:
        if call.op in ("sum", "mean"):
            return self._sums.of(call, self._of(call["input"], call))
        if call.op in RESHAPES:
            value, node = self._of(call["input"], call), call.node
            source = value.dims
            sizes = example_of(node).shape
            return replace(value, dims=reshaped_rows(node, source, sizes, lambda dim: OfReshape(node, source, dim)))
        if call.op in _COPIES or changes_dtype(call):
            return self._cast(call, self._of(call["input"], call))
        if call.op in PICKS:
            return self._picked(call)
        return self._pointwise.of(call)

    def _of(self, source: fx.Node, call: Call) -> RowValue:
        """What is known of the value that ``call`` takes."""
        value = self._known.get(source)
        if value is None:
            raise NoProgramError("D", f"{call.node.name} takes values of rows in an unknown place")
        return value

    def _cast(self, call: Call, value: RowValue) -> RowValue:
        before, after = example_of(call["input"]), example_of(call.node)
        if after.is_floating_point() and after.dtype.itemsize < 2:
            raise NoProgramError("D", f"{call.node.name} rounds values of rows to {after.dtype}")
        if value.flag and after.is_floating_point():
            return replace(value, token=self._writer.emit("number", value.token), flag=False)
        if before.is_floating_point() != after.is_floating_point():
            raise NoProgramError("D", f"{call.node.name} casts values of rows from {before.dtype} to {after.dtype}")
        return value

    def _picked(self, call: Call) -> RowValue:
        """One of equal parts of the rows, or a place among few."""
        pick = read_picks(call)
        if pick is None:
            raise NoProgramError("D", f"{call.node.name} picks rows in a way that is not read")
        value = self._of(pick.source, call)
        dims, token = list(value.dims), value.token
        for each in pick.intervals:
            part = part_of(dims[each.dim], each.size, each.start, each.count, each.step)
            if part is None:
                raise NoProgramError("D", f"{call.node.name} does not cut the rows in equal parts")
            token = self._writer.emit("part", token, part.axis, str(part.place))
            dims[each.dim] = part.rest
        left = tuple(() if dim is None else dims[dim] for dim in pick.result)
        return replace(value, token=token, dims=left)
