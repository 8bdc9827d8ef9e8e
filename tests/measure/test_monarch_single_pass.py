"""The benchmark of Monarch in one launch: both of its ways make the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.monarch_single_pass import CUTS, TWO, calls_of, in_two

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_two_launches_make_the_product_of_both_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    x, first, second = (
        torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)
        for shape in ((40, 4, 48), (4, 4, 16, 48), (4, 64, 4, 16))
    )
    between = torch.einsum("tki,klri->tlkr", x.double(), first.double())
    exact = torch.einsum("tlkr,lokr->tlo", between, second.double()).flatten(1)
    made = in_two(x, first, second)()
    assert (made - exact).norm() <= 2.0**-7 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(200, 256, 512, 4), (64, 512, 256, 2)])
def test_every_cut_makes_what_two_launches_make(shape: tuple[int, ...]) -> None:
    """Which the benchmark looks at before it times one."""
    left_out: list[str] = []
    made = [name for name, _ in calls_of(shape, left_out.append)]
    assert made[0] == TWO
    assert len(made) + len(left_out) == 1 + len(CUTS)
