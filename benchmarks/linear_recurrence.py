"""h_t = f_t h_{t-1} + x_t, forward, and forward and backward: time of each provider, in rotation, and its errors.

Beside them runs a sum of arrays that moves as many bytes as any method must: 3 numbers a step and channel forward
(f, x, h), 8 forward and backward (f, x, h; f, h, dh, df, dx).  Errors are relative Frobenius errors against the loop in
float64, for shapes of up to 131072 steps.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import recording
from benchmarks.recording import Row
from structfly import measure
from structfly.ops import linear_recurrence

KERNEL = "linear_recurrence"
FLOOR = "bytes alone"
SHAPES = {
    "cpu": ("1x65536x256",),
    "cuda": ("1x2097152x256", "1x65536x1024", "8x2048x1024"),
}
PROVIDERS_ON = {"cpu": ("doubling", "loop", "structfly"), "cuda": ("doubling", "doubling-inductor", "structfly")}
CPU_BAR = ("1x65536x256 float32, forward", "doubling", 0.25)
"""What structfly must reach there: its time over the doubling's."""
_LONGEST_CHECKED = 2**17
_LARGEST_DOUBLED = 2**26  # states of which a doubling's backward, which keeps some arrays a pass, fits a GPU
# Arrays that are read to move, with the one that is written, as many numbers as a pass must.
_READ = {"forward": 2, "forward+backward": 7}

Recurrence = Callable[[Tensor, Tensor], Tensor]


def doubling(f: Tensor, x: Tensor) -> Tensor:
    """log2(T) passes, each of which doubles how far a state reaches."""
    reach = 1
    while reach < x.shape[1]:
        x = torch.cat([x[:, :reach], x[:, reach:] + x[:, :-reach] * f[:, reach:]], 1)
        f = torch.cat([f[:, :reach], f[:, reach:] * f[:, :-reach]], 1)
        reach *= 2
    return x


def loop(f: Tensor, x: Tensor) -> Tensor:
    """One step after another."""
    state, states = torch.zeros_like(x[:, 0]), []
    for gate, input in zip(f.unbind(1), x.unbind(1), strict=True):
        state = torch.addcmul(input, gate, state)
        states.append(state)
    return torch.stack(states, 1)


def structfly(f: Tensor, x: Tensor) -> Tensor:
    return linear_recurrence(f, x)[0]


def provider(name: str) -> Recurrence:
    """A recurrence by its name."""
    if name == "doubling-inductor":
        return torch.compile(doubling, dynamic=False)
    return {"doubling": doubling, "loop": loop, "structfly": structfly}[name]


def make_inputs(shape: Sequence[int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gates between 0.79 and 0.99, inputs, and the gradient of the states."""
    generator = torch.Generator(device).manual_seed(0)
    f = torch.rand(*shape, generator=generator, device=device) * 0.2 + 0.79
    x, upstream = (torch.randn(*shape, generator=generator, device=device) for _ in range(2))
    return f.to(dtype).requires_grad_(), x.to(dtype).requires_grad_(), upstream.to(dtype)


def step(function: Recurrence, f: Tensor, x: Tensor, upstream: Tensor, *, training: bool) -> tuple[Tensor, ...]:
    """The states and, in training, the gradients of gates and inputs."""
    with torch.set_grad_enabled(training):
        states = function(f, x)
    return (states, *torch.autograd.grad(states, [f, x], upstream)) if training else (states,)


def truth(f: Tensor, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """The same in float64, one step after another."""
    wide, wide_x, wide_upstream = (each.detach().double() for each in (f, x, upstream))
    states = loop(wide, wide_x)
    passed = torch.zeros_like(states[:, 0])
    gradients = torch.empty_like(states)
    for t in reversed(range(states.shape[1])):
        gradients[:, t] = wide_upstream[:, t] + passed
        passed = wide[:, t] * gradients[:, t]
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    return states, gradients * before, gradients


def errors(made: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """Relative errors by what was made."""
    pairs = zip(("states", "grad_gate", "grad_input"), made, exact, strict=False)
    return {name: ((mine.detach().double() - true).norm() / true.norm()).item() for name, mine, true in pairs}


def floor(passes: str, shape: Sequence[int], dtype: torch.dtype, device: str) -> Callable[[], object]:
    """A sum over an axis of as many arrays as must be read, to one."""
    arrays = torch.ones(_READ[passes], *shape, dtype=dtype, device=device)
    out = torch.empty(*shape, dtype=dtype, device=device)
    return partial(torch.sum, arrays, 0, out=out)


def run(name: str, dtype: str, device: str, providers: Sequence[str], repeats: int) -> list[Row]:
    """All rows of one shape."""
    shape, kind = [int(size) for size in name.split("x")], getattr(torch, dtype)
    inputs = make_inputs(shape, kind, device)
    functions = {each: provider(each) for each in providers}
    exact = truth(*inputs) if shape[1] <= _LONGEST_CHECKED else None
    rows: list[Row] = []
    for passes in _READ:
        training = passes != "forward"
        fitting = {
            who: function
            for who, function in functions.items()
            if not (training and "doubling" in who and math.prod(shape) > _LARGEST_DOUBLED)
        }
        mode = f"{name} {dtype}, {passes}"
        calls: Mapping[str, Callable[[], object]] = {
            FLOOR: floor(passes, shape, kind, device),
            **{each: partial(step, function, *inputs, training=training) for each, function in fitting.items()},
        }
        timings = measure.times_in_rotation(calls, device, repeats=repeats, warmups=1)
        rows.extend(Row.of_timing(each, kernel=KERNEL, provider=who, mode=mode) for who, each in timings.items())
        for who, function in fitting.items():
            made = step(function, *inputs, training=training)
            for what, error in errors(made, exact).items() if exact is not None else ():
                rows.append(Row.of_value(error, kernel=KERNEL, provider=who, mode=mode, metric=f"error_{what}"))
    return rows


def misses(rows: Sequence[Row]) -> list[str]:
    """Bars that were not reached."""
    mode, other, bar = CPU_BAR
    times = {row.provider: row.p50 for row in rows if row.mode == mode and row.metric == "time_s"}
    if not {"structfly", other} <= times.keys() or times["structfly"] <= bar * times[other]:
        return []
    return [f"{mode}: {times['structfly'] / times[other]:.2f} of {other}'s time, must be at most {bar}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=tuple(SHAPES))
    parser.add_argument("--shapes", nargs="+", help="as in 8x2048x1024: batch, steps, channels")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--providers", nargs="+", choices=("doubling", "doubling-inductor", "loop", "structfly"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(given)
    console = Console(width=120)
    providers = chosen.providers or PROVIDERS_ON[chosen.device]
    rows = []
    for shape in chosen.shapes or SHAPES[chosen.device]:
        for row in run(shape, chosen.dtype, chosen.device, providers, chosen.repeats):
            value = f"{row.p50 * 1e3:.3f} ms" if row.metric == "time_s" else f"{row.p50:.2g}"
            console.print(f"{row.mode:45s} {row.provider:18s} {row.metric:18s} {value}", highlight=False)
            rows.append(row)
    if chosen.output:
        command = recording.command_line("benchmarks.linear_recurrence", given)
        recording.write(chosen.output, rows, environment=measure.environment(chosen.device), command=command)
    failed = misses(rows)
    for each in failed:
        console.print(each, style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
