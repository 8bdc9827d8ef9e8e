"""What the solver chooses for heads of real sizes on a device described by its profile; nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from structfly.backend import read_config
from structfly.patterns import DEFAULT_RULES
from structfly.records import DeviceProfile, SiteReport
from structfly.rewriter.engine import rewrite_graph

MIB = 2**20
H100 = DeviceProfile(
    name="NVIDIA H100",
    kind="cuda",
    capability=(9, 0),
    matrix_rate={torch.bfloat16: 700e12, torch.float16: 700e12, torch.float32: 50e12, torch.float64: 50e12},
    bandwidth=2.8e12,
    launch_seconds=4e-6,
    call_seconds=60e-6,
    half_rate_rows=128,
    fast_rows=3072,
    workspace_cap=1024 * MIB,
    processors=132,
    generated_products=True,
)
SEED, ODD = (16384, 2048, 131072), (16384, 768, 50257)


def loss(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w).float(), t)


def smoothed(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w).float(), t, label_smoothing=0.1)


def capped(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(F.linear(x, w) / 30.0) * 30.0, t)


def capped_and_smoothed(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(F.linear(x, w) / 30.0) * 30.0, t, label_smoothing=0.1)


def sigmoid_capped(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(23.0 * torch.sigmoid((F.linear(x, w) + 5.0) / 7.5), t)


def learned_scale(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w) * x[0, 0], t)


def learned_shift(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w) * 0.5 + w[:, 0], t)


def learned_bias(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w, w[:, 0]), t)


def learned_scale_of_rows(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(F.linear(x, w) * x[:, :1]) * 30.0, t)


def learned_scale_of_classes(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w) * w[:, 0], t)


def shifted_after_a_cap(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(F.linear(x, w) / 30.0) * 30.0 + w[:, 0], t)


def preferences(tokens: int) -> Callable[..., Tensor]:
    """DPO without references, on pairs of sequences of so many tokens."""

    def dpo(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        log_p = -F.cross_entropy(F.linear(x, w).float(), t, reduction="none").view(-1, tokens).sum(1)
        better, worse = log_p.chunk(2)
        return -F.logsigmoid(0.1 * (better - worse)).mean()

    return dpo


def stored_transposed(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy((x @ w).float(), t)


def with_z_loss(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    z = F.linear(x, w).float()
    return F.cross_entropy(z, t) + 1e-4 * z.logsumexp(-1).square().mean()


def with_accuracy(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    z = F.linear(x, w).float()
    return F.cross_entropy(z, t) * (z.argmax(-1) == t).sum()


def choose(
    shape: tuple[int, int, int],
    *,
    memory: str | None = None,
    profile: DeviceProfile = H100,
    function: Callable[..., Tensor] = loss,
    dtype: torch.dtype = torch.bfloat16,
    training: bool = True,
) -> SiteReport:
    """The report's line for a head of (rows, hidden units, classes)."""
    n, h, v = shape
    sites: list[SiteReport] = []
    options: dict[str, object] = {"budget": {"loss_memory": memory}} if memory else {}

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        sites.extend(rewrite_graph(gm, DEFAULT_RULES, read_config(options), lambda device: profile).sites)
        return gm.forward

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = (h, v) if function is stored_transposed else (v, h)
        x, w = (torch.empty(*size, dtype=dtype, requires_grad=training) for size in ((n, h), weight))
        torch.compile(function, backend=backend)(x, w, torch.empty(n, dtype=torch.int64))
    (site,) = sites
    return site


def test_exponentials_are_chosen_where_generated_products_run_well() -> None:
    assert choose(SEED).candidate.startswith("exponentials, ")
    assert choose(SEED, profile=replace(H100, generated_products=False)).candidate.startswith("logits, ")


@pytest.mark.parametrize("shape", [SEED, ODD, (8192, 4096, 128256)])
@pytest.mark.parametrize("memory", [None, "32MiB", "1100MiB", "8GiB"])
def test_an_evaluation_never_writes_logits_where_it_need_not(shape: tuple[int, int, int], memory: str | None) -> None:
    assert choose(shape, memory=memory, training=False).candidate.startswith("exponentials, ")


def test_an_evaluation_takes_no_more_than_it_may_or_has_to() -> None:
    limits = (None, "64KiB", "2KiB", "1GiB")
    peaks = [choose(SEED, memory=memory, training=False).peak_bytes or 0 for memory in limits]
    assert 0 < peaks[0] <= 8 * MIB
    assert 0 < peaks[1] <= 64 * 2**10
    assert 2 * 2**10 < peaks[2] <= 8 * 2**10  # of one row
    assert peaks[3] > 8 * MIB  # all rows at once are faster


@pytest.mark.parametrize(
    ("function", "dtype", "shape"),
    [
        (loss, torch.float16, SEED),
        (loss, torch.float32, SEED),
        (capped_and_smoothed, torch.bfloat16, SEED),
        (learned_scale_of_classes, torch.bfloat16, SEED),
        (shifted_after_a_cap, torch.bfloat16, SEED),
        (loss, torch.bfloat16, (16384, 770, 50257)),
        (stored_transposed, torch.bfloat16, ODD),
    ],
)
def test_heads_that_exponentials_do_not_serve_keep_the_logits(
    function: Callable[..., Tensor], dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    site = choose(shape, function=function, dtype=dtype, memory="1GiB")
    assert site.candidate.startswith(("logits, ", "dense"))


@pytest.mark.parametrize(
    "function",
    [
        *(smoothed, capped, sigmoid_capped, stored_transposed),
        *(learned_scale, learned_shift, learned_bias, learned_scale_of_rows),
    ],
)
def test_variants_that_exponentials_serve(function: Callable[..., Tensor]) -> None:
    assert choose(SEED, function=function).candidate.startswith("exponentials, ")


@pytest.mark.parametrize("function", [with_z_loss, with_accuracy])
def test_further_consumers_keep_the_logits_and_one_pass(function: Callable[..., Tensor]) -> None:
    site, plain = choose(SEED, function=function), choose(SEED, profile=replace(H100, generated_products=False))
    assert site.candidate.startswith("logits, ")
    assert "gradients in forward" in site.candidate
    assert site.seconds is not None
    assert plain.seconds is not None
    assert plain.seconds <= site.seconds <= 1.1 * plain.seconds
    assert site.seconds_kept is not None
    assert plain.seconds_kept is not None
    assert site.seconds_kept > plain.seconds_kept


@pytest.mark.parametrize("shape", [SEED, (8192, 4096, 128256), ODD])
@pytest.mark.parametrize(
    ("memory", "function"),
    [
        *((600, loss), (800, loss), (1100, loss), (2000, loss)),
        *((800, learned_bias), (800, learned_scale_of_rows), (2300, shifted_after_a_cap)),
    ],
)
def test_the_limit_is_kept_and_more_memory_is_never_slower(
    shape: tuple[int, int, int], memory: int, function: Callable[..., Tensor]
) -> None:
    site, roomier = (choose(shape, memory=f"{size}MiB", function=function) for size in (memory, 2 * memory))
    assert site.peak_bytes is not None
    assert site.peak_bytes <= memory * MIB
    assert site.seconds is not None
    assert roomier.seconds is not None
    assert roomier.seconds <= site.seconds


def without_gradient(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        return loss(x, w, t)


def test_an_evaluation_keeps_no_exponentials() -> None:
    site = choose(SEED, function=without_gradient)
    assert site.candidate.startswith("exponentials, ")
    assert "loss only" in site.candidate
    assert site.peak_bytes is not None
    assert site.peak_bytes <= 8 * MIB


@pytest.mark.parametrize(("function", "little"), [(learned_bias, "blocks of "), (learned_scale, "exponentials, ")])
def test_bias_and_operands_cost_little(function: Callable[..., Tensor], little: str) -> None:
    plain, site = choose(SEED), choose(SEED, function=function)
    assert plain.seconds is not None
    assert site.seconds is not None
    assert plain.seconds <= site.seconds <= 1.06 * plain.seconds
    assert choose(SEED, function=function, memory="64MiB").candidate.startswith(little)


@pytest.mark.parametrize("shape", [SEED, (32768, 4096, 128256), ODD])
@pytest.mark.parametrize("tokens", [128, 1024, 2048, 4096, 8192])
def test_without_a_limit_groups_are_made_in_one_pass_with_no_more_than_the_logits(
    shape: tuple[int, int, int], tokens: int
) -> None:
    """From many groups a chunk to one of all rows."""
    site, logits = choose(shape, function=preferences(tokens)), 2 * shape[0] * (shape[2] + 15)
    assert "gradients in forward (class C)" in site.candidate
    assert f", whole groups of {2 * tokens} rows" in site.candidate
    assert site.peak_bytes is not None
    assert site.peak_bytes <= logits
    assert site.seconds is not None
    assert site.seconds_kept is not None
    assert site.seconds <= 1.03 * site.seconds_kept


def test_without_gradients_groups_take_no_more_than_other_heads() -> None:
    def evaluated(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return preferences(8192)(x, w, t)

    site = choose(SEED, function=evaluated)
    assert site.peak_bytes is not None
    assert site.peak_bytes <= 1024 * MIB
    assert "groups" not in site.candidate


def test_what_fits_nowhere_takes_the_least_and_says_so() -> None:
    site = choose(SEED, memory="8MiB")
    assert site.status == "rewritten"
    assert "nothing fits the limit of 8 MiB" in site.reason
    assert site.candidate.startswith("blocks of ")


@pytest.mark.parametrize("shape", [SEED, (8192, 4096, 128256), ODD])
@pytest.mark.parametrize("memory", [32, 64, 128])
def test_little_memory_makes_logits_twice_in_blocks(shape: tuple[int, int, int], memory: int) -> None:
    site = choose(shape, memory=f"{memory}MiB")
    assert site.candidate.startswith("exponentials, " if (shape, memory) == (ODD, 128) else "blocks of ")
    assert site.peak_bytes is not None
    assert site.peak_bytes <= memory * MIB
    assert site.status == "rewritten"
