"""Recurrences by doubling (Hillis and Steele 1986): whole tensors, in as many rounds as the length has binary digits.

    z = z + f * shift(z, k),    f = f * shift(f, k),    k = 1, 2, 4, ...

After the round of k a state is made of the last 2 k steps and a gate is a product of as many.  With fewer rounds than
reach back to the first step a state has a window, which is another function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from structfly import compat
from structfly.lowering.linear_recurrence.op import DEVICES
from structfly.patterns.linear_recurrence.affine import Affine
from structfly.patterns.linear_recurrence.expressions import Part
from structfly.patterns.linear_recurrence.folding import fold, opened
from structfly.patterns.linear_recurrence.lifting import Lifting, Steps
from structfly.patterns.linear_recurrence.menu import doubled
from structfly.patterns.linear_recurrence.recurrence import DTYPES, Recurrence, write
from structfly.patterns.linear_recurrence.rewrite import laid_out, parts_of
from structfly.patterns.linear_recurrence.site import RecurrenceSite
from structfly.patterns.linear_recurrence.slices import WHOLE, Sequence
from structfly.patterns.linear_recurrence.steps import Run
from structfly.records import Miss
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region, example, needs_gradient, qualified_name

_ZEROS = ("zeros", "zeros_like", "new_zeros")
_ONES = ("ones", "ones_like", "new_ones")


class Reach(NamedTuple):
    """Products of gates, or states, of the last so many steps.

    Attributes:
        gate: the gates.
        input: the inputs, None for products.
        dim: time.
        steps: how many.
        nodes: what it is made by.
    """

    gate: fx.Node
    input: fx.Node | None
    dim: int
    steps: int
    nodes: frozenset[fx.Node]


@dataclass(frozen=True)
class DoublingSite(RecurrenceSite):
    """States made by doubling; ``runs`` are gate, input, and what these are activations of."""

    runs: tuple[Run, ...]
    dim: int
    nodes: frozenset[fx.Node]

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        return tuple(self.nodes)


class _Shift(NamedTuple):
    source: fx.Node
    dim: int
    steps: int
    nodes: frozenset[fx.Node]


def read_doublings(region: Region, rule: str) -> Iterator[DoublingSite | Miss]:
    """The states that are made by doubling, or why they are not those of the recurrence."""
    found: dict[fx.Node, Reach] = {}
    continued: set[fx.Node] = set()
    for call in region.calls:
        reach = _product(call, found) if call.op == "mul" else _state(call, found, continued)
        if reach is not None:
            found[call.node] = reach
    for node, reach in found.items():
        if reach.input is not None and reach.steps >= 4 and node not in continued:
            yield _site(node, reach, region, rule)


def _product(call: Call, found: dict[fx.Node, Reach]) -> Reach | None:
    """f * shift(f, k)."""
    for gate, other in _both(call["input"], call["other"]):
        shift = _shift(other)
        if shift is not None and shift.source is gate:
            before = found.get(gate, Reach(gate, None, shift.dim, 1, frozenset()))
            if before.input is None and before.steps == shift.steps and before.dim == shift.dim:
                nodes = before.nodes | shift.nodes | {call.node}
                return Reach(before.gate, None, shift.dim, 2 * before.steps, nodes)
    return None


def _state(call: Call, found: dict[fx.Node, Reach], continued: set[fx.Node]) -> Reach | None:
    """z + f * shift(z, k)."""
    for state, gate, other, product in _sums(call):
        shift = _shift(other)
        if shift is None or shift.source is not state:
            continue
        gates = found.get(gate, Reach(gate, None, shift.dim, 1, frozenset()))
        before = found.get(state, Reach(gates.gate, state, shift.dim, 1, frozenset()))
        if (
            gates.input is None
            and before.input is not None
            and gates.gate is before.gate
            and gates.dim == before.dim == shift.dim
            and gates.steps == before.steps == shift.steps
        ):
            continued.add(state)
            nodes = gates.nodes | before.nodes | shift.nodes | product | {call.node}
            return Reach(before.gate, before.input, shift.dim, 2 * before.steps, nodes)
    return None


def _sums(call: Call) -> Iterator[tuple[fx.Node, fx.Node, fx.Node, frozenset[fx.Node]]]:
    """State, gate, shifted state, and the node of the product, in every order that a call may have them in."""
    if call.op == "addcmul" and call.get("value", 1) == 1 and isinstance(call["input"], fx.Node):
        for gate, other in _both(call["tensor1"], call["tensor2"]):
            yield call["input"], gate, other, frozenset()
    if call.op == "add" and call.get("alpha", 1) == 1:
        for state, term in _both(call["input"], call["other"]):
            product = read(term)
            if product is not None and product.op == "mul":
                for gate, other in _both(product["input"], product["other"]):
                    yield state, gate, other, frozenset({term})


def _both(one: Any, other: Any) -> list[tuple[fx.Node, fx.Node]]:
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return []
    return [(one, other), (other, one)]


# --------------------------------------------------------------------------------------------------------------- shifts


def _shift(node: fx.Node) -> _Shift | None:
    """A tensor later by some steps: its first ones behind zeros, or behind ones.

    What a product of gates has in front does not matter: states have zeros there.
    """
    call = read(node)
    if call is None:
        return None
    if call.op == "cat":
        return _joined(call)
    tensor = example(node)
    if call.op != "pad" or call.get("mode", "constant") != "constant" or tensor is None:
        return None
    amounts = list(call["pad"])
    places = [place for place, amount in enumerate(amounts) if amount != 0]
    if len(places) != 1 or places[0] % 2 or call.get("value") not in (None, 0, 1):
        return None
    dim = tensor.ndim - 1 - places[0] // 2
    return _behind(call["input"], dim, amounts[places[0]], node)


def _joined(call: Call) -> _Shift | None:
    parts, dim, tensor = call["tensors"], call.get("dim", 0), example(call.node)
    if tensor is None or not isinstance(dim, int) or not isinstance(parts, (tuple, list)) or len(parts) != 2:
        return None
    front, rest = parts
    size = example(front)
    if size is None or not _is_filled(front):
        return None
    dim %= tensor.ndim
    found = _behind(rest, dim, size.shape[dim], call.node)
    return None if found is None else found._replace(nodes=found.nodes | {front})


def _is_filled(node: fx.Node) -> bool:
    """Whether a tensor is all zeros, or all ones."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    call = read(node)
    return name in (*_ZEROS, *_ONES) or (
        call is not None and call.op in ("full", "full_like") and call["fill_value"] in (0, 1)
    )


def _behind(node: object, dim: int, steps: object, shifted: fx.Node) -> _Shift | None:
    """The shift by ``steps``, if ``node`` is what is left of a tensor without its last ``steps``."""
    call, tensor = read(node), example(node)
    if call is None or tensor is None or call.op not in ("getitem", "narrow") or not isinstance(node, fx.Node):
        return None
    whole = example(call["input"])
    if whole is None or not isinstance(steps, int) or steps < 1 or whole.ndim != tensor.ndim:
        return None
    length = whole.shape[dim]
    if not isinstance(length, int) or tensor.shape[dim] != length - steps:
        return None
    if call.op == "narrow":
        first = call["dim"] % whole.ndim == dim and call["start"] == 0
    else:
        first = _is_front(call["index"], dim, whole.ndim)
    return _Shift(call["input"], dim, steps, frozenset({node, shifted})) if first else None


def _is_front(index: Any, dim: int, ndim: int) -> bool:
    """Whether an index takes all of every dimension but for the end of one."""
    entries = list(flat(index)) if isinstance(index, tuple) else [index]
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [slice(None)] * (ndim - len(entries) + 1)
    entries += [slice(None)] * (ndim - len(entries))
    return all(
        isinstance(entry, slice)
        and entry.start in (None, 0)
        and entry.step in (None, 1)
        and (place == dim or entry.stop is None)
        for place, entry in enumerate(entries)
    )


# ------------------------------------------------------------------------------------------------------ the whole of it


def _site(node: fx.Node, reach: Reach, region: Region, rule: str) -> DoublingSite | Miss:
    value, gate = example(node), example(reach.gate)
    assert value is not None
    name = qualified_name(node)

    def miss(reason: str) -> Miss:
        return Miss(rule, node, reason, 1, node, name)

    length = value.shape[reach.dim]
    if reach.steps < length:
        rounds = reach.steps.bit_length() - 1
        return miss(
            f"doubling in {rounds} rounds reaches back {reach.steps} of {length} steps: a state has a window, and is "
            "no recurrence; go on until the reach is the length"
        )
    if value.dtype not in DTYPES or value.device.type not in DEVICES:
        return miss(f"states of {value.dtype} on {value.device.type}; supported: {DTYPES} on {DEVICES}")
    if gate is None or gate.ndim != value.ndim or gate.shape[reach.dim] != length:
        return miss("the gate has fewer dimensions or steps than the states")
    if value.ndim > 3 and not all(isinstance(size, int) for size in value.shape):
        return miss("states of more than two dimensions, of which one is not constant")
    if len({region.modes[each] for each in reach.nodes}) > 1:
        return miss("gradients or autocast are switched between the rounds")
    with compat.example_mode(compat.fake_mode_of([value])):
        like = torch.select(value, reach.dim, 0)
    assert reach.input is not None
    rest = (WHOLE,) * (value.ndim - 1)
    runs = tuple(Run(Sequence(each, reach.dim, None, rest), 0, 1) for each in (reach.gate, reach.input))
    step, runs = opened(Affine(Part(0), Part(1)), runs)
    recurrence = Recurrence(
        step=fold(step),
        initial=0.0,
        zeros=True,
        like=like,
        backward=False,
        gradient=needs_gradient(node),
        autocast=len(region.modes[node]) > 1,
    )
    return DoublingSite(
        rule=rule,
        name=name,
        node=node,
        device=value.device,
        sizes=compat.size_hints(value),
        recurrence=recurrence,
        kept=doubled(recurrence, length, reach.steps.bit_length() - 1),
        steps=length,
        runs=runs,
        dim=reach.dim,
        nodes=reach.nodes,
    )


def rewrite_doubling(site: DoublingSite, editor: Editor) -> None:
    """Write the op where the last round stands."""
    steps = Steps(site.node.meta["example_value"].shape[site.dim], False)
    states = write(site.recurrence, Lifting(editor, parts_of(site.runs, steps, editor)), editor).states
    whole = editor.call(torch.movedim, states, 0, site.dim) if site.dim else states
    editor.replace(site.node, laid_out(whole, site.node, editor))
    editor.erase(site.dead_nodes)
