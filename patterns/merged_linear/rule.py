"""The rule: a structured layer of a graph without gradients is multiplied by as one dense weight.

That is done where it was measured faster at the graph's number of rows.  Exact, up to the rounding of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import fx, nn

from structfly import compat
from structfly.config import SiteSettings
from structfly.lowering.layer_op import FORWARD_OPS
from structfly.patterns.head.operands import cast
from structfly.patterns.linear.reads import rows_of
from structfly.patterns.merged_linear.site import MergedSite
from structfly.patterns.merged_linear.weights import MergedWeights, Wanted
from structfly.patterns.structure import Structure
from structfly.records import DeviceProfile, LayerMenu, Miss
from structfly.records.layer import AppliedOp, LayerSeconds, LayerSizes, Shape, TimeSource
from structfly.rewriter.editor import Editor
from structfly.rewriter.inputs import InputLike
from structfly.rewriter.layer_costs import Conditions, dense_cost
from structfly.rewriter.region import Region, example_of, needs_gradient, qualified_name


class Times(Protocol):
    """Times of layers on one device, known and measured."""

    def of(self, structure: Structure | None, shape: Shape, tokens: int) -> LayerSeconds:
        """The time of a layer, None for the dense one, over so many tokens."""
        ...

    def of_op(self, op: AppliedOp, shape: Shape, tokens: int) -> LayerSeconds | None:
        """The time of a layer as its op has it; None where it was not measured."""
        ...

    def measure_op(self, op: AppliedOp, layer: Callable[[], nn.Module], shape: Shape, tokens: int) -> bool:
        """Time it; False where its time is known already, or may not be measured."""
        ...


@dataclass(frozen=True)
class Way:
    """One way of running a structured layer: a :class:`~structfly.records.LayerCandidate`."""

    name: str
    rewrites: bool
    costs: Mapping[str, float]
    time_from: TimeSource = "roofline"
    loss: float = 0.0


class MergedLinear:
    """See docs/restructure.md.

    Args:
        times: gives the times of layers on a device.
    """

    name = "merged_linear"

    def __init__(self, times: Callable[[torch.device], Times]) -> None:
        self.times = times

    def find(self, region: Region) -> Sequence[MergedSite | Miss]:
        inputs = list(region.graph.find_nodes(op="placeholder"))
        found: list[MergedSite | Miss] = []
        for node in region.graph.nodes:
            if node.op == "call_function" and node.target in FORWARD_OPS:
                result = self._site(node, inputs, region)
                name = qualified_name(node)
                found.append(Miss(self.name, node, result, 0, node, name) if isinstance(result, str) else result)
        return found

    def menu(self, site: MergedSite, profile: DeviceProfile, settings: SiteSettings) -> LayerMenu:
        times, conditions = self.times(site.device), Conditions(site.rows, profile)
        times.measure_op(site.applied, site.layer, site.shape, site.rows)
        found = times.of_op(site.applied, site.shape, site.rows)
        dense = times.of(None, site.shape, site.rows)
        kept = Way("as it is", False, conditions.amounts(site.cost))
        if found is None:
            return LayerMenu((kept,), "its time could not be measured within timing_seconds")
        kept = replace(kept, costs={**kept.costs, "time": found.seconds}, time_from=found.source)
        merged = Way("merged", True, conditions.amounts(dense_cost(*site.shape)), dense.source)
        merged = replace(merged, costs={**merged.costs, "time": dense.seconds})
        numbers = f"{dense.seconds * 1e6:.3g} us as one dense weight, {found.seconds * 1e6:.3g} us as it is"
        if settings.rewrite == "always" or dense.seconds < found.seconds:
            return LayerMenu((kept, merged), f"measured for {site.rows} rows: {numbers}")
        return LayerMenu((merged, kept), f"measured for {site.rows} rows, and not faster merged: {numbers}")

    def rewrite(self, site: MergedSite, candidate: Way, editor: Editor) -> None:
        sizes, dtype = site.shape
        weights, places = MergedWeights(Wanted(site.op, site.static, sizes, dtype)), site.places
        name = f"{site.node.name}_merged"
        like = InputLike(sizes[::-1], dtype, site.device)
        weight = editor.add_inputs({name: like}, lambda given: [weights.of([given[place] for place in places])])[name]
        editor.before(site.node)
        bias = None if site.bias is None else cast(site.bias, dtype, editor)
        editor.replace(site.node, editor.call(F.linear, cast(site.x, dtype, editor), weight, bias))
        editor.erase([site.call, site.node])

    def _site(self, call: fx.Node, inputs: Sequence[fx.Node], region: Region) -> MergedSite | str:
        """The site, or why there is none."""
        arguments: Any = call.args
        x, factors, bias, static, _, activation, _ = arguments
        outputs = list(call.users)
        if len(outputs) != 1 or outputs[0].args[1] != 0:
            return "something else than the layer's output is read"
        if activation:
            return f"it was called with the activation {activation}, which one dense weight has no place for"
        if needs_gradient(outputs[0]):
            return "this graph trains, and the factors of a merged weight would not"
        if region.body:
            return "it stands in a checkpoint or a subgraph, whose inputs are fixed, so that no weight can be added"
        values = [compat.value_of_input(each) if each in inputs else None for each in factors]
        known = [each for each in values if each is not None]
        if len(known) < len(values):
            return "its factors are made in the graph, or their values are not known when it is compiled"
        if any(compat.wrapper_subclass(each) or each.is_inference() for each in known):
            return "its factors are of a tensor subclass, or were made under torch.inference_mode()"
        y = example_of(outputs[0])
        sizes = (example_of(x).shape[-1], y.shape[-1])
        if not all(isinstance(size, int) for size in (*sizes, *static)):
            return "its sizes vary from call to call, and those of a merged weight cannot"
        return MergedSite(
            rule=self.name,
            name=qualified_name(call),
            node=outputs[0],
            device=known[0].device,
            sizes={},
            call=call,
            op=FORWARD_OPS[call.target],
            x=x,
            bias=bias if isinstance(bias, fx.Node) else None,
            factors=tuple(known),
            places=tuple(inputs.index(each) for each in factors),
            static=tuple(map(int, static)),
            shape=Shape(LayerSizes(*sizes), y.dtype),
            rows=rows_of(x),
        )
