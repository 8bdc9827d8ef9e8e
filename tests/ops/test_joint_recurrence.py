"""structfly.ops.joint_linear_recurrence against the loop on slices."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from structfly.errors import ArgumentError, UnsupportedError
from structfly.lowering.linear_recurrence.reference import linear_recurrence_reference
from structfly.nn import QRNN
from structfly.ops import joint_linear_recurrence
from tests.dispatched import Dispatched
from tests.oracle import assert_like_eager

ACTIVATED = {"gate_activation": "sigmoid", "input_activation": "tanh"}


def leaves(order: str, dtype: torch.dtype = torch.float32, *, batch: int = 2, length: int = 30) -> list[Tensor]:
    """What lies side by side, four channels each, and an initial state."""
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, length, 4 * len(order)), (batch, 4)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def both(made: tuple[Tensor, Tensor]) -> Tensor:
    output, state = made
    return torch.cat([output.to(state.dtype), state.unsqueeze(1)], 1).flatten(0, 1)


def fused(order: str, joint: Tensor, c: Tensor, **options: Any) -> Tensor:
    options = {"complement": "i" not in order, "initial_state": c, **ACTIVATED, **options}
    return both(joint_linear_recurrence(joint, order, **options))


def loop(order: str, joint: Tensor, c: Tensor, reverse: bool = False) -> Tensor:
    parts = dict(zip(order, joint.chunk(len(order), 2), strict=True))
    i, o = parts.get("i"), parts.get("o")
    given = parts["f"], parts["z"], i, o, c
    return both(linear_recurrence_reference(*given, complement=i is None, sigmoid=True, tanh=True, reverse=reverse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("order", ["fz", "zfo", "ofiz"])
def test_as_accurate_as_the_loop(order: str, reverse: bool, dtype: torch.dtype) -> None:
    fast, slow = partial(fused, order, reverse=reverse), partial(loop, order, reverse=reverse)
    assert_like_eager(fast, slow, leaves(order, dtype), dtype, torch.linspace(-1, 1, 248).view(62, 4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "structfly"])
def test_in_what_any_backend_compiles(backend: str) -> None:
    torch._dynamo.reset()

    def step(function: Any, joint: Tensor, c: Tensor) -> Tensor:
        value: Tensor = function("zfo", torch.sin(joint), c) * 2.0
        return value

    fast = torch.compile(partial(step, fused), backend=backend, fullgraph=True, dynamic=True)
    for length in (30, 21):
        assert_like_eager(fast, partial(step, loop), leaves("zfo", length=length))
    torch._dynamo.reset()


@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
def test_the_backward_of_a_layer_joins_nothing(pooling: str) -> None:
    layer = QRNN(3, 4, pooling=pooling)
    output, _ = layer(torch.randn(2, 9, 3))
    with Dispatched() as ran:
        output.sum().backward()
    assert ran.names.count("joint_linear_recurrence_backward_v1") == 1
    assert not {"cat", "slice_backward", "copy_", "add_"} & set(ran.names), ran.names


def test_operations_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    given = leaves("zfoi")
    fused("zfoi", *given)  # whose formulas a counter made from here on has
    with FlopCounterMode(display=False) as counter:
        value = fused("zfoi", *given)
        made = counter.get_total_flops()
        value.sum().backward()
    assert (made, counter.get_total_flops() - made) == (4 * 240, 10 * 240)


def test_no_state_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    from structfly.ops import joint_recurrence

    def fake(*call: Any) -> tuple[Any, ...]:
        kept.append(call[-1])
        return call[0], call[0][:, 0], call[0]

    monkeypatch.setattr(joint_recurrence, "fused", fake)
    joint, _ = leaves("fz")
    joint_linear_recurrence(joint, "fz")
    with torch.no_grad():
        joint_linear_recurrence(joint, "fz")
    joint_linear_recurrence(joint.detach(), "fz")
    assert kept == [True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "z"}, "order is 'z'; allowed: 'f' and 'z' among 'f' for the gate, 'z' for the input, 'i' for the"),
        ({"order": "zff"}, "order is 'zff'"),
        ({"order": "zfg"}, "order is 'zfg'"),
        ({"joint": torch.ones(2, 5)}, r"joint has shape \(2, 5\); allowed: \(batch, steps, channels of each of the 3"),
        ({"joint": torch.ones(2, 5, 7)}, r"joint has shape \(2, 5, 7\)"),
        ({"order": "zfi", "complement": True}, "complement is True and order is 'zfi'"),
        ({"initial_state": torch.ones(2, 6)}, r"initial_state has shape \(2, 6\); allowed: \(2, 2\)"),
        ({"initial_state": torch.ones(2, 2, dtype=torch.float64)}, "float64"),
        ({"gate_activation": "tanh"}, "gate_activation is 'tanh'; allowed: 'none', 'sigmoid'"),
        ({"reset": torch.ones(2, 4, dtype=torch.bool)}, "reset has shape"),
        ({"offsets": torch.tensor([0, 5])}, "offsets are given with 2 rows of input; allowed: 1"),
    ],
)
def test_meaningless_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        joint_linear_recurrence(**{"joint": torch.ones(2, 5, 6), "order": "zfo", **changes})


def test_under_functional_gradients_it_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"structfly.ops.joint_linear_recurrence is called under torch.func.grad"
    ):
        torch.func.grad(lambda joint: joint_linear_recurrence(joint, "fz")[0].sum())(torch.ones(1, 2, 4))
