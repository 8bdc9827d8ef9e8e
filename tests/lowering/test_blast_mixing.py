"""What BLAST's blocks have of each component, made in place: interpreted on a CPU, any blocks, one range or several."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.blast.mixing import MOST_BLOCKS, TILE, mixing, mixing_with_gradients, ranges, tile
from tests.lowering.block_products.test_products import DEVICE, DTYPES, random, roundings
from tests.oracle import assert_as_accurate

BLOCKS = st.integers(1, 20)


@settings(max_examples=10, deadline=None)
@given(
    rows=BLOCKS,
    columns=BLOCKS,
    components=st.sampled_from((8, 16)),
    width=st.one_of(st.integers(1, 40).map(lambda eights: 8 * eights), st.just(3 * TILE)),
    dtype=st.sampled_from(DTYPES),
    in_place=st.booleans(),
)
def test_it_is_as_accurate_as_eager(
    rows: int, columns: int, components: int, width: int, dtype: torch.dtype, in_place: bool
) -> None:
    planes = max(rows, columns)
    scale = random(dtype, 0, components, rows, columns)
    held, above = (random(dtype, seed, planes, components, width) for seed in (1, 2))
    z, dw = held[:columns].clone(), above[:rows].clone()
    before = random(torch.float32, 3, ranges(scale, width), components, rows, columns)
    sums, alone = before.clone(), torch.empty_like(held)
    mixed = held if in_place else held.new_empty(rows, components, width)
    mixing(held, alone, scale)(0)
    mixing_with_gradients(held, mixed, above, scale, sums)(0)
    assert torch.equal(alone[:rows], mixed[:rows])
    assert in_place or torch.equal(held[:columns], z)

    def reference(wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        s, of_z, of_dw = scale.to(wide), z.to(wide), dw.to(wide)
        of_scale = torch.einsum("ipt,jpt->pij", of_dw, of_z) + before.to(wide).sum(0)
        return torch.einsum("pij,jpt->ipt", s, of_z), torch.einsum("pij,ipt->jpt", s, of_dw), of_scale

    (w, dz, of_scale), exact = reference(torch.float32), reference(torch.float64)
    assert_as_accurate(mixed[:rows], w.to(dtype), exact[0], dtype, "w", roundings(dtype))
    assert_as_accurate(above[:columns], dz.to(dtype), exact[1], dtype, "dz", roundings(dtype))
    assert_as_accurate(sums.sum(0), of_scale, exact[2], torch.float32, "of scale", roundings(dtype))


def test_few_components_are_cut_in_ranges_of_tokens() -> None:
    few, many = (torch.empty(count, 4, 4, dtype=torch.bfloat16) for count in (8, 64))
    assert ranges(few, 16) == 1
    assert ranges(few, 4 * TILE + 8) == 4
    assert ranges(many, 5 * TILE) == 1
    assert ranges(few.float(), TILE) == 2  # tiles of as many bytes are of fewer tokens


def test_a_tile_of_more_blocks_is_of_fewer_tokens() -> None:
    assert [tile([count, 2], 5000) for count in (3, 16, 17, MOST_BLOCKS)] == [TILE, TILE, TILE // 2, TILE // 4]
    assert [tile([2, 2], width) for width in (8, 24, TILE)] == [16, 32, TILE]
    assert tile([16, 16], 5000, itemsize=4) == TILE // 2


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (3, 40), (64, 64)])
def test_it_compiles_and_agrees_on_a_gpu(rows: int, columns: int) -> None:
    assert DEVICE == "cuda"
    scale, held = random(torch.bfloat16, 0, 64, rows, columns), random(torch.bfloat16, 1, 64, 64, 8 * TILE)
    exact = torch.einsum("pij,jpt->ipt", scale.double(), held[:columns].double())
    mixing(held, held, scale)(0)
    eager = exact.float().bfloat16()
    assert_as_accurate(held[:rows], eager, exact, torch.bfloat16, "w", roundings=1)
