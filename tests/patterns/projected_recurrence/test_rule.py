"""Recurrences of all that a linear makes, in graphs without gradients: what is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from structfly.nn import QRNN, QRNNState
from structfly.ops import joint_linear_recurrence, linear_recurrence
from tests.compiling import Rewritten
from tests.oracle import assert_as_accurate, assert_like_eager
from tests.patterns.linear_recurrence.test_layers import Layer
from tests.patterns.projected_recurrence.cases import (
    BATCH,
    INPUTS,
    POOLING,
    UNITS,
    arguments,
    call_of,
    calls_made,
    own,
    pooled,
    without_gradients,
)


@settings(max_examples=30)
@given(
    letters=st.sampled_from(("zf", "zfo", "zfi", "zfio")).flatmap(st.permutations),
    split=st.sampled_from(("chunk", "split", "slices", "narrow")),
    before=st.booleans(),
    reverse=st.booleans(),
    time_first=st.booleans(),
    begun=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_a_layer_that_is_a_loop(letters: list[str], dtype: torch.dtype, **options: Any) -> None:
    layer = Layer("".join(letters), **options)
    fast = Rewritten(layer)
    given = arguments(layer.order, dtype=dtype)
    with torch.no_grad():
        assert_like_eager(fast, layer, given, dtype, roundings=32)
    assert [site.status for site in own(fast)] == ["rewritten"], fast.sites
    assert (call_of(fast).order, call_of(fast).window, call_of(fast).reverse) == (layer.order, 1, layer.reverse)
    (graph,) = fast.graphs
    graph.graph.eliminate_dead_code()  # what zeros were like
    assert not any(node.target is F.linear for node in graph.graph.nodes)


@settings(max_examples=15)
@given(
    pooling=st.sampled_from(("f", "fo", "ifo")),
    window=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    steps=st.sampled_from((2, 3, 20)),
    begun=st.booleans(),
)
def test_a_qrnn(steps: int, begun: bool, **options: Any) -> None:
    layer = QRNN(INPUTS, UNITS, **options)
    x, directions = torch.randn(BATCH, steps, INPUTS), len(layer.projections)
    state = None
    if begun:
        state = QRNNState(
            torch.randn(directions, BATCH, UNITS), torch.randn(directions, BATCH, layer.window - 1, INPUTS)
        )
    fast = Rewritten(layer)
    with torch.no_grad():
        made, expected = fast(x, state), layer(x, state)
        wide = None if state is None else QRNNState(*(each.double() for each in state))
        exact = copy.deepcopy(layer).double()(x.double(), wide)
    for mine, theirs, true in zip((made[0], *made[1]), (expected[0], *expected[1]), (exact[0], *exact[1]), strict=True):
        assert_as_accurate(mine, theirs, true, torch.float32, "h or a state")
    sites = own(fast)
    assert [site.status for site in sites] == ["rewritten"] * directions, fast.sites
    assert [site.name for site in sites] == ["projections.0", "projections.1"][:directions]
    assert {(call.window, call.beside is None) for call in calls_made(fast)} == {(layer.window, layer.window == 1)}
    assert not any(node.target == "unfold" for graph in fast.graphs for node in graph.graph.nodes)


@pytest.mark.filterwarnings("ignore")  # torch's own deprecations
@pytest.mark.parametrize("window", [1, 2])
def test_inductor_compiles_it(window: int) -> None:
    torch._dynamo.reset()
    layer = QRNN(INPUTS, UNITS, window=window, bidirectional=True)
    fast = torch.compile(layer, backend="structfly", options={"rewrite": "always", "strict": True}, fullgraph=True)
    x = torch.randn(BATCH, 20, INPUTS)
    with torch.no_grad():
        output, state = layer(x)
        torch.testing.assert_close(fast(x), (output, state))
        torch.testing.assert_close(fast(x, state), layer(x, state))
    torch._dynamo.reset()


def by_matmul(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return pooled(x @ w.t())


def by_columns(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return pooled(x @ w.t().contiguous())


def of_rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return pooled(F.linear(x.flatten(0, 1), w, b).view(BATCH, -1, 3 * UNITS))


def of_some_steps(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return pooled(F.linear(x, w, b)[:, 2:])


def apart(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z, f, o = F.linear(x, w, b).chunk(3, -1)
    return linear_recurrence(f, z, output_gate=o, **POOLING)[0]


def under_autocast(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, w, b)
    return pooled(y)


def two_layers(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return pooled(F.linear(pooled(F.linear(x, w, b)), w.repeat(1, 2)[:, :UNITS], b))


def shifted_and_padded(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    windows = F.pad(x, (0, 0, 1, 0)).unfold(1, 2, 1).permute(0, 1, 3, 2).reshape(BATCH, -1, 2 * INPUTS)
    return pooled(F.linear(windows, w.repeat(1, 2), b))


def of_windows_as_they_are(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return pooled(F.linear(x.unfold(1, 3, 1).mT.flatten(2), w.repeat(1, 3), b))


SPELLINGS: Mapping[Callable[..., Tensor], list[int]] = {
    by_matmul: [1],
    by_columns: [1],
    of_rows: [1],
    of_some_steps: [1],
    apart: [1],
    under_autocast: [1],
    two_layers: [1, 1],
    shifted_and_padded: [2],
    of_windows_as_they_are: [3],
}


@pytest.mark.parametrize(("function", "windows"), SPELLINGS.items())
def test_spellings(function: Callable[..., Tensor], windows: list[int]) -> None:
    given = arguments(dtype=torch.float32)
    fast = Rewritten(function)
    made, expected = without_gradients(fast, *given), function(*given)
    exact = function(*(each.double() for each in given))
    assert_as_accurate(made, expected, exact, expected.dtype, "h")
    assert [site.status for site in own(fast)] == ["rewritten"] * len(windows), fast.sites
    assert [call.window for call in calls_made(fast)] == windows


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_results_lie_as_they_did(time_first: bool, batch: int) -> None:
    """Programs look at them in ways that not all strides allow."""

    def layer(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y = F.linear(x, w, b)
        h, last = joint_linear_recurrence(y.transpose(0, 1) if time_first else y, "zfo", **POOLING)
        return h, (h.transpose(0, 1) if time_first else h).view(-1, UNITS), last

    x, w, b = arguments(dtype=torch.float32)
    x = x[:batch].transpose(0, 1).contiguous() if time_first else x[:batch]
    fast = Rewritten(layer, then="aot_eager")
    for mine, theirs in zip(without_gradients(fast, x, w, b), layer(x, w, b), strict=True):
        torch.testing.assert_close(mine, theirs, check_stride=True)
    assert [site.status for site in own(fast)] == ["rewritten"]
    assert call_of(fast).time_first == time_first


def test_a_graph_for_all_lengths_and_batches() -> None:
    layer = QRNN(INPUTS, UNITS, window=2)
    fast = Rewritten(layer, then="aot_eager", dynamic=True)
    for batch, steps in ((2, 9), (3, 31), (5, 200)):
        x = torch.randn(batch, steps, INPUTS)
        torch.testing.assert_close(without_gradients(fast, x), without_gradients(layer, x))
    assert len([graph for graph in fast.graphs if len(graph.graph.nodes)]) == 1  # Dynamo begins with one of nothing
    assert call_of(fast).window == 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's own deprecations
@pytest.mark.parametrize("pooling", ["f", "fo"])
@pytest.mark.parametrize("window", [1, 2])
def test_on_a_gpu_nothing_but_the_output_takes_memory(pooling: str, window: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = nn.Sequential(QRNN(256, 256, pooling=pooling, window=window, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(1, 2**16 + 5, 256, device="cuda", dtype=torch.bfloat16)
    fast = torch.compile(layer, backend="structfly", options={"strict": True})
    with torch.no_grad():
        fast(x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output, state = fast(x)
        taken = torch.cuda.max_memory_allocated() - before
        expected, after = copy.deepcopy(layer).double()(x.double())
    assert taken < 1.1 * output.numel() * output.element_size() + 2**22
    assert (output - expected).norm() <= 2**-8 * expected.norm()
    assert (state.cell - after.cell).norm() <= 2**-8 * after.cell.norm()
    torch._dynamo.reset()
