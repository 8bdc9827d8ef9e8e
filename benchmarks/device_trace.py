"""What a profiler's trace says of a GPU: how long it worked, and how long it waited for the host."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Activity:
    """Of a GPU, from the start of the first kernel to the end of the last.

    Attributes:
        kernels: how many there were, copies and fills among them.
        kernel_seconds: the sum of their times.
        span_seconds: from first to last.
        busy_seconds: during which at least one ran.
        waiting_seconds: during which none ran, and the call that launched the next had not returned when the last
            ended: the GPU waited for the host.  What is neither busy nor waiting is between kernels that were queued.
    """

    kernels: int
    kernel_seconds: float
    span_seconds: float
    busy_seconds: float
    waiting_seconds: float

    @property
    def waiting_share(self) -> float:
        """Of the span."""
        return self.waiting_seconds / self.span_seconds


def read_activity(trace: dict[str, Any]) -> Activity:
    """Of a trace in Chrome's format, as torch.profiler exports it; its times are in microseconds.

    Raises:
        ValueError: no kernel is in the trace.
    """
    launched = {
        event["args"]["correlation"]: float(event["ts"]) + float(event["dur"])
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    kernels = _kernels(trace)
    first = last = float(kernels[0]["ts"])
    total = busy = waiting = 0.0
    for event in kernels:
        start, length = float(event["ts"]), float(event["dur"])
        if start > last and launched.get(event["args"].get("correlation"), 0.0) > last:
            waiting += start - last
        total += length
        busy += max(0.0, start + length - max(start, last))
        last = max(last, start + length)
    return Activity(len(kernels), total * 1e-6, (last - first) * 1e-6, busy * 1e-6, waiting * 1e-6)


@dataclass(frozen=True)
class Kernel:
    """One of those that a call launches.

    Attributes:
        name: as the profiler has it.
        seconds: of each call, from its beginning or the end of the kernels before it: one that starts early, to wait
            for those, is not busy until then.
    """

    name: str
    seconds: tuple[float, ...]


def read_kernels(trace: dict[str, Any], calls: int) -> list[Kernel]:
    """Those of each of so many equal calls, in the order in which they began, copies and fills among them.

    Raises:
        ValueError: the trace has no kernels, or calls had different ones.
    """
    kernels = _kernels(trace)
    each, rest = divmod(len(kernels), calls)
    made = [kernels[place::each] for place in range(each)]
    if rest or any(len({event["name"] for event in events}) > 1 for events in made):
        raise ValueError(f"{len(kernels)} kernels are not those of {calls} equal calls; profile warm steps of one form")
    seconds: dict[int, float] = {}
    last = 0.0
    for event in kernels:
        start, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        seconds[id(event)] = max(0.0, end - max(start, last)) * 1e-6
        last = max(last, end)
    return [Kernel(events[0]["name"], tuple(seconds[id(event)] for event in events)) for events in made]


def profiled(call: Callable[[], object], calls: int, keep: Path | None = None) -> Activity:
    """The GPU's activity during so many warm calls, one after another; the host is not profiled, so as not to slow it.

    Args:
        keep: where the trace is written, with .json.gz at its end, or None.
    """
    return read_activity(trace_of(call, calls, keep))


def trace_of(call: Callable[[], object], calls: int, keep: Path | None = None) -> dict[str, Any]:
    """The trace of so many warm calls, as :func:`profiled` has it."""
    with TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json.gz"
        for _ in range(2):  # the first starts the device's counters up, and its trace is written over
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for _ in range(calls):
                    call()
                torch.cuda.synchronize()
            profiler.export_chrome_trace(str(path))
        with gzip.open(path, "rt", encoding="utf-8") as file:
            made: dict[str, Any] = json.load(file)
    return made


def _kernels(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """In the order in which they began.

    Raises:
        ValueError: there are none.
    """
    events = (event for event in trace["traceEvents"] if event.get("ph") == "X")
    kernels = sorted((e for e in events if e.get("cat") in _ON_DEVICE), key=lambda event: float(event["ts"]))
    if not kernels:
        raise ValueError("the trace has no kernels; profile a step that runs on a GPU")
    return kernels
