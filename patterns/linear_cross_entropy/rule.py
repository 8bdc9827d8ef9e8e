"""The rule: linear -> cross-entropy heads become one op that never holds all logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from structfly.compat import size_hints
from structfly.config import SiteSettings
from structfly.lowering.head.linear import Wanted
from structfly.lowering.linear_cross_entropy import transforms as _transforms  # noqa: F401  registers the op
from structfly.patterns.head.checks import AFTER_TRACE, stranger, why_too_steep, why_unsupported
from structfly.patterns.head.gradients import wanted_gradients
from structfly.patterns.head.logits import LogitsPath, Obstacle, example_of, foreign_users, trace
from structfly.patterns.head.menu import FusedCandidate
from structfly.patterns.head.site import adapter_rank, class_count, hidden_size, row_count
from structfly.patterns.head.weighted_sum import WeightedSum, read_weighted_sum
from structfly.patterns.linear_cross_entropy.directions import (
    TwoWayCandidate,
    TwoWaySite,
    rewrite_both,
    two_way_menu,
    two_way_site,
)
from structfly.patterns.linear_cross_entropy.loss import LossForm, loss_forms
from structfly.patterns.linear_cross_entropy.menu import head_menu
from structfly.patterns.linear_cross_entropy.pieces import Pieces, read_pieces
from structfly.patterns.linear_cross_entropy.rewrite import rewrite_head
from structfly.patterns.linear_cross_entropy.site import CrossEntropySite
from structfly.records import Candidate, DeviceProfile, Menu, Miss
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region, example, qualified_name

_Site = CrossEntropySite | TwoWaySite


@dataclass(frozen=True)
class _Traced:
    form: LossForm
    path: LogitsPath


class LinearCrossEntropy:
    """Exact: loss and gradients are eager's, to the rounding of their dtype.  See docs/linear_cross_entropy.md."""

    name = "linear_cross_entropy"

    def find(self, region: Region) -> Sequence[_Site | Miss]:
        results: list[_Site | Miss] = []
        groups: dict[fx.Node, list[_Traced]] = {}
        for form in loss_forms(region):
            if not isinstance(form, LossForm):
                anchor, reason = form
                results.append(Miss(self.name, anchor, reason, 0, anchor))
                continue
            path = trace(form, region)
            if isinstance(path, Obstacle):
                results.append(Miss(self.name, path.node, path.reason, path.progress, form.anchor))
            else:
                groups.setdefault(path.linear.node, []).append(_Traced(form, path))
        for group in groups.values():
            results.extend(self._group(group, region))
        return results

    def menu(self, site: _Site, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        if isinstance(site, TwoWaySite):
            return two_way_menu(site, profile, settings)
        return head_menu(site, profile, settings)

    def rewrite(self, site: _Site, candidate: Candidate, editor: Editor) -> None:
        if isinstance(site, TwoWaySite):
            assert isinstance(candidate, TwoWayCandidate)
            rewrite_both(site, candidate, editor)
        else:
            assert isinstance(candidate, FusedCandidate)
            rewrite_head(site, candidate, editor)

    # ------------------------------------------------------------------------------------------------ one linear

    def _group(self, group: list[_Traced], region: Region) -> list[_Site | Miss]:
        """The losses that share one linear: one site, or a miss for each."""
        along = group[0].path.linear.class_dim
        split = [[t for t in group if (t.path.linear.class_dim == along) is same] for same in (True, False)]
        directions = [losses for losses in split if losses]
        found = [self._site(losses, group, region) for losses in directions]
        sites = [each for each in found if isinstance(each, CrossEntropySite)]
        if len(sites) == len(directions):
            return [two_way_site(*sites)] if len(sites) == 2 else [*sites]
        misses: list[_Site | Miss] = []
        for losses, each in zip(directions, found, strict=True):
            if isinstance(each, CrossEntropySite):  # but the logits must exist, for the other direction's losses
                each = self._site(losses, losses, region)
                assert not isinstance(each, CrossEntropySite)
            linear = losses[0].path.linear
            name = qualified_name(linear.node, linear.weight)
            misses.extend(Miss(self.name, *each, AFTER_TRACE, traced.form.anchor, name) for traced in losses)
        return misses

    def _site(
        self, group: list[_Traced], every: list[_Traced], region: Region
    ) -> CrossEntropySite | tuple[fx.Node, str]:
        first = group[0]
        form, path = first.form, first.path
        strangers = foreign_users([t.path for t in every], [t.form for t in every])
        if strangers:
            user = min(strangers, key=region.order.__getitem__)
            return user, stranger(user)
        pieces: Pieces | None = None
        if len(group) > 1:
            read = read_pieces([(t.path, t.form) for t in group], region)
            if isinstance(read, str):
                return form.anchor, read
            pieces = read
        unsupported = why_unsupported([t.path for t in group])
        if unsupported is not None:
            return unsupported
        total = read_weighted_sum(form.anchor) if pieces is None and form.reduction == "none" else None
        ends = [t.form.anchor for t in group] if total is None else [total.root]
        gradients = wanted_gradients([t.path for t in group], ends)
        if not isinstance(gradients, Wanted):
            return gradients
        return why_too_steep(path, gradients) or self._bind(first, pieces, total, gradients, region)

    def _bind(
        self, traced: _Traced, pieces: Pieces | None, total: WeightedSum | None, gradients: Wanted, region: Region
    ) -> CrossEntropySite:
        form, path = traced.form, traced.path
        linear = path.linear
        anchors = [form.anchor] if pieces is None else [member.form.anchor for member in pieces.members]
        loss = example_of(form.anchor if total is None else total.root)
        logits = example_of(linear.node)
        recompute = ""
        if region.checkpointed:
            recompute = "inside a checkpointed region"
        elif pieces is not None or (form.reduction == "none" and total is None):
            recompute = "per-token losses have no common upstream factor"
        values = [
            value for value in map(example, (linear.node, linear.x, linear.weight, form.logits)) if value is not None
        ]
        where = form.anchor if total is None else total.root
        class_dim = linear.class_dim % logits.ndim
        return CrossEntropySite(
            rule=self.name,
            name=qualified_name(linear.node, linear.weight),
            node=min(anchors, key=region.order.__getitem__) if pieces is not None else where,
            device=logits.device,
            sizes={symbol: hint for value in values for symbol, hint in size_hints(value).items()},
            path=path,
            form=form,
            pieces=pieces,
            total=total,
            gradients=gradients,
            recompute=recompute,
            rows=row_count(linear.node, class_dim) if pieces else row_count(form.logits, path.class_dim),
            hidden=hidden_size(linear),
            classes=class_count(path),
            rank=adapter_rank(path),
            dtype=logits.dtype,
            loss_dtype=_loss_dtype(loss.dtype, pieces, logits.dtype),
        )


def _loss_dtype(dtype: torch.dtype, pieces: Pieces | None, logits: torch.dtype) -> torch.dtype:
    """Per-token losses of pieces stay wide until each part has been summed."""
    if pieces is None:
        return dtype
    return torch.float64 if logits == torch.float64 else torch.float32
