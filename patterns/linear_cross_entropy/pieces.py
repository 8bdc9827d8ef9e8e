"""Logits split over several losses: chunked code, and losses unrolled over rows.

One linear whose rows are split, chunked, unbound or indexed, each part feeding a loss of its own, is one head with
per-token losses: the parts' targets are put together, the op gives all tokens' losses, and each part takes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from structfly.patterns.head.chain import TensorOperand
from structfly.patterns.head.path import LogitsPath
from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.patterns.linear_cross_entropy.mean import mean_divisor
from structfly.patterns.linear_cross_entropy.picks import read_picks
from structfly.rewriter.calls import read
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region, example
from structfly.rewriter.views import PICKS
from structfly.rewriter.writes import why_late


@dataclass(frozen=True)
class Piece:
    """The interval ``[start, start + length)`` a view picks of one row dimension."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True)
class Member:
    """One part: its interval of rows and its loss."""

    piece: Piece
    path: LogitsPath
    form: LossForm


@dataclass(frozen=True)
class Pieces:
    """Parts that tile one row dimension.

    Attributes:
        members: in the order of their rows.
        shared_views: how many of the paths' views lie before the split.
        dim: the row dimension that is split, among the shared views' result without its class dimension.
        moved: nodes that have to be computed before the first loss, and stand after it.
    """

    members: tuple[Member, ...]
    shared_views: int
    dim: int
    moved: tuple[fx.Node, ...]


def read_pieces(parts: Sequence[tuple[LogitsPath, LossForm]], region: Region) -> Pieces | str:
    """Put several losses on one linear together, or say why they cannot be."""
    first, form = parts[0]
    shared = _shared_views([path for path, _ in parts])
    members = []
    for path, other in parts:
        if other.inner:
            return "one of several losses on these logits is a gather less a logsumexp, which is read alone"
        if other.options != form.options:
            return "losses of parts of the logits differ in their options"
        if path.transform != first.transform:
            return "parts of the logits are scaled or masked differently"
        places = [o.place.views for o in path.chain.operands if isinstance(o, TensorOperand) and o.place is not None]
        if any(views > shared for views in places):
            return "a part of the logits meets a tensor with a number for each of its rows"
        rest = path.views[shared:]
        piece = _piece(path.view_nodes[shared]) if rest and rest[0].num_classes is None else None
        if piece is None:
            return "the logits feed several losses that do not take parts of fixed size of their rows"
        if not all(view.ordered for view in rest[1:]) or path.class_dim != _rank(other.logits) - 1:
            return "a part of the logits is transposed or sliced further before its loss"
        members.append(Member(piece, path, other))
    members.sort(key=lambda member: member.piece.start)
    end = 0
    for member in members:
        if member.piece.start != end or member.piece.dim != members[0].piece.dim:
            return "the losses' parts of the logits overlap or leave rows out"
        end += member.piece.length
    whole = members[0].path.views[shared]
    source = example(whole.call["input"])
    if source is None or source.shape[members[0].piece.dim] != end:
        return "the losses' parts of the logits leave rows out"
    class_dim = first.views[shared - 1].class_dim if shared else first.linear.class_dim % source.ndim
    dim = members[0].piece.dim
    if dim == class_dim:
        return "the logits are split along the classes"
    first_loss = min((member.form.anchor for member in members), key=region.order.__getitem__)
    own = {node for m in members for node in (*m.path.nodes, m.form.anchor)}
    moved: set[fx.Node] = set()
    for member in members:
        late = why_late(region, member.form.target, first_loss, own, moved)
        if late is not None:
            return f"a part's targets need {late.name}, which is computed after another part's loss"
    return Pieces(tuple(members), shared, dim - (dim > class_dim), tuple(sorted(moved, key=region.order.__getitem__)))


def _piece(node: fx.Node) -> Piece | None:
    """The interval that a view picks, or None for any other view or unknown sizes."""
    call = read(node)
    picks = read_picks(call) if call is not None and call.op in PICKS else None
    if picks is None or len(picks.intervals) != 1 or None in picks.result:
        return None
    (interval,) = picks.intervals
    start, length = interval.start, interval.count
    if not (isinstance(interval.size, int) and isinstance(start, int) and isinstance(length, int)):
        return None
    return Piece(interval.dim, start, length) if interval.step == 1 else None


def _rank(node: fx.Node) -> int:
    value = example(node)
    return -1 if value is None else value.ndim


def _shared_views(paths: Sequence[LogitsPath]) -> int:
    """How many views all paths have in common: the same nodes, up to where they part."""
    count = 0
    for nodes in zip(*(path.view_nodes for path in paths), strict=False):
        if any(node is not nodes[0] for node in nodes):
            break
        count += 1
    return count


def whole_target(pieces: Pieces, rows: fx.Node, editor: Editor) -> fx.Node:
    """All parts' targets, in the shape of the hidden states ``rows`` where the split was, less its last dimension."""
    parts = []
    for member in pieces.members:
        editor.hoist(member.form.target)
        part = _part(rows, pieces.dim, member.piece, editor)
        shape = editor.call(torch.select, part, -1, 0)
        parts.append(editor.method("reshape_as", member.form.target, shape))
    return editor.call(torch.cat, tuple(parts), pieces.dim)


def part_losses(pieces: Pieces, member: Member, losses: fx.Node, editor: Editor) -> fx.Node:
    """The value of one member's loss, from ``losses`` of all rows in the split's shape."""
    form = member.form
    part = _part(losses, pieces.dim, member.piece, editor)
    if form.reduction == "none":
        return editor.method("reshape_as", part, form.target)
    total = editor.call(torch.sum, part)
    return total if form.reduction == "sum" else editor.call(torch.div, total, mean_divisor(form, editor))


def _part(source: fx.Node, dim: int, piece: Piece, editor: Editor) -> fx.Node:
    return editor.call(torch.narrow, source, dim, piece.start, piece.length)
