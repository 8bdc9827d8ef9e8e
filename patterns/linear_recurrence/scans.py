"""torch's own scans: ``associative_scan`` of pairs of gate and input, and ``scan`` whose body is a step.

Their bodies are graphs, and read as a step of a loop is; their sequences are whole already.  They are replaced before
torch differentiates them.  Its gradient of ``associative_scan`` is made for one leaf at a time (torch 2.11 to 2.13,
pytorch#172568): of the pairs (a, b) it leaves out what a does to the states, and it makes a matrix of steps by steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
from torch import fx

from structfly import compat
from structfly.lowering.linear_recurrence.op import DEVICES
from structfly.patterns.linear_recurrence.affine import Affine, Obstacle, read_affine
from structfly.patterns.linear_recurrence.expressions import (
    ZERO,
    Expression,
    Part,
    Shared,
    State,
    depends,
    mul,
)
from structfly.patterns.linear_recurrence.folding import fold
from structfly.patterns.linear_recurrence.lifting import why_not_lifted
from structfly.patterns.linear_recurrence.menu import one_by_one
from structfly.patterns.linear_recurrence.operations import operation
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
        outputs: what the scan returns, by its place: all steps of an expression of the state.
        final: the place of the last state, None where it is not returned.
        product: the place of the gates' products, None where nobody uses them.
        unseen: what is made of what the scan returns, and used by nobody.
    """

    parts: tuple[fx.Node, ...]
    outputs: dict[int, Expression]
    final: int | None
    product: int | None
    unseen: frozenset[fx.Node]

    @property
    def settled(self) -> str:
        return _WRONG if self.final is None and self.recurrence.gradient else ""


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


def _expressions(leaves: dict[fx.Node, Expression]) -> Callable[[fx.Node], Expression]:
    made = dict(leaves)

    def of(node: fx.Node) -> Expression:
        if node not in made:
            made[node] = operation(node, of)
        return made[node]

    return of


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
    step = _affine(_expressions(leaves)(state))
    before = Part(-1)  # the state that a step takes, which is not to be had beside the one that it makes
    of = _expressions({**leaves, inputs[0]: before, state: State()})
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
    return _site(node, region, rule, step, initial[0], state, sequences, made, final=0)


def _associative(node: fx.Node, region: Region, rule: str) -> ScanSite:
    """``associative_scan``: (left, right) -> combined, of two leaves that are gate and input in either order."""
    arguments: Any = node.args
    _, sequences, lifted = arguments
    if len(sequences) != 2:
        raise _NoRecurrence(f"{len(sequences)} leaves; a recurrence has two, gate and input")
    if lifted:
        raise _NoRecurrence("its function takes further values, and must combine gates and inputs alone")
    inputs, outputs = _body(node, region)
    for state in (0, 1):
        gate = 1 - state
        left: dict[fx.Node, Expression] = {inputs[state]: State(), inputs[gate]: Part(2)}
        of = _expressions({**left, inputs[2]: Part(0), inputs[3]: Part(1)})
        product, step = of(outputs[gate]), read_affine(of(outputs[state]))
        if (
            isinstance(step, Affine)
            and step == Affine(Part(gate), Part(state))
            and product in (mul(Part(2), Part(gate)), mul(Part(gate), Part(2)))
        ):
            break
    else:
        raise _NoRecurrence("its function is not (a, b), (a', b') -> (a a', a' b + b')")
    unseen = unused(region)
    product_used = any(user.args[1] == gate and user not in unseen for user in node.users)
    product_place = gate if product_used else None
    return _site(node, region, rule, step, 0.0, outputs[state], sequences, {state: State()}, product=product_place)


def _site(
    node: fx.Node,
    region: Region,
    rule: str,
    step: Affine,
    initial: fx.Node | float,
    state: fx.Node,
    sequences: Sequence[fx.Node],
    outputs: dict[int, Expression],
    final: int | None = None,
    product: int | None = None,
) -> ScanSite:
    like, whole = example(state), example(sequences[0])
    assert like is not None
    assert whole is not None
    if like.dtype not in DTYPES or like.device.type not in DEVICES:
        raise _NoRecurrence(f"states of {like.dtype} on {like.device.type}; supported: {_SUPPORTED}")
    if like.ndim > 2 and not all(isinstance(size, int) for size in like.shape[1:]):
        raise _NoRecurrence("states of more than two dimensions, of which one behind the first is not constant")
    turned = [turned_round(each) for each in sequences]
    recurrence = Recurrence(
        step=fold(step),
        initial=initial,
        zeros=not isinstance(initial, fx.Node),
        like=like,
        backward=all(each is not None for each in turned),
        gradient=any(each.requires_grad for user in node.users for each in example_tensors(user)),
        autocast=len(region.modes[node]) > 1,
    )
    steps = compat.expression(whole.shape[0])
    kept = one_by_one(recurrence, steps)
    if final is None:
        kept = _associative_kernels(recurrence, steps)
    return ScanSite(
        rule=rule,
        name=qualified_name(node),
        node=node,
        device=like.device,
        sizes=compat.size_hints(whole),
        recurrence=recurrence,
        kept=kept,
        steps=steps,
        parts=tuple(each or own for each, own in zip(turned, sequences, strict=True))
        if recurrence.backward
        else tuple(sequences),
        outputs=outputs,
        final=final,
        product=product,
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
