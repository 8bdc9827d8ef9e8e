"""The rule: a linear with the losses and statistics of its rows becomes one op that never holds all logits."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from structfly.compat import size_hints
from structfly.config import SiteSettings
from structfly.lowering.head.chunks import wide_dtype
from structfly.lowering.head.linear import Wanted
from structfly.lowering.linear_cross_entropy import transforms as _transforms  # noqa: F401  registers the op
from structfly.patterns.head.checks import AFTER_TRACE, stranger, why_too_steep, why_unsupported
from structfly.patterns.head.gradients import carries_gradient, no_gradients, wanted_gradients
from structfly.patterns.head.logits import trace
from structfly.patterns.head.menu import FusedCandidate
from structfly.patterns.head.path import LogitsPath, Obstacle, foreign_users
from structfly.patterns.head.site import adapter_rank, class_count, hidden_size, row_count
from structfly.patterns.linear_cross_entropy.consumers import statistic_forms
from structfly.patterns.linear_cross_entropy.directions import (
    TwoWayCandidate,
    TwoWaySite,
    rewrite_both,
    share_a_sum,
    two_way_menu,
    two_way_site,
)
from structfly.patterns.linear_cross_entropy.loss import LossForm, loss_forms
from structfly.patterns.linear_cross_entropy.menu import head_menu
from structfly.patterns.linear_cross_entropy.pieces import Pieces, read_pieces
from structfly.patterns.linear_cross_entropy.rewrite import rewrite_head
from structfly.patterns.linear_cross_entropy.row_loss import NoRowLoss
from structfly.patterns.linear_cross_entropy.same_rows import (
    SameRows,
    Traced,
    read_same_rows,
    read_scalar,
    without_served,
)
from structfly.patterns.linear_cross_entropy.site import CrossEntropySite
from structfly.records import Candidate, DeviceProfile, Menu, Miss
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region, example, example_of, qualified_name
from structfly.rewriter.writes import unused

_Site = CrossEntropySite | TwoWaySite
_SUMMED_ELSEWHERE = NoRowLoss("D", "their sum is made with the other direction's")


class LinearCrossEntropy:
    """Exact: loss and gradients are eager's, to the rounding of their dtype.  See docs/linear_cross_entropy.md."""

    name = "linear_cross_entropy"

    def find(self, region: Region) -> Sequence[_Site | Miss]:
        results: list[_Site | Miss] = []
        groups: dict[fx.Node, list[Traced]] = {}
        reported: set[fx.Node] = set()
        for form in (*loss_forms(region), *statistic_forms(region)):
            if isinstance(form, tuple):
                anchor, reason = form
                results.append(Miss(self.name, anchor, reason, 0, anchor))
                continue
            path = trace(form, region)
            if not isinstance(path, Obstacle):
                groups.setdefault(path.linear.node, []).append((path, form))
            elif isinstance(form, LossForm):  # a statistic alone may be of anything
                results.append(Miss(self.name, path.node, path.reason, path.progress, form.anchor))
                reported.update(form.inner)
        for group in groups.values():
            results.extend(self._group(without_served(group), region, reported))
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

    def _group(self, group: list[Traced], region: Region, reported: set[fx.Node]) -> list[_Site | Miss]:
        """What consumes one linear's logits, along its rows or its columns: one site, or a miss for each loss, or else
        for each statistic that is not part of a loss whose miss is ``reported``."""
        along = group[0][0].linear.class_dim
        split = [[item for item in group if (item[0].linear.class_dim == along) is same] for same in (True, False)]
        idle = unused(region)
        directions = [items for items in split if any(form.anchor not in idle for _, form in items)]
        found = [self._site(items, group, region) for items in directions]
        sites = [each for each in found if isinstance(each, CrossEntropySite)]
        if len(sites) == 2 and share_a_sum(*sites):
            found[1] = self._site(directions[1], group, region, in_a_sum=False)
            sites = [each for each in found if isinstance(each, CrossEntropySite)]
        if len(sites) == 2:
            together = two_way_site(*sites)
            if isinstance(together, TwoWaySite):
                return [together]
            found = [together, together]
        results: list[_Site | Miss] = []
        for items, each in zip(directions, found, strict=True):
            if isinstance(each, CrossEntropySite) and len(directions) == 2:
                each = self._site(items, items, region)  # the other direction's consumers are strangers now
            results.extend([each] if isinstance(each, CrossEntropySite) else self._misses(items, each, reported))
        return results

    def _misses(self, items: list[Traced], why: tuple[fx.Node, str], reported: set[fx.Node]) -> list[Miss]:
        linear = items[0][0].linear
        name = qualified_name(linear.node, linear.weight)
        anchors = [form.anchor for _, form in items if isinstance(form, LossForm)]
        anchors = anchors or [form.anchor for _, form in items if form.anchor not in reported]
        return [Miss(self.name, *why, AFTER_TRACE, anchor, name) for anchor in anchors]

    def _site(
        self, items: list[Traced], every: list[Traced], region: Region, *, in_a_sum: bool = True
    ) -> CrossEntropySite | tuple[fx.Node, str]:
        """The site of ``items``, which take the same dimension as classes, where ``every`` consumer is replaced;
        ``in_a_sum`` if the op may make the scalar that they end in."""
        strangers = foreign_users([path for path, _ in every], [form for _, form in every])
        if strangers:
            user = min(strangers, key=region.order.__getitem__)
            return user, stranger(user)
        unsupported = why_unsupported([path for path, _ in items])
        if unsupported is not None:
            return unsupported
        losses = [(path, form) for path, form in items if isinstance(form, LossForm)]
        if len(losses) == len(items) > 1 and any(path.rows != losses[0][0].rows for path, _ in losses):
            pieces = read_pieces(losses, region)
            return (losses[0][1].anchor, pieces) if isinstance(pieces, str) else self._pieces(pieces, region)
        same = read_same_rows(items, region)
        return same if isinstance(same, tuple) else self._same_rows(same, region, in_a_sum)

    def _pieces(self, pieces: Pieces, region: Region) -> CrossEntropySite | tuple[fx.Node, str]:
        first = pieces.members[0]
        anchors = [member.form.anchor for member in pieces.members]
        carrying = [anchor for anchor in anchors if carries_gradient(anchor, region)]
        gradients: Wanted | tuple[fx.Node, str] = no_gradients(first.path)
        if carrying:
            if len(carrying) < len(anchors):
                constant = next(anchor for anchor in anchors if anchor not in carrying)
                return constant, "one of several losses on this linear is computed without gradient, another with"
            between = (node for member in pieces.members for node in (*member.path.nodes, *member.form.inner))
            gradients = wanted_gradients(first.path, between)
        if not isinstance(gradients, Wanted):
            return gradients
        recompute = "inside a checkpointed region" if region.checkpointed else "each part has a loss of its own"
        linear = first.path.linear
        source = example_of(linear.node)
        return self._bind(
            first.path,
            first.form,
            gradients,
            "D",
            recompute,
            node=min(anchors, key=region.order.__getitem__),
            rows=row_count(linear.node, linear.class_dim % source.ndim),
            loss_dtype=wide_dtype(source.dtype),  # until each part's losses have been summed
            pieces=pieces,
        )

    def _same_rows(self, same: SameRows, region: Region, in_a_sum: bool) -> CrossEntropySite | tuple[fx.Node, str]:
        form = None if same.loss is None else same.loss[1]
        carrying = [(path, each) for path, each in same.consumers if same.end(each) in same.carrying]
        gradients: Wanted | tuple[fx.Node, str] = no_gradients(same.path)
        if carrying:
            between = (node for path, each in carrying for node in (*path.nodes, *each.inner))
            gradients = wanted_gradients(carrying[0][0], between)
        if not isinstance(gradients, Wanted):
            return gradients
        path, first = same.consumers[0]
        dtype = example_of(path.linear.node).dtype
        coefficient_class, recompute = "A", ""
        if carrying and not (len(carrying) == 1 and carrying[0][1] is form and same.reduction != "none"):
            scalar = read_scalar(same, region) if in_a_sum else _SUMMED_ELSEWHERE
            if isinstance(scalar, NoRowLoss):
                coefficient_class, recompute = scalar.coefficient_class, scalar.reason
            else:
                coefficient_class = "B" if scalar.row_loss is None else scalar.row_loss.coefficient_class
                if dtype == torch.float16:
                    recompute = "float16 has not the range for coefficients that are not yet known"
                elif not region.checkpointed:
                    same = scalar
        if region.checkpointed:
            recompute = "inside a checkpointed region"
        end = same.end(first) if same.row_loss is None else same.row_loss.root
        return self._bind(
            same.path,
            form,
            gradients,
            coefficient_class,
            recompute,
            node=end,
            rows=row_count(first.logits, path.class_dim),
            # A sum over rows stays wide until the user's other terms have been added.
            loss_dtype=wide_dtype(dtype) if form is None or same.row_loss is not None else example_of(end).dtype,
            same=same,
        )

    def _bind(
        self,
        path: LogitsPath,
        form: LossForm | None,
        gradients: Wanted,
        coefficient_class: str,
        recompute: str,
        *,
        node: fx.Node,
        rows: sympy.Expr,
        loss_dtype: torch.dtype,
        pieces: Pieces | None = None,
        same: SameRows | None = None,
    ) -> CrossEntropySite | tuple[fx.Node, str]:
        steep = why_too_steep(path, gradients)
        if steep is not None:
            return steep
        linear = path.linear
        logits = example_of(linear.node)
        tensors = [linear.node, linear.x, linear.weight, *([] if form is None else [form.logits])]
        values = [value for value in map(example, tensors) if value is not None]
        return CrossEntropySite(
            rule=self.name,
            name=qualified_name(linear.node, linear.weight),
            node=node,
            device=logits.device,
            sizes={symbol: hint for value in values for symbol, hint in size_hints(value).items()},
            path=path,
            form=form,
            pieces=pieces,
            same=same,
            gradients=gradients,
            coefficient_class=coefficient_class,
            recompute=recompute,
            rows=rows,
            hidden=hidden_size(linear),
            classes=class_count(path),
            rank=adapter_rank(path),
            dtype=logits.dtype,
            loss_dtype=loss_dtype,
        )
