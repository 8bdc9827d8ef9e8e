"""Masked components become groups that have the same tiles, on each side in the order in which they need fewest.

Which order is best is a partition of a set under a cost that is no sum over pairs; several orders are tried instead.
One is greedy.  The others sort the components into classes of like width and each class by where its masks are centred:
components of one group then reach as far and stand at the same place, which wastes least where masks are intervals.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from structfly.errors import ArgumentError
from structfly.patterns.gblr import GBLR, index_of

GPU_TILES = (128, 128)
"""Features and components of a tile on a GPU, where smaller ones take longer than what they leave out."""

USUAL_TILES = (32, 16)
"""The same elsewhere."""


class Cut(NamedTuple):
    """Which components form the groups of each side, and which tiles the groups have.

    Attributes:
        structure: with the numbers of groups and tiles.
        right_members, left_members: int32 (groups * group,), the components of R's and of L's columns; after the last,
            as many as there are, which stands for zeros.
        right_index, left_index, order: as :class:`GBLR` has them.
    """

    structure: GBLR
    right_members: Tensor
    right_index: Tensor
    left_members: Tensor
    left_index: Tensor
    order: Tensor

    def factors(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """Those of the structure, with ``left right`` as its weight.

        Args:
            left, right: (out, components) and (components, in), zero outside of what was cut.
        """
        return {
            "right": self._tiles(right.t(), self.right_members, self.right_index),
            "right_index": self.right_index,
            "left": self._tiles(left, self.left_members, self.left_index),
            "left_index": self.left_index,
            "order": self.order,
        }

    def _tiles(self, columns: Tensor, members: Tensor, index: Tensor) -> Tensor:
        """(tiles, tile, group) of ``columns`` (features, components)."""
        tile, group = self.structure.tile, self.structure.group
        padded = F.pad(columns, (0, 1, 0, -len(columns) % tile))
        grouped = padded.index_select(1, members).unflatten(0, (-1, tile)).unflatten(2, (-1, group))
        places = grouped.shape[0]
        numbers = index[0] * places + index[1]
        taken: Tensor = grouped.permute(2, 0, 1, 3).flatten(0, 1).index_select(0, numbers)
        return taken


def cut_to_tiles(rows: Tensor, columns: Tensor, tile: int, group: int) -> Cut:
    """The groups and tiles of masked components.

    Args:
        rows, columns: bool (out, components) and (components, in): where each component stands.
        tile, group: see :class:`GBLR`.

    Raises:
        ArgumentError: no component has rows and columns.
    """
    rows, device = rows.t(), rows.device
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
    right_order, left_order = torch.cat(right_groups), torch.cat(left_groups)
    found = (
        _filled(alive.cpu()[right_order], structure.components, len(rows)),
        index_of(right_places),
        _filled(alive.cpu()[left_order], structure.components, len(rows)),
        index_of(left_places),
        _order(right_order, left_order, structure.components),
    )
    return Cut(structure, *(each.to(device) for each in found))


def _filled(members: Tensor, count: int, filling: int) -> Tensor:
    return F.pad(members.to(torch.int32), (0, count - len(members)), value=filling)


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
