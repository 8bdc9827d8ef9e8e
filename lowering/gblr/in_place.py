"""A GBLR layer's backward that kept nothing: z, then dz, and then dx in one place, which is no larger than dx.

dx (N, width) has a row for each token, z and dz (C, N) have one for each of C components, with the tokens along it.
They lie at the end of dx's place, and dx is made from its beginning on:

    dx of the first n tokens ends at      n width,
    z and dz begin at                     N width - C N.

So N (1 - C / width) rows of dx are made of dz where it is.  Those of the other N C / width tokens would take the place
of dz, for each component holds numbers of all tokens.  dz of those tokens, C^2 N / width numbers, is copied out before.
Where that is more than the dense layer's gradient of its weight takes beyond those of the factors, it is moved to the
end of the place, by way of copies of some components at a time, and the same is done with what is left.

What is not written yet at the beginning holds the sums of ranges of the factors' gradients, which are made before dx:
of no more ranges than it has room for, or the dense layer's gradient would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from structfly.lowering.block_products.support import padded_rows
from structfly.lowering.gblr.generated import collect, padded_features, spread, spread_to, tiles_of
from structfly.lowering.gblr.tile_products import inverse
from structfly.lowering.layer_products import Applied, room_beside_factors
from structfly.lowering.remembered import remembered

_WHOLE = 128  # tokens that dz is cut at multiples of: tiles are full, and descriptors begin where they may
_LEAST_SHARE = 4  # of what is left, one in so many tokens' rows is worth moving dz of the others
_MOST_COPIES = 8  # that a part of dz is moved by, however little room there is


def backward(grad: Tensor, call: Applied, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, of x and each factor, by generated products.

    Where the components are more than dx's features, or dx is not wanted, z and dz have a place of their own.
    """
    x, (right, right_index, left, left_index, order) = call.x, call.factors
    tokens, width = len(x), padded_features(x.shape[1], right)
    between_numbers, dx_numbers = len(order) * padded_rows(tokens), tokens * width
    within = wanted[0] and between_numbers <= dx_numbers
    place = x.new_empty(dx_numbers if within else between_numbers)
    begin = len(place) - between_numbers
    between, unused = place[begin:].view(len(order), -1), place[:begin]
    made: list[Tensor | None] = [None] * 6
    room = room_of_copies(call)
    gradients_of = partial(tiles_of, room=unused, spare=room * x.element_size())
    if wanted[3]:
        z = collect(x, right, right_index, order, between)[:, :tokens]
        made[3] = gradients_of(grad, z, left, left_index)
    if wanted[0] or wanted[1]:
        dz = collect(grad, left, left_index, remembered(inverse, order), between)[:, :tokens]
        if wanted[1]:
            made[1] = gradients_of(x, dz, right, right_index)
        if within:
            dx = place.view(tokens, width)
            _make_in_place(dx, between, room, partial(spread_to, tiles=right, index=right_index))
            made[0] = dx[:, : x.shape[1]]
        elif wanted[0]:
            made[0] = spread(dz, right, right_index, x.shape[1])
    return made


def room_of_copies(call: Applied) -> int:
    """Numbers of dz that may be copied out; before, sums of ranges may take as much."""
    return max(0, room_beside_factors(call))


def _make_in_place(dx: Tensor, dz: Tensor, room: int, make: Callable[[Tensor, Tensor], None]) -> None:
    """Make all rows of dx of dz (C, padded N), which lies at its end."""
    while True:
        rows_apart = (dx.numel() - dz.numel()) // dx.shape[1] // _WHOLE * _WHOLE
        make(dx[:rows_apart], dz[:, :rows_apart])
        last = _LEAST_SHARE * rows_apart < len(dx)
        dx, dz = dx[rows_apart:], dz[:, rows_apart:]
        if last or dz.numel() <= room:
            break
        dz = _moved_to_end(dz, dx, room)
    make(dx, dz.clone()[:, : len(dx)])


def _moved_to_end(dz: Tensor, dx: Tensor, room: int) -> Tensor:
    """dz (C, width), of which rows are apart, one after another at the end of dx, where its last row ends.

    The last are moved first: where a row goes to begins at or behind its own beginning, so behind all rows before it.
    """
    components, width = dz.shape
    flat = dx.flatten()
    target = flat[len(flat) - dz.numel() :].view(components, width)
    size = max(room // width, -(-components // _MOST_COPIES))
    for stop in range(components, 0, -size):
        some = slice(max(stop - size, 0), stop)
        target[some] = dz[some].clone()
    return target
