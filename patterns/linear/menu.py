"""What a layer of a graph may become: what its structures offer under a budget, or what a plan says."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from structfly.config import SiteSettings
from structfly.patterns.linear.candidates import Candidate, offered, undominated
from structfly.patterns.linear.heads import is_head
from structfly.patterns.linear.projection import remembered_losses
from structfly.patterns.linear.site import LinearSite
from structfly.patterns.linear.times import TimedCandidates, Times
from structfly.patterns.structure import Structure
from structfly.patterns.structures import OFFERED, STRUCTURES
from structfly.records import DeviceProfile, LayerMenu
from structfly.records.layer import LayerCost, LayerSizes
from structfly.rewriter.layer_costs import Conditions, Costs, dense_cost

_LOSSES = "losses are predicted from the weights alone, without calibration"


class Planned(Protocol):
    """What a plan says of a layer.

    Attributes:
        sizes: of the layer.
        structure: what its weight is made of, None leaves it dense.
        predicted_loss: how much the loss is predicted to rise by it.
    """

    @property
    def sizes(self) -> LayerSizes: ...
    @property
    def structure(self) -> Structure | None: ...
    @property
    def predicted_loss(self) -> float: ...


def offered_menu(
    site: LinearSite, profile: DeviceProfile, settings: SiteSettings, times: Times | None = None
) -> LayerMenu:
    """What the structures offer that the configuration names.

    Args:
        times: of layers on the site's device, where time counts; without them the roofline predicts it.
    """
    amounts = _Amounts(site, profile)
    if is_head(site.name) and "structures" not in settings.overridden:
        left = Candidate(None, 0.0, amounts(dense_cost(site.layer, site.dtypes[0])))
        return LayerMenu((left,), f"a head is left dense; overrides.{site.name}.structures names what it may become")
    names = OFFERED if settings.structures is None else settings.structures
    structures = [STRUCTURES[name] for name in names]
    losses = remembered_losses(site.stored, site.transposed)
    candidates = offered(site.layer, site.dtypes[0], structures, losses, amounts)
    if times is None:
        return LayerMenu(tuple(undominated(candidates)), basis=_LOSSES)
    return TimedCandidates.of(site, structures, candidates, times, _LOSSES).menu()


def planned_menu(site: LinearSite, profile: DeviceProfile, planned: Planned) -> LayerMenu:
    """What the plan says, at what it costs here."""
    amounts, dtype = _Amounts(site, profile), site.dtypes[0]
    dense = Candidate(None, 0.0, amounts(dense_cost(site.layer, dtype)))
    if planned.structure is None:
        return LayerMenu((dense,), "the plan leaves it dense")
    cost = amounts(planned.structure.cost(site.layer, dtype))
    chosen = Candidate(planned.structure, planned.predicted_loss, cost)
    reason = (
        "the plan says so; the predicted loss is the plan's, the costs are of this graph, the weight alone is projected"
    )
    return LayerMenu((dense, chosen), reason)


class _Amounts:
    """Amounts of a cost for all calls of a layer together, without gradients."""

    def __init__(self, site: LinearSite, profile: DeviceProfile) -> None:
        self.conditions = [Conditions(rows, profile) for rows in site.rows]

    def __call__(self, cost: LayerCost) -> Costs:
        calls = [each.amounts(replace(cost, saved_bytes=0)) for each in self.conditions]
        added = {name: sum(call[name] for call in calls) for name in ("flops", "time")}
        return {**calls[0], **added, "transient_bytes": max(call["transient_bytes"] for call in calls)}
