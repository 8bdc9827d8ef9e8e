"""structfly.ops.linear_recurrence against the loop, in every way it can be called."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from structfly.errors import ArgumentError, UnsupportedError
from structfly.lowering.linear_recurrence.reference import linear_recurrence_reference
from structfly.ops import linear_recurrence
from tests.oracle import assert_like_eager

POOLINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "f": {"complement": True},
    "fo": {"complement": True, "gate_activation": "sigmoid", "input_activation": "tanh"},
    "ifo": {"gate_activation": "sigmoid", "input_activation": "tanh"},
}


def arguments(pooling: str, dtype: torch.dtype = torch.float32, *, batch: int = 2, length: int = 50) -> list[Any]:
    """Gate, input, input gate, output gate and initial state."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(dtype).requires_grad_()

    shape = batch, length, 4
    input_gate = leaf(*shape) if pooling == "ifo" else None
    return [leaf(*shape), leaf(*shape), input_gate, leaf(*shape) if pooling in ("fo", "ifo") else None, leaf(batch, 4)]


def both(made: tuple[Tensor, Tensor]) -> Tensor:
    output, state = made
    return torch.cat([output.to(state.dtype), state.unsqueeze(1)], 1).flatten(0, 1)


def fused(pooling: str, f: Tensor, z: Tensor, i: Tensor | None, o: Tensor | None, c: Tensor, **options: Any) -> Tensor:
    options = {**POOLINGS[pooling], **options}
    return both(linear_recurrence(f, z, input_gate=i, output_gate=o, initial_state=c, **options))


def loop(pooling: str, f: Tensor, z: Tensor, i: Tensor | None, o: Tensor | None, c: Tensor, **options: Any) -> Tensor:
    chosen = POOLINGS[pooling]
    options["complement"] = chosen.get("complement", False)
    options |= {"sigmoid": "gate_activation" in chosen, "tanh": "input_activation" in chosen}
    return both(linear_recurrence_reference(f, z, i, o, c, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_as_accurate_as_the_loop(pooling: str, reverse: bool, dtype: torch.dtype) -> None:
    fast, slow = partial(fused, pooling, reverse=reverse), partial(loop, pooling, reverse=reverse)
    assert_like_eager(fast, slow, arguments(pooling, dtype), dtype, torch.linspace(-1, 1, 408).view(102, 4))


def test_packed_sequences_are_those_alone() -> None:
    gate, input, *_ = arguments("f", batch=1)
    lengths = [7, 0, 30, 13]
    begun = torch.randn(4, 4)
    offsets = torch.tensor([0, 7, 7, 37, 50], dtype=torch.int32)
    output, final = linear_recurrence(gate, input, complement=True, initial_state=begun, offsets=offsets)
    pairs = zip(gate.split(lengths, 1), input.split(lengths, 1), begun.split(1), strict=True)
    alone = [linear_recurrence(f, z, complement=True, initial_state=c) for f, z, c in pairs]
    torch.testing.assert_close(output, torch.cat([each for each, _ in alone], 1))
    torch.testing.assert_close(final, torch.cat([each for _, each in alone]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "structfly"])
def test_in_what_any_backend_compiles(backend: str) -> None:
    torch._dynamo.reset()

    def step(function: Any, f: Tensor, z: Tensor, *rest: Any) -> Tensor:
        value: Tensor = function("fo", torch.sin(f), z, *rest) * 2.0
        return value

    fast = torch.compile(partial(step, fused), backend=backend, fullgraph=True, dynamic=True)
    for length in (50, 21):
        assert_like_eager(fast, partial(step, loop), arguments("fo", length=length))
    torch._dynamo.reset()


def test_in_a_checkpoint() -> None:
    given = arguments("ifo")
    value = checkpoint(partial(fused, "ifo"), *given, use_reentrant=False)
    made = torch.autograd.grad(value.sum(), given)
    for gradient, plain in zip(made, torch.autograd.grad(fused("ifo", *given).sum(), given), strict=True):
        assert torch.equal(gradient, plain)


def test_vmap_runs_entry_after_entry() -> None:
    gate, input, *_ = arguments("f", batch=6)
    together = torch.vmap(lambda f, z: linear_recurrence(f, z)[0])(
        gate.unflatten(0, (3, 2)), input.unflatten(0, (3, 2))
    )
    apart = linear_recurrence(gate, input)[0]
    assert torch.equal(together.flatten(0, 1), apart)
    for one, other in zip(*(torch.autograd.grad(v.sum(), [gate, input]) for v in (together, apart)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("pooling", "forward", "backward"), [("none", 2, 5), ("f", 3, 7), ("ifo", 4, 10)])
def test_operations_are_counted(pooling: str, forward: int, backward: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    given = arguments(pooling)
    fused(pooling, *given)  # whose formulas a counter made from here on has
    with FlopCounterMode(display=False) as counter:
        value = fused(pooling, *given)
        made = counter.get_total_flops()
        value.sum().backward()
    assert (made, counter.get_total_flops() - made) == (forward * 400, backward * 400)


def test_no_state_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    from structfly.ops import recurrence

    def fake(*call: Any) -> tuple[Any, ...]:
        kept.append(call[-1])
        return call[1], call[1][:, 0], call[1]

    monkeypatch.setattr(recurrence, "fused", fake)
    given = arguments("f")
    linear_recurrence(*given[:2])
    with torch.no_grad():
        linear_recurrence(*given[:2])
    linear_recurrence(*(each.detach() for each in given[:2]))
    assert kept == [True, False, False]


def test_differentiating_twice_is_refused() -> None:
    gate, input, *_ = arguments("f")
    (gradient,) = torch.autograd.grad(linear_recurrence(gate, input)[0].sum(), gate, create_graph=True)
    with pytest.raises(UnsupportedError, match="differentiated twice"):
        gradient.sum().backward()


def test_under_functional_gradients_it_is_refused() -> None:
    gate, input = (each.detach() for each in arguments("f")[:2])
    with pytest.raises(UnsupportedError, match=r"structfly.ops.linear_recurrence is called under torch.func.grad"):
        torch.func.grad(lambda f: linear_recurrence(f, input)[0].sum())(gate)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.ones(2, 50)}, r"input has shape \(2, 50\); allowed: \(batch, steps, channels\)"),
        ({"gate": torch.ones(2, 50, 3)}, r"gate has shape \(2, 50, 3\); allowed: \(2, 50, 4\), as input has"),
        ({"output_gate": torch.ones(2, 49, 4)}, "output_gate has shape"),
        ({"initial_state": torch.ones(1, 4)}, r"initial_state has shape \(1, 4\); allowed: \(2, 4\), a state for each"),
        ({"reset": torch.ones(2, 50)}, "reset is torch.float32; allowed: torch.bool; use reset != 0"),
        ({"reset": torch.ones(2, 5, dtype=torch.bool)}, "reset has shape"),
        ({"gate": torch.ones(2, 50, 4, dtype=torch.int32)}, "gate is torch.int32; allowed: torch.float32"),
        ({"gate": torch.ones(2, 50, 4, dtype=torch.float64)}, "gate is torch.float64 and input torch.float32"),
        ({"gate_activation": "relu"}, "gate_activation is 'relu'; allowed: 'none', 'sigmoid'"),
        ({"input_activation": "relu"}, "input_activation is 'relu'; allowed: 'none', 'tanh'"),
        ({"complement": True, "input_gate": torch.ones(2, 50, 4)}, "complement is True and there is an input_gate"),
        ({"offsets": torch.tensor([0, 50])}, "offsets are given with 2 rows of input; allowed: 1"),
        ({"offsets": torch.tensor([0.0, 50.0])}, r"offsets has shape \(2,\) and torch.float32"),
        ({"offsets": torch.tensor([0])}, r"offsets has shape \(1,\)"),
    ],
)
def test_meaningless_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        linear_recurrence(**{"gate": torch.ones(2, 50, 4), "input": torch.ones(2, 50, 4), **changes})


def test_other_devices_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="input is on meta; supported devices: cpu, cuda"):
        linear_recurrence(*(torch.ones(1, 2, 3, device="meta") for _ in "fz"))
