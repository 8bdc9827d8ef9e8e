"""Masked components become groups that have the same tiles."""

from __future__ import annotations

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
    of_rows, of_columns = (_touched(masks[alive], tile) for masks in (rows, columns))
    groups = _grouped(of_rows, of_columns, group)
    left_places = [of_rows[members].any(0).nonzero()[:, 0].tolist() for members in groups]
    right_places = [of_columns[members].any(0).nonzero()[:, 0].tolist() for members in groups]
    structure = GBLR(
        tile=tile,
        group=group,
        groups=len(groups),
        right_tiles=sum(map(len, right_places)),
        left_tiles=sum(map(len, left_places)),
    )
    return structure, {
        "right": _tiles(right.t()[:, alive], groups, right_places, tile, group),
        "right_index": index_of(right_places),
        "left": _tiles(left[:, alive], groups, left_places, tile, group),
        "left_index": index_of(left_places),
    }


def _touched(masks: Tensor, tile: int) -> Tensor:
    """(components, tiles) bool: which tiles a mask (components, features) has a part of."""
    padded = F.pad(masks, (0, -masks.shape[1] % tile))
    touched: Tensor = padded.unflatten(1, (-1, tile)).any(2)
    return touched


def _grouped(of_rows: Tensor, of_columns: Tensor, group: int) -> list[Tensor]:
    """Groups of components, each begun by that with most tiles, the others being those that add fewest to its tiles."""
    waiting = torch.ones(len(of_rows), dtype=torch.bool, device=of_rows.device)
    touched = torch.cat((of_rows, of_columns), 1)
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
