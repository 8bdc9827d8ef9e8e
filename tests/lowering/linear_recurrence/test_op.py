"""The op against its reference in float64, and its contracts with torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.library import opcheck

from structfly.errors import ArgumentError, UnsupportedError
from structfly.lowering.linear_recurrence import blocks
from structfly.lowering.linear_recurrence.arguments import DIFFERENTIABLE, STEPS_KEPT, Arguments
from structfly.lowering.linear_recurrence.op import linear_recurrence
from tests.lowering.linear_recurrence.cases import (
    calls,
    leaves_of,
    make_call,
    run,
    run_reference,
    upstream_for,
    with_leaves,
)
from tests.oracle import assert_like_eager, errors, in_float64, value_and_gradients

OP = torch.ops.structfly.linear_recurrence_v1
BACKWARD = torch.ops.structfly.linear_recurrence_backward_v1

FULL: dict[str, Any] = {"weight": "gate", "output_gate": True, "sigmoid": True, "tanh": True}
POOLINGS: list[dict[str, Any]] = [
    {},
    {"weight": "complement"},
    {"weight": "complement", "sigmoid": True, "tanh": True},
    {"weight": "complement", "output_gate": True, "sigmoid": True, "tanh": True},
    FULL,
]


def check(call: Arguments, roundings: int = 8) -> None:
    fast, reference = partial(run, call), partial(run_reference, call)
    assert_like_eager(fast, reference, leaves_of(call), call.input.dtype, upstream_for(call), roundings)


@settings(max_examples=150)
@given(call=calls())
def test_as_accurate_as_the_loop(call: Arguments) -> None:
    check(call)


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_without_steps_the_state_stays(lengths: tuple[int, ...]) -> None:
    call = make_call(2, 0, 3, lengths=lengths)
    output, final, kept = linear_recurrence(*call)
    assert output.shape == (1 if lengths else 2, 0, 3)
    assert len(kept) == 0
    assert call.initial is not None
    assert torch.equal(final, call.initial)
    upstream = torch.randn(2, 3)
    gate, initial = torch.autograd.grad(final, [call.gate, call.initial], upstream)
    assert gate.shape == call.gate.shape
    assert torch.equal(initial, upstream)


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, parts and chunks where there is little data."""
    monkeypatch.setattr(blocks, "STEPS", 16)
    monkeypatch.setattr(blocks, "_SHORT", 3)
    monkeypatch.setattr(blocks, "_ELEMENTS", 40)
    monkeypatch.setitem(STEPS_KEPT, "aten", 16)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(), (40,), (3, 0, 50, 1, 1, 23, 0), (16, 32, 16)])
@pytest.mark.parametrize("reset", [0.0, 0.1])
@pytest.mark.parametrize("options", POOLINGS)
def test_many_blocks(options: dict[str, Any], reset: float, lengths: tuple[int, ...], reverse: bool) -> None:
    for length in (16, 47, 100):
        check(make_call(3, length, 5, lengths=lengths, reset=reset, reverse=reverse, dtype=torch.float64, **options))


@pytest.mark.parametrize("gates", ["any", "slow", "ends"])
@pytest.mark.parametrize("options", POOLINGS)
def test_no_less_accurate_than_the_loop_at_size(gates: str, options: dict[str, Any]) -> None:
    call = make_call(1, 3000, 64, gates=gates, **options)
    leaves, upstream = leaves_of(call), upstream_for(call)
    mine = value_and_gradients(partial(run, call), leaves, upstream)
    loop = value_and_gradients(partial(run_reference, call), leaves, upstream)
    exact = value_and_gradients(partial(run_reference, call), list(map(in_float64, leaves)), upstream.double())
    for found, theirs, true in zip(*((value, *gradients) for value, gradients in (mine, loop, exact)), strict=True):
        assert found is not None
        assert theirs is not None
        assert true is not None
        allowed = 1.1 * errors(theirs, true)[0] + torch.finfo(torch.float32).eps
        assert errors(found, true)[0] <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["BTD", "BDT", "part"])
@pytest.mark.parametrize("options", POOLINGS)
def test_as_accurate_as_the_loop_on_cuda(dtype: torch.dtype, layout: str, options: dict[str, Any]) -> None:
    for lengths in ((), (700, 0, 1, 64, 65, 3)):
        for reverse in (False, True):
            case = {"lengths": lengths, "reverse": reverse, "reset": 0.01, **options}
            check(make_call(2, 1300, 70, dtype=dtype, layout=layout, device="cuda", **case))


@pytest.mark.gpu
def test_gradients_of_gates_next_to_1_on_cuda() -> None:
    for gates in ("slow", "ends"):
        check(make_call(1, 5000, 33, gates=gates, device="cuda"))


def test_gates_next_to_1_keep_their_complement() -> None:
    """1 - f of f = sigmoid(20) is 2e-9, which 1 - (rounded f) is not."""
    y, z = torch.full((1, 1, 1), 20.0), torch.ones(1, 1, 1)
    made = linear_recurrence(y, z, None, None, None, None, None, True, True, False, False, False).output
    torch.testing.assert_close(made.double(), torch.sigmoid(torch.full((1, 1, 1), -20.0, dtype=torch.float64)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(), (5, 0, 9)])
@pytest.mark.parametrize("options", POOLINGS)
def test_gradients_are_those_of_differences(options: dict[str, Any], lengths: tuple[int, ...], reverse: bool) -> None:
    call = make_call(2, 11, 2, dtype=torch.float64, reset=0.2, lengths=lengths, reverse=reverse, **options)
    leaves = [leaf for leaf in leaves_of(call) if leaf is not None]
    names = [name for name, leaf in zip(DIFFERENTIABLE, leaves_of(call), strict=True) if leaf is not None]

    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        changes: dict[str, Any] = dict(zip(names, given, strict=True))
        return linear_recurrence(*call._replace(**changes))[:2]

    assert torch.autograd.gradcheck(function, leaves)


def test_the_last_state_begins_the_next_call() -> None:
    whole = make_call(2, 40, 3, weight="complement", output_gate=True)
    output, final, _ = linear_recurrence(*whole)
    first, rest = (
        whole._replace(**{name: getattr(whole, name)[:, part] for name in ("gate", "input", "output_gate")})
        for part in (slice(0, 13), slice(13, 40))
    )
    begun = linear_recurrence(*first)
    ended = linear_recurrence(*rest._replace(initial=begun.final))
    torch.testing.assert_close(torch.cat([begun.output, ended.output], 1), output)
    torch.testing.assert_close(ended.final, final)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["input", "gate"])
@pytest.mark.usefixtures("short_blocks")
def test_nothing_passes_a_reset(of: str, poison: float, packed: bool, reverse: bool) -> None:
    """Not even what is not finite, neither into the states after it nor into the gradients before it."""
    call = make_call(1, 60, 2, reverse=reverse, initial=False, lengths=(31, 29) if packed else ())
    if not packed:
        reset = torch.zeros(1, 60, dtype=torch.bool)
        reset[0, 30 if reverse else 31] = True
        call = call._replace(reset=reset)
    earlier, later = (slice(31, 60), slice(0, 31)) if reverse else (slice(0, 31), slice(31, 60))
    poisoned = getattr(call, of).detach().clone()
    poisoned[:, earlier] = poison
    output = linear_recurrence(*call._replace(**{of: poisoned})).output
    assert output[:, later].isfinite().all()
    assert not output[:, earlier].isfinite().any()
    upstream = torch.zeros_like(output)
    upstream[:, later] = poison
    for gradient in torch.autograd.grad(linear_recurrence(*call).output, [call.gate, call.input], upstream):
        assert gradient[:, earlier].eq(0).all()


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("length", [3, 30])
def test_a_state_that_is_not_finite_does_not_pass_a_reset(length: int) -> None:
    reset = torch.zeros(1, length, dtype=torch.bool)
    reset[0, 1] = True
    call = make_call(1, length, 2)._replace(reset=reset)
    with torch.no_grad():
        assert call.initial is not None
        call.initial.fill_(float("nan"))
    made = linear_recurrence(*call)
    assert made.output[:, 0].isnan().all()
    assert made.output[:, 1:].isfinite().all()
    assert made.final.isfinite().all()


@pytest.mark.parametrize("layout", ["BTD", "BDT", "TBD"])
def test_outputs_and_gradients_lie_as_the_inputs_do(layout: str) -> None:
    call = make_call(layout=layout)
    output = linear_recurrence(*call).output
    assert output.stride() == call.input.stride()
    for gradient in torch.autograd.grad(output.sum(), [call.gate, call.input]):
        assert gradient.stride() == call.input.stride()


def test_one_gate_may_serve_all_steps() -> None:
    call = make_call(2, 37, 3)
    decay = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def smoothed(decay: Tensor, input: Tensor, op: Any) -> Tensor:
        call_of = call._replace(gate=decay.expand(2, 37, 3), input=input, initial=None)
        value: Tensor = op(call_of, *leaves_of(call_of))
        return value

    arguments = [decay, call.input.detach().double().requires_grad_()]
    assert_like_eager(
        partial(smoothed, op=run), partial(smoothed, op=run_reference), arguments, torch.float64, upstream_for(call)
    )


@settings(max_examples=25)
@given(call=calls())
def test_same_bits_every_time(call: Arguments) -> None:
    first, second = (value_and_gradients(partial(run, call), leaves_of(call)) for _ in range(2))
    for one, other in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        assert torch.equal(one, other) if one is not None and other is not None else one is other


def test_what_was_not_kept_is_made_again() -> None:
    kept, again = (make_call(2, 100, 3, keep=keep, **FULL) for keep in (True, False))
    assert linear_recurrence(*again).kept.numel() == 0
    for one, other in zip(
        *(value_and_gradients(partial(run, call), leaves_of(call))[1] for call in (kept, again)), strict=True
    ):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_little_is_kept() -> None:
    call = make_call(1, 2**13, 4)
    assert linear_recurrence(*call).kept.numel() <= call.input.numel() // 32


@pytest.mark.parametrize(
    "options", [*POOLINGS, {"lengths": (5, 0, 7)}, {"reset": 0.1}, {"frozen": frozenset({"gate"})}]
)
def test_opcheck(options: dict[str, Any]) -> None:
    assert set(opcheck(OP.default, tuple(make_call(**options))).values()) == {"SUCCESS"}


@pytest.mark.parametrize("absent", [0, 1])
def test_opcheck_of_the_backward_op(absent: int) -> None:
    call = make_call(frozen=frozenset(DIFFERENTIABLE), **FULL)
    output, final, kept = linear_recurrence(*call)
    upstream: list[Tensor | None] = [torch.ones_like(output), torch.ones_like(final)]
    upstream[absent] = None
    arguments = (*upstream, kept, *call, [True, False, True, True, True])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(opcheck(BACKWARD.default, arguments, test_utils=tests).values()) == {"SUCCESS"}


def test_only_wanted_gradients_are_made() -> None:
    call = make_call(frozen=frozenset(DIFFERENTIABLE))
    output, final, kept = linear_recurrence(*call)
    made = BACKWARD.default(output, final, kept, *call, [False, True, False, False, False])
    assert [gradient.numel() for gradient in made] == [0, call.input.numel(), 0, 0, 0]


@pytest.mark.parametrize("of", ["output", "final"])
def test_either_result_alone_can_be_differentiated(of: str) -> None:
    call = make_call(2, 50, 3, dtype=torch.float64, **FULL)

    def alone(run_it: Any, *leaves: Any) -> Tensor:
        values: Tensor = run_it(call, *leaves)
        return values[:, :100] if of == "output" else values[:, 100:]

    leaves, exact = leaves_of(call), [in_float64(leaf) for leaf in leaves_of(call)]
    mine = value_and_gradients(partial(alone, run), leaves)[1]
    true = value_and_gradients(partial(alone, run_reference), exact)[1]
    for one, other in zip(mine, true, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)
        else:
            assert one is None or not one.any()
            assert other is None or not other.any()


def test_backward_can_run_twice() -> None:
    call = make_call()
    value = run(call, *leaves_of(call))
    first, second = (torch.autograd.grad(value.sum(), [call.gate, call.input], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_differentiating_twice_is_refused() -> None:
    call = make_call()
    (gradient,) = torch.autograd.grad(linear_recurrence(*call).output.sum(), call.gate, create_graph=True)
    with pytest.raises(UnsupportedError, match="linear_recurrence was differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("offsets", [[0, 5], [1, 37], [0, 20, 10, 37]])
def test_offsets_that_are_none_are_refused(offsets: list[int]) -> None:
    call = make_call(1, initial=False)._replace(offsets=torch.tensor(offsets))
    with pytest.raises(ArgumentError, match=r"offsets are .* must go from 0 up to the length, 37, and never down"):
        linear_recurrence(*call)


def test_vmap_runs_entry_after_entry() -> None:
    call = make_call(3, 20, 2, initial=False, frozen=frozenset({"gate", "input"}))
    gate, input = (each.unsqueeze(1) for each in (call.gate, call.input))

    def one(gate: Tensor, input: Tensor) -> Tensor:
        return linear_recurrence(*call._replace(gate=gate, input=input)).output

    torch.testing.assert_close(torch.vmap(one)(gate, input).squeeze(1), linear_recurrence(*call).output)


def test_under_autocast_nothing_is_cast() -> None:
    call = make_call(dtype=torch.bfloat16, gate_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_recurrence(*call)
    outside = linear_recurrence(*call)
    assert torch.equal(inside.output, outside.output)
    assert inside.final.dtype == torch.float32
    gradients = torch.autograd.grad(inside.output.float().sum(), [call.gate, call.input])
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.bfloat16]


def test_leaves_are_put_back_where_they_were() -> None:
    call = make_call(**FULL)
    assert with_leaves(call, leaves_of(call)) == call
