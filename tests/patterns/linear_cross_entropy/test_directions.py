"""Losses over the rows and the columns of one product: CLIP's, in the spellings of its implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from structfly.records import SiteReport
from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_cross_entropy.test_menu import H100, choose

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BOTH = "both directions, each with a product of its own"


def normed(features: Tensor) -> Tensor:
    return F.normalize(features, dim=-1)


def diagonal(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(logits.shape[0]))


def scaled_first(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = scale.exp() * normed(a) @ normed(b).T
    return (diagonal(logits) + diagonal(logits.T)) / 2


def scaled_last(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    per_image = scale.exp() * (a / a.norm(dim=1, keepdim=True) @ normed(b).t())
    return (diagonal(per_image) + diagonal(per_image.transpose(0, 1))) / 2


def hugging_face(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    per_text = torch.matmul(normed(b), normed(a).t().to(b.device)) * scale.exp().to(b.device)
    return (diagonal(per_text) + diagonal(per_text.t())) / 2


def scaled_in_each_direction(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    similarity = torch.einsum("nd,md->nm", a, b)
    return diagonal(similarity * scale) + 0.5 * diagonal(similarity.mT / scale.exp())


def log_softmaxes(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits, target = F.linear(a, b) * scale, torch.arange(a.shape[0])
    columns = -logits.log_softmax(0).gather(0, target[None]).mean()
    return F.nll_loss(logits.log_softmax(1), target) + columns


def per_pair(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits, target = a @ b.t() * scale, torch.arange(a.shape[0])
    rows = F.cross_entropy(logits, target, reduction="none")
    return rows + F.cross_entropy(logits.t(), target, reduction="none", label_smoothing=0.1)


def columns_alone(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return diagonal((a @ b.t()).t() * scale)


def columns_alone_stored_the_other_way(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return diagonal((a @ b.t().contiguous() * scale).t())


def with_itself(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = a @ a.t() * scale
    return diagonal(logits) + diagonal(logits.t()) + 0 * b.sum()


def scaled_in_place(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = a @ b.t()
    logits *= scale
    columns = diagonal(logits.t())
    return columns + diagonal(logits)


def checkpointed(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    result: Tensor = checkpoint(scaled_last, a, b, scale, use_reentrant=False)
    return result


def z_losses_in_one_sum(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = a @ b.t() * scale
    losses = diagonal(logits) + diagonal(logits.t())
    return losses + 0.1 * logits.logsumexp(1).square().mean() + 0.1 * logits.logsumexp(0).square().mean()


def gathered_in_rows_normalised_over_columns(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits, target = a @ b.t() * scale, torch.arange(a.shape[0])
    return (logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(0)).sum()


def with_what_nobody_takes(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = a @ b.t() * scale
    diagonal(torch.relu(logits.t())), diagonal(logits.t()), logits.argmax(0)
    return diagonal(logits)


ONE_SITE = (
    *(scaled_first, scaled_last, hugging_face, scaled_in_each_direction, log_softmaxes, per_pair),
    *(with_itself, scaled_in_place, checkpointed, z_losses_in_one_sum, gathered_in_rows_normalised_over_columns),
)


def two_products(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    a, b, scale = normed(a), normed(b), scale.exp()
    return (diagonal(scale * a @ b.T) + diagonal(scale * b @ a.T)) / 2


def features(rows: int = 11, hidden: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return a, b, torch.tensor(1.3, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    ("loss", "dtype"),
    [
        *((loss, torch.float32) for loss in ONE_SITE),
        *((hugging_face, dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
    ],
)
def test_both_directions_are_fused_together(loss: Loss, dtype: torch.dtype) -> None:
    fast = Rewritten(loss)
    arguments = features(dtype=dtype)
    upstream = torch.linspace(-1.0, 1.0, arguments[0].shape[0]) if loss is per_pair else None
    assert_like_eager(fast, loss, arguments, dtype, upstream)
    assert fast.statuses == ["rewritten"], fast.sites
    assert fast.sites[0].candidate.startswith(BOTH)
    assert len(fast.calls) == 2
    assert not any(node.target in (torch.matmul, F.linear) for gm in fast.graphs for node in gm.graph.nodes)


def test_a_sum_that_both_end_in_is_made_by_one() -> None:
    fast = Rewritten(z_losses_in_one_sum)
    fast(*features())
    one, other = fast.sites[0].candidate.removeprefix(BOTH).split("; ")
    assert "loss, gradients in forward (class B)" in one
    assert "loss and lse, recompute (class D: their sum is made with the other direction's)" in other


def test_a_direction_whose_values_nobody_takes_is_none() -> None:
    fast = Rewritten(with_what_nobody_takes)
    assert_like_eager(fast, with_what_nobody_takes, features())
    assert fast.statuses == ["rewritten"], fast.sites
    assert len(fast.calls) == 1


@pytest.mark.parametrize("loss", [columns_alone, columns_alone_stored_the_other_way])
def test_columns_alone_are_a_head(loss: Loss) -> None:
    fast = Rewritten(loss)
    assert_like_eager(fast, loss, features())
    assert fast.statuses == ["rewritten"], fast.sites
    assert len(fast.calls) == 1


def test_two_products_are_two_heads() -> None:
    fast = Rewritten(two_products, then="aot_eager")
    assert_like_eager(fast, two_products, features())
    assert fast.statuses == ["rewritten"] * 2


def test_both_directions_survive_aot_autograd_and_other_sizes() -> None:
    fast = Rewritten(hugging_face, then="aot_eager", dynamic=True)
    for rows in (11, 6, 17):
        assert_like_eager(fast, hugging_face, features(rows))
    assert fast.statuses == ["rewritten"]


@settings(max_examples=20)
@given(data=st.data())
def test_any_two_losses_over_rows_and_columns(data: st.DataObject) -> None:
    rows, columns, hidden = (data.draw(st.integers(2, size)) for size in (12, 12, 6))
    frozen = data.draw(st.sets(st.integers(0, 2), max_size=2))
    names = ("reduction", "label_smoothing", "ignore_index")
    values = st.tuples(st.sampled_from(("mean", "sum")), st.sampled_from((0.0, 0.2)), st.sampled_from((-100, 0)))
    options: list[dict[str, Any]] = [dict(zip(names, data.draw(values), strict=True)) for _ in range(2)]
    stored_transposed, memory = data.draw(st.booleans()), data.draw(st.integers(1, 600))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    targets = [torch.randint(0, n, (m,), generator=generator) for m, n in ((rows, columns), (columns, rows))]

    def loss(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        z = a @ b if stored_transposed else F.linear(a, b)
        first = F.cross_entropy(z * scale, targets[0], **options[0])
        return first + 0.3 * F.cross_entropy(z.t() + a[:, 0], targets[1], **options[1])

    shapes = ((rows, hidden), (hidden, columns) if stored_transposed else (columns, hidden), ())
    leaves = [torch.randn(shape, generator=generator) for shape in shapes]
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number not in frozen)
    fast = Rewritten(loss, {"rewrite": "always", "strict": True, "budget": {"loss_memory": memory}})
    assert_like_eager(fast, loss, leaves)
    assert fast.statuses == ["rewritten"]


# Of rows of logits and their targets: one number each, or a scalar.
CONSUMERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "losses": lambda z, t: F.cross_entropy(z, t, reduction="none"),
    "mean": lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1),
    "log-sum-exp": lambda z, t: z.logsumexp(1),
    "squared": lambda z, t: z.logsumexp(1).square().mean() * 0.1,
    "entropy": lambda z, t: -(z.softmax(1) * z.log_softmax(1)).sum(1),
    "hits": lambda z, t: (z.argmax(1) == t).to(z.dtype),
    "detached": lambda z, t: z.logsumexp(1).detach(),
}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda a, b: a + b,
    "sum of means": lambda a, b: a.mean() + b.mean(),
    "product": lambda a, b: a * torch.tanh(b),
}


@settings(max_examples=15)
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_consumers_of_rows_and_columns(data: st.DataObject, seed: int) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(CONSUMERS)), min_size=2, max_size=5))
    across = [data.draw(st.booleans()) for _ in names]
    joins = [data.draw(st.sampled_from(sorted(JOINS))) for _ in names]
    steps = list(zip(names, across, joins, strict=True))

    def loss(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        z, t = a @ b.t() * scale, torch.arange(a.shape[0])
        total = a.sum() * 0.1
        for name, other, join in steps:
            total = JOINS[join](total, CONSUMERS[name](z.t() if other else z, t))
        return torch.cat([total.flatten(), torch.ones(a.shape[0])])  # terms may all but cancel

    fast = Rewritten(loss)
    arguments = features(5 + seed % 3)
    assert_like_eager(fast, loss, arguments)
    twice = any("more than one with class weights or label smoothing" in site.reason for site in fast.sites)
    assert twice or fast.statuses == ["rewritten"], fast.sites
    assert twice or not any(node.target is torch.matmul for gm in fast.graphs for node in gm.graph.nodes)


def one_way_misses(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = a @ b.t()
    return diagonal(logits) + diagonal(torch.relu(logits.t())) * scale


def logits_returned_too(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = a @ b.t()
    return diagonal(logits) + diagonal(logits.t()) + logits.square().mean() * scale


def features_overwritten(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    with torch.no_grad():
        copy = a * 1
        logits = copy @ b.t()
        rows = diagonal(logits)
        copy.zero_()
        return rows + diagonal(logits.t())


def nearest_as_target(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = a @ b.t() * scale
    return F.cross_entropy(logits.t(), logits.argmax(1))


def normalised_over_columns(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = a @ b.t() * scale
    return diagonal(logits - logits.logsumexp(0))


def with_a_bias(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return diagonal(F.linear(a, b, b[:, 0]).t()) * scale


@pytest.mark.parametrize(
    ("loss", "reasons"),
    [
        (one_way_misses, ["used elsewhere too, by t (", "relu (relu"]),
        (logits_returned_too, ["used elsewhere too, by square"] * 2),
        (features_overwritten, ["writes into a tensor that the nodes of this site read"]),
        (nearest_as_target, ["argmax is made of the logits along one dimension, and what is made along the other"] * 2),
        (normalised_over_columns, ["logsumexp is made of the logits along one dimension"] * 2),
        (with_a_bias, ["the loss takes dimension 1 as classes, they are 0"]),
    ],
)
def test_where_one_direction_misses_both_do_and_say_why(loss: Loss, reasons: list[str]) -> None:
    fast = Rewritten(loss)
    assert_like_eager(fast, loss, features())
    assert fast.statuses == ["missed"] * len(reasons)
    for site, reason in zip(fast.sites, reasons, strict=True):
        assert reason in site.reason


def at_size(memory: str | None) -> SiteReport:
    def loss(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        logits = a @ b.t()
        return F.cross_entropy(logits.float(), t) + F.cross_entropy(logits.t().float(), t)

    return choose((32768, 1024, 32768), memory=memory, function=loss, profile=H100)


def test_the_cost_of_a_second_product_is_weighed() -> None:
    """Stored logits are the faster way, so that only a budget asks for the other."""
    kept, fused = at_size(None), at_size("600MiB")
    assert (kept.status, kept.candidate) == ("kept", "dense")
    assert "predicted to be fastest as it is" in kept.reason
    assert (fused.status, fused.candidate.startswith(BOTH)) == ("rewritten", True)
    assert fused.peak_bytes is not None
    assert fused.peak_bytes <= 600 * 2**20
    assert kept.seconds is not None
    assert fused.seconds is not None
    assert kept.seconds < fused.seconds < 3 * kept.seconds
