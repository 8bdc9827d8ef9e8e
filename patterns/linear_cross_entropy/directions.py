"""Losses and statistics over both dimensions of one product, as contrastive training has them (CLIP: images to texts
and back).

With z = s A B^T the rows of z are logits over B, and its columns are logits over A: a head with hidden states A and
weight B, and one with hidden states B and weight A.  Each makes its own product in chunks, so that z is computed twice,
12NHV operations against the 6NHV of a z that is stored, and never stored.  Where no budget asks for less memory, time
alone decides.

Each is written where its own values are first used, so that neither may need what the other gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from structfly.config import SiteSettings
from structfly.patterns.head.menu import FusedCandidate
from structfly.patterns.linear_cross_entropy.menu import head_menu
from structfly.patterns.linear_cross_entropy.rewrite import rewrite_head
from structfly.patterns.linear_cross_entropy.site import CrossEntropySite
from structfly.records import Candidate, Cost, DeviceProfile, Menu, Site
from structfly.records.cost import at_sizes
from structfly.rewriter.editor import Editor


@dataclass(frozen=True)
class TwoWaySite(Site):
    """Two heads that read one product, one along its rows and one along its columns."""

    heads: tuple[CrossEntropySite, CrossEntropySite]

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        return tuple(dict.fromkeys(node for head in self.heads for node in head.dead_nodes))


@dataclass(frozen=True)
class TwoWayCandidate(Candidate):
    """One candidate for each head."""

    heads: tuple[FusedCandidate, ...] = ()


def share_a_sum(one: CrossEntropySite, other: CrossEntropySite) -> bool:
    """Whether the scalars that two heads make have nodes in common, of which only one can take the place."""
    sums = [set() if head.row_loss is None else set(head.row_loss.nodes) for head in (one, other)]
    return not sums[0].isdisjoint(sums[1])


def two_way_site(one: CrossEntropySite, other: CrossEntropySite) -> TwoWaySite | tuple[fx.Node, str]:
    """The site of both, where the first of them stands; or what one needs of the other, as the reason why not."""
    for head, giver in ((one, other), (other, one)):
        needed = head.inputs & _made_of(giver.ends)
        if needed:
            node = min(needed, key=str)
            return node, (
                f"{node.name} is made of the logits along one dimension, and what is made along the other needs it, so "
                "they must exist"
            )
    return TwoWaySite(one.rule, one.name, one.node, one.device, {**one.sizes, **other.sizes}, (one, other))


def two_way_menu(site: TwoWaySite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
    """Both heads left dense, on logits that are made once, or both fused, in chunks of about the same bytes."""
    menus = [head_menu(head, profile, settings) for head in site.heads]
    (dense, *one), (other_dense, *other) = (menu.candidates for menu in menus)
    passes = tuple(stage for stage in other_dense.cost.stages if stage.dtype is None)
    cost = replace(dense.cost, stages=dense.cost.stages + passes)
    candidates: list[Candidate] = [replace(dense, cost=cost)]
    candidates.extend(_together(each, _like(each, other)) for each in one)
    limit = max(menu.peak_limit for menu in menus)
    if settings.loss_memory is None:
        limit = max(limit, int(at_sizes(cost.transient_bytes, site.sizes)))
    return Menu(
        tuple(candidates),
        peak_limit=limit,
        own_bytes=sum(menu.own_bytes for menu in menus),
        shared_bytes={name: count for menu in menus for name, count in menu.shared_bytes.items()},
    )


def rewrite_both(site: TwoWaySite, candidate: TwoWayCandidate, editor: Editor) -> None:
    """Write each head where its own values are first used."""
    for head, chosen in zip(site.heads, candidate.heads, strict=True):
        editor.before(head.node)
        rewrite_head(head, chosen, editor)


def _made_of(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """These and all that depends on them."""
    found, pending = set(nodes), list(nodes)
    while pending:
        fresh = [user for user in pending.pop().users if user not in found]
        found.update(fresh)
        pending.extend(fresh)
    return found


def _like(one: Candidate, others: Sequence[Candidate]) -> Candidate:
    """The one of ``others`` that comes nearest in what it does and, without more memory, in how it is cut up."""
    assert isinstance(one, FusedCandidate)

    def distance(other: Candidate) -> tuple[bool, bool, bool, float]:
        assert isinstance(other, FusedCandidate)
        more = other.workspace - one.workspace
        return other.scheme != one.scheme, other.schedule != one.schedule, more > 0, abs(more)

    return min(others, key=distance)


def _together(one: Candidate, other: Candidate) -> TwoWayCandidate:
    assert isinstance(one, FusedCandidate)
    assert isinstance(other, FusedCandidate)
    name = one.name if one.name == other.name else f"{one.name}; {other.name}"
    cost = Cost(
        one.cost.stages + other.cost.stages,
        transient_bytes=max(one.cost.transient_bytes, other.cost.transient_bytes),
        saved_bytes=one.cost.saved_bytes + other.cost.saved_bytes,
        opaque_calls=one.cost.opaque_calls + other.cost.opaque_calls,
    )
    return TwoWayCandidate(f"both directions, each with a product of its own: {name}", cost, heads=(one, other))
