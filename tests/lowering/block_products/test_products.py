"""Products with matrices made of blocks, interpreted on a CPU: ragged sides, any tiles, parts of none and of many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from structfly.errors import UnsupportedError
from structfly.lowering.activations import ACTIVATIONS, activated
from structfly.lowering.block_products.listing import Listing
from structfly.lowering.block_products.products import block_sums
from structfly.lowering.block_products.tiles import Summing
from structfly.lowering.gemm import Tiles
from tests.oracle import FEW, TF32, assert_as_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
NAMES = st.sampled_from(("", *ACTIVATIONS))
SIDES = st.integers(1, 6).map(lambda eights: 8 * eights)
_NUMBERS = torch.arange(2, dtype=torch.int32, device=DEVICE)
ONE = Listing(_NUMBERS[:1], None, _NUMBERS, each=1)
LARGE = Tiles(m=128, n=128, k=64, group=4, parts=2, warps=4, stages=3)


def cuts() -> st.SearchStrategy[Tiles]:
    """Small tiles for the interpreter, those of a device there."""
    if DEVICE == "cuda":
        return st.sampled_from((LARGE, Tiles(64, 64, 32, 2, 1, 4, 2)))
    sides = st.sampled_from((16, 32))
    shape = {"m": sides, "n": sides, "k": sides, "group": st.integers(1, 3), "parts": st.sampled_from((1, 2))}
    return st.builds(Tiles, **shape, warps=st.just(1), stages=st.just(1))


def roundings(dtype: torch.dtype) -> int:
    """Allowed of sums of products: on GPUs those of float32 are in TF32, which the interpreter does not know."""
    return TF32 if dtype == torch.float32 and DEVICE == "cuda" else FEW


def random(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def with_tokens_along(a: Tensor) -> Tensor:
    """(parts, side, tokens) of (tokens, parts, side), in rows of a multiple of 16 bytes; what lies between is NaN."""
    tokens = len(a)
    return F.pad(a.permute(1, 2, 0), (0, -tokens % 8), value=float("nan")).contiguous()[..., :tokens]


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 70),
    sides=st.tuples(SIDES, SIDES),
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    equal=st.booleans(),
    sources=st.integers(1, 4),
    listed=st.booleans(),
    turned=st.booleans(),
    a_turned=st.booleans(),
    scattered=st.booleans(),
    rank=st.integers(0, 5).map(lambda eights: 8 * eights),
    bias=st.booleans(),
    activation=NAMES,
    dtype=st.sampled_from(DTYPES),
    tiles=cuts(),
    swapped=st.booleans(),
    seed=st.integers(0, 100),
)
def test_sums_are_as_accurate_as_eager(
    tokens: int,
    sides: tuple[int, int],
    counts: list[int],
    equal: bool,
    sources: int,
    listed: bool,
    turned: bool,
    a_turned: bool,
    scattered: bool,
    rank: int,
    bias: bool,
    activation: str,
    dtype: torch.dtype,
    tiles: Tiles,
    swapped: bool,
    seed: int,
) -> None:
    side_k, side_n = sides
    counts = [max(counts[0], 1)] * len(counts) if equal else counts
    generator = torch.Generator().manual_seed(seed)
    members = sum(counts)
    of_members = torch.randint(sources, (members,), generator=generator)
    order = torch.randperm(members, generator=generator) if listed else torch.arange(members)
    a, b = random(dtype, 0, tokens, sources, side_k), random(dtype, 1, max(members, 1), side_n, side_k)
    added = random(dtype, 2, len(counts), side_n) if bias else None
    thin = (random(dtype, 3, tokens, rank), random(dtype, 4, len(counts), side_n, rank)) if rank else None
    stored = b.mT.contiguous() if turned else b
    width = -(-tokens // 8) * 8  # so that rows along the tokens begin at multiples of 16 bytes
    seen = with_tokens_along(a) if a_turned else a
    rows = torch.randperm(len(counts) * side_n, generator=generator).to(DEVICE, torch.int32) if scattered else None
    shape = (len(counts) * side_n, width) if scattered else (tokens, len(counts), side_n)
    c = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    starts = torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)
    block_sums(
        seen,
        stored,
        c,
        Listing(
            of_members.to(DEVICE, torch.int32),
            order.to(DEVICE, torch.int32) if listed else None,
            starts,
            counts[0] if equal else 0,
        ),
        cut=Summing(tiles, swapped and dtype in HALF),
        turned=turned,
        a_turned=a_turned,
        rows=rows,
        beside=thin
        and (
            with_tokens_along(thin[0][:, None])[0] if a_turned else thin[0],
            thin[1].permute(2, 0, 1).contiguous() if turned else thin[1],
        ),
        bias=added,
        activation=activation,
    )

    def reference(wide: torch.dtype) -> Tensor:
        made = torch.zeros(tokens, len(counts), side_n, dtype=wide, device=DEVICE)
        parts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        for member, part in enumerate(parts.tolist()):
            made[:, part] += a[:, of_members[member]].to(wide) @ b[order[member]].to(wide).t()
        if thin is not None:
            made += torch.einsum("tr,pnr->tpn", *(each.to(wide) for each in thin))
        return activated(made if added is None else made + added.to(wide), activation)

    if rows is not None:
        assert c.isfinite().all()
        c = c[rows.long(), :tokens].t().view(tokens, len(counts), side_n)
    exact = reference(torch.float64)
    assert_as_accurate(c, reference(torch.float32).to(dtype), exact, dtype, "sums", roundings(dtype))


def test_the_same_bits_every_time() -> None:
    a, b = random(torch.bfloat16, 0, 70, 3, 24), random(torch.bfloat16, 1, 5, 40, 24)
    sources = torch.tensor([0, 1, 2, 0, 1], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=DEVICE)
    made = [torch.empty(70, 3, 40, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    for c in made:
        block_sums(a, b, c, Listing(sources, None, starts, 0), cut=Summing(Tiles(16, 16, 16, 2, 1, 1, 1)))
    assert torch.equal(*made)


def test_operands_without_descriptors_are_refused() -> None:
    a, b = random(torch.bfloat16, 0, 8, 1, 12), random(torch.bfloat16, 1, 1, 16, 12)
    c = torch.empty(8, 1, 16, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(UnsupportedError, match=r"strides \(12, 12, 1\).* begin at multiples of 16 bytes"):
        block_sums(a, b, c, ONE, cut=Summing(LARGE))
