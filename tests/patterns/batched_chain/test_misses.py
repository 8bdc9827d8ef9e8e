"""Products that are left as they are, and the reason that is given where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiling import Rewritten
from tests.patterns.batched_chain.forms import by_bmm, by_einsum, of_neighbours

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
X, W1, W2 = torch.randn(6, 20), torch.randn(4, 6, 5), torch.randn(3, 7, 8)


class Of(nn.Module):
    """A form and its factors."""

    def __init__(self, form: Callable[..., Tensor], first: tuple[int, ...], second: tuple[int, ...]) -> None:
        super().__init__()
        self.form = form
        self.w1, self.w2 = nn.Parameter(torch.randn(first)), nn.Parameter(torch.randn(second))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.w1, self.w2)


def kept_between(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    out1 = torch.einsum("nkp,kqp->nkq", x.unflatten(1, (4, 5)), w1)
    out2 = torch.einsum("nrl,lsr->nls", out1.reshape(-1, 8, 3), w2)
    return out2 + out1.sum()


def one_matrix_for_two_blocks(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The second product has a matrix for each half of what the first has a block for."""
    out1 = torch.einsum("nkp,kqp->nkq", x.unflatten(1, (4, 5)), w1)
    return torch.einsum("nkuq,usq->nkus", out1.unflatten(2, (2, 3)), w2)


def rows_behind(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    out1 = torch.einsum("nkp,kqp->nkq", x.unflatten(1, (4, 5)), w1)
    return torch.einsum("nrl,lsr->lsn", out1.reshape(-1, 8, 3), w2)


def across_rows(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    out1 = torch.einsum("nkp,kqp->nkq", x.unflatten(1, (4, 5)), w1)  # (6, 4, 6)
    return torch.einsum("nrl,lsr->nls", out1.reshape(3, 8, 6), w2)


def broadcast(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    out1 = x.reshape(6, 4, 1, 5) @ w1.mT
    return out1.reshape(6, 3, 1, 8) @ w2.mT


@pytest.mark.parametrize(
    ("form", "shapes", "reason"),
    [
        (by_bmm, ((6, 20), (4, 6, 5), (12, 7, 2)), "rewritten"),
        (by_bmm, ((6, 15), (3, 8, 5), (12, 7, 2)), "a dimension of 2 is part of one axis and part of the next"),
        (of_neighbours, ((6, 15), (3, 8, 5), (12, 7, 2)), "a dimension of 2 is part of one axis"),
        (kept_between, ((6, 20), (4, 6, 5), (3, 7, 8)), "out1, between the products, is read elsewhere"),
        (one_matrix_for_two_blocks, ((6, 20), (4, 6, 5), (2, 7, 3)), "one matrix for several of their blocks"),
        (rows_behind, ((6, 20), (4, 6, 5), (3, 7, 8)), "the rows do not come first"),
        (across_rows, ((6, 20), (4, 6, 5), (6, 7, 8)), "the products take different rows"),
        (broadcast, ((6, 20), (1, 6, 5), (3, 7, 8)), "a factor is broadcast"),
    ],
)
def test_left_with_a_reason(form: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], reason: str) -> None:
    x, model = torch.randn(shapes[0]), Of(form, *shapes[1:])
    fast = Rewritten(model)
    torch.testing.assert_close(fast(x), model(x))
    (site,) = fast.sites
    assert site.rule == "batched_chain"
    assert reason == site.status or (site.status == "missed" and reason in site.reason), site.reason


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = torch.relu(q), torch.relu(k), torch.tanh(v)
    return torch.bmm(q, torch.bmm(k.mT, v))


def with_an_activation(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    out1 = torch.relu(torch.einsum("nkp,kqp->nkq", x.unflatten(1, (4, 5)), w1))
    return torch.einsum("nrl,lsr->nls", out1.reshape(-1, 8, 3), w2)


@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        (attention, [(2, 5, 4)] * 3),
        (linear_attention, [(2, 5, 4)] * 3),
        (with_an_activation, [(6, 20), (4, 6, 5), (3, 7, 8)]),
    ],
)
def test_other_products_are_no_chains(form: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    arguments = [torch.randn(shape) for shape in shapes]
    fast = Rewritten(form)
    torch.testing.assert_close(fast(*arguments), form(*arguments))
    assert fast.sites == []


class Multiply(torch.autograd.Function):
    """As fly has it, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1, w2)
        return by_bmm(x, w1, w2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w1, w2 = ctx.saved_tensors
        return grad.sum() * x, grad.sum() * w1, grad.sum() * w2


def test_a_custom_autograd_function_keeps_its_backward() -> None:
    x = X.clone().requires_grad_()
    fast = Rewritten(lambda *arguments: Multiply.apply(*arguments))  # type: ignore[no-untyped-call]
    fast(x, W1.clone().requires_grad_(), W2.clone().requires_grad_()).sum().backward()
    assert [site.status for site in fast.sites] == ["missed"]
    assert "inside a custom autograd function" in fast.sites[0].reason


def test_a_write_between_the_products_is_left() -> None:
    def form(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        out1 = torch.einsum("nkp,kqp->nkq", x.unflatten(1, (4, 5)), w1)
        w1.mul_(2.0)
        return torch.einsum("nrl,lsr->nls", out1.reshape(-1, 8, 3), w2)

    fast = Rewritten(form)
    torch.testing.assert_close(fast(X, W1.clone(), W2), form(X, W1.clone(), W2))
    assert "writes into a tensor that the nodes of this site read" in fast.sites[0].reason


def test_products_of_integers_are_left() -> None:
    arguments = [torch.ones(shape, dtype=torch.int64) for shape in ((6, 20), (4, 6, 5), (3, 7, 8))]
    fast = Rewritten(by_bmm)
    torch.testing.assert_close(fast(*arguments), by_bmm(*arguments))
    assert "the products run in torch.int64; one floating-point dtype is allowed" in fast.sites[0].reason


def test_products_under_different_modes_are_left() -> None:
    def form(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        with torch.no_grad():
            out1 = torch.einsum("nkp,kqp->nkq", x.unflatten(1, (4, 5)), w1)
        return torch.einsum("nrl,lsr->nls", out1.reshape(-1, 8, 3), w2)

    w1, w2 = W1.clone().requires_grad_(), W2.clone().requires_grad_()
    fast = Rewritten(form)
    found = torch.autograd.grad(fast(X, w1, w2).sum(), (w1, w2), allow_unused=True)
    assert found[0] is None
    assert "under different modes of autocast or of recording gradients" in fast.sites[0].reason


def test_two_chains_in_a_row_are_one() -> None:
    """Four products; the features between the second and the third are in the order that the program gives them."""

    def form(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return by_einsum(by_einsum(x, w1, w2), w1, w2)

    arguments = torch.randn(5, 16), torch.randn(4, 4, 4), torch.randn(4, 4, 4)
    fast = Rewritten(form)
    torch.testing.assert_close(fast(*arguments), form(*arguments), rtol=1e-4, atol=1e-4)
    assert set(fast.statuses) == {"rewritten"}
