"""What training code does around a fused head: several heads on a weight, tied weights, gradients that add up over
micro-batches, scaled losses, checkpoints, evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.compiling import ALWAYS, Rewritten
from tests.oracle import FEW, assert_as_accurate

# Inductor's compile workers and torch's own deprecations warn.
pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES, HIDDEN, BATCH, LENGTH = 37, 8, 3, 9


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, CLASSES, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """A body and a head."""

    heads = 1

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, HIDDEN)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embedding(ids)))

    def shifted(self, logits: Tensor, ids: Tensor, shift: int = 1) -> Tensor:
        return F.cross_entropy(logits[:, :-shift].reshape(-1, CLASSES), ids[:, shift:].reshape(-1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.shifted(self.head(self.hidden(ids)), ids)


class Tied(Model):
    """The head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


class MultiToken(Tied):
    """Multi-token prediction (Gloeckle et al. 2024; DeepSeek-V3): a block for each shift, one head for all."""

    heads = 3

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.hidden(ids)
        losses = [self.shifted(self.head(block(hidden)), ids, k + 1) for k, block in enumerate(self.blocks)]
        return losses[0] + 0.3 * torch.stack(losses[1:]).mean()


class Medusa(Model):
    """Heads with a residual block and a weight each (Cai et al. 2024), losses weighted by 0.8 ** k."""

    heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.medusa = nn.ModuleList(nn.Linear(HIDDEN, CLASSES, bias=False) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.hidden(ids)
        loss = self.shifted(self.head(hidden), ids)
        for k, (block, head) in enumerate(zip(self.blocks, self.medusa, strict=True)):
            loss = loss + 0.8 ** (k + 1) * self.shifted(head(hidden + F.silu(block(hidden))), ids, k + 2)
        return loss


class TransposedTied(Tied):
    """The embedding's weight stored (hidden, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding.weight = self.head.weight = nn.Parameter(torch.randn(CLASSES, HIDDEN).t().contiguous().t())


class Checkpointed(Tied):
    """The head and the loss under activation checkpointing, in three parts of the batch."""

    heads = 3

    def forward(self, ids: Tensor) -> Tensor:
        def loss(hidden: Tensor, ids: Tensor) -> Tensor:
            return self.shifted(self.head(hidden), ids)

        pairs = zip(self.hidden(ids).chunk(3), ids.chunk(3), strict=True)
        return torch.stack([checkpoint(loss, hidden, part, use_reentrant=False) for hidden, part in pairs]).mean()


def make(kind: type[Model], dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return kind().to(dtype)


Step = Callable[[Model, Callable[[Tensor], Tensor]], None]


def once(model: Model, loss: Callable[[Tensor], Tensor]) -> None:
    loss(ids()).backward()


def micro_batches(model: Model, loss: Callable[[Tensor], Tensor]) -> None:
    for seed in range(3):
        (loss(ids(seed)) / 3).backward()


def two_losses_then_backward(model: Model, loss: Callable[[Tensor], Tensor]) -> None:
    first, second = loss(ids(1)), loss(ids(2))
    (first + 2.0 * second).backward()


def two_losses_in_the_other_order(model: Model, loss: Callable[[Tensor], Tensor]) -> None:
    first, second = loss(ids(1)), loss(ids(2))
    second.backward()
    (first * 0.5).backward()


def backward_twice(model: Model, loss: Callable[[Tensor], Tensor]) -> None:
    value = loss(ids()) * 0.5
    value.backward(retain_graph=True)
    value.backward()


def scaled(model: Model, loss: Callable[[Tensor], Tensor]) -> None:
    scaler = torch.amp.GradScaler(model.head.weight.device.type, init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(2):
        scaler.scale(loss(ids(seed)) / 2).backward()
    scaler.unscale_(optimizer)


def assert_trains_like_eager(
    kind: type[Model], step: Step, fast: Callable[[Model], Callable[[Tensor], Tensor]], dtype: torch.dtype
) -> None:
    """Gradients left in ``.grad`` against eager's in float64."""
    left: list[dict[str, Tensor]] = []
    model = make(kind, dtype)
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    for each, loss in ((exact, exact), (eager, eager), (model, fast(model))):
        step(each, loss)
        left.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert left[0].keys() == left[1].keys() == left[2].keys()
    for name, gradient in left[2].items():
        assert_as_accurate(gradient, left[1][name], left[0][name], dtype, name, 2 * FEW)


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        (Model, backward_twice),
        (Tied, micro_batches),
        (Tied, two_losses_in_the_other_order),
        (Tied, backward_twice),
        (TransposedTied, two_losses_then_backward),
        (MultiToken, micro_batches),
        (MultiToken, once),
        (Medusa, scaled),
        (Checkpointed, micro_batches),
        (Checkpointed, once),
    ],
)
def test_gradients_add_up_as_in_eager(kind: type[Model], step: Step) -> None:
    made: list[Rewritten] = []

    def fast(model: Model) -> Rewritten:
        made.append(Rewritten(model, then="aot_eager"))
        return made[0]

    assert_trains_like_eager(kind, step, fast, torch.float32)
    assert made[0].statuses == ["rewritten"] * kind.heads


def test_a_gradient_scaler_loses_nothing_of_float16_logits() -> None:
    assert_scaled_like_eager("cpu")


@pytest.mark.gpu
def test_a_gradient_scaler_loses_nothing_of_float16_logits_on_cuda() -> None:
    assert_scaled_like_eager("cuda")


def assert_scaled_like_eager(device: str) -> None:
    """Gradients of a loss that is scaled by 2 ** 16 and computed under autocast, after they are unscaled."""

    def under_autocast(model: Model, ids: Tensor) -> Tensor:
        with torch.autocast(device, torch.float16):
            loss: Tensor = model(ids.to(device))
            return loss

    mine, eager, exact = make(Tied).to(device), make(Tied).to(device), make(Tied).to(device).double()
    fast = Rewritten(lambda ids: under_autocast(mine, ids), then="aot_eager")
    scaled(mine, fast)
    scaled(eager, lambda ids: under_autocast(eager, ids))
    scaled(exact, lambda ids: exact(ids.to(device)))
    assert fast.statuses == ["rewritten"]
    for (name, one), other, reference in zip(
        mine.named_parameters(), eager.parameters(), exact.parameters(), strict=True
    ):
        assert one.grad is not None
        assert other.grad is not None
        assert reference.grad is not None
        assert_as_accurate(one.grad, other.grad, reference.grad, torch.float16, name)


def test_training_and_evaluation_take_turns() -> None:
    model = make(Tied)
    fast = Rewritten(model, then="aot_eager")
    value = fast(ids())
    value.backward()
    modes: list[Callable[[], Any]] = [torch.no_grad, torch.inference_mode]
    for mode in modes:
        with mode():
            loss = fast(ids())
        assert not loss.requires_grad
        torch.testing.assert_close(loss, value.detach())
    model.zero_grad()
    fast(ids()).backward()
    assert model.embedding.weight.grad is not None
    assert [any(call.gradients) for call in fast.arguments] == [True, False, False]


def compiled(model: Model, mode: str) -> Any:
    options: Any = {**ALWAYS, "mode": mode}
    return torch.compile(model, backend="structfly", options=options)


def test_reduce_overhead_is_harmless_on_a_cpu() -> None:
    assert_trains_like_eager(Tied, micro_batches, lambda model: compiled(model, "reduce-overhead"), torch.float32)


def train(model: Model, loss: Callable[[Tensor], Tensor], steps: int) -> list[float]:
    """The losses of some steps, each on another batch and with other weights."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.5), []
    for seed in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        value = loss(ids(seed).to(model.head.weight.device))
        value.backward()
        losses.append(value.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [Tied, MultiToken])
def test_replayed_cuda_graphs_see_the_weights_as_they_are(kind: type[Model], dtype: torch.dtype) -> None:
    from torch._dynamo.utils import counters

    usual, replayed = make(kind, dtype).cuda(), make(kind, dtype).cuda()
    expected = train(usual, compiled(usual, "default"), 6)
    torch._dynamo.reset()
    counters.clear()
    assert train(replayed, compiled(replayed, "reduce-overhead"), 6) == pytest.approx(expected, rel=1e-4)
    assert not counters["inductor"]["cudagraph_skips"]
    for one, other in zip(usual.parameters(), replayed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-3)
