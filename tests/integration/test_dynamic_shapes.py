"""One compilation serves every length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiling import Rewritten
from tests.oracle import assert_like_eager

CLASSES = 37
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def shifted(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w)[..., :-1, :].contiguous()
    return F.cross_entropy(z.view(-1, z.size(-1)), labels[..., 1:].contiguous().view(-1))


def sizes_read_from_logits(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w)[:, :-1]
    return F.cross_entropy(z.reshape(z.size(0) * z.size(1), CLASSES), labels[:, 1:].reshape(-1))


def per_token_mean(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w).transpose(1, 2), labels, reduction="none").mean()


def mean_of_sequences(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    mask = labels > 5
    losses = F.cross_entropy(F.linear(x, w).view(-1, CLASSES), labels.view(-1), reduction="none").view(labels.shape)
    return ((losses * mask).sum(-1) / mask.sum(-1).clamp_min(1)).mean()


def per_token(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w).flatten(0, 1), labels.flatten(), reduction="none")


def temperatures(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w) / (x[:, :1, :1] ** 2 + 1.0) + w[:, 0]
    z = (z.transpose(0, 1) * x[..., 1:2].exp().transpose(0, 1)).clamp(-3.0, 3.0)
    return F.cross_entropy(z.reshape(-1, CLASSES), labels.t().reshape(-1))


def accuracy_and_z_loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w)[:, :-1]
    hits = (z.argmax(-1) == labels[:, 1:]).sum()
    return F.cross_entropy(z.flatten(0, 1), labels[:, 1:].flatten()) * hits + z.logsumexp(-1).square().mean()


def ratios_of_sequences(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    z, mask = F.linear(x, w), labels > 5
    log_p = z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(log_p - log_p.detach()) * labels[:, :1].float()
    return (((ratio + z.logsumexp(-1)) * mask).sum(-1, keepdim=True) / labels.shape[1]).mean(0).sum() / x.shape[0]


LOSSES = [
    shifted,
    sizes_read_from_logits,
    per_token_mean,
    mean_of_sequences,
    per_token,
    temperatures,
    accuracy_and_z_loss,
    ratios_of_sequences,
]


@pytest.mark.parametrize("loss", LOSSES)
def test_one_graph_for_all_lengths(loss: Loss) -> None:
    fast = Rewritten(loss, then="aot_eager", dynamic=True)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(CLASSES, 8, generator=generator).requires_grad_()
    for batch, length in ((2, 5), (3, 7), (4, 9), (2, 11)):
        x = torch.randn(batch, length, 8, generator=generator).requires_grad_()
        labels = torch.randint(0, CLASSES, (batch, length), generator=generator)
        assert_like_eager(fast, loss, (x, w, labels))
    assert fast.statuses == ["rewritten"]
    assert len(fast.graphs) == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_as_many_sequences_as_tokens(loss: Loss) -> None:
    fast = Rewritten(loss, then="aot_eager", dynamic=True)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(CLASSES, 8, generator=generator).requires_grad_()
    for size in (4, 7):  # one symbol stands for both, and quotients of its powers for either
        x = torch.randn(size, size, 8, generator=generator).requires_grad_()
        labels = torch.randint(0, CLASSES, (size, size), generator=generator)
        assert_like_eager(fast, loss, (x, w, labels))
    assert fast.statuses == ["rewritten"]
    assert len(fast.graphs) == 1


def rows_that_count(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    mask = labels > 5
    return F.cross_entropy(F.linear(x[mask], w), labels[mask])


def temperatures_of_rows_that_count(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    mask = labels > 5
    return F.cross_entropy(F.linear(x[mask], w) / (x[mask][:, :1] ** 2 + 1.0), labels[mask])


@pytest.mark.parametrize("loss", [rows_that_count, temperatures_of_rows_that_count])
def test_a_row_count_that_depends_on_data(loss: Loss) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(CLASSES, 8, generator=generator).requires_grad_()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = Rewritten(loss, then="aot_eager")
        for _ in range(3):
            x = torch.randn(4, 9, 8, generator=generator).requires_grad_()
            assert_like_eager(fast, loss, (x, w, torch.randint(0, CLASSES, (4, 9), generator=generator)))
    assert fast.statuses == ["rewritten"]
    assert len(fast.graphs) == 1
