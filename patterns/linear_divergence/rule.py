"""The rule: a linear whose logits only feed a divergence from a teacher becomes one op that never holds all logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import sympy
import torch
from torch import fx

from structfly.compat import size_hints
from structfly.config import SiteSettings
from structfly.lowering.head.linear import DTYPES, Wanted
from structfly.lowering.linear_divergence import transforms as _transforms  # noqa: F401  registers the op
from structfly.patterns.head.checks import AFTER_TRACE, stranger, why_too_steep, why_unsupported
from structfly.patterns.head.gradients import no_gradients, wanted_gradients
from structfly.patterns.head.logits import trace
from structfly.patterns.head.menu import FusedCandidate
from structfly.patterns.head.path import LogitsPath, Obstacle
from structfly.patterns.head.site import adapter_rank, class_count, hidden_size, row_count
from structfly.patterns.head.weighted_sum import read_weighted_sum
from structfly.patterns.linear_divergence.kinds import Kind, classify
from structfly.patterns.linear_divergence.menu import divergence_menu
from structfly.patterns.linear_divergence.reader import divergences
from structfly.patterns.linear_divergence.readings import Distribution, Divergence
from structfly.patterns.linear_divergence.rewrite import rewrite_divergence
from structfly.patterns.linear_divergence.site import DivergenceSite
from structfly.patterns.linear_divergence.teacher import (
    GivenTeacher,
    entry_bytes,
    read_teacher,
    softmax_of,
    teacher_dtype,
)
from structfly.records import Candidate, DeviceProfile, Menu, Miss
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region, example, example_of, needs_gradient, qualified_name
from structfly.rewriter.writes import overwritten


class LinearDivergence:
    """Exact: loss and gradients are eager's, to the rounding of their dtype.  See docs/linear_divergence.md."""

    name = "linear_divergence"

    def find(self, region: Region) -> Sequence[DivergenceSite | Miss]:
        results: list[DivergenceSite | Miss] = []
        for anchor, divergence in divergences(region):
            if isinstance(divergence, str):
                results.append(Miss(self.name, anchor, divergence, 0, anchor))
            else:
                results.extend(self._attempts(anchor, divergence, region))
        return results

    def menu(self, site: DivergenceSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        return divergence_menu(site, profile, settings)

    def rewrite(self, site: DivergenceSite, candidate: Candidate, editor: Editor) -> None:
        assert isinstance(candidate, FusedCandidate)
        rewrite_divergence(site, candidate, editor)

    # ------------------------------------------------------------------------------------------- one divergence

    def _attempts(self, anchor: fx.Node, divergence: Divergence, region: Region) -> list[DivergenceSite | Miss]:
        """The site; or why neither distribution is a student's."""
        bases = sorted(divergence.bases, key=lambda base: region.order[_node(base)], reverse=True)
        if len(bases) == 1:
            return []  # an entropy, which is no divergence
        if len(bases) > 2:
            reason = "probabilities times log-probabilities of more than two distributions (a detached one is another)"
            return [Miss(self.name, anchor, reason, 0, anchor)]
        learning = [base for base in bases if base.gradient]
        if len(learning) == 2:
            reason = "both distributions take part in differentiation; make the teacher's under torch.no_grad()"
            return [Miss(self.name, anchor, reason, 0, anchor)]
        misses: list[DivergenceSite | Miss] = []
        for student in learning or bases:
            (teacher,) = (base for base in bases if base != student)
            found = self._site(anchor, divergence, student, teacher, region)
            if isinstance(found, DivergenceSite):
                return [found]
            misses.append(found)
        return misses

    def _site(
        self, anchor: fx.Node, divergence: Divergence, student: Distribution, teacher: Distribution, region: Region
    ) -> DivergenceSite | Miss:
        def miss(node: fx.Node, reason: str, progress: int = 0, name: str = "") -> Miss:
            return Miss(self.name, node, reason, progress, anchor, name)

        if student.form != "logits":
            return miss(anchor, "what takes part in differentiation is not the softmax of logits in this graph")
        computed_in = torch.finfo(example_of(anchor).dtype).eps
        kind = classify(divergence, student, teacher, computed_in)
        if kind is None:
            reason = "a sum of probabilities times log-probabilities that is none of the divergences that are read"
            return miss(anchor, reason)
        path = trace(softmax_of(student, divergence.nodes, region), region)
        if isinstance(path, Obstacle):
            return miss(path.node, path.reason, path.progress)
        found = self._bind(anchor, divergence, kind, path, (student, teacher), region)
        if isinstance(found, DivergenceSite):
            return found
        return miss(*found, AFTER_TRACE, qualified_name(path.linear.node, path.linear.weight))

    def _bind(
        self,
        anchor: fx.Node,
        divergence: Divergence,
        kind: Kind,
        path: LogitsPath,
        pair: tuple[Distribution, Distribution],
        region: Region,
    ) -> DivergenceSite | tuple[fx.Node, str]:
        linear = path.linear
        logits = example_of(linear.node)
        reason = _why_no_chain(path)
        if reason:
            return anchor, reason
        teacher = read_teacher(pair[1], divergence, anchor, region)
        given = () if isinstance(teacher, LogitsPath) else teacher.nodes
        written = overwritten(region, {*divergence.nodes, *given} - {anchor})
        if written is not None:
            return written
        reason = _why_unfit(teacher, pair, logits)
        if reason:
            return anchor, reason
        elementwise = not divergence.reduction
        total = None
        if divergence.reduction in ("", "rows"):
            total = read_weighted_sum(anchor, path.class_dim if elementwise else None)
        if elementwise and total is None:
            return anchor, "a divergence's terms are not summed over the classes, or by something that tells them apart"
        end = anchor if total is None else total.root
        strangers = _strangers(path, divergence, () if total is None else total.nodes, end, region)
        if strangers:
            user = min(strangers, key=region.order.__getitem__)
            return user, stranger(user)
        unsupported = why_unsupported([path])
        if unsupported is not None:
            return unsupported
        loss_dtype = example_of(end).dtype
        if loss_dtype == torch.float64 != logits.dtype:
            return end, f"the loss is computed in float64 from logits of {logits.dtype}"
        gradients = wanted_gradients(path, path.nodes) if needs_gradient(end) else no_gradients(path)
        if not isinstance(gradients, Wanted):
            return gradients
        steep = why_too_steep(path, gradients)
        if steep is not None:
            return steep
        by_row = divergence.reduction == "rows" and total is None
        recompute = "per-row divergences have no common upstream factor" if by_row else ""
        tensors = [linear.node, linear.x, linear.weight, _node(pair[0])]
        if isinstance(teacher, LogitsPath):
            tensors.append(teacher.linear.x)
        values = [value for value in map(example, tensors) if value is not None]
        return DivergenceSite(
            rule=self.name,
            name=qualified_name(linear.node, linear.weight),
            node=end,
            device=logits.device,
            sizes={symbol: hint for value in values for symbol, hint in size_hints(value).items()},
            anchor=anchor,
            divergence=divergence,
            kind=kind,
            path=path,
            teacher=teacher,
            teacher_bytes=entry_bytes(teacher, path.class_dim),
            total=total,
            gradients=gradients,
            coefficient_class="D" if by_row else "A",
            recompute="inside a checkpointed region" if region.checkpointed else recompute,
            rows=row_count(_node(pair[0]), path.class_dim),
            hidden=hidden_size(linear),
            classes=class_count(path),
            rank=adapter_rank(path),
            teacher_hidden=_width(teacher),
            dtype=logits.dtype,
            loss_dtype=loss_dtype,
        )


def _node(distribution: Distribution) -> fx.Node:
    """The node of a distribution that is no mixture."""
    assert distribution.node is not None
    return distribution.node


def _why_no_chain(path: LogitsPath) -> str:
    """Why the op does not take the operations on the student's logits, or ""."""
    for step in path.chain.steps:
        if not all(isinstance(operand, float) for operand in step.operands):
            if step.name in ("where", "masked_fill") and step.operands[1] == -math.inf:
                return "the student's logits are set to -inf for some classes, which a divergence does not read"
            return f"{step.name} of the student's logits takes a tensor, which a divergence does not read"
    return ""


def _why_unfit(
    teacher: LogitsPath | GivenTeacher, pair: tuple[Distribution, Distribution], logits: torch.Tensor
) -> str:
    """Why a teacher cannot stand beside the student, or ""."""
    if pair[1].class_dim not in (None, pair[0].class_dim):
        return f"the student's classes are dimension {pair[0].class_dim}, the teacher's {pair[1].class_dim}"
    dtype, device = teacher_dtype(teacher), example_of(_node(pair[1])).device
    if device != logits.device:
        return f"the teacher is on {device}, the student on {logits.device}"
    if dtype not in DTYPES or (dtype == torch.float64) != (logits.dtype == torch.float64):
        return f"the teacher is {dtype}, the student's logits are {logits.dtype}; both or neither may be float64"
    return ""


def _strangers(
    path: LogitsPath, divergence: Divergence, total: Iterable[fx.Node], end: fx.Node, region: Region
) -> list[fx.Node]:
    """Users of the student's logits, or of what is made of them up to ``end``, that are no part of the divergence."""
    own = {*path.nodes, *divergence.nodes, *total}
    dependent = set(path.nodes)
    for node in sorted(own - dependent, key=region.order.__getitem__):
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return [user for node in dependent - {end} for user in node.users if user not in own]


def _width(teacher: LogitsPath | GivenTeacher) -> sympy.Expr:
    return hidden_size(teacher.linear) if isinstance(teacher, LogitsPath) else sympy.Integer(0)
