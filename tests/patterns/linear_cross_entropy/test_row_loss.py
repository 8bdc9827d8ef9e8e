"""Statistics that end in a scalar: the class the report names, the passes it takes, what stays in the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from structfly.lowering.linear_cross_entropy import flops
from structfly.patterns.head.gradients import carries_gradient
from structfly.rewriter.region import Region
from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_cross_entropy import forms
from tests.patterns.linear_cross_entropy.test_forms import BATCH, CLASSES, HIDDEN, LENGTH, inputs

_REGISTERED = flops  # imported for what it registers
PRODUCT = 2 * BATCH * LENGTH * HIDDEN * CLASSES


def run(function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Rewritten:
    fast = Rewritten(function)
    assert_like_eager(fast, function, arguments, arguments[0].dtype)
    return fast


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (forms.gathered_mean, 3),
        (forms.accuracy, 3),
        (forms.z_loss, 3),
        (forms.ppo, 3),
        (forms.grpo_with_reference, 3),
        (forms.on_policy_grpo, 3),
        (forms.dpo_of_one_pair, 3),
        (forms.entropy_per_token, 4),
        (forms.dpo_of_two_batches, 8),
    ],
)
def test_matrix_products(function: Callable[..., Tensor], products: int) -> None:
    fast, arguments = Rewritten(function), inputs()
    fast(*arguments)
    (graph,) = fast.graphs  # under a mode the function itself would run
    named = dict(zip(("l_x_", "l_w_", "l_b_", "l_ids_", "l_labels_"), arguments, strict=True))
    taken = [named[node.name] for node in graph.graph.nodes if node.op == "placeholder"]
    with FlopCounterMode(display=False) as counter:
        (value,) = graph(*taken)
        value.backward(torch.ones_like(value))
    assert counter.get_total_flops() == products * PRODUCT


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (forms.masked_mean, "loss, gradients in forward (class A)"),
        (forms.detached_entropy, "loss and entropy, gradients in forward (class A)"),
        (forms.on_policy_grpo, "loss, gradients in forward (class B)"),
        (forms.grpo_with_reference, "loss and losses, gradients in forward (class B)"),
        (forms.dpo_of_two_batches, "loss, recompute (class D: worse, an operand of sub, needs a gradient itself)"),
        (forms.normalised_by_its_own_mean, "loss, recompute (class D: truediv takes both values of single rows and"),
        (forms.a_learned_weight_of_rows, "recompute (class D: getitem, an operand of mul, needs a gradient itself)"),
        (forms.gathered, "loss, recompute (class D: values of rows that are differentiated do not end in one scalar)"),
        (forms.checkpointed, "loss, recompute (class A: inside a checkpointed region)"),
        (forms.split_logits, "loss, recompute (class D: each part has a loss of its own)"),
    ],
)
def test_the_report_names_the_outputs_the_class_and_the_reason(function: Callable[..., Tensor], what: str) -> None:
    fast, arguments = Rewritten(function), inputs()
    fast(*arguments).sum().backward()
    assert what in fast.sites[0].candidate


def test_without_gradients_nothing_but_statistics_is_made() -> None:
    fast = Rewritten(forms.ppo)
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs()), forms.ppo(*inputs()))
    (call,) = fast.arguments
    assert (call.row_loss, call.reduction, list(call.gradients)) == ("", "none", [False] * 5)
    assert fast.sites[0].candidate.endswith("loss only")


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, w, b, ids, labels = inputs()
    fast = run(forms.grpo_with_reference, (x, w.requires_grad_(False), b.requires_grad_(False), ids, labels))
    assert list(fast.arguments[0].gradients) == [True, False, False, False, False]


def test_only_what_is_used_besides_is_returned() -> None:
    def logged(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(x, w, b)
        entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
        log_p = z.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return -(log_p.exp() + 0.1 * entropy).mean(), entropy.detach().mean()

    fast, arguments = Rewritten(logged, then="aot_eager"), inputs()
    made, eager = fast(*arguments), logged(*arguments)
    torch.testing.assert_close(made, eager)
    assert not made[1].requires_grad
    made[0].backward()
    (call,) = fast.arguments
    assert call.statistics == "entropy"
    assert call.row_loss


def test_all_rows_ignored() -> None:
    x, w, b, ids, labels = inputs()
    fast = Rewritten(forms.several_losses_and_something_else)
    loss = fast(x, w, b, ids, torch.full_like(labels, -100))
    assert fast.arguments[0].row_loss
    assert loss.isnan()
    eager = forms.several_losses_and_something_else(x, w, b, ids, torch.full_like(labels, -100))
    for mine, theirs in zip(torch.autograd.grad(loss, [x, w]), torch.autograd.grad(eager, [x, w]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_wider_values_are_no_program() -> None:
    def step(*arguments: Tensor) -> Tensor:
        return forms.gathered(*arguments).double().exp().mean()

    fast = run(step, inputs())
    assert "is float64, which the program does not compute in" in fast.sites[0].candidate


def test_float16_is_recomputed() -> None:
    fast = run(forms.focal, inputs(torch.float16))
    assert "recompute (class B: float16 has not the range" in fast.sites[0].candidate


def test_a_program_in_bfloat16_is_as_accurate_as_eager() -> None:
    assert run(forms.grpo_with_reference, inputs(torch.bfloat16)).arguments[0].row_loss


def test_in_a_checkpoint_the_program_stays_in_the_graph() -> None:
    def step(*arguments: Tensor) -> Tensor:
        result: Tensor = checkpoint(forms.z_loss, *arguments, use_reentrant=False)
        return result

    fast = Rewritten(step, then="aot_eager")
    assert_like_eager(fast, step, inputs())
    (call,) = fast.arguments
    assert (call.schedule, call.row_loss, call.statistics) == ("backward", "", "lse")
    assert "class B: inside a checkpointed region" in fast.sites[0].candidate


def test_under_autocast() -> None:
    def step(*arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forms.policy_gradient_with_entropy_bonus(*arguments)

    fast, arguments = Rewritten(step, then="aot_eager"), inputs()
    made, eager = fast(*arguments), step(*arguments)
    assert made.dtype == eager.dtype
    assert fast.arguments[0].row_loss
    mine, theirs = (torch.autograd.grad(value, arguments[:3]) for value in (made, eager))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=2e-3)


def test_a_write_through_a_view_of_row_values_is_no_program() -> None:
    def step(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(F.linear(x, w, b).flatten(0, 1), ids.flatten(), reduction="none").square()
        view = losses.view(ids.shape)
        view *= 0.5
        return losses.mean()

    fast = run(step, inputs())
    assert "writes into the memory of losses" in fast.sites[0].candidate


def test_statistics_that_are_overwritten_share_no_memory() -> None:
    def step(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            z = F.linear(x, w, b)
            lse = z.logsumexp(-1)
            lse.view(-1).mul_(2.0)
            expected = (z.softmax(-1) * z).sum(-1)
        return lse, expected

    fast = Rewritten(step)
    for made, eager in zip(fast(*inputs()), step(*inputs()), strict=True):
        torch.testing.assert_close(made, eager)
    assert fast.statuses == ["rewritten"]


def test_what_may_ask_for_gradients() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    of_known = graph.call_function(torch.detach, (x,))
    x.meta["example_value"] = torch.zeros(3, requires_grad=True)
    of_known.meta["example_value"] = torch.zeros(3)
    assert not carries_gradient(x, Region(fx.GraphModule({}, graph)))
    of_unknown = graph.call_function(torch.trapezoid, (x,))
    of_unknown.meta["example_value"] = torch.zeros(())
    assert carries_gradient(of_unknown.args[0], Region(fx.GraphModule({}, graph)))  # type: ignore[arg-type]


def test_gradients_that_the_graph_itself_takes() -> None:
    def step(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forms.z_loss(x, w, b, ids, labels), [x, w, b])

    fast = Rewritten(step, then="aot_eager")
    for made, eager in zip(fast(*inputs()), step(*inputs()), strict=True):
        torch.testing.assert_close(made, eager)
