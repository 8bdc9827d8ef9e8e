"""Loops within models: layers, both directions, products inside, states of any shape, and other users."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.linear_recurrence.arguments import Arguments
from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_recurrence.programs import calls, inputs

OP = torch.ops.structfly.linear_recurrence_v1.default
STEPS = 7


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def two_layers(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    for weight in (w, v):
        f, z = F.linear(x, weight).sigmoid().chunk(2, -1)
        h, hs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = f[:, t] * h + (1 - f[:, t]) * z[:, t]
            hs.append(h)
        x = torch.stack(hs, 1)
    return x


def products_in_the_step(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h, hs = x.new_zeros(x.shape[0], x.shape[2]), []
    for t in range(x.shape[1]):
        f, z = F.linear(x[:, t], w).chunk(2, -1)
        h = torch.sigmoid(f) * h + torch.tanh(z) * (x[:, t] @ v[: x.shape[2], :])
        hs.append(h)
    return torch.stack(hs, 1)


def window_of_two(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h, hs = torch.zeros_like(x[:, 0]), []
    for t in range(1, x.shape[1]):
        f, z = F.linear(torch.cat([x[:, t - 1], x[:, t]], -1), torch.cat([w, v], 1)).chunk(2, -1)
        h = torch.lerp(torch.tanh(z), h, torch.sigmoid(f))
        hs.append(h)
    return torch.stack(hs, 1)


def both_directions(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    f, z = F.linear(x, w).chunk(2, -1)
    f = f.sigmoid()
    outputs = []
    for times in (range(x.shape[1]), reversed(range(x.shape[1]))):
        h, hs = torch.zeros_like(x[:, 0]), [x[:, 0]] * x.shape[1]
        for t in times:
            h = f[:, t] * h + z[:, t]
            hs[t] = h
        outputs.append(torch.stack(hs, 1))
    return torch.cat(outputs, -1)


def last_states_of_both_directions(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    finals = []
    for times in (range(x.shape[1]), reversed(range(x.shape[1]))):
        h = torch.zeros_like(x[:, 0])
        for t in times:
            h = 0.75 * h + x[:, t] * 0.5
        finals.append(h)
    return F.linear(torch.cat(finals, -1).tanh(), torch.cat([w, v], 1))


def one_loop_after_another(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h, hs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = x[:, t].sigmoid() * h + 1.0
    for t in range(x.shape[1]):
        h = h * 0.5 + x[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def learned_decay(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h, hs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        decay = torch.sigmoid(w[:, 0][: x.shape[2]])
        h = decay * h + (1 - decay) * x[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def output_gate(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    f, z = F.linear(x, w).chunk(2, -1)
    c, hs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        c = f[:, t].sigmoid() * c + z[:, t]
        hs.append(torch.sigmoid(x[:, t]) * torch.tanh(c))
    return torch.cat([torch.stack(hs, 1), c.unsqueeze(1)], 1)


def gates_are_seen(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h, hs, gates = torch.zeros_like(x[:, 0]), [], []
    for t in range(x.shape[1]):
        f = x[:, t].sigmoid()
        h = f * h + x[:, t]
        hs.append(h)
        gates.append(f)
    return torch.stack(hs, 1) * torch.stack(gates, 1)


def states_of_three_dimensions(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    a = torch.stack([x, x + 1, x - 1], 2).unflatten(-1, (2, -1))
    h, hs = torch.zeros_like(a[:, 0]), []
    for t in range(x.shape[1]):
        h = x[:, t, None, None, :1].sigmoid() * h + a[:, t]
        hs.append(h)
    return torch.stack(hs, 1).flatten(2)


def states_of_one_dimension(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    one = x[0]
    h, hs = one.new_zeros(one.shape[1]), []
    for t in range(one.shape[0]):
        h = one[t].sigmoid() * h + one[t]
        hs.append(h)
    return torch.stack(hs) + h


def numbers_as_states(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    one = x[0, :, 0]
    h, hs = one.new_zeros(()), []
    for t in range(one.shape[0]):
        h = one[t].sigmoid() * h + one[t]
        hs.append(h)
    return torch.stack(hs) * h


def state_wider_than_its_inputs(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h, hs = v[: x.shape[0]], []
    for t in range(x.shape[1]):
        h = h * x[:, t, :1] + x[:, t, 1:2]
        hs.append(h)
    return torch.stack(hs, 1)


def every_second_step(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    x = torch.cat([x, x * 0.5], 1)
    h, hs = torch.zeros_like(x[:, 0]), []
    for t in range(0, x.shape[1], 2):
        h = x[:, t].sigmoid() * h + x[:, t + 1]
        hs.append(h)
    return torch.stack(hs, 1)


def one_of_its_inputs_turned_round(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h, hs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = x[:, t].sigmoid() * h + x[:, -1 - t] * x[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def first_and_last_kept(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = v[: x.shape[0]]
    hs = [h]
    for t in range(x.shape[1]):
        h = x[:, t].sigmoid() * h + x[:, t]
        hs.append(h)
    return torch.stack([*hs, h * 2], 1)


def alternating(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    x = torch.cat([x, x * 0.5], 1)
    h, hs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = x[:, t].sigmoid() * h + x[:, t] if t % 2 else 0.5 * h - x[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def detached_every_four_steps(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    x = torch.cat([x, x * 0.5], 1)
    h, hs = torch.zeros_like(x[:, 0]), []
    for t in range(8):
        h = (h.detach() if t % 4 == 0 else h) * x[:, t].sigmoid() + x[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


MODELS: dict[Callable[..., Tensor], int] = {
    two_layers: 2,
    products_in_the_step: 1,
    window_of_two: 1,
    both_directions: 2,
    last_states_of_both_directions: 2,
    one_loop_after_another: 2,
    learned_decay: 1,
    output_gate: 1,
    gates_are_seen: 1,
    states_of_three_dimensions: 1,
    states_of_one_dimension: 1,
    numbers_as_states: 1,
    state_wider_than_its_inputs: 1,
    every_second_step: 1,
    one_of_its_inputs_turned_round: 1,
    first_and_last_kept: 1,
    alternating: 1,
    detached_every_four_steps: 2,
}


@pytest.mark.parametrize(("model", "loops"), MODELS.items(), ids=lambda each: getattr(each, "__name__", ""))
@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_a_model(model: Callable[..., Tensor], loops: int, then: str) -> None:
    arguments = drawn((3, STEPS, 4), (8, 4), (8, 4))
    fast = Rewritten(model, then=then)
    assert_like_eager(fast, model, arguments, roundings=32)
    assert fast.statuses_of("linear_recurrence") == ["rewritten"] * loops, fast.sites
    assert len(calls(fast)) == loops


def f_pooling(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    h, hs = h0, []
    for t in range(f.shape[1]):
        h = torch.where(mask[:, t, None], 0.0, h)
        h = f[:, t] * h + (1 - f[:, t]) * z[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def test_the_first_step_is_one_of_the_others() -> None:
    """What it makes of the initial state alone depends on no slice, unlike in the others."""
    arguments = drawn((3, STEPS, 4), (8, 4), (8, 4))
    fast = Rewritten(learned_decay)
    fast(*arguments)
    (node,) = fast.calls_of(OP)
    given: Any = node.args
    sequence: Any = Arguments(*given).input
    assert sequence.meta["example_value"].shape[1] == STEPS


def test_one_graph_for_all_batches() -> None:
    fast = Rewritten(f_pooling, then="aot_eager", dynamic=True)
    for batch in (3, 5):
        arguments = inputs(batch, width=4)
        for tensor in arguments:
            torch._dynamo.mark_static(tensor, 1)
        assert_like_eager(fast, f_pooling, arguments)
    assert fast.statuses == ["rewritten"]
    assert len(fast.graphs) == 1


@pytest.mark.parametrize("learns", [True, False])
def test_states_are_kept_for_a_backward_only(learns: bool) -> None:
    arguments = [each.requires_grad_(learns) if each.is_floating_point() else each for each in inputs()]
    fast = Rewritten(f_pooling)
    with torch.set_grad_enabled(learns):
        fast(*arguments)
    (node,) = fast.calls_of(OP)
    given: Any = node.args
    assert Arguments(*given).keep is learns


def test_autocast_changes_products_within_the_loop_alone() -> None:
    def step(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return products_in_the_step(x, w, v)

    arguments = drawn((3, STEPS, 4), (8, 4), (8, 4))
    fast = Rewritten(step, then="aot_eager")
    mine, theirs = fast(*arguments), step(*arguments)
    assert fast.statuses == ["rewritten"]
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=5e-2, atol=5e-2)


def test_differentiating_twice_is_refused() -> None:
    f, z, h0, mask = inputs()
    fast = Rewritten(f_pooling)
    (gradient,) = torch.autograd.grad(fast(f, z, h0, mask).square().sum(), f, create_graph=True)
    with pytest.raises(UnsupportedError, match="differentiated twice"):
        gradient.sum().backward()


# Inductor's compile workers and torch's own deprecations warn.
@pytest.mark.filterwarnings("ignore")
def test_inductor_runs_it_as_accurately_as_eager() -> None:
    torch._dynamo.reset()
    options: Any = {"rewrite": "always"}
    assert_like_eager(torch.compile(f_pooling, backend="structfly", options=options), f_pooling, inputs())


def test_a_short_loop_is_predicted_to_be_faster_as_it_is() -> None:
    fast = Rewritten(f_pooling, {"strict": True})
    assert_like_eager(fast, f_pooling, inputs())
    (site,) = fast.sites
    assert site.status == "kept"
    assert "rewrite='always' overrides this" in site.reason


def unbound(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    hs = []
    for gate, input in zip(f.unbind(1), z.unbind(1), strict=True):
        h0 = gate * h0 + input
        hs.append(h0)
    return torch.stack(hs, 1)


@pytest.mark.parametrize(
    ("function", "learns", "status"),
    [(f_pooling, True, "rewritten"), (f_pooling, False, "kept"), (unbound, True, "kept")],
)
def test_gradients_of_picked_slices_cost_the_square_of_the_steps(
    function: Callable[..., Tensor], learns: bool, status: str
) -> None:
    fast = Rewritten(function, {"strict": True})
    with torch.set_grad_enabled(learns):
        fast(*inputs(8, 128, 256))
    assert fast.statuses == [status]


def test_switched_off() -> None:
    fast = Rewritten(f_pooling, {"rewrite": "always", "rules": {"linear_recurrence": False}})
    fast(*inputs())
    assert fast.statuses == ["kept"]
