"""The rule: linear layers of a graph without gradients become structured ones, as a budget or a plan asks.

Approximate: it acts only where one of the two is given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from structfly import compat
from structfly.config import SiteSettings
from structfly.patterns.linear.candidates import Candidate
from structfly.patterns.linear.menu import Planned, offered_menu, planned_menu
from structfly.patterns.linear.reads import TRAINS, linears_by_weight, rows_of, why_not
from structfly.patterns.linear.rewrite import rewrite_layer
from structfly.patterns.linear.site import LinearSite
from structfly.patterns.linear.times import Times
from structfly.records import DeviceProfile, LayerMenu, Miss
from structfly.rewriter.editor import Editor
from structfly.rewriter.linear import LinearLike
from structfly.rewriter.region import Region, qualified_name

log = logging.getLogger("structfly.patterns")


class RestructuredLinear:
    """See docs/restructure.md.

    Args:
        plan: what each layer becomes, by qualified name, or None where a budget decides.
        times: gives the times of layers on a device, where they count; None where the roofline predicts them.
    """

    name = "linear"

    def __init__(
        self, plan: Mapping[str, Planned] | None = None, times: Callable[[torch.device], Times] | None = None
    ) -> None:
        self.plan, self.times = plan, times

    def find(self, region: Region) -> Sequence[LinearSite | Miss]:
        results: list[LinearSite | Miss] = []
        for weight, calls in linears_by_weight(region).items():
            reason = why_not(weight, calls, region)
            if reason is None:
                continue
            name = qualified_name(calls[0].node, weight)
            site = None if reason else self._site(name, weight, calls, region)
            reason = reason if site is None else self._why_unplanned(site)
            if site is not None and not reason:
                results.append(site)
            else:
                results.extend(Miss(self.name, call.node, reason, 0, call.node, name) for call in calls)
        training = [each.name for each in results if isinstance(each, Miss) and each.reason == TRAINS]
        if training:
            log.warning("%d linear layers (%s, ...) are left as they are: %s", len(training), training[0], TRAINS)
        return results

    def menu(self, site: LinearSite, profile: DeviceProfile, settings: SiteSettings) -> LayerMenu:
        if self.plan is not None:
            return planned_menu(site, profile, self.plan[site.name])
        return offered_menu(site, profile, settings, self.times and self.times(site.device))

    def rewrite(self, site: LinearSite, candidate: Candidate, editor: Editor) -> None:
        assert candidate.structure is not None
        rewrite_layer(site, candidate.structure, editor)

    def _site(self, name: str, weight: fx.Node, calls: Sequence[LinearLike], region: Region) -> LinearSite:
        stored = compat.value_of_input(weight)
        assert stored is not None
        return LinearSite(
            rule=self.name,
            name=name,
            node=calls[0].node,
            device=stored.device,
            sizes={},
            calls=tuple(calls),
            rows=tuple(rows_of(call.x) for call in calls),
            stored=stored,
            transposed=calls[0].transposed,
            place=region.graph.find_nodes(op="placeholder").index(weight),
        )

    def _why_unplanned(self, site: LinearSite) -> str:
        if self.plan is None:
            return ""
        if site.name not in self.plan:
            return "the plan does not name it"
        planned = self.plan[site.name]
        if planned.sizes != site.layer:
            return f"the plan has it as {planned.sizes}; here it is {site.layer}"
        return "" if planned.structure is None else planned.structure.why_not(site.layer)
