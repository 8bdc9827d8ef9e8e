"""Gates and input that are slices of one tensor, which the op then takes whole.

A layer projects them together.  Of slices, autograd makes the tensor's gradient by copying theirs into one; the op's
joint form writes them there.  That pays where the slices are all of the tensor, and nothing else uses it.

Which part of a tensor a view holds is told by its memory, whatever views led there: what begins at the same place of
the same memory, and has the same sizes and strides, is the same numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import permutations
from typing import NamedTuple

import sympy
import torch
from torch import Tensor, fx

from structfly.compat import expression, storage_key
from structfly.rewriter.calls import read
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region, example
from structfly.rewriter.views import SPLITS, VIEWS
from structfly.rewriter.writes import written

_VIEWS = (*VIEWS, *SPLITS, "broadcast_tensors")


class Joint(NamedTuple):
    """A tensor (batch, steps, channels of all), and what lies in it, by the letters of the op's ``order``."""

    tensor: fx.Node
    order: str


class Whole(NamedTuple):
    """A tensor of which sequences are all slices, with nothing beside them.

    Attributes:
        tensor: the tensor, of three dimensions.
        order: what lies in it, by the letters of the op's ``order``.
        dims: which of its dimensions are batch, steps and channels.
        views: between it and the sequences, these among them.
    """

    tensor: fx.Node
    order: str
    dims: tuple[int, ...]
    views: tuple[fx.Node, ...]


def joint_of(sequences: Mapping[str, fx.Node], own: Collection[fx.Node], editor: Editor) -> Joint | None:
    """The tensor that ``sequences`` are all slices of, and all of which they are, or None.

    Args:
        sequences: (batch, steps, channels) by letter, made for the op alone.
        own: nodes that the rewrite makes superfluous.
        editor: writes a view of the tensor where its dimensions have another order, and erases those of slices.
    """
    goals, dead = set(sequences.values()), frozenset(own)
    for node, order, dims, views in wholes_of(sequences):
        if any(other_readers(node, goals, dead)):
            continue
        if _undifferentiated(node.graph).intersection(views):
            return None
        editor.erase(views)
        return Joint(node if dims == (0, 1, 2) else editor.call(torch.permute, node, dims), order)
    return None


def wholes_of(sequences: Mapping[str, fx.Node]) -> Iterator[Whole]:
    """The tensors of which ``sequences``, by letter, are all slices side by side, the nearest first."""
    views = {letter: list(views_above(node)) for letter, node in sequences.items()}
    for node in views["z"]:
        if any(node not in each for each in views.values()):
            continue
        arranged = _arrangement(node, sequences)
        if arranged is not None:
            between = (view for each in views.values() for view in each[: each.index(node)])
            yield Whole(node, *arranged, tuple(dict.fromkeys(between)))


def views_above(node: fx.Node) -> Iterator[fx.Node]:
    """A view, and what it is a view of, one after another."""
    source: object = node
    while isinstance(source, fx.Node):
        yield source
        call = None if written(source) else read(source)
        if call is None or call.op not in _VIEWS:
            return
        above = read(call["input"]) if call.op == "getitem" else None
        if above is not None and above.op == "broadcast_tensors":
            source = above["tensors"][call["index"]]
        else:
            source = call["input"]


def other_readers(node: fx.Node, goals: Collection[fx.Node], own: Collection[fx.Node]) -> Iterator[fx.Node]:
    """What reads a tensor, perhaps through views, besides ``goals`` and what nobody uses but ``own`` nodes."""
    for user in node.users:
        if user in goals or _is_dead(user, own):
            continue
        call = read(user)
        if call is None or call.op not in _VIEWS:
            yield user
        else:
            yield from other_readers(user, goals, own)


def _undifferentiated(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes through which no gradient passes; the example of a view does not tell."""
    owner = graph.owning_module
    assert owner is not None
    return Region(owner).undifferentiated


def _is_dead(node: fx.Node, own: Collection[fx.Node]) -> bool:
    """Whether nothing is made of a node but ``own`` nodes and values that nobody uses."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        each = pending.pop()
        if each not in own and each not in seen:
            if read(each) is None or written(each):
                return False
            seen.add(each)
            pending.extend(each.users)
    return True


def _arrangement(node: fx.Node, sequences: Mapping[str, fx.Node]) -> tuple[str, tuple[int, ...]] | None:
    """In which order the sequences lie in a tensor, side by side and nothing beside them, and which of its dimensions
    are batch, steps and channels."""
    whole, parts = example(node), {letter: example(each) for letter, each in sequences.items()}
    if whole is None or whole.ndim != 3:
        return None
    for dims in permutations(range(3)):
        places = {letter: _place(part, whole, dims, len(parts)) for letter, part in parts.items()}
        letters = {place: letter for letter, place in places.items()}
        if set(letters) == set(range(len(parts))):
            return "".join(letters[place] for place in range(len(parts))), dims
    return None


def _place(part: Tensor | None, whole: Tensor, dims: tuple[int, ...], count: int) -> int | None:
    """Which of ``count`` slices of the channels a part is."""
    if part is None or part.dtype != whole.dtype or storage_key(part) != storage_key(whole):
        return None
    sizes, strides = ([expression(each) for each in values] for values in (part.shape, part.stride()))
    whole_sizes = [expression(whole.shape[dim]) for dim in dims]
    whole_strides = [expression(whole.stride(dim)) for dim in dims]
    if whole_sizes != [*sizes[:2], count * sizes[2]]:
        return None
    alike = zip(sizes, strides, whole_strides, strict=True)
    if any(size != 1 and mine != theirs for size, mine, theirs in alike):
        return None
    offset = expression(part.storage_offset()) - expression(whole.storage_offset())
    place = sympy.cancel(offset / (sizes[2] * whole_strides[2]))
    return int(place) if place.is_Integer else None
