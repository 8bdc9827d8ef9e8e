"""Recurrences by cumulative sums and products of whole tensors.

With F_t = f_1 ... f_t the states are h_t = F_t (b_1 / F_1 + ... + b_t / F_t), which programs write as

    F = cumprod(f),              h = F * cumsum(b / F)
    A = cumsum(l),  f = exp(l),  h = exp(A) * cumsum(b * exp(-A))
    A = cumsum(l),  b = exp(v),  h = exp(A + logcumsumexp(v - A))          (Heinsen 2023)

and the first two with h_0 beside the sum.  They divide by F, which is 0 as soon as the product is below the smallest
number: their states are inf or nan from there on.  The third is inf - inf where a gate is 0, and its sums of logarithms
lose digits as they grow.  The op has states there, which is another function: the rule is off unless it is switched on.
So it is with products with the matrix of quotients F_t / F_s, or of exp(A_t - A_s): see ``segment_sums``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import fx

from structfly.config import SiteSettings
from structfly.patterns.linear_recurrence.gates import Cumulated, cumulated, exponential, exponential_of
from structfly.patterns.linear_recurrence.menu import cumulative, recurrence_menu
from structfly.patterns.linear_recurrence.segment_sums import read_segment_sums
from structfly.patterns.linear_recurrence.step_matrices import repeated
from structfly.patterns.linear_recurrence.whole import Source, WholeSite, rewrite_whole, whole_site
from structfly.records import Candidate, DeviceProfile, Menu, Miss
from structfly.rewriter.calls import Call, both_ways, read
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region


class _Form(NamedTuple):
    """Gate and input as what is made of two tensors, the nodes that make the states of them now, and the state before
    the first step, None for zeros."""

    gate: Source
    input: Source
    dim: int
    nodes: tuple[fx.Node, ...]
    initial: fx.Node | None = None


class CumulativeRecurrence:
    """Not exact where eager's states are inf or nan though the recurrence has states: see docs/linear_recurrence.md."""

    name = "cumulative_recurrence"

    def find(self, region: Region) -> Sequence[WholeSite | Miss]:
        return list(self._sites(region))

    def menu(self, site: WholeSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        return recurrence_menu(site, profile)

    def rewrite(self, site: WholeSite, candidate: Candidate, editor: Editor) -> None:
        rewrite_whole(site, editor)

    def _sites(self, region: Region) -> Iterator[WholeSite | Miss]:
        for call in region.calls:
            form = _of_products(call) if call.op == "mul" else _of_logarithms(call) if call.op == "exp" else None
            if form is not None:
                nodes = frozenset((*form.nodes, call.node))
                yield whole_site(
                    call.node,
                    form.gate,
                    form.input,
                    form.dim,
                    nodes,
                    cumulative,
                    region,
                    self.name,
                    initial=form.initial,
                )
        yield from read_segment_sums(region, self.name, exact=False)


def _of_products(call: Call) -> _Form | None:
    """F * cumsum(b / F), or F * (h_0 + cumsum(b / F))."""
    for product, sums in both_ways(call):
        gate = _gate_of(product)
        for summed, initial, added in () if gate is None else _summed(sums):
            divided = _divided(summed.source, product)
            if gate is not None and gate.dim == summed.dim and divided is not None:
                term, nodes = divided
                nodes = (*gate.nodes, *nodes, *added, summed.node, summed.source)
                return gate._replace(input=Source(term), nodes=nodes, initial=initial)
    return None


def _summed(node: fx.Node) -> Iterator[tuple[Cumulated, fx.Node | None, tuple[fx.Node, ...]]]:
    """A cumulative sum, what is added to it in all steps alike, and the nodes that do."""
    call, made = read(node), cumulated(node, "cumsum")
    if made is not None:
        yield made, None, ()
    elif call is not None and call.op == "add" and call.get("alpha", 1) == 1:
        for sums, first in both_ways(call):
            made, view = cumulated(sums, "cumsum"), repeated(first)
            if made is not None and view is not None and view.dim == made.dim:
                yield made, view.source, (node, *view.nodes)


def _gate_of(product: fx.Node) -> _Form | None:
    """The gates of a cumulative product, or of the exponential of a cumulative sum; its input is not known yet."""
    made = cumulated(product, "cumprod")
    if made is not None:
        return _Form(Source(made.source), Source(made.source), made.dim, (product,))
    call = read(product)
    if call is None or call.op != "exp":
        return None
    sums = cumulated(call["input"], "cumsum")
    if sums is None:
        return None
    gate = exponential_of(sums.source)
    return _Form(gate, gate, sums.dim, (product, sums.node))


def _divided(node: fx.Node, product: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """b of b / F, b * (1 / F) or b * exp(-A), and the nodes besides."""
    call = read(node)
    if call is None:
        return None
    if call.op == "div" and call.get("rounding_mode") is None and isinstance(call["input"], fx.Node):
        return (call["input"], (call["other"],)) if _same(call["other"], product) else None
    if call.op == "mul":
        for term, factor in both_ways(call):
            nodes = _inverse(factor, product)
            if nodes:
                return term, nodes
    return None


def _inverse(node: fx.Node, product: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes of 1 / F, () where ``node`` is something else."""
    call, exponential = read(node), read(product)
    if call is None:
        return ()
    if call.op == "reciprocal" and _same(call["input"], product):
        return (node, call["input"])
    if call.op == "div" and call["input"] == 1 and _same(call["other"], product):
        return (node, call["other"])
    if call.op == "exp" and exponential is not None and exponential.op == "exp":
        negative = read(call["input"])
        if negative is not None and negative.op == "neg" and negative["input"] is exponential["input"]:
            return (node, negative.node)
    return ()


def _same(one: Any, other: fx.Node) -> bool:
    """Whether both are one node, or the same function of one node."""
    if one is other:
        return True
    first, second = read(one), read(other)
    if first is None or second is None or first.op != second.op:
        return False
    return first.op in ("exp", "cumprod") and dict(first.arguments) == dict(second.arguments)


def _of_logarithms(call: Call) -> _Form | None:
    """exp(A + logcumsumexp(v - A))."""
    total = read(call["input"])
    if total is None or total.op != "add" or total.get("alpha", 1) != 1:
        return None
    for sums, logarithms in both_ways(total):
        gates, states = cumulated(sums, "cumsum"), cumulated(logarithms, "logcumsumexp")
        difference = None if states is None else read(states.source)
        if gates is None or states is None or difference is None or gates.dim != states.dim:
            continue
        term = difference.arguments.get("input")
        if (
            difference.op == "sub"
            and difference.get("alpha", 1) == 1
            and difference["other"] is sums
            and isinstance(term, fx.Node)
        ):
            nodes = (total.node, sums, logarithms, difference.node)
            return _Form(exponential_of(gates.source), Source(term, exponential), gates.dim, nodes)
    return None
