"""Calls that are recorded and replayed: the same bits from any tensors, and only where that holds."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from structfly.lowering.remembered import remembered
from structfly.lowering.replay.recording import Recording
from structfly.lowering.replay.replayed import replayed

Operation = Callable[[list[Tensor]], None]

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "t": Tensor.t,
    "rows": lambda x: x[1:],
    "columns": lambda x: x[:, :-1],
    "bits": lambda x: x.view(torch.int32).view(torch.float32),
    "flat": lambda x: x.reshape(-1)[: x.shape[0] * x.shape[1]].view(x.shape),
}
MADE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, y: x + y[1, 0],
    "product": lambda x, y: x @ x.t(),
    "joined": lambda x, y: torch.cat([x, x], 0),
    "sorted": lambda x, y: x.sort(dim=0, stable=True)[0],
    "zeros": lambda x, y: torch.zeros_like(x) + y.amax(),
    "into": lambda x, y: torch.mm(x, x.t(), out=x.new_empty(x.shape[0], x.shape[0])),
}
WRITTEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "scaled": lambda x, y: x.mul_(0.5),
    "zeroed": lambda x, y: x[:1].zero_(),
    "copied": lambda x, y: x[0].copy_(y.amax()),
}

PLACES = st.integers(0, 20)


def program(steps: Sequence[tuple[str, int, int]], results: Sequence[int]) -> Callable[..., list[Tensor]]:
    """Operations on what was given and made before, and which of that is returned; what was given is never written."""

    def run(*inputs: Tensor) -> list[Tensor]:
        values = [*inputs, inputs[0].clone()]
        for name, first, second in steps:
            x, y = values[first % len(values)], values[second % len(values)]
            if min(*x.shape, *y.shape) < 2:
                continue
            if name in VIEWS:
                if x.is_contiguous() or name != "bits":
                    values.append(VIEWS[name](x))
            elif name in MADE:
                values.append(MADE[name](x, y))
            else:
                mine = values[len(inputs)]
                if min(mine.shape) > 1:
                    WRITTEN[name](mine, y)
        return [values[each % len(values)].clone() for each in results]

    return run


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from([*VIEWS, *MADE, *WRITTEN]), st.integers(0, 20), st.integers(0, 20)), max_size=12
    ),
    results=st.lists(st.integers(0, 20), max_size=3),
    shape=st.tuples(st.integers(2, 5), st.integers(2, 5)),
)
def test_any_operations_give_the_same_bits(
    replays: list[Recording], steps: list[tuple[str, int, int]], results: list[int], shape: tuple[int, int]
) -> None:
    plain = program(steps, results)
    run = replayed(plain)
    replays.clear()
    kept = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(shape, generator=generator) for _ in range(2)]
        kept.append((inputs, torch.empty(seed + 1)))  # so that the next ones lie elsewhere
        made, expected = run(*inputs), plain(*inputs)
        assert all(map(torch.equal, made, expected))
        assert [each.stride() for each in made] == [each.stride() for each in expected]
    assert len(replays) == 2


def called(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """The function replayed, and a list that grows whenever the function itself is called."""
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return function(*arguments)

    return replayed(counted), calls


def test_the_second_call_of_a_form_is_recorded_and_later_ones_are_replayed(replays: list[Recording]) -> None:
    run, calls = called(lambda x, factor: x * factor)
    for number in range(5):
        assert torch.equal(run(torch.full((2,), number), 3), torch.full((2,), 3 * number))
    assert len(calls) == 2
    assert len(replays) == 3


@pytest.mark.parametrize(
    "other",
    [
        (torch.ones(2, 3), 3.0),
        (torch.ones(3, 2).t(), 2.0),
        (torch.ones(2, 3).double(), 2.0),
        (torch.ones(3, 3), 2.0),
        (torch.ones(7)[1:].view(2, 3), 2.0),  # which begins elsewhere than at a multiple of 16 bytes
        (torch.ones(2, 3).requires_grad_(), 2.0),
    ],
    ids=["number", "strides", "dtype", "shape", "alignment", "gradient"],
)
def test_another_form_is_another_recording(replays: list[Recording], other: tuple[Tensor, float]) -> None:
    run, calls = called(lambda x, factor: x.detach() * factor)
    for _ in range(3):
        run(torch.ones(2, 3), 2.0)
    assert torch.equal(run(*other), other[0].detach() * other[1])
    assert len(calls) == 3


def test_tensors_that_share_memory_in_another_way_are_another_form(replays: list[Recording]) -> None:
    """A view of one of them may be what the other was given for."""
    run, calls = called(lambda x, y: x.as_strided((4,), (1,), int(x.storage_offset())) + y)

    def views(begin: int) -> tuple[Tensor, Tensor]:
        memory = torch.arange(24.0)
        return memory[:4], memory[begin : begin + 4]

    for begin in (4, 4, 4, 8, 8, 8):
        assert run(*views(begin)).tolist() == [2 * n + begin for n in range(4)]
    assert len(calls) == 4
    assert len(replays) == 2


def test_other_settings_are_other_forms(replays: list[Recording]) -> None:
    run, calls = called(lambda x: x @ x if torch.is_grad_enabled() else x + 1)
    for _ in range(3):
        run(torch.ones(2, 2))
    with torch.no_grad():
        assert torch.equal(run(torch.ones(2, 2)), torch.full((2, 2), 2.0))
    assert len(calls) == 3


def test_a_replay_under_autocast_casts_as_the_call_did(replays: list[Recording]) -> None:
    """Autocast does so before the recorder sees an operation; it must not a second time."""
    run, _ = called(lambda x: (x @ x, torch.empty(2, 2).copy_(x)))
    with torch.autocast("cpu", torch.bfloat16):
        made = [run(torch.randn(2, 2)) for _ in range(3)]
    assert len(replays) == 1
    assert [[each.dtype for each in pair] for pair in made] == [[torch.bfloat16, torch.float32]] * 3


NOISE = torch.ones(3)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x + x.sum().item(), "reads on the host"),
        (lambda x: x[x > 0], "reads on the host"),
        (lambda x: x + torch.rand(3), "random"),
        (lambda x: x + NOISE, "came from elsewhere"),
        (lambda x: x.to_sparse().to_dense() + 1, "not strided"),
        (lambda x: x + torch.complex(x, x).conj().real, "conjugate"),
    ],
    ids=["item", "mask", "random", "elsewhere", "sparse", "conjugate"],
)
def test_what_depends_on_more_is_not_replayed(
    replays: list[Recording], caplog: pytest.LogCaptureFixture, function: Callable[[Tensor], Tensor], reason: str
) -> None:
    caplog.set_level(logging.INFO)
    run, calls = called(function)
    for number in range(4):
        torch.manual_seed(number)
        made = run(torch.full((3,), 1.0 + number))
        torch.manual_seed(number)
        assert torch.equal(made, function(torch.full((3,), 1.0 + number)))
    assert len(calls) == 4
    assert not replays
    (record,) = (each for each in caplog.records if each.name == replayed.__module__)
    assert re.search(f"are not replayed: .*({reason})", record.getMessage())


def test_a_call_that_fails_is_recorded_when_it_does_not(replays: list[Recording]) -> None:
    fails = [False, True, False, False]

    def function(x: Tensor) -> Tensor:
        made = x + 1
        if fails.pop(0):
            raise ValueError("no room")
        return made * 2

    run = replayed(function)
    run(torch.ones(2))
    with pytest.raises(ValueError, match="no room"):
        run(torch.ones(2))
    assert [run(torch.full((2,), float(n))).tolist() for n in range(2)] == [[2.0, 2.0], [4.0, 4.0]]
    assert len(replays) == 1


def test_modes_see_the_operations(replays: list[Recording]) -> None:
    run, _ = called(lambda x: x @ x)
    for _ in range(3):
        run(torch.ones(4, 4))
    with FlopCounterMode(display=False) as counter:
        run(torch.ones(4, 4))
    assert counter.get_total_flops() == 2 * 4**3
    assert len(replays) == 1


def test_calls_within_a_recorded_one_are_part_of_it(replays: list[Recording]) -> None:
    inner, calls = called(lambda x: x * 2)
    run, _ = called(lambda x: inner(x) + 1)
    for number in range(5):
        assert run(torch.full((2,), float(number))).tolist() == [2.0 * number + 1] * 2
    assert len(calls) == 2


def test_each_thread_has_its_own(replays: list[Recording]) -> None:
    run, _ = called(lambda x: (x.t() @ x).sum(0))

    def many(seed: int) -> bool:
        inputs = [torch.randn(40, 30, generator=torch.Generator().manual_seed(seed + n)) for n in range(50)]
        return all(torch.equal(run(x), (x.t() @ x).sum(0)) for x in inputs)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(0, 400, 100)))
    assert replays


def starts(index: Tensor, most: int) -> tuple[Tensor, list[int]]:
    """What the host reads of an index."""
    edges = index.bincount(minlength=most).cumsum(0)
    return edges, edges.tolist()


def test_what_is_remembered_about_a_tensor_is_looked_up_in_each_replay(replays: list[Recording]) -> None:
    """Recordings hold for what was found: where that has another form, there is another."""

    def function(x: Tensor, index: Tensor) -> Tensor:
        edges, numbers = remembered(starts, index, 4)
        doubled = remembered(torch.mul, edges, 2)
        return x[: numbers[0]].sum() * doubled

    run, calls = called(function)
    x = torch.arange(5.0)
    indices = [torch.tensor(each) for each in ([0, 0, 1], [1, 0, 0], [2, 0, 0], [0, 1, 1], [3, 0, 1], [2, 0, 3])]
    expected = [function(x, index) for index in indices]
    for _ in range(3):
        assert all(torch.equal(run(x, index), each) for index, each in zip(indices, expected, strict=True))
    # The host's numbers are (2, 3, 3, 3) twice, (2, 2, 3, 3), (1, 3, 3, 3), (1, 2, 2, 3) and (1, 1, 2, 3); of these
    # the first was met before anything was recorded.
    assert len(calls) == 1 + 5
    indices[0].copy_(torch.tensor([1, 1, 0]))
    assert torch.equal(run(x, indices[0]), function(x, indices[0]))


def test_what_is_looked_up_about_a_tensor_made_on_the_way_is_not_replayed(replays: list[Recording]) -> None:
    run, calls = called(lambda x, index: x * remembered(starts, index + 0, 4)[0])
    for _ in range(3):
        run(torch.ones(4), torch.tensor([0, 1]))
    assert len(calls) == 3
