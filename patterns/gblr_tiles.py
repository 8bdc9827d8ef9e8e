"""Masked components become groups that have the same tiles, on each side in the order in which they need fewest.

Which order is best is a partition of a set under a cost that is no sum over pairs; several orders are tried instead.
One is greedy.  The others sort the components into classes of like width and each class by where its masks are centred:
components of one group then reach as far and stand at the same place, which wastes least where masks are intervals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from structfly.errors import ArgumentError
from structfly.patterns.gblr import GBLR, index_of


def cut_to_tiles(
    left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, tile: int, group: int
) -> tuple[GBLR, dict[str, Tensor]]:
    """The structure and its factors, with ``left right`` as their weight.

    Args:
        left, right: (out, components) and (components, in), zero outside of what follows.
        rows, columns: bool, the same shapes: where each component stands.
        tile, group: see :class:`GBLR`.

    Raises:
        ArgumentError: no component has rows and columns.
    """
    rows, columns = rows.t(), columns
    alive = (rows.any(1) & columns.any(1)).nonzero()[:, 0]
    if not len(alive):
        raise ArgumentError("every component is empty: no weight is left to cut; shrink the widths less")
    of_rows, of_columns = (_touched(masks[alive], tile).cpu() for masks in (rows, columns))
    left_groups, right_groups = (_grouped(touched, group) for touched in (of_rows, of_columns))
    left_places, right_places = (
        [touched[members].any(0).nonzero()[:, 0].tolist() for members in groups]
        for touched, groups in ((of_rows, left_groups), (of_columns, right_groups))
    )
    structure = GBLR(
        tile=tile,
        group=group,
        groups=len(left_groups),
        right_tiles=sum(map(len, right_places)),
        left_tiles=sum(map(len, left_places)),
    )
    return structure, {
        "right": _tiles(right.t()[:, alive], right_groups, right_places, tile, group),
        "right_index": index_of(right_places),
        "left": _tiles(left[:, alive], left_groups, left_places, tile, group),
        "left_index": index_of(left_places),
        "order": _order(torch.cat(right_groups), torch.cat(left_groups), structure.components),
    }


def _order(right: Tensor, left: Tensor, components: int) -> Tensor:
    """Where the components, listed in both orders, stand on the left; those added to fill the last group follow."""
    order = torch.arange(components, dtype=torch.int32)
    order[: len(right)] = left.argsort()[right].to(torch.int32)
    return order


def _touched(masks: Tensor, tile: int) -> Tensor:
    """(components, tiles) bool: which tiles a mask (components, features) has a part of."""
    padded = F.pad(masks, (0, -masks.shape[1] % tile))
    touched: Tensor = padded.unflatten(1, (-1, tile)).any(2)
    return touched


def _grouped(touched: Tensor, group: int) -> list[Tensor]:
    """Groups of components, all but the last full, that need few tiles: the best of several ways."""
    ways = [_greedy(touched, group)]
    classes = 1
    while classes * group < 2 * len(touched):
        ways.append(_sorted(touched, group, classes))
        classes *= 2
    return min(ways, key=lambda groups: sum(int(touched[members].any(0).sum()) for members in groups))


def _sorted(touched: Tensor, group: int, classes: int) -> list[Tensor]:
    """In so many classes of like width, each a multiple of ``group``, by where the masks are centred.

    The centre of tiles on a circle is the angle of the sum of their unit vectors.
    """
    angles = torch.arange(touched.shape[1], dtype=torch.float64) * (2 * math.pi / touched.shape[1])
    centres = torch.atan2(*(touched.double() @ torch.stack((angles.sin(), angles.cos()), 1)).unbind(1))
    widths = touched.sum(1).argsort(descending=True, stable=True)
    size = -(-len(touched) // (classes * group)) * group
    ordered = torch.cat([members[centres[members].argsort(stable=True)] for members in widths.split(size)])
    return list(ordered.split(group))


def _greedy(touched: Tensor, group: int) -> list[Tensor]:
    """Each group begun by the component with most tiles, the others being those that add fewest to its tiles."""
    waiting = torch.ones(len(touched), dtype=torch.bool)
    counts = touched.sum(1)
    groups = []
    while waiting.any():
        first = torch.where(waiting, counts, -1).argmax()
        members, union = [first], touched[first]
        waiting[first] = False
        while len(members) < group and waiting.any():
            added = (touched & ~union).sum(1)
            # Of equals the largest, which leaves least for the groups that follow.
            rank = added * (touched.shape[1] + 1) - counts
            following = torch.where(waiting, rank, torch.iinfo(rank.dtype).max).argmin()
            members.append(following)
            union = union | touched[following]
            waiting[following] = False
        groups.append(torch.stack(members))
    return groups


def _tiles(columns: Tensor, groups: list[Tensor], places: list[list[int]], tile: int, group: int) -> Tensor:
    """(tiles, tile, group) of ``columns`` (features, components)."""
    padded = F.pad(columns, (0, 0, 0, -len(columns) % tile)).unflatten(0, (-1, tile))
    parts = [
        F.pad(padded[of_group][:, :, members], (0, group - len(members)))
        for members, of_group in zip(groups, places, strict=True)
    ]
    return torch.cat(parts)
