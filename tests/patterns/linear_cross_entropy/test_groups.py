"""Losses of groups of rows, DPO above all: right for every layout of groups, in one pass where a chunk holds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from structfly.lowering.linear_cross_entropy import flops
from tests.compiling import ALWAYS, Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_cross_entropy import forms
from tests.patterns.linear_cross_entropy.test_forms import BATCH, CLASSES, HIDDEN, LENGTH, inputs

_REGISTERED = flops  # imported for what it registers
ROW_BYTES = 48 * 4  # of float32 logits, in aligned rows

# How the better and the worse of two sequences, or of their tokens, stand among all.
LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda s: s.chunk(2),
    "split": lambda s: s.split(s.shape[0] // 2, dim=0),
    "tensor_split": lambda s: torch.tensor_split(s, 2),
    "slices": lambda s: (s[: len(s) // 2], s[len(s) // 2 :]),
    "slices from the end": lambda s: (s[: -(len(s) // 2)], s[-(len(s) // 2) :, ...]),
    "narrow": lambda s: (s.narrow(0, 0, len(s) // 2), s.narrow(0, len(s) // 2, len(s) // 2)),
    "viewed": lambda s: s.unflatten(0, (2, -1)).unbind(0),
    "alternating": lambda s: (s[::2], s[1::2]),
    "alternating, viewed": lambda s: (s.unflatten(0, (-1, 2))[:, 0], s.unflatten(0, (-1, 2)).select(1, -1)),
    "of four": lambda s: (s.chunk(4)[1], s.chunk(4)[3]),
    "every fourth": lambda s: (s[1::4], s[3::4]),
}
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dpo": lambda better, worse, reference: -F.logsigmoid(0.5 * (better - worse - reference)).mean(),
    "ipo": lambda better, worse, reference: (better - worse - reference).square().mean(),
    "hinge": lambda better, worse, reference: torch.relu(1.3 - (better - worse) * reference).sum(),
    "robust": lambda better, worse, reference: (
        -0.9 * F.logsigmoid(better - worse - reference) - 0.1 * F.logsigmoid(worse - better + reference)
    ).mean(),
    "with the better's own": lambda better, worse, reference: (
        (-F.logsigmoid(better - worse) * reference).mean() - 0.5 * better.sum() / 7
    ),
    "of the margin's mean": lambda better, worse, reference: ((better - reference).exp() - worse).mean() * 0.1,
}


def pairs(seed: int, groups: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, weight, labels of which some are ignored, and references' margins."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * groups, length, HIDDEN, generator=generator).to(dtype).requires_grad_()
    w = (torch.randn(CLASSES, HIDDEN, generator=generator) * 0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, CLASSES, (4 * groups, length), generator=generator)
    labels.masked_fill_(torch.rand(labels.shape, generator=generator) < 0.2, -100)
    return x, w, labels, torch.randn(2 * groups, generator=generator).to(dtype)


def preference(layout: str, loss: str, *, picks_rows: bool, average: bool) -> Callable[..., Tensor]:
    def step(x: Tensor, w: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        mask = labels != -100
        log_p = F.linear(x, w).log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        log_p, counts = log_p * mask, mask.sum(1).clamp(min=1) if average else torch.ones_like(labels[:, 0])
        halves, divisors = LAYOUTS[layout](log_p if picks_rows else log_p.sum(1)), LAYOUTS[layout](counts)
        better, worse = ((s.sum(1) if picks_rows else s) / n for s, n in zip(halves, divisors, strict=True))
        return LOSSES[loss](better, worse, reference[: better.shape[0]])

    return step


def operations(fast: Rewritten, arguments: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> int:
    """Of forward and backward; the graph is run by itself, for under a mode the function would."""
    fast(*arguments)
    (graph,) = fast.graphs
    taken = [named[node.name] for node in graph.graph.nodes if node.op == "placeholder"]
    with FlopCounterMode(display=False) as counter:
        graph(*taken)[0].backward()
    return int(counter.get_total_flops())


@settings(max_examples=15)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    loss=st.sampled_from(sorted(LOSSES)),
    picks_rows=st.booleans(),
    average=st.booleans(),
    groups=st.integers(1, 3),
    length=st.integers(1, 6),
    seed=st.integers(0, 999),
    limit=st.integers(1, 80),
    dynamic=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16)),
)
def test_as_accurate_as_eager(
    layout: str,
    loss: str,
    picks_rows: bool,
    average: bool,
    groups: int,
    length: int,
    seed: int,
    limit: int,
    dynamic: bool,
    dtype: torch.dtype,
) -> None:
    """Every layout, whether sums or rows are picked, with chunks of less than a group and of several."""
    assume(not (dynamic and length == 4 * groups))  # torch then writes s * s // s for s
    step = preference(layout, loss, picks_rows=picks_rows, average=average)
    options = {**ALWAYS, "budget": {"loss_memory": limit * ROW_BYTES}}
    fast = Rewritten(step, options, dynamic=dynamic)
    assert_like_eager(fast, step, pairs(seed, groups, length, dtype), dtype)
    (call,) = fast.arguments
    candidate = fast.sites[0].candidate
    # There a view's size is a quotient of symbols, which nothing proves to be half of the rows.
    unproven = dynamic and picks_rows and layout == "alternating, viewed"
    if unproven and call.schedule == "backward":
        assert "does not cut the rows in equal parts" in candidate
        return
    assert call.schedule == "forward", candidate
    assert call.row_loss


def test_other_sizes_run_the_same_program() -> None:
    step = preference("chunk", "dpo", picks_rows=False, average=True)
    options = {**ALWAYS, "budget": {"loss_memory": 40 * ROW_BYTES}}
    fast = Rewritten(step, options, then="aot_eager", dynamic=True)
    for groups, length in ((3, 4), (2, 6), (5, 17), (2, 90)):  # of the last, a group is more than a chunk
        assert_like_eager(fast, step, pairs(0, groups, length))
    assert len(fast.graphs) == 1


@pytest.mark.parametrize("cut_again", [False, True])
def test_a_size_that_is_made_too_late_is_reported(cut_again: bool) -> None:
    def step(x: Tensor, w: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        log_p = -F.cross_entropy(F.linear(x, w).flatten(0, 1), labels.clamp_min(0).flatten(), reduction="none")
        logged = log_p.detach().exp().sum()
        first, second = log_p.view(x.shape[0] // 2, 2 * x.shape[1]).chunk(2, 1)
        margins = first.sum(1) - second.sum(1)
        better, worse = margins.chunk(2) if cut_again else (margins, reference)
        return (better - worse).sigmoid().sum() + logged

    fast = Rewritten(step, dynamic=True)
    assert_like_eager(fast, step, pairs(0, 2, 3))
    assert "(class C: floordiv, which " in fast.sites[0].candidate
    assert "is made after a statistic was used" in fast.sites[0].candidate


@pytest.mark.parametrize("dynamic", [False, True])
def test_slices_end_where_the_rows_do(dynamic: bool) -> None:
    def step(x: Tensor, w: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        log_p = F.linear(x, w).log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1).sum(1)
        half = log_p.shape[0] // 2
        return -F.logsigmoid(log_p[-99:half] - log_p[half:99] - reference).mean()

    fast = Rewritten(step, dynamic=dynamic)
    assert_like_eager(fast, step, pairs(0, 1, 3))
    assert "gradients in forward (class C)" in fast.sites[0].candidate


@pytest.mark.parametrize(
    "only_place",
    [
        lambda log_p: log_p[..., 0].sum(1),
        lambda log_p: log_p.select(-1, -1).sum(1),
        lambda log_p: log_p.sum(1).narrow(1, 0, 1),
        lambda log_p: log_p.squeeze(2).sum(1, keepdim=True)[:, 0],
        lambda log_p: log_p.sum(1).unbind(1)[0],
    ],
)
def test_the_only_place_of_a_dimension_is_no_cut(only_place: Callable[[Tensor], Tensor]) -> None:
    def step(x: Tensor, w: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        log_p = F.linear(x, w).log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1))
        return only_place(log_p).square().mean()

    fast = Rewritten(step)
    assert_like_eager(fast, step, pairs(0, 1, 3))
    (call,) = fast.arguments
    assert (call.schedule, list(call.row_group)) == ("forward", [3])
    assert "part" not in call.row_loss


@pytest.mark.parametrize(
    "loss",
    [
        lambda log_p, r: (log_p[0].sum() - r[0]).square() + log_p[1].sum(),
        lambda log_p, r: (log_p.sum(1) - (r[0] - log_p[0].sum()) / r[1]).sigmoid().sum(),
        lambda log_p, r: (log_p.sum(1) * (log_p[1].sum() + r[0]).detach()).sum(),
        lambda log_p, r: (log_p.sum(1) + (log_p[2].mean() + r[0] * r[1]).view(1)).sigmoid().sum(),
    ],
)
def test_what_is_added_to_the_sum_of_some_rows_comes_before_what_is_not_linear(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    def step(x: Tensor, w: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        log_p = F.linear(x, w).log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return loss(log_p, reference)

    fast = Rewritten(step)
    assert_like_eager(fast, step, pairs(0, 1, 3))
    assert "gradients in forward (class C)" in fast.sites[0].candidate


@pytest.mark.parametrize("pick", [lambda s: s[: len(s) // 2], lambda s: s[1::2]])
def test_parts_that_are_no_longer_equal_make_another_graph(pick: Callable[[Tensor], Tensor]) -> None:
    def step(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        log_p = F.cross_entropy(F.linear(x, w).flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        return pick(log_p).sum(1).square().mean()

    fast = Rewritten(step, dynamic=True)
    for rows in (6, 8, 5):
        x, w, labels, _ = pairs(0, 2, 3)
        assert_like_eager(fast, step, (x[:rows].detach().requires_grad_(), w, labels[:rows].clamp_min(0)))
    assert "class C" in fast.sites[0].candidate
    assert len(fast.graphs) == 2


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (forms.dpo, 2 * BATCH * (LENGTH - 1)),
        (forms.dpo_with_logged_rewards, 2 * BATCH * LENGTH),
        (forms.ipo_of_alternating_sequences, 2 * BATCH * (LENGTH - 1)),
        (forms.orpo_with_the_better_ones_loss, 2 * BATCH * (LENGTH - 1)),
        (forms.gspo, BATCH * LENGTH),
    ],
)
def test_three_products(function: Callable[..., Tensor], rows: int) -> None:
    fast, arguments = Rewritten(function), inputs()
    named = dict(zip(("l_x_", "l_w_", "l_b_", "l_ids_", "l_labels_"), arguments, strict=True))
    assert operations(fast, arguments, named) == 3 * 2 * rows * HIDDEN * CLASSES
    assert "gradients in forward (class C)" in fast.sites[0].candidate


def test_chunks_hold_whole_groups() -> None:
    step = preference("chunk", "dpo", picks_rows=False, average=False)
    copy = 24 * 5 * HIDDEN * 4  # the hidden states in the groups' order
    fast = Rewritten(step, {**ALWAYS, "budget": {"loss_memory": 37 * ROW_BYTES + copy}})
    fast(*pairs(0, 6, 5))
    (call,) = fast.arguments
    assert list(call.row_group) == [2, 5]
    assert (call.workspace % (10 * ROW_BYTES), call.workspace <= 37 * ROW_BYTES) == (0, True)
    assert "rows a chunk, loss, gradients in forward (class C)" in fast.sites[0].candidate


def test_a_group_that_is_more_than_a_chunk_is_reported_and_takes_four_products() -> None:
    step, arguments = preference("chunk", "dpo", picks_rows=False, average=False), pairs(0, 6, 50)
    copy = 24 * 50 * HIDDEN * 4
    fast = Rewritten(step, {**ALWAYS, "budget": {"loss_memory": 60 * ROW_BYTES + copy}})
    assert_like_eager(fast, step, arguments)
    assert "(class C), logits made twice: a group of 100 rows is more than a chunk" in fast.sites[0].candidate
    named = dict(zip(("l_x_", "l_w_", "l_labels_", "l_reference_"), arguments, strict=True))
    assert operations(fast, arguments, named) == 4 * 2 * 24 * 50 * HIDDEN * CLASSES


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (forms.sequences_of_chosen_rows, "class D: getitem_1 picks rows in a way that is not read"),
        (forms.unequal_parts, "class D: getitem does not cut the rows in equal parts"),
        (forms.products_of_all_pairs, "class D: sub spreads values of rows over others"),
        (forms.windows_of_tokens, "class D: getitem does not cut the rows in equal parts"),
        (forms.normalised_by_its_own_mean, "class D: truediv takes both values of single rows and a sum over rows"),
    ],
)
def test_what_is_no_group_is_recomputed_for_a_reason(function: Callable[..., Tensor], reason: str) -> None:
    fast = Rewritten(function)
    fast(*inputs()).backward()
    assert reason in fast.sites[0].candidate
    assert fast.arguments[0].schedule == "backward"


def test_one_place_of_a_dynamic_batch_leaves_it_dynamic() -> None:
    def step(x: Tensor, w: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        log_p = -F.cross_entropy(F.linear(x, w).flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        return (log_p.sum(1) - log_p[0].sum() + reference.sum()).sigmoid().sum()

    fast = Rewritten(step, then="aot_eager", dynamic=True)
    for groups in (3, 4):  # Dynamo takes equal sizes for the same one
        assert_like_eager(fast, step, pairs(0, groups, 5))
    assert len(fast.graphs) == 1
    assert "class C" in fast.sites[0].candidate
