"""Recurrences as products with the matrix of all their gates' products."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.compiling import ALWAYS, Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_recurrence.programs import any_inputs, inputs, rewritten

OP = torch.ops.structfly.linear_recurrence_v1.default
ON = {**ALWAYS, "rules": {"cumulative_recurrence": True}}
INF = float("inf")
Program = Callable[[Tensor, Tensor], Tensor]


def lower(length: int, diagonal: int = 0) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril(diagonal)


def segment_sums(logs: Tensor) -> Tensor:
    """As Dao and Gu (2024, listing 1) have them."""
    length = logs.shape[-1]
    below = logs.unsqueeze(-1).repeat(*[1] * logs.ndim, length).masked_fill(~lower(length, -1), 0)
    return below.cumsum(-2).masked_fill(~lower(length), -INF)


def of_heads(f: Tensor, z: Tensor) -> Tensor:
    return torch.exp(segment_sums(f[..., 0].log())) @ z


def of_heads_in_one_batch(f: Tensor, z: Tensor) -> Tensor:
    return segment_sums(f[0, :, 0].log()).exp() @ z[0]


def one_sequence_of_gates_for_all(f: Tensor, z: Tensor) -> Tensor:
    return torch.bmm(segment_sums(f[:1, :, 0].log()).exp().expand(len(z), -1, -1), z)


def of_logits(f: Tensor, z: Tensor) -> Tensor:
    return torch.matmul(torch.tril(segment_sums(F.logsigmoid(f[..., 0])).exp()), z)


def of_channels(f: Tensor, z: Tensor) -> Tensor:
    below, to_row = lower(f.shape[1], -1)[..., None], lower(f.shape[1])[..., None]
    sums = torch.where(below, f.log().unsqueeze(2), 0.0).cumsum(1)
    return torch.einsum("btsd,bsd->btd", torch.where(to_row, sums, -INF).exp(), z)


def of_channels_summed(f: Tensor, z: Tensor) -> Tensor:
    below = torch.where(~lower(f.shape[1], -1)[:, :, None], 0.0, f.log()[:, :, None])
    weights = torch.where(lower(f.shape[1])[:, :, None], below.cumsum(1).exp(), torch.zeros(()))
    return (weights * z[:, None]).sum(2)


def of_heads_summed(f: Tensor, z: Tensor) -> Tensor:
    return (z[:, None] * segment_sums(f[..., 0].log()).exp()[..., None]).sum(-2)


def of_heads_between(f: Tensor, z: Tensor) -> Tensor:
    weights = segment_sums(f.log().mT.unflatten(1, (1, -1))).exp()  # (B, 1, D, T, T)
    values = z.unflatten(2, (-1, 1)).unsqueeze(3)  # (B, T, D, 1, 1)
    return torch.einsum("bghts,bshgp->bgthp", weights, values)


def across_time(f: Tensor, z: Tensor) -> Tensor:
    below = f[..., 0].log()[:, None].expand(-1, f.shape[1], -1).masked_fill(~lower(f.shape[1], -1).mT, 0)
    sums = below.cumsum(-1).masked_fill(~lower(f.shape[1]).mT, -INF)  # (B, s, t)
    return torch.einsum("bst,bsd->btd", sums.exp(), z)


EXACT: Mapping[str, Program] = {
    "heads": of_heads,
    "heads, no batch": of_heads_in_one_batch,
    "heads, one batch": one_sequence_of_gates_for_all,
    "logits": of_logits,
    "channels": of_channels,
    "channels, summed": of_channels_summed,
    "heads, summed": of_heads_summed,
    "heads between": of_heads_between,
    "across": across_time,
}


def differences(f: Tensor) -> Tensor:
    sums = f[..., 0].log().cumsum(1)
    return sums[:, :, None] - sums[:, None, :]


def masked_differences(f: Tensor, z: Tensor) -> Tensor:
    return differences(f).masked_fill(~lower(f.shape[1]), -INF).exp() @ z


def added_mask(f: Tensor, z: Tensor) -> Tensor:
    return (differences(f) + torch.full((f.shape[1],) * 2, -INF).triu(1)).exp() @ z


def triangle(f: Tensor, z: Tensor) -> Tensor:
    return differences(f).exp().tril() @ z


def times_a_mask(f: Tensor, z: Tensor) -> Tensor:
    return (lower(f.shape[1]) * differences(f).exp()) @ z


def by_order(f: Tensor, z: Tensor) -> Tensor:
    steps = torch.arange(f.shape[1])
    return torch.where(steps[:, None] >= steps, differences(f).exp(), 0.0) @ z


def of_channels_by_differences(f: Tensor, z: Tensor) -> Tensor:
    sums = torch.cumsum(f.log(), 1)
    weights = (sums.unsqueeze(2) - sums.unsqueeze(1)).exp().masked_fill(~lower(f.shape[1])[..., None], 0)
    return torch.einsum("b t s d, b s d -> b t d", weights, z)


def quotients(f: Tensor, z: Tensor) -> Tensor:
    products = f[..., 0].cumprod(-1)
    return torch.tril(products[..., None] / products[..., None, :]) @ z


DIFFERENCES: Mapping[str, Program] = {
    "masked": masked_differences,
    "added": added_mask,
    "tril": triangle,
    "product": times_a_mask,
    "by order": by_order,
    "channels": of_channels_by_differences,
    "quotients": quotients,
}


@settings(deadline=None, max_examples=40)
@given(program=st.sampled_from([*EXACT.values(), *DIFFERENCES.values()]), drawn=any_inputs())
def test_products_with_the_matrix_are_rewritten(program: Program, drawn: list[Tensor]) -> None:
    fast = rewritten(program, drawn[:2], ON)
    assert len(fast.calls_of(OP)) == 1
    (graph,) = fast.graphs
    graph.graph.eliminate_dead_code()
    assert not {"cumsum", torch.cumsum, torch.matmul, torch.bmm, torch.einsum} & {
        node.target for node in graph.graph.nodes
    }


@pytest.mark.parametrize("kind", EXACT)
def test_segment_sums_need_no_switch(kind: str) -> None:
    rewritten(EXACT[kind], inputs()[:2], ALWAYS)


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_differences_and_quotients_do(kind: str) -> None:
    fast = Rewritten(DIFFERENCES[kind], ALWAYS)
    assert_like_eager(fast, DIFFERENCES[kind], inputs()[:2])
    assert [(site.status, site.rule) for site in fast.sites] == [("kept", "cumulative_recurrence")]


@pytest.mark.parametrize("kind", EXACT)
def test_they_are_the_same_where_gates_are_0(kind: str) -> None:
    f, z = inputs(steps=9)[:2]
    with torch.no_grad():
        f[:, 3] = -INF if kind == "logits" else 0.0
        torch.testing.assert_close(Rewritten(EXACT[kind], ALWAYS)(f, z), EXACT[kind](f, z))


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_differences_have_no_states_where_gates_are_0(kind: str) -> None:
    f, z = inputs(steps=9)[:2]
    with torch.no_grad():
        f[:, 3] = 0.0
        made, eager = Rewritten(DIFFERENCES[kind], ON)(f, z), DIFFERENCES[kind](f, z)
        expected = EXACT["channels" if kind == "channels" else "heads"](f, z)
    assert not eager[:, 4:].isfinite().all()
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize(("steps", "status"), [(4, "kept"), (1024, "rewritten")])
def test_the_matrix_is_kept_where_it_is_small(steps: int, status: str) -> None:
    fast = Rewritten(of_channels, {})
    f, z = (each.detach() for each in inputs(steps=steps)[:2])
    torch.testing.assert_close(fast(f, z), of_channels(f, z), rtol=1e-4, atol=1e-5)
    assert fast.statuses == [status]


def test_gates_of_logits_stay_logits() -> None:
    fast = Rewritten(of_logits, ALWAYS)
    assert_like_eager(fast, of_logits, inputs()[:2])
    (node,) = fast.calls_of(OP)
    assert node.args[8] is True


def test_an_output_gate_is_taken() -> None:
    def program(f: Tensor, z: Tensor, o: Tensor) -> Tensor:
        return of_heads(f, z) * o

    f, z, *_ = inputs()
    fast = Rewritten(program, ALWAYS)
    assert_like_eager(fast, program, [f, z, torch.randn_like(z)])
    (graph,) = fast.graphs
    assert not any(node.target in ("mul", torch.mul) for node in graph.graph.nodes)


def with_diagonal(f: Tensor, z: Tensor) -> Tensor:
    sums = f[..., 0].log().unsqueeze(-1).expand(-1, -1, f.shape[1]).masked_fill(~lower(f.shape[1]), 0).cumsum(1)
    return sums.masked_fill(~lower(f.shape[1]), -INF).exp() @ z


def before_the_step(f: Tensor, z: Tensor) -> Tensor:
    return segment_sums(f[..., 0].log()).exp().tril(-1) @ z


def with_later_steps(f: Tensor, z: Tensor) -> Tensor:
    below = f[..., 0].log()[..., None].expand(-1, -1, f.shape[1]).masked_fill(~lower(f.shape[1], -1), 0)
    return below.cumsum(-2).masked_fill(~lower(f.shape[1], 1), -INF).exp() @ z


def by_given_masks(f: Tensor, z: Tensor) -> Tensor:
    return segment_sums(f[..., 0].log()).exp().masked_fill(z[:, :1, :1] > 0, 0.0) @ z


def weighted_masks(f: Tensor, z: Tensor) -> Tensor:
    return (segment_sums(f[..., 0].log()).exp() * torch.full((f.shape[1],) * 2, 2.0)) @ z


def by_channel(f: Tensor, z: Tensor) -> Tensor:
    keep = lower(f.shape[1])[..., None] & (torch.arange(f.shape[2]) > 0)
    return torch.einsum("btsd,bsd->btd", torch.where(keep, of_channels_weights(f), 0.0), z)


def of_channels_weights(f: Tensor) -> Tensor:
    below, to_row = lower(f.shape[1], -1)[..., None], lower(f.shape[1])[..., None]
    return torch.where(to_row, torch.where(below, f.log().unsqueeze(2), 0.0).cumsum(1), -INF).exp()


def summed_over_rows(f: Tensor, z: Tensor) -> Tensor:
    return torch.einsum("bts,btd->bsd", segment_sums(f[..., 0].log()).exp(), z)


def summed_over_channels(f: Tensor, z: Tensor) -> Tensor:
    return torch.einsum("btsd,bsd->bt", of_channels_weights(f), z)


def made_in_place(f: Tensor, z: Tensor) -> Tensor:
    below = f[..., 0].log()[..., None].expand(-1, -1, f.shape[1]).masked_fill(~lower(f.shape[1], -1), 0)
    return below.cumsum(-2).masked_fill_(~lower(f.shape[1]), -INF).exp() @ z


def in_a_triangle_of_channels(f: Tensor, z: Tensor) -> Tensor:
    return torch.einsum("btsd,bsd->btd", of_channels_weights(f).tril(), z)


def of_earlier_minus_later(f: Tensor, z: Tensor) -> Tensor:
    sums = f[..., 0].log().cumsum(1)
    return (sums[:, None, :] - sums[:, :, None]).exp().tril() @ z


def with_a_large_number(f: Tensor, z: Tensor) -> Tensor:
    return (differences(f) + torch.full((f.shape[1],) * 2, -1e9).triu(1)).exp() @ z


def of_inputs_for_each_row(f: Tensor, z: Tensor) -> Tensor:
    return torch.einsum("bts,bst->bt", segment_sums(f[..., 0].log()).exp(), z @ z.mT)


def of_fewer_inputs(f: Tensor, z: Tensor) -> Tensor:
    count = f.shape[1] - 2
    below = f[..., 0].log()[..., None].expand(-1, -1, count).tril(-1)
    return below.cumsum(1).exp().tril() @ z[:, :count]


MISSES: Mapping[Program, str] = {
    of_fewer_inputs: "the input has fewer dimensions or steps than the states",
    in_a_triangle_of_channels: "the triangle is of other dimensions than the steps",
    of_earlier_minus_later: "is not multiplied by inputs and summed over their steps",
    with_a_large_number: "has other values than 0 and -inf",
    of_inputs_for_each_row: "is not multiplied by inputs and summed over their steps",
    with_diagonal: "keeps something else than each step with those before it",
    before_the_step: "the triangle ends at diagonal -1, not at 0",
    with_later_steps: "keeps something else than each step with those before it",
    by_given_masks: "is no constant",
    weighted_masks: "has other values than 0 and 1",
    by_channel: "of steps alone",
    summed_over_rows: "is not multiplied by inputs and summed over their steps",
    summed_over_channels: "is not multiplied by inputs and summed over their steps",
    made_in_place: "writes into what it is made of; use what returns a new tensor",
}


@pytest.mark.parametrize("program", MISSES)
def test_near_misses_have_a_reason(program: Program) -> None:
    fast = Rewritten(program, ON)
    assert_like_eager(fast, program, inputs()[:2])
    assert not fast.calls_of(OP)
    assert [(site.status, MISSES[program] in site.reason) for site in fast.sites] == [("missed", True)], fast.sites


def of_other_sums(f: Tensor, z: Tensor) -> Tensor:
    one, other = f[..., 0].log().cumsum(1), f[..., 1].log().cumsum(1)
    return (one[:, :, None] - other[:, None, :]).exp().tril() @ z


def the_wrong_way_round(f: Tensor, z: Tensor) -> Tensor:
    return differences(f).mT.neg().mul(-1).exp().tril() @ z


def without_masks(f: Tensor, z: Tensor) -> Tensor:
    return differences(f).exp() @ z


def attention(f: Tensor, z: Tensor) -> Tensor:
    return (segment_sums(f[..., 0].log()).exp() * (z @ z.mT)) @ z


def between_other_dimensions(f: Tensor, z: Tensor) -> Tensor:
    sums = f[:, :3].log().cumsum(1)  # of three channels
    weights = (sums[..., None] - sums[:, None]).exp().masked_fill(~lower(3)[:, None], 0)
    return torch.einsum("bids,bsd->bid", weights, z[:, :3])


def with_products_by_masks(f: Tensor, z: Tensor) -> Tensor:
    below = f[..., 0].log()[..., None] * lower(f.shape[1], -1)
    return below.cumsum(-2).masked_fill(~lower(f.shape[1]), -INF).exp() @ z


def along_the_columns(f: Tensor, z: Tensor) -> Tensor:
    below = f[..., 0].log()[..., None].expand(-1, -1, f.shape[1]).masked_fill(~lower(f.shape[1], -1), 0)
    return below.cumsum(-1).masked_fill(~lower(f.shape[1]), -INF).exp() @ z


def with_two_new_dimensions(f: Tensor, z: Tensor) -> Tensor:
    sums = f[0, :, 0].log().cumsum(0)
    return (sums[None, :, None] - sums[None, None, :]).exp().tril() @ z


def of_repeated_steps(f: Tensor, z: Tensor) -> Tensor:
    below = f[:, :4, 0].log()[..., None].repeat(1, 2, 8).masked_fill(~lower(8, -1), 0)
    return below.cumsum(-2).masked_fill(~lower(8), -INF).exp() @ z[:, :8]


def with_masks_of_more_dimensions(f: Tensor, z: Tensor) -> Tensor:
    sums = f[0, :, 0].log().cumsum(0)
    return torch.where(lower(len(sums))[None], (sums[:, None] - sums).exp(), 0.0) @ z


def rounded(f: Tensor, z: Tensor) -> Tensor:
    products = f[..., 0].cumprod(-1)
    return torch.tril(torch.div(products[..., None], products[..., None, :], rounding_mode="floor")) @ z


@pytest.mark.parametrize(
    "program",
    [
        between_other_dimensions,
        with_products_by_masks,
        along_the_columns,
        with_two_new_dimensions,
        of_repeated_steps,
        with_masks_of_more_dimensions,
        rounded,
        of_other_sums,
        the_wrong_way_round,
        without_masks,
        attention,
    ],
)
def test_what_is_no_such_matrix_is_left_alone(program: Program) -> None:
    fast = Rewritten(program, ON)
    assert_like_eager(fast, program, inputs()[:2])
    assert not fast.sites


def test_of_a_number_of_steps_that_is_not_known_it_is_a_miss() -> None:
    fast = Rewritten(of_heads, ALWAYS, then="aot_eager", dynamic=True)
    f, z = (each.detach() for each in inputs(steps=7)[:2])
    torch.testing.assert_close(fast(f, z), of_heads(f, z))
    assert "taken is a number of them that the graph is compiled for" in fast.sites[0].reason


def test_masks_that_a_module_holds_may_change() -> None:
    class Layer(torch.nn.Module):
        keep: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keep", lower(7))

        def forward(self, f: Tensor, z: Tensor) -> Tensor:
            weights: Tensor = differences(f).masked_fill(~self.keep, -INF).exp()
            return weights @ z

    layer = Layer()
    fast = Rewritten(layer, ON)
    f, z = inputs(steps=7)[:2]
    torch.testing.assert_close(fast(f, z), layer(f, z))
    (site,) = fast.sites
    assert "is made of a module's state, which may change; make it where it is used" in site.reason
    layer.keep.fill_(True)
    torch.testing.assert_close(fast(f, z), layer(f, z))
