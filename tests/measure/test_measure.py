"""structfly.measure against callables whose time and memory are known."""

import sys
import time

import pytest
import torch

from structfly import measure
from structfly.errors import UnsupportedError

MIB = 2**20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak counter is Linux's")


def touch(mebibytes: int) -> torch.Tensor:
    return torch.ones(mebibytes * MIB // 4)


@on_linux
@pytest.mark.parametrize("mebibytes", [32, 128])
def test_peak_counts_what_one_call_allocates(mebibytes: int) -> None:
    peak = measure.peak_extra_memory(lambda: touch(mebibytes), "cpu")
    assert abs(peak - mebibytes * MIB) < 4 * MIB


@on_linux
def test_peak_counts_memory_freed_before_the_call_ends() -> None:
    def fn() -> None:
        touch(64).sum()
        touch(96).sum()

    peak = measure.peak_extra_memory(fn, "cpu")
    assert abs(peak - 96 * MIB) < 4 * MIB


@on_linux
def test_peak_leaves_out_what_was_there_before() -> None:
    kept = touch(128)
    peak = measure.peak_extra_memory(lambda: kept.sum(), "cpu")
    assert peak < 4 * MIB


@on_linux
def test_peak_leaves_out_an_earlier_peak_and_the_warmup() -> None:
    calls = []

    def fn() -> torch.Tensor:
        calls.append(1)
        return touch(128 if len(calls) == 1 else 16)

    peak = measure.peak_extra_memory(fn, "cpu", warmups=1)
    assert len(calls) == 2
    assert abs(peak - 16 * MIB) < 4 * MIB


@on_linux
def test_peak_counts_memory_that_the_heap_had_kept() -> None:
    def small_blocks() -> list[torch.Tensor]:
        return [torch.ones(4096) for _ in range(4096)]  # 64 MiB in blocks that malloc takes from its heap

    pin = small_blocks()[-1]  # the heap cannot shrink below it
    peak = measure.peak_extra_memory(small_blocks, "cpu", warmups=0)
    assert pin.sum() == 4096
    assert abs(peak - 64 * MIB) < 8 * MIB


def test_peak_refuses_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UnsupportedError, match=r"darwin.*measure on Linux"):
        measure.peak_extra_memory(lambda: None, "cpu")


@pytest.mark.parametrize("function", [measure.peak_extra_memory, measure.median_time])
def test_other_devices_are_refused(function: object) -> None:
    assert callable(function)
    with pytest.raises(UnsupportedError, match="'meta': allowed are cpu and cuda"):
        function(lambda: None, "meta")


def test_median_time_of_a_sleep() -> None:
    timing = measure.median_time(lambda: time.sleep(0.02), "cpu", repeats=5, warmups=0)
    assert len(timing.samples) == 5
    assert 0.02 <= timing.p20 <= timing.median <= timing.p80
    assert timing.median < 0.2


def test_rotation_interleaves_and_drops_the_warmups() -> None:
    order: list[str] = []
    fns = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = measure.times_in_rotation(fns, "cpu", repeats=3, warmups=2)
    rounds = [order[at : at + 2] for at in range(0, 10, 2)]
    assert all(sorted(each) == ["a", "b"] for each in rounds)
    assert ["a", "b"] in rounds
    assert ["b", "a"] in rounds
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"a": 3, "b": 3}


@pytest.mark.gpu
def test_work_before_a_call_is_not_counted_and_hides_the_host() -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    small = torch.zeros(16, device="cuda")

    def slow_host() -> None:
        time.sleep(5e-4)
        small.add_(1)

    def busy() -> None:
        for _ in range(20):
            a @ a

    timings = [measure.times_in_rotation({"": slow_host}, "cuda", before=before)[""].median for before in (None, busy)]
    assert timings[0] > 4e-4
    assert timings[1] < 2e-4


def test_each_call_has_work_of_its_own_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_check_device", torch.device)
    monkeypatch.setattr(measure, "_time_cuda_call", lambda call, before: float(10 * before() + call()))
    calls, before = {"a": lambda: 1, "b": lambda: 2}, {"a": lambda: 3, "b": lambda: 4}
    timings = measure.times_in_rotation(calls, "cuda", repeats=3, before=before)
    assert {name: timing.samples for name, timing in timings.items()} == {"a": (31.0,) * 3, "b": (42.0,) * 3}


def test_work_before_a_call_of_a_cpu_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match="the device is a CPU, which works on one call at a time"):
        measure.times_in_rotation({"": lambda: None}, "cpu", before=lambda: None)


def test_no_measured_call_is_an_error() -> None:
    with pytest.raises(ValueError, match="repeats is 0"):
        measure.median_time(lambda: None, "cpu", repeats=0)


def test_percentiles() -> None:
    timing = measure.summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert timing.samples == (5.0, 1.0, 2.0, 4.0, 3.0, 6.0)
    assert (timing.p20, timing.median, timing.p80) == (2.0, 3.5, 5.0)
    assert measure.summarize([7.0]) == (7.0, 7.0, 7.0, (7.0,))


def test_environment_is_complete_and_anonymous() -> None:
    import platform
    from pathlib import Path

    values = measure.environment()
    assert set(values) == {"device", "threads", "system", "python", "torch", "triton", "structfly", "date"}
    assert all(values.values())
    assert values["torch"] == torch.__version__
    text = " ".join(values.values())
    assert platform.node() not in text
    assert str(Path.home()) not in text


def test_a_devices_name_has_the_threads_that_a_processor_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    name = measure.device_name("cpu")
    assert name == f"{measure.environment()['device']}, 3 threads"
    with pytest.raises(UnsupportedError, match="cannot measure on device 'meta'"):
        measure.device_name("meta")
