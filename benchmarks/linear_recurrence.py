"""Gated recurrences h_t = f_t h_{t-1} + x_t, forward, and forward and backward, against what any method must move.

    time       of each provider, in rotation with a copy that moves as many bytes as any method must: 3 numbers a step
               and channel forward (f, x, h), 8 forward and backward (f, x, h; f, h, dh, df, dx).  On a GPU behind
               products that keep it busy, as the layers before it do within a model: what the host takes to launch is
               host_s, and no part of the time, unless it is more than 5 ms
    x_copy     that time over the copy's;  x_sheet  over what the bytes take at the device's bandwidth by its data sheet
    memory     what a backward takes above the gradients, as a share of the states
    error      relative Frobenius error against the loop in float64, with usual gates, with gates between 0.999 and 1,
               and with gates that are 0 or 1
    growth     from 2^14 to 2^22 steps
    layer      a QRNN layer with fo-pooling and a window of two, as it is and compiled, over its product alone and the
               copy of what its recurrence moves

On a GPU all of it, unless --parts says otherwise.  What a provider cannot do, or for which --seconds leaves no time, is
left out, with the reason.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import busy, recording
from benchmarks.arguments import sizes
from benchmarks.recording import Row
from benchmarks.recurrence_case import GATES, PASSES, Case
from benchmarks.recurrence_layer import Layer
from benchmarks.recurrence_providers import OURS, PROVIDERS
from structfly import measure

KERNEL = "linear_recurrence"
COMPILED = "structfly, compiled"
COPY = "copy"
PRODUCT = "product alone"
PARTS = ("layer", "errors", "growth", "table")
LONG, WIDE, MANY = (1, 2**21, 256), (1, 65536, 1024), (8, 2048, 1024)
PROBLEMS = {
    "cpu": (((1, 65536, 256), "float32"),),
    "cuda": ((LONG, "float32"), (LONG, "bfloat16"), (WIDE, "bfloat16"), (MANY, "bfloat16")),
}
CHECKED = {"cpu": (1, 4096, 64), "cuda": (1, 16384, 256)}
GROWING = {"cpu": [2**power for power in range(10, 15)], "cuda": [2**power for power in range(14, 23)]}
SHEETS = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12}
"""Bytes a second."""
BARS: Mapping[tuple[str, str], tuple[str, float]] = {
    ("1x65536x256 float32, forward", "x_doubling"): ("cpu", 0.25),
    **{
        (f"{'x'.join(map(str, shape))} {dtype}, {passes}", "x_copy"): ("cuda", bar)
        for shape, dtype, bars in (
            (LONG, "float32", (1.2, 1.25)),
            (LONG, "bfloat16", (1.3, 1.35)),
            (WIDE, "bfloat16", (1.3, 1.35)),
            (MANY, "bfloat16", (1.5, 1.6)),
        )
        for passes, bar in zip(PASSES, bars, strict=True)
    },
    (f"QRNN fo, window 2, {'x'.join(map(str, LONG))} bfloat16, forward", "x_bound"): ("cuda", 1.4),
}
"""What structfly's numbers may be at most, by conditions and metric, on such a device."""
MOST_MEMORY = 1 / 32
"""Of the states, what a backward may take above its gradients on a GPU."""
_LONGEST_CHECKED = 2**16


@dataclass
class Bench:
    """What is measured where, and until when."""

    device: str
    repeats: int
    seconds: float
    console: Console
    rows: list[Row] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def late(self) -> bool:
        return time.monotonic() - self.start > self.seconds

    def note(self, row: Row) -> None:
        self.rows.append(row)
        value = f"{row.p50 * 1e3:.3f} ms" if row.metric in ("time_s", "host_s") else f"{row.p50:.3g}"
        self.console.print(f"{row.mode:62s} {row.provider:18s} {row.metric:18s} {value}", highlight=False)

    def value(self, value: float, provider: str, mode: str, metric: str) -> None:
        self.note(Row.of_value(value, kernel=KERNEL, provider=provider, mode=mode, metric=metric))

    def leave_out(self, provider: str, mode: str, reason: str) -> None:
        self.console.print(f"{mode:62s} {provider:18s} left out: {reason}", highlight=False, style="yellow")

    def times(self, mode: str, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Medians by name; a provider that fails is left out."""
        working = {}
        for who, call in calls.items():
            try:
                call()
            except Exception as error:  # a peer's failure is a result
                if who in (OURS, COMPILED, COPY, PRODUCT):
                    raise
                self.leave_out(who, mode, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
            else:
                working[who] = call
        timings, host = busy.times_behind_work(
            working, self.device, repeats=self.repeats, warmups=1, longest=busy.LONGEST
        )
        for row in busy.host_rows(KERNEL, mode, host):
            self.note(row)
        for who, timing in timings.items():
            self.note(Row.of_timing(timing, kernel=KERNEL, provider=who, mode=mode))
        return {who: timing.median for who, timing in timings.items()}

    def ratios(self, mode: str, times: Mapping[str, float], bytes_moved: int) -> None:
        sheet = SHEETS.get(measure.device_name(self.device))
        for who, seconds in times.items():
            if sheet:
                self.value(seconds * sheet / bytes_moved, who, mode, "x_sheet")
            if who != COPY:
                self.value(seconds / times[COPY], who, mode, "x_copy")
        if "doubling" in times:
            self.value(times[OURS] / times["doubling"], OURS, mode, "x_doubling")


def table(bench: Bench, problems: Sequence[tuple[tuple[int, int, int], str]], providers: Sequence[str]) -> None:
    """Times, ratios, errors and memory of every problem."""
    for shape, dtype in problems:
        for training in (False, True):
            case = Case(shape, dtype, bench.device, training)
            calls = dict(_calls(bench, case, providers))
            times = bench.times(case.mode, {COPY: case.copy(), **calls})
            bench.ratios(case.mode, times, case.bytes_moved)
            if training:
                _memory(bench, case)
            if shape[1] <= _LONGEST_CHECKED:
                _errors(bench, case, {who: calls[who] for who in times if who != COPY})


def _calls(bench: Bench, case: Case, providers: Sequence[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    for who in providers:
        provider = PROVIDERS[who]
        reason = provider.why_not(case.shape[1], case.elements, training=case.training)
        if bench.late and who != OURS:
            reason = "no time is left"
        try:
            call = None if reason else case.call(provider)
        except ImportError as error:
            reason = str(error)
        if reason:
            bench.leave_out(who, case.mode, reason)
        elif call is not None:
            yield who, call


def _memory(bench: Bench, case: Case) -> None:
    if bench.device != "cuda":  # there it is that of the process, of which the gradients are not known apart
        return
    f, x, upstream = case.inputs
    states = PROVIDERS[OURS].build()(f, x)

    def backward() -> object:
        return torch.autograd.grad(states, [f, x], upstream, retain_graph=True)

    extra = measure.peak_extra_memory(backward, bench.device) - 2 * case.state_bytes
    bench.value(extra / case.state_bytes, OURS, case.mode, "backward_extra_of_states")


def _errors(bench: Bench, case: Case, calls: Mapping[str, Callable[[], object]]) -> None:
    for who, call in calls.items():
        made = call()
        assert isinstance(made, tuple)
        for what, error in case.errors(made, PROVIDERS[who]).items():
            bench.value(error, who, case.mode, f"error_{what}")


def errors(bench: Bench) -> None:
    """Of structfly and of the loop in float32."""
    for gates in GATES:
        case = Case(CHECKED[bench.device], "float32", bench.device, True, gates)
        _errors(bench, case, {who: case.call(PROVIDERS[who]) for who in (OURS, "loop")})


def growth(bench: Bench) -> None:
    """Times by the number of steps."""
    for steps in GROWING[bench.device]:
        for training in (False, True):
            case = Case((1, steps, 256), "bfloat16", bench.device, training)
            providers = (OURS,) if training else (OURS, "doubling")
            bench.times(
                f"growth, {case.mode}", {COPY: case.copy(), **{who: case.call(PROVIDERS[who]) for who in providers}}
            )


def layer(bench: Bench) -> None:
    """A QRNN layer over what bounds it."""
    shape = LONG if bench.device == "cuda" else (1, 1024, 32)
    for training in (False, True):
        case = Layer(shape, "bfloat16", bench.device, training)
        ours = {OURS: case.call(compiled=False), COMPILED: case.call(compiled=True)}
        times = bench.times(case.mode, {PRODUCT: case.product(), COPY: case.copy(), **ours})
        for who in ours:
            bench.value(times[who] / (times[PRODUCT] + times[COPY]), who, case.mode, "x_bound")


def warm(problem: tuple[tuple[int, int, int], str], who: str, device: str = "cuda") -> None:
    """Fill the compilers' caches, in a process of its own."""
    shape, dtype = problem
    for training in (False, True):
        case = Case(shape, dtype, device, training)
        provider = PROVIDERS[who]
        if not provider.why_not(shape[1], case.elements, training=training):
            case.call(provider)()


def warm_all(problems: Sequence[tuple[tuple[int, int, int], str]], providers: Sequence[str]) -> None:
    """Several at once of what takes seconds to compile.  What fails fails again, with its reason, where it is timed."""
    tasks = [((1, 2**14, 256), dtype, OURS) for dtype in sorted({dtype for _, dtype in problems})]
    small = [(shape, dtype) for shape, dtype in problems if shape[0] * shape[1] * shape[2] <= 2**26]
    tasks += [(*problem, who) for who in providers if PROVIDERS[who].compiled for problem in small]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(8, len(tasks)), mp_context=context) as pool:
        for future in [pool.submit(warm, (shape, dtype), who) for shape, dtype, who in tasks]:
            future.exception()


def misses(rows: Sequence[Row], device: str) -> list[str]:
    """Bars that were not reached."""
    found = []
    for row in rows:
        where, bar = BARS.get((row.mode, row.metric), ("", 0.0))
        if row.metric == "backward_extra_of_states":
            where, bar = "cuda", MOST_MEMORY
        if row.provider in (OURS, COMPILED) and where == device and row.p50 > bar:
            found.append(f"{row.mode}, {row.provider}: {row.metric} is {row.p50:.3f}, must be at most {bar:.3g}")
    errors = {(row.provider, row.mode, row.metric): row.p50 for row in rows if row.metric.startswith("error_")}
    for (who, mode, metric), error in errors.items():
        theirs = errors.get(("loop", mode, metric))
        if who == OURS and theirs is not None and "float32" in mode and error > theirs:
            found.append(f"{mode}: {metric} is {error:.3g}, must be at most the loop's {theirs:.3g}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=tuple(PROBLEMS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all on a GPU, the table on a CPU")
    parser.add_argument("--shapes", nargs="+", type=sizes("batch x steps x channels"), help="as in 8x2048x1024")
    parser.add_argument("--dtype", help="of --shapes", default="float32")
    parser.add_argument("--providers", nargs="+", choices=tuple(PROVIDERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=140.0, help="after which peers are left out")
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(given)
    bench = Bench(chosen.device, chosen.repeats, chosen.seconds, Console(width=140))
    gpu = chosen.device == "cuda"
    problems = [(shape, chosen.dtype) for shape in chosen.shapes or ()] or PROBLEMS[chosen.device]
    providers = chosen.providers or (tuple(PROVIDERS) if gpu else (OURS, "doubling", "loop"))
    parts = chosen.parts or (PARTS if gpu else ("table",))
    if gpu:
        warm_all(problems, providers if "table" in parts else ())
    for part in parts:
        if part == "table":
            table(bench, problems, providers)
        else:
            {"layer": layer, "errors": errors, "growth": growth}[part](bench)
        if chosen.output:  # after each, so that a run that is stopped leaves what it found
            command = recording.command_line("benchmarks.linear_recurrence", given)
            recording.write(chosen.output, bench.rows, environment=measure.environment(chosen.device), command=command)
    failed = misses(bench.rows, chosen.device)
    for each in failed:
        bench.console.print(each, style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
