"""Products that are made ready once: what they are known by, and that those known by it are right for other tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.block_products import axes, gradients, matrices, products
from structfly.lowering.block_products.gradient_places import Cutting, Gradients, gradient_places
from structfly.lowering.block_products.listing import Listing
from structfly.lowering.block_products.tiles import Summing
from structfly.lowering.descriptor import form
from structfly.lowering.gemm import Tiles
from tests.lowering.block_products.test_products import DEVICE, ONE, random

TILES = Tiles(m=16, n=16, k=16, group=2, parts=1, warps=1, stages=1)
BASE: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "tokens": 20,
    "rows_apart": False,
    "turned": False,
    "bias": None,
    "activation": "",
    "tiles": TILES,
}
EVERY = {
    "dtype": torch.float16,
    "tokens": 21,
    "rows_apart": True,
    "tiles": replace(TILES, n=32),
}
OF_PRODUCTS = {**EVERY, "turned": True, "bias": torch.bfloat16, "activation": "relu"}


def operand(dtype: torch.dtype, seed: int, rows_apart: bool, *shape: int) -> Tensor:
    """A random tensor, whose rows are apart if asked: of the same shape, but other strides."""
    if not rows_apart:
        return random(dtype, seed, *shape)
    return random(dtype, seed, shape[0], 2, *shape[1:])[:, 0]


def added(bias: torch.dtype | None, seed: int, *shape: int) -> Tensor | None:
    return None if bias is None else random(bias, seed, *shape)


def finished(made: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    made = made if bias is None else made + bias.double()
    return made.relu() if activation else made


def of_matrices(seed: int, dtype: torch.dtype, tokens: int, rows_apart: bool, **kind: Any) -> tuple[Tensor, Tensor]:
    a = operand(dtype, seed, rows_apart, tokens, 2, 1, 24)
    b, bias = random(dtype, seed + 1, 2, 1, 24, 24), added(kind["bias"], seed + 2, 2, 24)
    c = torch.empty(tokens, 2, 1, 24, dtype=dtype, device=DEVICE)
    matrices.matrix_products(a, b, c, **{**kind, "bias": bias})
    used = b.double() if kind["turned"] else b.double().mT
    made = torch.einsum("tmk,mkn->tmn", a[:, :, 0].double(), used[:, 0])
    return c[:, :, 0], finished(made, bias, kind["activation"])


def of_matrix_gradients(seed: int, dtype: torch.dtype, tokens: int, rows_apart: bool, **kind: Any) -> Any:
    a, b = operand(dtype, seed, rows_apart, tokens, 2, 24), random(dtype, seed + 1, tokens, 2, 40)
    c = torch.empty(2, 1, 24, 40, dtype=dtype, device=DEVICE)
    matrices.matrix_gradients(a, b, c, tiles=kind["tiles"])
    return c[:, 0], torch.einsum("tmr,tmn->mrn", a.double(), b.double())


def of_sums(
    seed: int, dtype: torch.dtype, tokens: int, rows_apart: bool, members: Listing = ONE, **kind: Any
) -> tuple[Tensor, Tensor]:
    a, b = operand(dtype, seed, rows_apart, tokens, 1, 24), random(dtype, seed + 1, 1, 24, 24)
    bias, thin = added(kind["bias"], seed + 2, 1, 24), kind.pop("rank", 0)
    c = torch.empty(tokens, 1, 24, dtype=dtype, device=DEVICE)
    left, right = random(dtype, seed + 3, tokens, thin), random(dtype, seed + 4, 1, 24, thin)
    beside = (left, right.permute(2, 0, 1).contiguous() if kind["turned"] else right) if thin else None
    cut = Summing(kind.pop("tiles"), kind.pop("swapped", False))
    products.block_sums(a, b, c, members, **{**kind, "bias": bias}, beside=beside, cut=cut)
    used = b[0].double() if kind["turned"] else b[0].double().mT
    made = a[:, 0].double() @ used + left.double() @ right[0].double().mT
    return c[:, 0], finished(made, bias, kind["activation"])


def of_block_gradients(seed: int, dtype: torch.dtype, tokens: int, rows_apart: bool, **kind: Any) -> Any:
    a, b = operand(dtype, seed, rows_apart, tokens, 1, 24), random(dtype, seed + 1, tokens, 1, 40)
    nought = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    cutting = Cutting(kind["tiles"], kind.get("abreast", 1))
    places = gradient_places(nought, nought, Gradients(1, 1, 24, 40), cutting)
    c, turned = torch.empty(1, 24, 40, dtype=dtype, device=DEVICE), kind["turned"]
    stored = torch.nn.functional.pad(b.permute(1, 2, 0), (0, -tokens % 8)).contiguous()[..., :tokens] if turned else b
    gradients.block_gradients(a, stored, c, places, b_turned=turned)
    return c, a.double().permute(1, 2, 0) @ b.double().transpose(0, 1)


def of_axes(seed: int, dtype: torch.dtype, tokens: int, rows_apart: bool, batch: int = 8, **kind: Any) -> Any:
    a, b = operand(dtype, seed, rows_apart, tokens, 1, 24, 8), random(dtype, seed + 1, 8, 1, 24, 24)
    bias, c = added(kind["bias"], seed + 2, 1, 24, 8), torch.empty(tokens, 1, 24, 8, dtype=dtype, device=DEVICE)
    axes.axis_products(a, b, c, batch=batch, **{**kind, "bias": bias})
    used = b.double() if kind["turned"] else b.double().mT
    return c, finished(torch.einsum("toki,iokn->toni", a.double(), used), bias, kind["activation"])


def of_axis_gradients(seed: int, dtype: torch.dtype, tokens: int, rows_apart: bool, batch: int = 8, **kind: Any) -> Any:
    a, b = operand(dtype, seed, rows_apart, tokens, 1, 24, 8), random(dtype, seed + 1, tokens, 1, 40, 8)
    made = axes.axis_gradients(a, b, tiles=kind["tiles"], batch=batch)
    return made, torch.einsum("tomi,toni->iomn", a.double(), b.double())


LISTED = Listing(ONE.sources, ONE.sources, ONE.starts, each=1)
UNEQUAL = ONE._replace(each=0)
CASES: list[tuple[Callable[..., tuple[Tensor, Tensor]], Any, dict[str, Any]]] = [
    (of_matrices, matrices._products, OF_PRODUCTS),
    (of_matrix_gradients, matrices._gradients, EVERY),
    (of_sums, products._ready, {**OF_PRODUCTS, "rank": 8, "members": LISTED, "swapped": True}),
    (of_sums, products._ready, {"members": UNEQUAL}),
    (of_block_gradients, gradients._ready, {**EVERY, "turned": True, "abreast": 2}),
    (of_axes, axes._products, {**OF_PRODUCTS, "batch": 16}),
    (of_axis_gradients, axes._gradients, {**EVERY, "batch": 16}),
]


def check(make: Callable[..., tuple[Tensor, Tensor]], seed: int, kind: dict[str, Any]) -> None:
    made, expected = make(seed, **kind)
    torch.testing.assert_close(made.double(), expected, rtol=0.01, atol=0.1)


@pytest.mark.parametrize(
    ("make", "known", "change", "to"),
    [(make, known, change, to) for make, known, changes in CASES for change, to in changes.items()],
    ids=[f"{make.__name__}-{change}-{i}" for i, (make, _, changes) in enumerate(CASES) for change in changes],
)
def test_what_a_product_depends_on_is_what_it_is_known_by(
    make: Callable[..., tuple[Tensor, Tensor]], known: Any, change: str, to: Any
) -> None:
    """Right before and after calls of another kind, and not made ready again."""
    known.cache_clear()
    check(make, 0, BASE)
    check(make, 5, {**BASE, change: to})
    assert known.cache_info().misses == 2
    for seed, kind in ((10, BASE), (15, {**BASE, change: to})):
        check(make, seed, kind)
    assert known.cache_info().misses == 2


def test_where_a_tensor_begins_is_looked_at_each_time() -> None:
    check(of_matrices, 0, BASE)
    kind = {"turned": False, "bias": None, "activation": "", "tiles": TILES}
    b, c = random(torch.bfloat16, 1, 2, 1, 24, 24), torch.empty(20, 2, 1, 24, dtype=torch.bfloat16, device=DEVICE)
    begins = random(torch.bfloat16, 0, 20 * 2 * 24 + 4)
    with pytest.raises(UnsupportedError, match="begins 8 bytes after"):
        matrices.matrix_products(begins[4:].view(20, 2, 1, 24), b, c, **kind)  # type: ignore[arg-type]
    check(of_matrices, 5, BASE)


def test_tensors_of_other_devices_are_of_another_form() -> None:
    tensor = torch.empty(2, 3)
    assert form(tensor) == form(torch.ones(2, 3))
    assert form(tensor) != form(tensor.to("meta"))
    like = form(tensor.t()).like()
    assert (like.shape, like.stride(), like.dtype) == ((3, 2), (1, 3), torch.float32)


def test_sides_that_are_not_in_one_run_are_refused_rather_than_read_as_one() -> None:
    a = random(torch.bfloat16, 0, 20, 2, 2, 48)[..., :24]
    b, c = random(torch.bfloat16, 1, 2, 1, 24, 48), torch.empty(20, 2, 1, 24, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        matrices.matrix_products(a, b, c, tiles=TILES)
