"""The rule: the gates and the input of a recurrence are made, by a linear, within its op, in graphs without gradients.

It comes after all other rules, for those write the ops of recurrences, and structures in the place of linears.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from structfly import compat
from structfly.config import SiteSettings
from structfly.lowering.linear_recurrence.arguments import ProjectedArguments
from structfly.lowering.linear_recurrence.projected_op import PROJECTED
from structfly.lowering.linear_recurrence.projected_steps import why_in_two
from structfly.lowering.precision import tf32_allowed
from structfly.patterns.projected_recurrence.menu import projected_menu
from structfly.patterns.projected_recurrence.projections import Projection, read_projection, readers_beside
from structfly.patterns.projected_recurrence.recurrences import RecurrenceCall, read_recurrence
from structfly.patterns.projected_recurrence.site import ProjectedSite
from structfly.patterns.projected_recurrence.windows import Windows, read_windows
from structfly.records import Candidate, DeviceProfile, Menu, Miss
from structfly.records.cost import at_sizes
from structfly.rewriter.editor import Editor
from structfly.rewriter.linear import LinearLike
from structfly.rewriter.region import Region, example_of, example_tensors, needs_gradient, qualified_name


class ProjectedRecurrence:
    """Exact: what the linear makes stays in float32, where eager rounds it.  See docs/linear_recurrence.md."""

    name = "projected_recurrence"

    def find(self, region: Region) -> Sequence[ProjectedSite | Miss]:
        found: list[ProjectedSite | Miss] = []
        for node in region.graph.nodes:
            call = read_recurrence(node)
            projection = None if call is None else read_projection(call)
            if call is None or projection is None:
                continue
            result, name = projection, qualified_name(node)
            if isinstance(projection, Projection):
                name = qualified_name(projection.linear.node)
                result = _why_not(call, projection) or projection
            if isinstance(result, str):
                found.append(Miss(self.name, node, result, 0, node, name))
            else:
                found.append(self._site(call, result, name))
        return found

    def menu(self, site: ProjectedSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        return projected_menu(site, always=settings.rewrite == "always")

    def rewrite(self, site: ProjectedSite, candidate: Candidate, editor: Editor) -> None:
        call, projection = site.call, site.projection
        editor.before(site.node)
        weight, bias = _operands(projection.linear, site, editor)
        arguments = ProjectedArguments(
            inputs=_inputs(site, editor),
            beside=_beside(site, editor),
            weight=weight,
            bias=bias,
            initial=None if call.initial is None else editor.current(call.initial),  # type: ignore[arg-type]
            order=projection.order,
            window=1 if site.windows is None else site.windows.window,
            reverse=call.reverse,
            time_first=_is_time_first(site),
        )
        made = editor.call(PROJECTED, *arguments)
        for user in list(site.node.users):
            editor.replace(user, editor.getitem(made, user.args[1]))  # type: ignore[arg-type]
        editor.erase(site.dead_nodes)

    def _site(self, call: RecurrenceCall, projection: Projection, name: str) -> ProjectedSite:
        linear = projection.linear
        made = example_of(linear.node)
        windows = None
        if not projection.views and projection.dims == (0, 1, 2):
            windows = read_windows(linear.x, reverse=call.reverse)
        source = example_of(linear.x if windows is None else windows.source)
        examples = (made, source, example_of(linear.weight))
        sizes = {symbol: size for each in examples for symbol, size in compat.size_hints(each).items()}
        for_it_alone = windows is not None and _are_only_for(windows, linear.node)
        outer, inner = (compat.expression(size) for size in _out_and_in(linear))
        return ProjectedSite(
            rule=self.name,
            name=name,
            node=call.node,
            device=made.device,
            sizes=sizes,
            call=call,
            projection=projection,
            windows=windows,
            dtype=made.dtype,
            slower=_why_slower(call, projection, windows, sizes),
            steps=sympy.prod([compat.expression(size) for size in made.shape[:-1]]),
            inner=inner,
            outer=outer,
            seen=sympy.prod([compat.expression(size) for size in source.shape]) if for_it_alone else 0,
        )


def _why_not(call: RecurrenceCall, projection: Projection) -> str:
    """Why the op does not compute this, or ""."""
    linear = projection.linear
    if needs_gradient(linear.node) or any(made.requires_grad for made in example_tensors(call.node)):
        return "this graph trains, and the recurrence's gradient takes what the linear makes"
    if call.restarts:
        return "states are reset, or sequences are packed; made in one are whole sequences, a row each"
    if not (call.sigmoid and call.tanh and call.complement == ("i" not in projection.order)):
        return (
            "made in one are gates that are sigmoids, inputs that are a tanh, and 1 - f in the place of an input gate "
            "that is not there"
        )
    if call.initial is not None and _is_made_of(call.initial, linear.node):
        return "the states it begins with are made of what the linear makes"
    if others := readers_beside(call, projection):
        return f"not only the recurrence reads what the linear makes, but {', '.join(others)} too"
    if linear.adapter is not None:
        return "a low-rank update is added to what the linear makes; merge it into the weight"
    bias = None if linear.bias is None else tuple(map(compat.expression, example_of(linear.bias).shape))
    if bias is not None and bias != tuple(map(compat.expression, _out_and_in(linear)[:1])):
        return f"the bias has shape {bias}; taken is one with a number for each that the linear makes"
    if any(not _is_taken(user) for user in call.node.users):
        return "not only the outputs and the final states are used, but what is kept for a backward"
    operands = [each for each in (linear.x, linear.weight, linear.bias, call.initial) if each is not None]
    for node in operands:
        if name := compat.wrapper_subclass(example_of(node)):
            return f"{node.name} is a {name}, for which the op has no rule; pass a plain tensor"
    return ""


def _is_made_of(node: fx.Node, source: fx.Node) -> bool:
    """Whether a value, and not its sizes alone, is made of another."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        each = pending.pop()
        if each is source:
            return True
        if each not in seen and example_tensors(each):
            seen.add(each)
            pending += each.all_input_nodes
    return False


def _is_taken(user: fx.Node) -> bool:
    """Whether it is the output, or the final states, of a recurrence."""
    return user.target is operator.getitem and user.args[1] in (0, 1)


def _why_slower(
    call: RecurrenceCall, projection: Projection, windows: Windows | None, sizes: dict[sympy.Symbol, int]
) -> str:
    """Why no one kernel does it, or not faster, or ""; of symbolic sizes at those of the example."""
    linear = projection.linear
    given, made = example_of(linear.weight), example_of(linear.node)
    with compat.example_mode(compat.fake_mode_of([given])):
        known = [int(at_sizes(compat.expression(size), sizes)) for size in _out_and_in(linear)]
        weight = given.new_empty(known, dtype=made.dtype)
    steps = int(at_sizes(compat.expression(_steps_of(call)), sizes))
    window, apart = (1, 0) if windows is None else (windows.window, windows.apart)
    return why_in_two(weight, projection.order, window, steps - apart, tf32=tf32_allowed())


def _out_and_in(linear: LinearLike) -> tuple[int | torch.SymInt, ...]:
    """Numbers that the linear makes of how many."""
    shape = tuple(example_of(linear.weight).shape)
    return shape[::-1] if linear.transposed else shape


def _steps_of(call: RecurrenceCall) -> int | torch.SymInt:
    sequence = call.sequences["z"] if call.joint is None else call.joint[0]
    return example_of(sequence).shape[1]


def _are_only_for(windows: Windows, linear: fx.Node) -> bool:
    """Whether nothing else reads them, so that they are not written where the linear is not there."""
    own = {*windows.nodes, linear}
    return all(own.issuperset(node.users) for node in windows.nodes)


def _is_time_first(site: ProjectedSite) -> bool:
    """Whether outputs lie in memory as (T, B, D) does: they lie as what the linear makes, channels last."""
    output = example_tensors(site.node)[0]
    return bool(compat.expression(output.stride(0)) == compat.expression(output.shape[2]))


def _inputs(site: ProjectedSite, editor: Editor) -> Any:
    """(B, S, I) of what the linear takes."""
    projection = site.projection
    node = editor.current(projection.linear.x if site.windows is None else site.windows.source)
    for view in projection.views:
        node = view.replay(editor, node, editor.size(node, -1))
    if projection.dims != (0, 1, 2):
        node = editor.call(torch.permute, node, projection.dims)
    return _cast(node, site, editor)


def _beside(site: ProjectedSite, editor: Editor) -> Any:
    """(B, K, I) of what the linear takes before those, or None."""
    windows = site.windows
    if windows is None or not windows.apart:
        return None
    if windows.beside is not None:
        return _cast(editor.current(windows.beside), site, editor)
    source = editor.current(windows.source)
    sizes = (editor.size(source, 0), windows.apart, editor.size(source, 2))
    return editor.method("new_zeros", source, sizes, dtype=site.dtype)


def _operands(linear: LinearLike, site: ProjectedSite, editor: Editor) -> tuple[Any, Any]:
    """(out, in) and (out,), or None."""
    weight = editor.current(linear.weight)
    if linear.transposed:
        weight = editor.call(torch.t, weight)
    bias = None if linear.bias is None else _cast(editor.current(linear.bias), site, editor)
    return _cast(weight, site, editor), bias


def _cast(node: fx.Node, site: ProjectedSite, editor: Editor) -> fx.Node:
    """As autocast has a linear's operands."""
    value: Tensor = example_of(node)
    return node if value.dtype == site.dtype else editor.method("to", node, site.dtype)
