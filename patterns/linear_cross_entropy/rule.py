"""The rule: linear -> cross-entropy heads become one op that never holds all logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from structfly.compat import expression, size_hints, wrapper_subclass
from structfly.config import SiteSettings
from structfly.lowering.head.linear import DEVICES, Wanted
from structfly.lowering.linear_cross_entropy import transforms as _transforms  # noqa: F401  registers the op
from structfly.patterns.linear_cross_entropy.gradients import wanted_gradients
from structfly.patterns.linear_cross_entropy.logits import (
    LogitsPath,
    Obstacle,
    example_of,
    foreign_users,
    trace,
)
from structfly.patterns.linear_cross_entropy.loss import LossForm, loss_forms
from structfly.patterns.linear_cross_entropy.menu import FusedCandidate, head_menu
from structfly.patterns.linear_cross_entropy.pieces import Pieces, read_pieces
from structfly.patterns.linear_cross_entropy.rewrite import rewrite_head
from structfly.patterns.linear_cross_entropy.site import HeadSite
from structfly.patterns.linear_cross_entropy.weighted_sum import WeightedSum, read_weighted_sum
from structfly.records import Candidate, DeviceProfile, Menu, Miss
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region, example, qualified_name

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
UNBOUNDED_SLOPE = "the slope of the operations on float16 logits has no bound, and float16 no room for it"
# Progress of a miss beyond the walk itself: later conditions are further than any walk.
AFTER_TRACE = 10**6


@dataclass(frozen=True)
class _Traced:
    form: LossForm
    path: LogitsPath


class LinearCrossEntropy:
    """Exact: loss and gradients are eager's, to the rounding of their dtype.  See docs/linear_cross_entropy.md."""

    name = "linear_cross_entropy"

    def find(self, region: Region) -> Sequence[HeadSite | Miss]:
        results: list[HeadSite | Miss] = []
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

    def menu(self, site: HeadSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        return head_menu(site, profile, settings)

    def rewrite(self, site: HeadSite, candidate: Candidate, editor: Editor) -> None:
        assert isinstance(candidate, FusedCandidate)
        rewrite_head(site, candidate, editor)

    # ------------------------------------------------------------------------------------------------ one linear

    def _group(self, group: list[_Traced], region: Region) -> list[HeadSite | Miss]:
        """The losses that share one linear: one site, or a miss for each."""
        found = self._site(group, region)
        if isinstance(found, HeadSite):
            return [found]
        node, reason = found
        name = qualified_name(group[0].path.linear.node, group[0].path.linear.weight)
        return [Miss(self.name, node, reason, AFTER_TRACE, traced.form.anchor, name) for traced in group]

    def _site(self, group: list[_Traced], region: Region) -> HeadSite | tuple[fx.Node, str]:
        first = group[0]
        form, path = first.form, first.path
        strangers = foreign_users([t.path for t in group], [t.form for t in group])
        if strangers:
            user = min(strangers, key=region.order.__getitem__)
            return user, stranger(user)
        pieces: Pieces | None = None
        if len(group) > 1:
            read = read_pieces([(t.path, t.form) for t in group], region)
            if isinstance(read, str):
                return form.anchor, read
            pieces = read
        value = example_of(path.linear.node)
        if value.device.type not in DEVICES:
            return path.linear.node, f"on {value.device.type}; supported devices: {', '.join(DEVICES)}"
        if value.dtype not in DTYPES:
            return path.linear.node, f"logits of {value.dtype}; supported: {', '.join(map(str, DTYPES))}"
        wrapped = wrapper_operand([t.path for t in group])
        if wrapped is not None:
            return wrapped
        total = read_weighted_sum(form.anchor) if pieces is None and form.reduction == "none" else None
        ends = [t.form.anchor for t in group] if total is None else [total.root]
        gradients = wanted_gradients([t.path for t in group], ends)
        if not isinstance(gradients, Wanted):
            return gradients
        if value.dtype == torch.float16 and gradients.any and not path.chain.epilogue.has_steepest:
            return path.linear.node, UNBOUNDED_SLOPE
        return self._bind(first, pieces, total, gradients, region)

    def _bind(
        self, traced: _Traced, pieces: Pieces | None, total: WeightedSum | None, gradients: Wanted, region: Region
    ) -> HeadSite:
        form, path = traced.form, traced.path
        linear, adapter = path.linear, path.linear.adapter
        anchors = [form.anchor] if pieces is None else [member.form.anchor for member in pieces.members]
        loss = example_of(form.anchor if total is None else total.root)
        logits = example_of(linear.node)
        rank = 0 if adapter is None else expression(example_of(adapter.x).shape[-1])
        recompute = ""
        if region.checkpointed:
            recompute = "inside a checkpointed region"
        elif pieces is not None or (form.reduction == "none" and total is None):
            recompute = "per-token losses have no common upstream factor"
        values = [
            value for value in map(example, (linear.node, linear.x, linear.weight, form.logits)) if value is not None
        ]
        where = form.anchor if total is None else total.root
        return HeadSite(
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
            rows=_row_count(form, path, pieces),
            hidden=expression(example_of(linear.x).shape[-1]),
            classes=expression(logits.shape[-1]) if path.num_classes is None else sympy.Integer(path.num_classes),
            rank=sympy.Integer(rank) if isinstance(rank, int) else rank,
            dtype=logits.dtype,
            loss_dtype=_loss_dtype(loss.dtype, pieces, logits.dtype),
        )


def _loss_dtype(dtype: torch.dtype, pieces: Pieces | None, logits: torch.dtype) -> torch.dtype:
    """Per-token losses of pieces stay wide until each part has been summed."""
    if pieces is None:
        return dtype
    return torch.float64 if logits == torch.float64 else torch.float32


def _row_count(form: LossForm, path: LogitsPath, pieces: Pieces | None) -> sympy.Expr:
    if pieces is not None:
        source = example_of(path.linear.node)
        return sympy.expand(math.prod((expression(size) for size in source.shape[:-1]), start=sympy.Integer(1)))
    shape = example_of(form.logits).shape
    sizes = (expression(size) for dim, size in enumerate(shape) if dim != path.class_dim)
    return sympy.expand(math.prod(sizes, start=sympy.Integer(1)))


def wrapper_operand(paths: Sequence[LogitsPath]) -> tuple[fx.Node, str] | None:
    """An operand that is no plain tensor: the op would run on what it wraps, without its meaning."""
    nodes = {node for path in paths for node in path.nodes}
    for operand in sorted({operand for node in nodes for operand in node.all_input_nodes}, key=str):
        value = example(operand)
        name = "" if value is None else wrapper_subclass(value)
        if name:
            return operand, f"{operand.name} is a {name}, for which the fused head has no rule; pass a plain tensor"
    return None


def stranger(user: fx.Node) -> str:
    if user.op == "output":
        return (
            "the logits are returned as well, so they must exist; compile a function that returns the loss and not "
            "the logits (for a Hugging Face model: a step that returns model(...).loss)"
        )
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", str(user.target))
    return f"the logits are used elsewhere too, by {name} ({user.name}), so they must exist"
