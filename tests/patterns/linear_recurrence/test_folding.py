"""Layers around a recurrence: the op makes activations and complements of gates itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_recurrence.programs import calls

BATCH, STEPS, INPUTS, UNITS = 2, 7, 3, 4
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Flags(NamedTuple):
    complement: bool = False
    sigmoid: bool = False
    tanh: bool = False
    input_gate: bool = False


def layer(step: Step, window: int = 1, *, before: bool = False) -> Callable[..., Tensor]:
    """A layer whose step takes the state and three projections of what the window sees; with ``before`` the activations
    are those of whole tensors."""

    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        seen = F.pad(x, (0, 0, window - 1, 0))
        seen = torch.cat([seen[:, first : first + x.shape[1]] for first in range(window)], -1)
        z, f, i = F.linear(seen, w[:, : window * INPUTS], b).chunk(3, -1)
        if before:
            z, f, i = z.tanh(), f.sigmoid(), i.sigmoid()
        h, hs = x.new_zeros(x.shape[0], UNITS), []
        for t in range(x.shape[1]):
            h = step(h, z[:, t], f[:, t], i[:, t])
            hs.append(h)
        return torch.stack(hs, 1)

    return forward


def rg_lru(h: Tensor, z: Tensor, f: Tensor, i: Tensor) -> Tensor:
    """Griffin, De et al. 2024."""
    log_a = -8.0 * torch.sigmoid(f) * 0.3
    a = torch.exp(log_a)
    return a * h + torch.sqrt(1 - torch.exp(2 * log_a)) * (torch.sigmoid(i) * z)


FORMS: dict[str, tuple[Callable[..., Tensor], Flags]] = {
    "f pooling": (
        layer(lambda h, z, f, i: f.sigmoid() * h + (1 - f.sigmoid()) * z.tanh()),
        Flags(complement=True, sigmoid=True, tanh=True),
    ),
    "f pooling with a window of 2": (
        layer(lambda h, z, f, i: f * h + (1 - f) * z, 2, before=True),
        Flags(complement=True, sigmoid=True, tanh=True),
    ),
    "ifo pooling with a window of 2": (
        layer(lambda h, z, f, i: f * h + i * z, 2, before=True),
        Flags(sigmoid=True, tanh=True, input_gate=True),
    ),
    "minGRU": (
        layer(lambda h, z, f, i: (1 - torch.sigmoid(f)) * h + torch.sigmoid(f) * z),
        Flags(complement=True, sigmoid=True),
    ),
    "minLSTM, not normalised": (
        layer(lambda h, z, f, i: torch.sigmoid(f) * h + torch.sigmoid(i) * z),
        Flags(sigmoid=True, input_gate=True),
    ),
    "lerp": (layer(lambda h, z, f, i: torch.lerp(z, h, f), before=True), Flags(True, True, True)),
    "lerp the other way": (layer(lambda h, z, f, i: torch.lerp(h, z, f), before=True), Flags(True, True, True)),
    "difference": (layer(lambda h, z, f, i: z + torch.sigmoid(f) * (h - z)), Flags(True, True)),
    "sigmoid of the negative": (
        layer(lambda h, z, f, i: torch.sigmoid(f) * h + torch.sigmoid(-f) * z),
        Flags(complement=True, sigmoid=True),
    ),
    "plain gate": (layer(lambda h, z, f, i: torch.exp(-f.abs()) * h + (1 - torch.exp(-f.abs())) * z), Flags(True)),
    "RG-LRU": (layer(rg_lru), Flags()),
    "input gate of another kind": (layer(lambda h, z, f, i: f.abs().neg().exp() * h + i.sigmoid() * z), Flags()),
    "not quite the complement": (
        layer(lambda h, z, f, i: f.sigmoid() * h + (1 - 0.5 * f.sigmoid()) * z),
        Flags(sigmoid=True),
    ),
    "square of the complement": (
        layer(lambda h, z, f, i: f.sigmoid() * h + (1 - f.sigmoid()) * (1 - f.sigmoid()) * z),
        Flags(sigmoid=True),
    ),
    "the gate inside the input": (
        layer(lambda h, z, f, i: f.sigmoid() * h + (1 - f.sigmoid()) * torch.exp(f.sigmoid() * z)),
        Flags(sigmoid=True),
    ),
    "EMA": (layer(lambda h, z, f, i: 0.9 * h + 0.1 * z), Flags()),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer(name: str, dtype: torch.dtype) -> None:
    function, flags = FORMS[name]
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH, STEPS, INPUTS), (3 * UNITS, 2 * INPUTS), (3 * UNITS,))
    arguments = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    fast = Rewritten(function)
    assert_like_eager(fast, function, arguments, dtype, roundings=32)
    assert fast.statuses_of("linear_recurrence") == ["rewritten"], fast.sites
    (call,) = calls(fast)
    assert Flags(call.complement, call.sigmoid, call.tanh, call.input_gate is not None) == flags


@pytest.mark.parametrize("shift", [0, 1])
def test_a_slice_that_is_taken_twice_is_one(shift: int) -> None:
    """And one of another step is another."""

    def function(f: Tensor, z: Tensor) -> Tensor:
        h, hs = torch.zeros_like(z[:, 0]), []
        for t in range(1, z.shape[1]):
            h = f[:, t] * h + (1 - f[:, t - shift]) * z[:, t]
            hs.append(h)
        return torch.stack(hs, 1)

    fast = Rewritten(function)
    generator = torch.Generator().manual_seed(0)
    assert_like_eager(
        fast, function, [torch.rand(BATCH, STEPS, UNITS, generator=generator).requires_grad_() for _ in "fz"]
    )
    (call,) = calls(fast)
    assert call.complement == (shift == 0)


def test_activations_without_gradients_have_none() -> None:
    def function(f: Tensor, z: Tensor) -> Tensor:
        with torch.no_grad():
            f = torch.sigmoid(f)
        h, hs = torch.zeros_like(z[:, 0]), []
        for t in range(z.shape[1]):
            h = f[:, t] * h + z[:, t]
            hs.append(h)
        return torch.stack(hs, 1)

    generator = torch.Generator().manual_seed(0)
    shape = BATCH, STEPS, UNITS
    given = torch.randn(shape, generator=generator, requires_grad=True)
    fast = Rewritten(function)
    assert_like_eager(fast, function, [given, torch.randn(shape, generator=generator).requires_grad_()])
    (call,) = calls(fast)
    assert not call.sigmoid


def test_a_gate_next_to_one_keeps_its_complement() -> None:
    """1 - sigmoid(20) is 0 in float32; of the logits it is 2e-9."""
    function = layer(lambda h, z, f, i: f.sigmoid() * h + (1 - f.sigmoid()) * z)
    x, w = torch.ones(1, STEPS, INPUTS), torch.zeros(3 * UNITS, 2 * INPUTS)
    b = torch.tensor([1.0, 20.0, 0.0]).repeat_interleave(UNITS)
    assert not function(x, w, b).any()
    exact = function(x.double(), w.double(), b.double())
    torch.testing.assert_close(Rewritten(function)(x, w, b).double(), exact, rtol=1e-5, atol=0.0)
