"""Recurrences by doubling (Hillis and Steele 1986): whole tensors, in as many rounds as the length has binary digits.

    z = z + f * shift(z, k),    f = f * shift(f, k),    k = 1, 2, 4, ...

After the round of k a state is made of the last 2 k steps and a gate is a product of as many.  With fewer rounds than
reach back to the first step a state has a window, which is another function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import fx

from structfly.patterns.linear_recurrence.expressions import Expression
from structfly.patterns.linear_recurrence.menu import doubled
from structfly.patterns.linear_recurrence.recurrence import Recurrence
from structfly.patterns.linear_recurrence.whole import WholeSite, whole_site
from structfly.records import Miss, Stage
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.region import Region, example, qualified_name

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


class _Shift(NamedTuple):
    source: fx.Node
    dim: int
    steps: int
    nodes: frozenset[fx.Node]


def read_doublings(region: Region, rule: str) -> Iterator[WholeSite | Miss]:
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


def _site(node: fx.Node, reach: Reach, region: Region, rule: str) -> WholeSite | Miss:
    value = example(node)
    assert value is not None
    assert reach.input is not None
    length, rounds = value.shape[reach.dim], reach.steps.bit_length() - 1
    if reach.steps < length:
        reason = (
            f"doubling in {rounds} rounds reaches back {reach.steps} of {length} steps: a state has a window, and is "
            "no recurrence; go on until the reach is the length"
        )
        return Miss(rule, node, reason, 1, node, qualified_name(node))

    def kept(recurrence: Recurrence, steps: int) -> tuple[Stage, ...]:
        return doubled(recurrence, steps, rounds)

    gate, input = (reach.gate, _itself), (reach.input, _itself)
    return whole_site(node, gate, input, reach.dim, reach.nodes, kept, region, rule)


def _itself(value: Expression) -> Expression:
    return value
