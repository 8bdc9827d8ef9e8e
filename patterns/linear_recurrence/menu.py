"""The candidates: the graph as it is, or the op.

What moves is counted in numbers: the gate, the input and the output of a step in the forward, and in the backward gate,
state and gradients of output, gate and input.
"""

from __future__ import annotations

import sympy

from structfly.patterns.linear_recurrence.expressions import Operation
from structfly.patterns.linear_recurrence.recurrence import Recurrence
from structfly.patterns.linear_recurrence.site import RecurrenceSite
from structfly.records import Candidate, Cost, DeviceProfile, Menu, Stage
from structfly.records.cost import Expression

_FORWARD, _BACKWARD = 3, 5
_FUSED = 64  # torch._inductor.config.max_fusion_size


def recurrence_menu(site: RecurrenceSite, profile: DeviceProfile) -> Menu:
    """Costs of leaving the graph alone and of the op."""
    fused = tuple(stage for each in site.recurrences for stage in _fused(each, site.steps))
    op = Cost(fused, opaque_calls=sum(1 + each.gradient for each in site.recurrences))
    return Menu(
        (Candidate("left alone", Cost(site.kept), rewrites=False), Candidate("one op, parallel over time", op)),
        peak_limit=profile.workspace_cap,
        settled=site.settled,
    )


def _fused(recurrence: Recurrence, steps: Expression) -> tuple[Stage, ...]:
    """The op's kernels, and those that make the gate and the input."""
    step = recurrence.step
    fused = _passes(recurrence, steps, 1)
    made = sum(isinstance(each, Operation) for each in (step.gate, step.input, step.input_gate))
    return fused + (Stage(0, 2 * made * _moved(recurrence, steps)),) * len(fused) if made else fused


def unrolled(recurrence: Recurrence, steps: int, operations: int, *, picked: bool) -> tuple[Stage, ...]:
    """The kernels of an unrolled loop: Inductor fuses at most so many operations, and they run one after another.

    Where slices are ``picked`` by an index, the gradient of each is as large as the whole tensor, with zeros at other
    steps, and the tensor's is the sum of as many as there are steps.
    """
    passes = _passes(recurrence, steps, -(-operations // _FUSED))
    if picked and recurrence.gradient:
        return (*passes, Stage(0, steps * _moved(recurrence, steps)))
    return passes


def one_by_one(recurrence: Recurrence, steps: Expression) -> tuple[Stage, ...]:
    """The kernels of a loop that runs at run time, one a step."""
    return _passes(recurrence, steps, steps)


def doubled(recurrence: Recurrence, steps: int, rounds: int) -> tuple[Stage, ...]:
    """The kernels of a recurrence by doubling: a round reads gates and states, each twice, and writes both; its
    backward moves twice as much."""
    moved = 6 * _moved(recurrence, steps)
    return tuple(Stage(0, count * moved, rounds) for count in ((1, 2) if recurrence.gradient else (1,)))


def cumulative(recurrence: Recurrence, steps: int) -> tuple[Stage, ...]:
    """The kernels of a recurrence by cumulative sums: two scans and what is done to them read five numbers a step and
    channel and write three; the backward has as many scans again, and moves twice as much."""
    moved = 8 * _moved(recurrence, steps)
    return tuple(Stage(0, count * moved, 3) for count in ((1, 2) if recurrence.gradient else (1,)))


def multiplied(recurrence: Recurrence, steps: int, *, weights: Expression) -> tuple[Stage, ...]:
    """The kernels of a product with the matrix of all gates' products, of so many numbers: one makes it, and one takes
    it; the backward is four times as much."""
    dtype = recurrence.like.dtype
    made = Stage(0, weights * dtype.itemsize)
    moved = weights * dtype.itemsize + 2 * _moved(recurrence, steps)
    product = Stage(2 * recurrence.numbers * steps**2, moved, dtype=dtype, rows=sympy.Min(steps, recurrence.numbers))
    return (made, product) * (5 if recurrence.gradient else 1)


def _passes(recurrence: Recurrence, steps: Expression, kernels: Expression) -> tuple[Stage, ...]:
    moved = _moved(recurrence, steps) / kernels
    counts = (_FORWARD, _BACKWARD) if recurrence.gradient else (_FORWARD,)
    return tuple(Stage(0, count * moved, kernels) for count in counts)


def _moved(recurrence: Recurrence, steps: Expression) -> Expression:
    return recurrence.numbers * steps * recurrence.like.dtype.itemsize
