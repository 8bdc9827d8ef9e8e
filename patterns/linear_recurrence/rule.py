"""The rule: a loop over time whose state is affine in the state before becomes one op, parallel over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from structfly.compat import size_hints, storage_key, subgraph_kind, wrapper_subclass
from structfly.config import SiteSettings
from structfly.lowering.linear_recurrence.op import DEVICES
from structfly.patterns.linear_recurrence.affine import Affine, Obstacle, read_affine
from structfly.patterns.linear_recurrence.collectors import Joins
from structfly.patterns.linear_recurrence.expressions import ZERO, Expression, Operation, Part, Shared
from structfly.patterns.linear_recurrence.folding import fold, opened
from structfly.patterns.linear_recurrence.lifting import steps_of, why_not_lifted
from structfly.patterns.linear_recurrence.loops import SlicedNodes
from structfly.patterns.linear_recurrence.menu import recurrence_menu, unrolled
from structfly.patterns.linear_recurrence.output_gates import with_output_gate
from structfly.patterns.linear_recurrence.recurrence import DTYPES, Recurrence
from structfly.patterns.linear_recurrence.rewrite import rewrite_loop
from structfly.patterns.linear_recurrence.scan_rewrite import rewrite_scan
from structfly.patterns.linear_recurrence.scans import KINDS, ScanSite, read_scan
from structfly.patterns.linear_recurrence.segment_sums import read_segment_sums
from structfly.patterns.linear_recurrence.site import LoopSite, RecurrenceSite
from structfly.patterns.linear_recurrence.steps import Loop, Unlike, read_way
from structfly.patterns.linear_recurrence.trees import read_trees
from structfly.patterns.linear_recurrence.whole import WholeSite, rewrite_whole
from structfly.records import Candidate, DeviceProfile, Menu, Miss
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region, example, example_tensors, needs_gradient, qualified_name
from structfly.rewriter.writes import written


class LinearRecurrence:
    """Exact: states and gradients are eager's, to the rounding of their dtype.  See docs/linear_recurrence.md."""

    name = "linear_recurrence"

    def find(self, region: Region) -> Sequence[RecurrenceSite | Miss]:
        results: list[RecurrenceSite | Miss] = [
            read_scan(node, region, self.name) for node in region.graph.nodes if subgraph_kind(node) in KINDS
        ]
        results.extend(read_trees(region, self.name))
        results.extend(read_segment_sums(region, self.name, exact=True))
        sliced = SlicedNodes(region)
        joins: Joins | None = None
        states: set[fx.Node] = set()
        for way in reversed(list(sliced.ways())):  # a loop that takes another's states is deeper than that one
            loop = read_way(way, sliced, states)
            if isinstance(loop, Unlike):
                results.append(Miss(self.name, loop.node, loop.reason, len(results), loop.last))
            elif loop is not None:
                states.update(loop.states)
                joins = joins or Joins(region, sliced)
                results.append(self._site(loop, joins, region))
        return results

    def menu(self, site: RecurrenceSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        return recurrence_menu(site, profile)

    def rewrite(self, site: RecurrenceSite, candidate: Candidate, editor: Editor) -> None:
        if isinstance(site, ScanSite):
            rewrite_scan(site, editor)
        elif isinstance(site, WholeSite):
            rewrite_whole(site, editor)
        else:
            assert isinstance(site, LoopSite)
            rewrite_loop(site, editor)

    # -------------------------------------------------------------------------------------------------- one loop

    def _site(self, loop: Loop, joins: Joins, region: Region) -> LoopSite | Miss:
        last = loop.states[-1]
        name = qualified_name(last)

        def miss(node: fx.Node | None, reason: str) -> Miss:
            return Miss(self.name, node or last, reason, 1, last, name)

        step = read_affine(loop.step)
        if isinstance(step, Obstacle):
            return miss(*step)
        reason = _why_not(loop, step, region)
        if reason is not None:
            return miss(*reason)
        collectors = [each for each in joins.of(loop) if len({region.modes[node] for node in (*each.nodes, last)}) == 1]
        value = example(last)
        assert value is not None
        folded = fold(step)
        inside, runs = opened(step, loop.runs)
        if (activated := fold(inside)).sigmoid or activated.tanh:
            folded, loop = activated, replace(loop, runs=runs)
        recurrence = Recurrence(
            step=folded,
            initial=loop.initial,
            zeros=loop.begins_with_zeros,
            like=value,
            backward=steps_of(loop.runs, len(loop.states)).backward,
            gradient=needs_gradient(last),
            autocast=len(region.modes[last]) > 1,
        )
        slices = [node for node in loop.nodes if node in joins.sliced.slices]
        picked = any(example(node.all_input_nodes[0]) is not None for node in slices)
        operations = sum(node not in joins.sliced.slices for node in loop.nodes)
        site = LoopSite(
            rule=self.name,
            name=name,
            node=last,
            device=value.device,
            sizes=size_hints(value),
            recurrence=recurrence,
            kept=unrolled(recurrence, len(loop.states), operations, picked=picked),
            steps=len(loop.states),
            loop=loop,
            collectors=tuple(collectors),
        )
        return with_output_gate(site, region)


def _why_not(loop: Loop, step: Affine, region: Region) -> tuple[fx.Node, str] | None:
    """Why a loop whose steps are affine is not rewritten."""
    last = loop.states[-1]
    value = example(last)
    if value is None or value.dtype not in DTYPES:
        return (
            last,
            f"states of {value.dtype if value is not None else 'no tensor'}; supported: {', '.join(map(str, DTYPES))}",
        )
    if value.device.type not in DEVICES:
        return last, f"on {value.device.type}; supported devices: {', '.join(DEVICES)}"
    if value.ndim > 2 and not all(isinstance(size, int) for size in value.shape[1:]):
        return last, "states of more than two dimensions, of which one behind the first is not constant"
    if step.gate == ZERO:
        return last, "a step does not depend on the state before it"
    for part in (step.gate, step.input, step.reset):
        reason = None if part is None else why_not_lifted(part)
        if reason is not None:
            return reason
    if step.reset is not None and not _is_by_row(step.reset, loop, value.ndim):
        return last, "a reset that differs between channels; multiply the state by a mask, or reset whole rows"
    for node in (*loop.shared, *(run.sequence.source for run in loop.runs)):
        wrapped = [name for each in example_tensors(node) if (name := wrapper_subclass(each))]
        if wrapped:
            return node, f"{node.name} is a {wrapped[0]}, for which the recurrence has no rule; pass a plain tensor"
    modes = {region.modes[node] for node in loop.nodes}
    if len(modes) > 1:
        return last, "gradients or autocast are switched within the loop"
    return _why_not_together(loop, region) or _why_written(loop, region)


def _why_written(loop: Loop, region: Region) -> tuple[fx.Node, str] | None:
    """A write into what a step made that others of its users see."""
    for node in loop.nodes:
        for target in written(node):
            if target not in loop.nodes and target is not loop.own_zeros:
                continue  # why_pinned says so
            own = {storage_key(tensor) for tensor in example_tensors(target)}
            for user in target.users:
                seen = own.intersection(storage_key(tensor) for tensor in example_tensors(user))
                if user is not node and (seen or region.order[user] > region.order[node]):
                    return node, f"{node.name} writes into a state that {user.name} uses; use h = f * h + z instead"
    return None


def _is_by_row(reset: Expression, loop: Loop, rank: int) -> bool:
    """Whether a mask is the same for all channels of a row."""
    if isinstance(reset, Operation) and reset.op in ("not", "or", "and"):
        return all(_is_by_row(each, loop, rank) for _, each in reset.arguments)
    if isinstance(reset, Part):
        shape = loop.runs[reset.number].sequence.shape
    elif isinstance(reset, (Shared, Operation)) and reset.node is not None:
        shape = list(reset.node.meta["example_value"].shape)
    else:
        return False
    by_channel = shape[-(rank - 1) :] if rank > 1 else shape
    return all(size == 1 for size in by_channel)


def _why_not_together(loop: Loop, region: Region) -> tuple[fx.Node, str] | None:
    """Why the states cannot be computed where all that they are made of is there: behind a part of the first step."""
    order = region.order
    last = max(loop.needed, key=order.__getitem__)
    place = max(last.next, min(loop.nodes, key=order.__getitem__), key=order.__getitem__)
    if region.modes[place] != region.modes[loop.states[-1]]:
        return place, "gradients or autocast are switched within the loop"
    return None
