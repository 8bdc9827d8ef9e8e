"""What the host takes to launch a call, and work that keeps a GPU busy for that long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping

import torch

from benchmarks.recording import Row
from structfly import measure

_SIZE = 8192
_MARGIN = 2.0  # times as long as the host takes, for it is not as fast at every time


def host_seconds(call: Callable[[], object]) -> float:
    """What the host takes to launch a call from an idle GPU, with what it waits where the queue of launches is full."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def host_times(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, measure.Timing]:
    """The same many times for each of several calls, after two that are not counted."""
    samples = {name: [host_seconds(call) for _ in range(2 + repeats)][2:] for name, call in calls.items()}
    return {name: measure.summarize(seconds) for name, seconds in samples.items()}


def host_rows(kernel: str, mode: str, times: Mapping[str, measure.Timing]) -> list[Row]:
    """As the metric ``host_s``."""
    return [
        Row.of_timing(timing, kernel=kernel, provider=name, mode=mode, metric="host_s")
        for name, timing in times.items()
    ]


def other_work(host: Iterable[measure.Timing]) -> Callable[[], object]:
    """Products that keep a GPU busy for longer than the host takes for any of these: what a program does before it
    comes to what is measured."""
    a, b, c = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    once = measure.median_time(lambda: torch.mm(a, b, out=c), "cuda", repeats=5).median
    count = math.ceil(_MARGIN * max(each.p80 for each in host) / once)

    def work() -> None:
        for _ in range(count):
            torch.mm(a, b, out=c)

    return work
