"""structfly.nn.QRNN against a loop over time in float64."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structfly
from structfly.errors import ArgumentError
from structfly.nn import QRNN, QRNNState
from tests.oracle import assert_as_accurate

UNITS = 4


def by_loop(layer: QRNN, x: Tensor, state: QRNNState | None) -> tuple[Tensor, Tensor]:
    """h and the last c, one step after another, in evaluation."""
    size, window = layer.hidden_size, layer.window
    outputs, cells = [], []
    for direction, projection in enumerate(layer.projections):
        steps = x.flip(1) if direction else x
        batch = x.shape[0]
        c = x.new_zeros(batch, size) if state is None else state.cell[direction].to(x.dtype)
        past = x.new_zeros(batch, window - 1, x.shape[2]) if state is None else state.window[direction].to(x.dtype)
        past = past.flip(1) if direction else past
        seen = torch.cat([past, steps], 1)
        hs = []
        for t in range(x.shape[1]):
            frame = seen[:, t : t + window]
            frame = frame.flip(1) if direction else frame
            z, f, *others = projection(frame.flatten(1)).split(size, -1)
            f, z = f.sigmoid(), z.tanh()
            moved = 1 - layer.zoneout
            update = others[1].sigmoid() if layer.pooling == "ifo" else 1 - f
            c = (1 - moved * (1 - f)) * c + moved * update * z
            hs.append(c if layer.pooling == "f" else others[0].sigmoid() * c)
        outputs.append(torch.stack(hs[::-1] if direction else hs, 1))
        cells.append(c)
    return torch.cat(outputs, -1), torch.stack(cells)


@settings(max_examples=60)
@given(
    pooling=st.sampled_from(("f", "fo", "ifo")),
    window=st.integers(1, 4),
    bidirectional=st.booleans(),
    zoneout=st.sampled_from((0.0, 0.1, 0.9)),
    bias=st.booleans(),
    length=st.sampled_from((1, 2, 3, 17, 40)),
    begun=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_as_accurate_as_the_loop(length: int, begun: bool, seed: int, **options: Any) -> None:
    torch.manual_seed(seed)
    layer = QRNN(3, UNITS, **options).eval()
    exact = copy.deepcopy(layer).double()
    x = torch.randn(2, length, 3, requires_grad=True)
    directions = len(layer.projections)
    state = None
    if begun:
        state = QRNNState(torch.randn(directions, 2, UNITS), torch.randn(directions, 2, layer.window - 1, 3))
    output, after = layer(x, state)
    results = [(output, after.cell), by_loop(layer, x, state)]
    wide = x.detach().double().requires_grad_()
    results.append(by_loop(exact, wide, None if state is None else QRNNState(*(each.double() for each in state))))
    made = []
    for (h, c), leaf, module in zip(results, (x, x, wide), (layer, layer, exact), strict=True):
        leaves = [leaf, *module.parameters()]
        made.append((h.detach(), c.detach(), *torch.autograd.grad(h.square().sum() + c.sum(), leaves)))
    for mine, loop, true in zip(*made, strict=True):
        assert_as_accurate(mine, loop, true, torch.float32, "value or gradient", roundings=16)


@pytest.mark.parametrize(("pooling", "window"), list(itertools.product(("f", "fo", "ifo"), (1, 2, 5))))
def test_a_sequence_may_come_in_pieces(pooling: str, window: int) -> None:
    layer = QRNN(3, UNITS, pooling=pooling, window=window)
    x = torch.randn(2, 20, 3)
    whole, last = layer(x)
    state, pieces = None, []
    for piece in x.split([1, 2, 10, 7], 1):
        output, state = layer(piece, state)
        pieces.append(output)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert state is not None
    torch.testing.assert_close(tuple(state), tuple(last))


def test_the_direction_back_through_time_goes_on_to_the_front() -> None:
    layer = QRNN(3, UNITS, window=3, bidirectional=True)
    x = torch.randn(2, 20, 3)
    whole, _ = layer(x)
    _, state = layer(x[:, 8:])
    front, _ = layer(x[:, :8], QRNNState(state.cell, state.window))
    torch.testing.assert_close(front[..., UNITS:], whole[:, :8, UNITS:])


@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
def test_zoneout_keeps_states_in_training(pooling: str) -> None:
    """A unit's c either stays exactly or moves as it would without zoneout; about as many stay as should."""
    torch.manual_seed(0)
    layer = QRNN(3, 50, pooling=pooling, zoneout=0.3)
    state = QRNNState(torch.randn(1, 40, 50), torch.empty(1, 40, 0, 3))
    x = torch.randn(40, 1, 3)
    cell = layer(x, state)[1].cell
    plain = copy.deepcopy(layer)
    plain.zoneout = 0.0
    stayed = cell == state.cell
    torch.testing.assert_close(torch.where(stayed, 0.0, cell), torch.where(stayed, 0.0, plain(x, state)[1].cell))
    assert 0.25 < stayed.float().mean() < 0.35
    (gradient,) = torch.autograd.grad(cell[stayed].sum(), [*layer.parameters()][:1])
    assert gradient.eq(0).all()


@pytest.mark.filterwarnings("ignore")
def test_it_trains_saves_and_compiles() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = QRNN(3, UNITS, window=2, bidirectional=True)
    fast = torch.compile(layer, backend="structfly", fullgraph=True)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    x = torch.randn(4, 30, 3)
    target = torch.roll(x[..., :1], 1, 1).tanh() * 0.5
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (fast(x)[0][..., :1] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = QRNN(3, UNITS, window=2, bidirectional=True)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x)[0], layer(x)[0])
    torch._dynamo.reset()


def test_in_bfloat16_the_state_is_float32() -> None:
    layer = QRNN(3, UNITS, dtype=torch.bfloat16)
    output, state = layer(torch.randn(2, 10, 3, dtype=torch.bfloat16))
    assert (output.dtype, state.cell.dtype) == (torch.bfloat16, torch.float32)


def test_its_projection_can_be_restructured() -> None:
    """It is an ordinary linear of an ordinary module."""
    layer = torch.nn.Sequential(QRNN(32, 32, window=2))
    plan = structfly.restructure_(layer, structfly.Budget(params=0.5))
    assert plan.layers
    output, _ = layer(torch.randn(2, 9, 32))
    assert output.shape == (2, 9, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 0}, "input_size is 0; allowed: from 1 up"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"window": 0}, "window is 0"),
        ({"pooling": "g"}, "pooling is 'g'; allowed: 'f', 'fo', 'ifo'"),
        ({"zoneout": 1.0}, "zoneout is 1.0; allowed: from 0 up to, but not, 1"),
    ],
)
def test_meaningless_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        QRNN(**{"input_size": 3, "hidden_size": 4, **changes})


@pytest.mark.parametrize(
    ("shape", "cell", "window", "message"),
    [
        ((2, 3), (1, 2, 4), (1, 2, 1, 3), r"input has shape \(2, 3\); allowed: \(batch, steps, 3\)"),
        ((2, 5, 4), (1, 2, 4), (1, 2, 1, 3), "input has shape"),
        ((2, 5, 3), (2, 4), (1, 2, 1, 3), r"the state's cell has shape \(2, 4\); allowed: \(1, 2, 4\)"),
        ((2, 5, 3), (1, 2, 4), (1, 2, 2, 3), "the state's window has shape"),
    ],
)
def test_what_does_not_fit_is_refused(
    shape: tuple[int, ...], cell: tuple[int, ...], window: tuple[int, ...], message: str
) -> None:
    state = QRNNState(torch.zeros(cell), torch.zeros(window))
    with pytest.raises(ArgumentError, match=message):
        QRNN(3, 4, window=2)(torch.zeros(shape), state)


def test_it_says_what_it_is() -> None:
    assert "3, 4, pooling='fo', window=2, bidirectional=False, zoneout=0.0" in repr(QRNN(3, 4, window=2))
