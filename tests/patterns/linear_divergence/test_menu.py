"""What the solver chooses for distillation at real sizes on a device described by its profile; nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from structfly.backend import read_config
from structfly.patterns import DEFAULT_RULES
from structfly.records import SiteReport
from structfly.rewriter.engine import rewrite_graph
from tests.patterns.linear_cross_entropy.test_menu import H100, MIB

ROWS, HIDDEN, WIDTH, CLASSES = 8192, 2048, 4096, 128256


def two_heads(x: Tensor, w: Tensor, y: Tensor, u: Tensor, given: Tensor) -> Tensor:
    return F.kl_div(F.linear(x, w).log_softmax(-1), F.linear(y, u).softmax(-1), reduction="batchmean")


def given_logits(x: Tensor, w: Tensor, y: Tensor, u: Tensor, given: Tensor) -> Tensor:
    return F.kl_div((F.linear(x, w) / 2).log_softmax(-1), (given.float() / 2).softmax(-1), reduction="batchmean")


def choose(loss: Callable[..., Tensor], memory: str | None = None) -> SiteReport:
    """The report's line."""
    sites: list[SiteReport] = []
    options: dict[str, object] = {"budget": {"loss_memory": memory}} if memory else {}

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        sites.extend(rewrite_graph(gm, DEFAULT_RULES, read_config(options), lambda device: H100).sites)
        return gm.forward

    torch._dynamo.reset()
    shapes = ((ROWS, HIDDEN), (CLASSES, HIDDEN), (ROWS, WIDTH), (CLASSES, WIDTH), (ROWS, CLASSES))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, w, *rest = (torch.empty(*shape, dtype=torch.bfloat16) for shape in shapes)
        torch.compile(loss, backend=backend)(x.requires_grad_(), w.requires_grad_(), *rest)
    (site,) = sites
    return site


def test_two_heads_are_fused_and_keep_the_limit() -> None:
    site = choose(two_heads)
    assert site.status == "rewritten"
    assert "teacher's head within" in site.candidate
    assert site.peak_bytes is not None
    assert site.peak_bytes_kept == 2 * ROWS * CLASSES * 2
    assert site.peak_bytes <= site.peak_bytes_kept // 2


@pytest.mark.parametrize("memory", [1200, 1600])
def test_a_chunk_of_two_heads_takes_twice_the_memory_of_one(memory: int) -> None:
    """The student's weight gradient is summed in float32, which takes as much in both."""
    both, one = choose(two_heads, f"{memory}MiB"), choose(given_logits, f"{memory}MiB")
    assert both.peak_bytes is not None
    assert one.peak_bytes is not None
    assert max(both.peak_bytes, one.peak_bytes) <= memory * MIB
    assert "teacher given" in one.candidate
    assert _rows(both) < _rows(one)


def _rows(site: SiteReport) -> int:
    return int(site.candidate.split(", ")[2].split()[0])
