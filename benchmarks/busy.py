"""What the host takes to launch a call, and work that keeps a GPU busy for that long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from benchmarks.recording import Row
from structfly import measure

LONGEST = 5e-3
"""Seconds of the host that may be hidden where one call of many takes it longer: queues have room for no more
launches, and what stands before the calls would be many times as long as they are."""
MARGIN = 2.0
"""Times as long as the host takes that a GPU is kept busy, for it is not as fast at every time."""
_SIZE = 8192


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


class Times(NamedTuple):
    """Of several calls, by name: of the device behind other work, and of the host, which a CPU has none of."""

    device: dict[str, measure.Timing]
    host: dict[str, measure.Timing]


def times_behind_work(
    calls: Mapping[str, Callable[[], object]],
    device: str,
    *,
    repeats: int,
    warmups: int = 2,
    longest: float = math.inf,
) -> Times:
    """Times in rotation, on a GPU behind work that keeps it busy for longer than the host needs for any of the calls.

    Args:
        calls: without arguments, by name.
        device: "cpu", where a call is timed as it is, or "cuda".
        repeats, warmups: rounds that count, and that come first.
        longest: seconds of the host's that are hidden; of calls that take it longer they are not.
    """
    if device != "cuda":
        return Times(measure.times_in_rotation(calls, device, repeats=repeats, warmups=warmups), {})
    host = host_times(calls, repeats)
    hidden = max((each.p80 for each in host.values() if each.p80 <= longest), default=longest)
    before = work_for(MARGIN * hidden)
    return Times(measure.times_in_rotation(calls, device, repeats=repeats, warmups=warmups, before=before), host)


def work_for(seconds: float) -> Callable[[], object]:
    """Products that keep a GPU busy for at least so long: what a program does before it comes to what is measured."""
    a, b, c = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    once = measure.median_time(lambda: torch.mm(a, b, out=c), "cuda", repeats=5).median
    count = math.ceil(seconds / once)

    def work() -> None:
        for _ in range(count):
            torch.mm(a, b, out=c)

    return work
