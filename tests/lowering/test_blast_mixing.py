"""What BLAST's blocks have of each component, made in place: interpreted on a CPU, any blocks, one range or several."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.blast.mixing import TILE, mixing, mixing_with_gradients, ranges
from tests.lowering.block_products.test_products import DEVICE, DTYPES, random
from tests.oracle import assert_as_accurate

BLOCKS = st.integers(1, 20)


@settings(max_examples=10, deadline=None)
@given(
    rows=BLOCKS,
    columns=BLOCKS,
    components=st.sampled_from((8, 16)),
    width=st.sampled_from((16, 64, TILE, 5 * TILE)),
    dtype=st.sampled_from(DTYPES),
)
def test_it_is_as_accurate_as_eager(rows: int, columns: int, components: int, width: int, dtype: torch.dtype) -> None:
    planes = max(rows, columns)
    scale = random(dtype, 0, components, rows, columns)
    held, above = (random(dtype, seed, planes, components, width) for seed in (1, 2))
    z, dw = held[:columns].clone(), above[:rows].clone()
    before = random(torch.float32, 3, ranges(components, width, held.device), components, rows, columns)
    alone, sums = held.clone(), before.clone()
    mixing(alone, scale)(0)
    mixing_with_gradients(held, above, scale, sums)(0)
    assert torch.equal(alone[:rows], held[:rows])

    def reference(wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        s, of_z, of_dw = scale.to(wide), z.to(wide), dw.to(wide)
        of_scale = torch.einsum("ipt,jpt->pij", of_dw, of_z) + before.to(wide).sum(0)
        return torch.einsum("pij,jpt->ipt", s, of_z), torch.einsum("pij,ipt->jpt", s, of_dw), of_scale

    (w, dz, of_scale), exact = reference(torch.float32), reference(torch.float64)
    assert_as_accurate(held[:rows], w.to(dtype), exact[0], dtype, "w")
    assert_as_accurate(above[:columns], dz.to(dtype), exact[1], dtype, "dz")
    assert_as_accurate(sums.sum(0), of_scale, exact[2], torch.float32, "of scale")


def test_few_components_are_cut_in_ranges_of_tokens() -> None:
    assert ranges(8, 16, torch.device("cpu")) == 1
    assert ranges(8, 5 * TILE, torch.device("cpu")) == 4
    assert ranges(64, 5 * TILE, torch.device("cpu")) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (3, 40), (64, 64)])
def test_it_compiles_and_agrees_on_a_gpu(rows: int, columns: int) -> None:
    assert DEVICE == "cuda"
    scale, held = random(torch.bfloat16, 0, 64, rows, columns), random(torch.bfloat16, 1, 64, 64, 8 * TILE)
    exact = torch.einsum("pij,jpt->ipt", scale.double(), held[:columns].double())
    mixing(held, scale)(0)
    eager = exact.float().bfloat16()
    assert_as_accurate(held[:rows], eager, exact, torch.bfloat16, "w", roundings=1)
