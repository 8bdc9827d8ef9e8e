"""Honest measurement of a callable: how long it takes, and how much memory it needs on top of what is there.

Everything here measures steady state: a callable is run ``warmups`` times first, so that compilation,
autotuning and first-touch allocation are not counted.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from structfly.errors import UnsupportedError
from structfly.version import __version__

MEASURED_DEVICES = ("cpu", "cuda")
"""Types of devices on which times and memory can be measured."""

_PROCESS_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # man 5 proc_pid_clear_refs: sets the peak resident set size to its current value


class Timing(NamedTuple):
    """Wall-clock times of one callable, in seconds.

    Attributes:
        median: the 50th percentile.
        p20: the 20th percentile.
        p80: the 80th percentile.
        samples: every measured call, in the order they ran.
    """

    median: float
    p20: float
    p80: float
    samples: tuple[float, ...]


def peak_extra_memory(fn: Callable[[], object], device: torch.device | str, *, warmups: int = 1) -> int:
    """Bytes that one call of ``fn`` needs at its peak, above what was in use when it started.

    On CUDA these are bytes of tensors, from PyTorch's allocator.  On a CPU it is the resident memory of the
    whole process, as Linux counts it, with freed heap given back first: exact to about 1 MiB, so measure
    calls that need many times that, and run nothing else in the process.  Keep nothing alive between calls
    that ``fn`` allocates anew: let it set gradients to None first.

    Args:
        fn: the callable; it takes no arguments.
        device: where its tensors lie, "cpu" or "cuda".
        warmups: how many calls come first, uncounted; 0 if the caller has warmed ``fn``.

    Raises:
        UnsupportedError: for another device, or for a CPU on a system without Linux's peak counter or glibc.
    """
    device = _check_device(device)
    for _ in range(warmups):
        fn()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = fn()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        before = _start_resident_peak()
        result = fn()
        peak = _process_status("VmHWM")
    del result
    return max(0, peak - before)


def median_time(fn: Callable[[], object], device: torch.device | str, *, repeats: int = 10, warmups: int = 2) -> Timing:
    """Time one callable; see :func:`times_in_rotation`."""
    return times_in_rotation({"": fn}, device, repeats=repeats, warmups=warmups)[""]


def times_in_rotation(
    fns: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    *,
    repeats: int = 10,
    warmups: int = 2,
    before: Callable[[], object] | Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Time several callables side by side: each round runs every one once, so that drift hits all alike.

    Every round has an order of its own, the same in every run: who follows whom decides how hot a device is.
    CUDA events time the work on a GPU, from an idle device; a monotonic clock times the call on a CPU.

    From an idle device, a call's time has in it what the host takes to launch its first kernel.  Within a longer
    program the device is still busy then; ``before`` stands for what it is busy with.

    Args:
        fns: callables without arguments, by name.
        device: where their tensors lie, "cpu" or "cuda".
        repeats: measured rounds.
        warmups: rounds that come first, uncounted.
        before: launches work on a GPU ahead of every call, uncounted, or by name ahead of each; None leaves the
            device idle.

    Returns:
        One :class:`Timing` for each name, in seconds.

    Raises:
        UnsupportedError: for another device, or for ``before`` on a CPU, where no call runs ahead of another.
        ValueError: if ``repeats`` is less than 1.
    """
    device = _check_device(device)
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; at least 1 measured call is needed")
    if before is not None and device.type != "cuda":
        raise UnsupportedError(
            "before is given and the device is a CPU, which works on one call at a time; leave it out"
        )
    ahead = before if isinstance(before, Mapping) else dict.fromkeys(fns, before)
    samples: dict[str, list[float]] = {name: [] for name in fns}
    order, shuffle = list(fns), random.Random(0).shuffle
    for turn in range(warmups + repeats):
        shuffle(order)
        for name in order:
            seconds = _time_cuda_call(fns[name], ahead[name]) if device.type == "cuda" else _time_cpu_call(fns[name])
            if turn >= warmups:
                samples[name].append(seconds)
    return {name: summarize(values) for name, values in samples.items()}


def summarize(samples: list[float]) -> Timing:
    """The percentiles of at least one sample, interpolated linearly between neighbours."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], (samples[0],))
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[-1], tuple(samples))


def device_name(device: torch.device | str) -> str:
    """The device as times are of it: a GPU's name, a processor's with the threads that torch may use.

    Raises:
        UnsupportedError: for a device on which nothing can be measured.
    """
    device = _check_device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_name()}, {torch.get_num_threads()} threads"


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """What a committed result must carry to be judged later: device, threads, versions and date (UTC).

    Names no host, user or path.
    """
    device = _check_device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name(),
        "threads": str(torch.get_num_threads()),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "structfly": __version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _check_device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type not in MEASURED_DEVICES:
        raise UnsupportedError(
            f"cannot measure on device {str(device)!r}: allowed are {' and '.join(MEASURED_DEVICES)}; "
            "move the tensors to one of them"
        )
    return device


def _time_cpu_call(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _time_cuda_call(fn: Callable[[], object], before: Callable[[], object] | None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if before is not None:
        before()
    start.record()
    fn()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3  # it counts in milliseconds


def _start_resident_peak() -> int:
    """Give freed heap back, set the peak counter to the present resident size, and return that in bytes."""
    if sys.platform != "linux":
        raise UnsupportedError(
            f"peak CPU memory is read from Linux's /proc, and this system is {sys.platform!r}; "
            "measure on Linux, or on a CUDA device"
        )
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except (AttributeError, OSError) as error:
        raise UnsupportedError(
            f"peak CPU memory needs glibc's malloc_trim and a writable /proc/self/clear_refs, but: {error}; "
            "measure on a Linux system that has both"
        ) from error
    return _process_status("VmRSS")


def _process_status(field: str) -> int:
    """A memory field of this process, in bytes."""
    for line in _PROCESS_STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024  # the file counts in kB of 1024 bytes
    raise UnsupportedError(f"/proc/self/status has no field {field!r}; measure on a Linux kernel that reports it")


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
