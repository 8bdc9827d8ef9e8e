"""The engine: find sites, let the solver choose among their candidates, write the choices into the graph.

Reading comes first and changes nothing.  Writing is one transaction per site.  A rule that raises never breaks the
user's program unless ``strict`` is set: its site is left as it was and the report says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import fx

from structfly.config import Config
from structfly.errors import PlanError, RewriteError
from structfly.records import DeviceProfile, LayerMenu, Miss, Site, SiteReport, Status
from structfly.rewriter.choosing import Choice, Order, choose
from structfly.rewriter.editor import Editor
from structfly.rewriter.inputs import ExtraInputs, copy_of, with_placeholders
from structfly.rewriter.layer_choosing import LayerChoice, LayerOrder, choose_layers
from structfly.rewriter.region import Region, qualified_name, regions_of, source_line
from structfly.rewriter.rule import Rule
from structfly.rewriter.writes import why_pinned

log = logging.getLogger("structfly.rewriter")

Profiles = Callable[[torch.device], DeviceProfile]
OrderT = TypeVar("OrderT")
ChoiceT = TypeVar("ChoiceT")


@dataclass
class Outcome:
    """What the engine did to one graph.

    Attributes:
        module: what to compile: the graph module given, or a copy that takes further inputs.
        sites: the report's lines, in graph order for each run of the engine.
        inputs: graph inputs that rewrites added, after the graph's own.
        original: the graph as it was, where some rewrite does not hold for all arguments, else None.
        changed: whether the graph was changed.
        seconds: time taken.
    """

    module: fx.GraphModule
    sites: list[SiteReport] = field(default_factory=list)
    inputs: list[ExtraInputs] = field(default_factory=list)
    original: fx.GraphModule | None = None
    changed: bool = False
    seconds: float = 0.0

    @property
    def examples(self) -> list[torch.Tensor]:
        """Example values of the inputs that were added."""
        return [node.meta["example_value"] for extra in self.inputs for node in extra.nodes]


@dataclass(frozen=True)
class _Found:
    rule: Rule[Any]
    site: Site
    region: Region
    place: tuple[int, int]


def rewrite_graph(gm: fx.GraphModule, rules: Sequence[Rule[Any]], config: Config, profiles: Profiles) -> Outcome:
    """Rewrite ``gm`` in place and say what was done.

    Args:
        gm: a Dynamo graph; its nodes carry example values.
        rules: the rules to run.
        config: budgets, switches and overrides.
        profiles: gives the profile of a device.

    Raises:
        PlanError: no choice keeps the budget of the graph's layers.
        RewriteError: a rule raised, and ``config.strict`` is set.
    """
    return _Run(gm, rules, config, profiles).run()


class _Run:
    """One run over one graph."""

    def __init__(self, gm: fx.GraphModule, rules: Sequence[Rule[Any]], config: Config, profiles: Profiles) -> None:
        self.gm, self.rules, self.config, self.profiles = gm, rules, config, profiles
        self.outcome = Outcome(gm)
        self.lines: list[tuple[tuple[int, int], SiteReport]] = []
        self.successors: dict[fx.Node, fx.Node] = {}

    def run(self) -> Outcome:
        start = time.perf_counter()
        regions = regions_of(self.gm)
        found = [item for number, region in enumerate(regions) for item in self._find(number, region)]
        choices = self._choose(found)
        if any(item.site.conditional and choice.candidate.rewrites for item, choice in choices):
            self.outcome.original = copy_of(self.gm)
        for item, choice in choices:
            self._apply(item, choice)
        if self.outcome.inputs:
            self.outcome.module = with_placeholders(self.gm, self.outcome.inputs)
        if self.outcome.changed:
            for module in (self.outcome.module, *(region.owner for region in regions[1:])):
                module.recompile()
        self.outcome.sites = [line for _, line in sorted(self.lines, key=lambda entry: entry[0])]
        self.outcome.seconds = time.perf_counter() - start
        for site in self.outcome.sites:
            log.info("%s %s at %s: %s", site.rule, site.status, site.name or site.nodes[:1], site.reason)
        return self.outcome

    # ------------------------------------------------------------------------------------------------ reading

    def _find(self, number: int, region: Region) -> list[_Found]:
        found: list[_Found] = []
        results = [(rule, self._results(rule, number, region)) for rule in self.rules]
        taken = {node for _, each in results for site in each if isinstance(site, Site) for node in site.dead_nodes}
        of_earlier: set[fx.Node] = set()  # what a rule may rewrite, no later one does
        for rule, each in results:
            for result in each:
                place = (number, region.order[result.node])
                if isinstance(result, Miss):
                    if result.anchor not in taken:  # else it is part of what another attempt found
                        self._missed(result, place)
                elif not of_earlier.isdisjoint((result.node, *result.dead_nodes)):
                    if not of_earlier.issuperset(result.dead_nodes):
                        reason = "another rule takes part of what would be rewritten"
                        self._missed(Miss(rule.name, result.node, reason, 0, result.node, result.name), place)
                elif not self.config.for_site(result.name).rule_enabled(rule.name):
                    reason = f"the rule {rule.name} is switched off here; rules.{rule.name} = true switches it on"
                    self._say(result, place, "kept", reason)
                else:
                    found.append(_Found(rule, result, region, place))
            of_earlier.update(node for item in found if item.rule is rule for node in item.site.dead_nodes)
        return found

    def _results(self, rule: Rule[Any], number: int, region: Region) -> list[Site | Miss]:
        """What a rule finds in a region, or nothing if it raises."""
        try:
            return [_checked(result, region) for result in furthest(rule.find(region))]
        except Exception as error:
            self._failed(rule.name, None, (number, -1), error)
            return []

    def _choose(self, found: Sequence[_Found]) -> list[tuple[_Found, Choice | LayerChoice]]:
        sites: list[tuple[_Found, Order]] = []
        layers: list[tuple[_Found, LayerOrder]] = []
        for item in found:
            settings = self.config.for_site(item.site.name)
            always = settings.rewrite == "always"
            try:
                profile = self.profiles(item.site.device)
                menu = item.rule.menu(item.site, profile, settings)
            except Exception as error:
                self._failed(item.rule.name, item.site, item.place, error)
                continue
            if isinstance(menu, LayerMenu):
                layers.append((item, LayerOrder(item.site.name, menu, always)))
            else:
                sites.append((item, Order(item.site.sizes, menu, profile, always)))
        return [
            *self._chosen(sites, choose),
            *self._chosen(layers, lambda orders: choose_layers(orders, self.config.budget)),
        ]

    def _chosen(
        self, items: Sequence[tuple[_Found, OrderT]], choices: Callable[[Sequence[OrderT]], Sequence[ChoiceT]]
    ) -> list[tuple[_Found, ChoiceT]]:
        """What ``choices`` says of the items' orders; where it fails, all of them stay as they are."""
        if not items:
            return []
        try:
            made = choices([order for _, order in items])
        except PlanError:  # the user's
            raise
        except Exception as error:
            for item, _ in items:
                self._failed(item.rule.name, item.site, item.place, error)
            return []
        return [(item, choice) for (item, _), choice in zip(items, made, strict=True)]

    # ------------------------------------------------------------------------------------------------ writing

    def _apply(self, item: _Found, choice: Choice | LayerChoice) -> None:
        site, place = item.site, item.place
        if choice.candidate.rewrites:
            own = item.region.owner is self.gm
            editor = Editor(item.region.graph, site.node, allow_inputs=own, successors=self.successors)
            try:
                item.rule.rewrite(site, choice.candidate, editor)
                editor.commit()
            except Exception as error:
                editor.rollback()
                self._failed(item.rule.name, site, place, error)
                return
            self.outcome.inputs.extend(editor.inputs)
            self.outcome.changed = True
        self._say(site, place, "rewritten" if choice.candidate.rewrites else "kept", choice.reason, choice)

    # ------------------------------------------------------------------------------------------------ reporting

    def _say(
        self,
        site: Site,
        place: tuple[int, int],
        status: Status,
        reason: str,
        choice: Choice | LayerChoice | None = None,
    ) -> None:
        line = SiteReport(site.rule, status, reason, site.name, site.replaces, source_line(site.node))
        if choice is not None:
            line = _with_costs(line, choice)
        self.lines.append((place, line))

    def _missed(self, miss: Miss, place: tuple[int, int]) -> None:
        name = miss.name or qualified_name(miss.node)
        line = SiteReport(miss.rule, "missed", miss.reason, name, (miss.node.name,), source_line(miss.node))
        self.lines.append((place, line))

    def _failed(self, rule: str, site: Site | None, place: tuple[int, int], error: Exception) -> None:
        reason = f"structfly's own failure, please report it: {type(error).__name__}: {error}"
        if self.config.strict:
            raise RewriteError(f"rule {rule}: {reason}; strict=False leaves the site as it is instead") from error
        log.warning("rule %s: %s", rule, reason, exc_info=error)
        line = SiteReport(rule, "failed", reason)
        if site is not None:
            line = SiteReport(rule, "failed", reason, site.name, site.replaces, source_line(site.node))
        self.lines.append((place, line))


def _with_costs(line: SiteReport, choice: Choice | LayerChoice) -> SiteReport:
    if isinstance(choice, LayerChoice):
        return replace(
            line,
            candidate=choice.candidate.name,
            seconds=choice.candidate.costs["time"],
            seconds_kept=choice.dense.costs["time"],
            loss=choice.candidate.loss,
            costs=choice.candidate.costs,
            costs_kept=choice.dense.costs,
            time_from=choice.candidate.time_from,
        )
    return replace(
        line,
        candidate=choice.candidate.name,
        seconds=choice.values.seconds,
        seconds_kept=choice.kept.seconds,
        peak_bytes=choice.values.transient_bytes,
        peak_bytes_kept=choice.kept.transient_bytes,
    )


def _checked(result: Site | Miss, region: Region) -> Site | Miss:
    """The find, or the miss it becomes where nothing may be rewritten or its nodes cannot be computed together."""
    closed = region.why_closed(result.node, values_only=isinstance(result, Site) and result.values_only)
    if isinstance(result, Miss):
        return replace(result, reason=closed or result.reason)
    pinned = [(result.node, closed)] if closed else [why_pinned(region, group) for group in result.groups]
    reasons = [each for each in pinned if each is not None]
    return Miss(result.rule, *reasons[0], 0, result.node, result.name) if reasons else result


def furthest(results: Iterable[Site | Miss]) -> list[Site | Miss]:
    """One result per anchor: its site if there is one, else the attempt that got furthest."""
    best: dict[fx.Node, Miss] = {}
    sites: list[Site] = []
    for result in results:
        if isinstance(result, Site):
            sites.append(result)
        elif result.anchor not in best or result.progress > best[result.anchor].progress:
            best[result.anchor] = result
    matched = {site.node for site in sites}
    return [*sites, *(miss for anchor, miss in best.items() if anchor not in matched)]
