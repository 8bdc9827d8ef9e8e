"""torch's own scans: ``associative_scan`` of gates and inputs, and ``scan`` whose body is a step.

Their bodies are graphs, and read as a step of a loop is; their sequences are whole already.  They are replaced before
torch differentiates them.  Its gradient of ``associative_scan`` is made for one leaf at a time (torch 2.11 to 2.13,
pytorch#172568): of the pairs (a, b) it leaves out what a does to the states, and it makes a matrix of steps by steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
from torch import fx

from structfly import compat
from structfly.lowering.linear_recurrence.op import DEVICES
from structfly.patterns.linear_recurrence.affine import Affine, Obstacle, read_affine
from structfly.patterns.linear_recurrence.combining import Combined
from structfly.patterns.linear_recurrence.expressions import (
    ZERO,
    Expression,
    Part,
    Shared,
    State,
    depends,
)
from structfly.patterns.linear_recurrence.folding import fold
from structfly.patterns.linear_recurrence.lifting import why_not_lifted
from structfly.patterns.linear_recurrence.menu import one_by_one
from structfly.patterns.linear_recurrence.operations import expressions
from structfly.patterns.linear_recurrence.recurrence import DTYPES, Recurrence
from structfly.patterns.linear_recurrence.site import RecurrenceSite
from structfly.records import Miss, Stage
from structfly.rewriter.calls import flat, read
from structfly.rewriter.region import Region, bodies, example, example_tensors, qualified_name
from structfly.rewriter.writes import unused

KINDS = ("associative_scan", "scan")


@dataclass(frozen=True)
class ScanSite(RecurrenceSite):
    """A scan whose state is affine in the state before.

    Attributes:
        parts: the sequences, time first.
        by_place: recurrences by the place of what the scan returns: of an associative scan, whose are all states; else
            the last state.
        outputs: what else the scan returns, by its place: all steps of an expression of the state.
        associative: whether it is an associative scan.
        unseen: what is made of what the scan returns, and used by nobody.
    """

    parts: tuple[fx.Node, ...]
    by_place: dict[int, Recurrence]
    outputs: dict[int, Expression]
    associative: bool
    unseen: frozenset[fx.Node]

    @property
    def recurrences(self) -> tuple[Recurrence, ...]:
        return tuple(self.by_place.values())

    @property
    def settled(self) -> str:
        return _WRONG if self.associative and any(each.gradient for each in self.recurrences) else ""


class Body(NamedTuple):
    """The graph that a scan runs."""

    inputs: list[fx.Node]
    outputs: list[fx.Node]


def read_scan(node: fx.Node, region: Region, rule: str) -> ScanSite | Miss:
    """The site that a scan is, or why it is none."""
    kind = compat.subgraph_kind(node)
    try:
        return (_associative if kind == "associative_scan" else _sequential)(node, region, rule)
    except _NoRecurrence as found:
        return Miss(rule, node, f"{kind}: {found}", 1, node, qualified_name(node))


class _NoRecurrence(Exception):  # noqa: N818  it carries a reason through the reading
    pass


def _body(node: fx.Node, region: Region) -> Body:
    (body,) = bodies(region.owner, node)
    inputs = list(body.graph.find_nodes(op="placeholder"))
    (output,) = body.graph.find_nodes(op="output")
    return Body(inputs, list(output.args[0]))


def _affine(value: Expression) -> Affine:
    step = read_affine(value)
    if isinstance(step, Obstacle):
        raise _NoRecurrence(step.reason)
    if step.gate == ZERO:
        raise _NoRecurrence("a step does not depend on the state before it")
    if step.reset is not None:
        raise _NoRecurrence("a step that resets the state; multiply the state by a mask")
    for part in (step.gate, step.input):
        _check_lifted(part)
    return step


def _check_lifted(value: Expression) -> None:
    reason = why_not_lifted(value)
    if reason is not None:
        raise _NoRecurrence(reason[1])


def _sequential(node: fx.Node, region: Region, rule: str) -> ScanSite:
    """``scan``: (states, x's of a step, lifted values) -> (new states, outputs of the step)."""
    arguments: Any = node.args
    _, initial, sequences, lifted = arguments
    if len(initial) != 1 or not sequences:
        raise _NoRecurrence(f"{len(initial)} states and {len(sequences)} sequences; a recurrence has one and some")
    inputs, outputs = _body(node, region)
    count = len(sequences)
    leaves: dict[fx.Node, Expression] = {inputs[0]: State()}
    leaves.update({each: Part(number) for number, each in enumerate(inputs[1 : 1 + count])})
    leaves.update({each: Shared(value) for each, value in zip(inputs[1 + count :], lifted, strict=True)})
    state, *rest = outputs
    step = _affine(expressions(leaves)(state))
    before = Part(-1)  # the state that a step takes, which is not to be had beside the one that it makes
    of = expressions({**leaves, inputs[0]: before, state: State()})
    unseen = unused(region)
    used = {user.args[1] for user in node.users if user not in unseen}
    made: dict[int, Expression] = {}
    for place, output in enumerate(rest, 1):
        if place in used:
            value = of(output)
            if depends(value, before):
                raise _NoRecurrence("an output of a step is made of the state before it")
            _check_lifted(value)
            made[place] = value
    recurrence = _recurrence(node, region, step, initial[0], state, sequences)
    return _site(node, region, rule, sequences, {0: recurrence}, made)


def _associative(node: fx.Node, region: Region, rule: str) -> ScanSite:
    """``associative_scan``: (left, right) -> combined, each of which has as many leaves as there are sequences."""
    arguments: Any = node.args
    _, sequences, lifted = arguments
    if lifted:
        raise _NoRecurrence("its function takes further values, and must combine leaves alone")
    inputs, outputs = _body(node, region)
    unseen = unused(region)
    places: set[Any] = {user.args[1] for user in node.users if user not in unseen}
    used: list[int] = sorted(places)
    if not used:
        raise _NoRecurrence("nobody uses what it returns")
    combined = Combined(inputs, outputs, [example(turned_round(each) or each) for each in sequences])
    recurrences = {}
    for place in used:
        leaf = combined.recurrence(place)
        if isinstance(leaf, str):
            raise _NoRecurrence(leaf)
        recurrences[place] = _recurrence(node, region, leaf.step, leaf.initial, outputs[place], sequences)
    return _site(node, region, rule, sequences, recurrences, {})


def _recurrence(
    node: fx.Node,
    region: Region,
    step: Affine,
    initial: fx.Node | float,
    state: fx.Node,
    sequences: Sequence[fx.Node],
) -> Recurrence:
    like = example(state)
    assert like is not None
    if like.dtype not in DTYPES or like.device.type not in DEVICES:
        raise _NoRecurrence(f"states of {like.dtype} on {like.device.type}; supported: {_SUPPORTED}")
    if like.ndim > 2 and not all(isinstance(size, int) for size in like.shape[1:]):
        raise _NoRecurrence("states of more than two dimensions, of which one behind the first is not constant")
    return Recurrence(
        step=fold(step),
        initial=initial,
        zeros=initial == 0.0,
        like=like,
        backward=all(turned_round(each) is not None for each in sequences),
        gradient=any(each.requires_grad for user in node.users for each in example_tensors(user)),
        autocast=len(region.modes[node]) > 1,
    )


def _site(
    node: fx.Node,
    region: Region,
    rule: str,
    sequences: Sequence[fx.Node],
    recurrences: dict[int, Recurrence],
    outputs: dict[int, Expression],
) -> ScanSite:
    whole = example(sequences[0])
    assert whole is not None
    associative = compat.subgraph_kind(node) == "associative_scan"
    recurrence = next(iter(recurrences.values()))
    steps = compat.expression(whole.shape[0])
    kernels = _associative_kernels if associative else one_by_one
    return ScanSite(
        rule=rule,
        name=qualified_name(node),
        node=node,
        device=recurrence.like.device,
        sizes=compat.size_hints(whole),
        recurrence=recurrence,
        kept=tuple(stage for each in recurrences.values() for stage in kernels(each, steps)),
        steps=steps,
        parts=tuple(turned_round(each) or each for each in sequences) if recurrence.backward else tuple(sequences),
        by_place=recurrences,
        outputs=outputs,
        associative=associative,
        unseen=frozenset(_below(node, unused(region))),
    )


_WRONG = "left alone, the gates' gradient would be wrong: torch makes that of associative_scan for one leaf at a time"
_SUPPORTED = f"{', '.join(map(str, DTYPES))} on {', '.join(DEVICES)}"


def _below(node: fx.Node, among: set[fx.Node]) -> set[fx.Node]:
    """The nodes that are made of ``node``, and of those, as far as they are ``among`` the given."""
    found: set[fx.Node] = set()
    for user in node.users:
        if user in among and user not in found:
            found |= {user, *_below(user, among)}
    return found


def turned_round(node: fx.Node) -> fx.Node | None:
    """What is turned round in time, which comes first."""
    call = read(node)
    if call is None or call.op != "flip" or flat(call["dims"]) not in ((0,), [0]):
        return None
    source: fx.Node = call["input"]
    return source


def _associative_kernels(recurrence: Recurrence, steps: sympy.Expr) -> tuple[Stage, ...]:
    """One kernel that reads and writes both leaves, and a backward that makes a matrix of steps by steps of each."""
    numbers = recurrence.numbers * steps * recurrence.like.dtype.itemsize
    forward = Stage(0, 4 * numbers)
    return (forward, Stage(0, 4 * numbers * steps)) if recurrence.gradient else (forward,)
