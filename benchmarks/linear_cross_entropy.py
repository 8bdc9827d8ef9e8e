"""linear + cross_entropy, forward and backward: time, peak extra memory and error of each provider, together.

Times are taken in one process, the providers in rotation, so that a drifting clock hits all alike; beside
them run the three matrix products of the shape alone (6 N H V operations), the floor of any method that makes
every logit once.  Memory is that of one step above its inputs; on a CPU each provider gets a process of its
own for it.  Errors are relative Frobenius errors against a chunked reference, in float64 for float32 inputs
and in float32 for the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import busy, head, recording
from benchmarks.arguments import fill_in, sizes
from benchmarks.head import LOSSES, PROVIDERS, Case, Inputs
from benchmarks.matmul import matmul_rate
from benchmarks.peers import PEERS
from benchmarks.recording import Row
from structfly import measure

KERNEL = "linear_cross_entropy"
FLOORS = {True: "three products", False: "one product"}  # of a training step, of an evaluation
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "shapes": [(2048, 256, 32000)],
        "dtype": "float32",
        "ignored": 0.0,
        "providers": ["eager", "inductor", "structfly"],
        "matmul": 2048,
    },
    "cuda": {
        "shapes": [(16384, 2048, 131072), (8192, 4096, 128256), (16384, 768, 50257)],
        "dtype": "bfloat16",
        "ignored": 0.05,
        "providers": list(PROVIDERS),
        "matmul": 8192,
    },
}
CPU_BARRED = "2048x256x32000 float32 random logits, 0% ignored, forward+backward"
# What structfly must reach there: its time over eager's and over Inductor's, its memory over eager's.
CPU_BARS = (("time_s", "eager", 0.85), ("time_s", "inductor", 1.05), ("peak_extra_bytes", "eager", 1 / 6))


def make_products(inputs: Inputs, *, training: bool) -> Callable[[], object]:
    """The products of the shape alone: logits and, in training, dx and dw."""
    x, w = inputs.x.detach(), inputs.w.detach()

    def products() -> None:
        z = x @ w.T
        if training:
            z @ w
            z.T @ x

    return products


def measure_case(
    case: Case,
    providers: Sequence[str],
    options: dict[str, Any],
    repeats: int,
    *,
    behind_work: bool = False,
) -> list[Row]:
    """All rows of one case; with ``behind_work``, also the times of steps that a GPU comes to from other work."""
    mode = case.mode
    inputs = head.make_inputs(case)
    exact = head.truth(inputs, case.loss)
    torch.compiler.reset()
    steps: dict[str, Callable[[], Any]] = {}
    rows: list[Row] = []
    for provider in providers:
        loss = head.make_loss(provider, options, case)
        step = steps[provider] = head.make_step(loss, inputs, training=case.training)
        for name, error in head.errors(step(), inputs, exact).items():
            metric = f"relative_error_{name}"
            rows.append(Row.of_value(error, kernel=KERNEL, provider=provider, mode=mode, metric=metric))
    del exact
    steps[FLOORS[case.training]] = make_products(inputs, training=case.training)
    timings = measure.times_in_rotation(steps, case.device, repeats=repeats)
    rows += [Row.of_timing(timing, kernel=KERNEL, provider=name, mode=mode) for name, timing in timings.items()]
    if behind_work:
        behind, host = busy.times_behind_work(steps, case.device, repeats=repeats)
        rows += busy.host_rows(KERNEL, mode, host)
        rows += [
            Row.of_timing(timing, kernel=KERNEL, provider=name, mode=mode, metric="time_behind_work_s")
            for name, timing in behind.items()
        ]
    del steps, inputs
    if case.graphs:  # whose memory is taken once, and kept
        return rows
    peak_memory = head.peak_memory_in_own_process if case.device == "cpu" else head.peak_memory
    for provider in providers:
        peak = peak_memory(case, provider, options)
        above = {"peak_extra_bytes": peak, "peak_extra_above_gradients_bytes": peak - case.gradient_bytes}
        for metric, size in above.items():
            rows.append(Row.of_value(size, kernel=KERNEL, provider=provider, mode=mode, metric=metric))
    return rows


def case_table(mode: str, rows: Sequence[Row]) -> Table:
    """The providers of one case, with ratios to eager, Inductor and the floor."""
    values = {(row.provider, row.metric): row for row in rows}
    floor = next(row.provider for row in rows if row.provider in FLOORS.values())

    def ratio(provider: str, metric: str, base: str) -> str:
        if (provider, metric) not in values or (base, metric) not in values:
            return ""
        return f"{values[provider, metric].p50 / values[base, metric].p50:.3f}"

    def show(provider: str, metric: str, form: str, unit: float = 1.0) -> str:
        return format(values[provider, metric].p50 / unit, form) if (provider, metric) in values else ""

    table = Table(title=mode, title_justify="left")
    table.add_column("provider")
    for heading in (
        "ms (p20 to p80)",
        "x eager",
        "x inductor",
        "x floor",
        "host ms",
        "ms behind work",
        "x inductor",
        "extra MiB",
        "above grads",
        "x eager",
    ):
        table.add_column(heading, justify="right")
    gradients = [name for name in head.GRADIENTS if any(row.metric == f"relative_error_{name}" for row in rows)]
    table.add_column(f"error: {', '.join(('loss', *gradients))}", justify="right")
    for provider in dict.fromkeys(row.provider for row in rows):
        time = values[provider, "time_s"]
        table.add_row(
            provider,
            f"{time.p50 * 1e3:.2f} ({time.p20 * 1e3:.2f} to {time.p80 * 1e3:.2f})",
            *(ratio(provider, "time_s", base) for base in ("eager", "inductor", floor)),
            show(provider, "host_s", ".2f", 1e-3),
            show(provider, "time_behind_work_s", ".2f", 1e-3),
            ratio(provider, "time_behind_work_s", "inductor"),
            show(provider, "peak_extra_bytes", ".0f", 2**20),
            show(provider, "peak_extra_above_gradients_bytes", ".0f", 2**20),
            ratio(provider, "peak_extra_bytes", "eager"),
            " ".join(show(provider, f"relative_error_{name}", ".1e") for name in ("loss", *gradients)).strip(),
        )
    return table


def bars(rows: Sequence[Row]) -> list[str]:
    """One line for each of ``CPU_BARS`` and mode that both providers were measured in."""
    values = {(row.mode, row.provider, row.metric): row.p50 for row in rows}
    lines = []
    for (mode, provider, metric), value in values.items():
        for barred, base, limit in CPU_BARS:
            if provider == "structfly" and metric == barred and (mode, base, metric) in values:
                ratio = value / values[mode, base, metric]
                word = "met" if ratio <= limit else "MISSED"
                lines.append(f"{word}: {metric} {ratio:.3f} x {base}'s, at most {limit:.3f} wanted ({mode})")
    return lines


def provider(name: str) -> str:
    """A provider's name, checked."""
    if name in PROVIDERS or name in PEERS or re.fullmatch(r"structfly@\S+", name):
        return name
    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join((*PROVIDERS, *PEERS))} and not structfly@SIZE")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is not given depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    shape = sizes("rows x features x classes")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="NxHxV", help="rows x features x classes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tf32", action="store_true", help="float32 products may round their operands to TF32")
    parser.add_argument("--transposed", action="store_true", help="store the weight (features, classes)")
    parser.add_argument("--ignored", type=float, help="share of rows with target -100")
    parser.add_argument("--logits", nargs="+", choices=("random", "trained"), default=["random"])
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=["plain"])
    parser.add_argument("--passes", nargs="+", choices=("training", "evaluation"), default=["training"])
    parser.add_argument(
        "--providers",
        nargs="+",
        type=provider,
        help=f"{', '.join((*PROVIDERS, *PEERS))}, or structfly@SIZE: with that budget.loss_memory, e.g. 600MiB",
    )
    parser.add_argument("--options", type=json.loads, default={}, help="structfly's options, as JSON")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--behind-work", action="store_true", help="also time steps that a GPU comes to from other work"
    )
    parser.add_argument(
        "--graphs", action="store_true", help="compiled steps are CUDA graphs, whose memory is not measured"
    )
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    chosen = parser.parse_args(arguments)
    fill_in(chosen, DEFAULTS[chosen.device])
    if chosen.behind_work and chosen.device != "cuda":
        parser.error("--behind-work is for GPUs; a CPU works on one call at a time")
    if chosen.graphs and chosen.device != "cuda":
        parser.error("--graphs is for GPUs; a CPU has no CUDA graphs")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    chosen = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 170)
    torch.set_float32_matmul_precision(head.precision(tf32=chosen.tf32))
    rate = matmul_rate(chosen.device, chosen.dtype, chosen.matmul, chosen.repeats)
    console.print(f"{rate.mode} matmul: {rate.p50 * 1e-12:.3g} TFLOP/s")
    environment = measure.environment(chosen.device)
    command = recording.command_line("benchmarks.linear_cross_entropy", arguments or sys.argv[1:])
    rows: list[Row] = []
    for n, h, v in chosen.shapes:
        for logits, loss, passes in itertools.product(chosen.logits, chosen.loss, chosen.passes):
            case = Case(
                rows=n,
                features=h,
                classes=v,
                dtype=chosen.dtype,
                device=chosen.device,
                logits=logits,
                ignored=chosen.ignored,
                loss=loss,
                training=passes == "training",
                transposed=chosen.transposed,
                tf32=chosen.tf32,
                graphs=chosen.graphs,
            )
            with torch._dynamo.config.patch(recompile_limit=64):  # the providers compile one function
                measured = measure_case(
                    case, chosen.providers, chosen.options, chosen.repeats, behind_work=chosen.behind_work
                )
            console.print(case_table(measured[0].mode, measured))
            rows += measured
            if chosen.output:  # after each, so that a run that is stopped leaves what it found
                recording.write(chosen.output, [rate, *rows], environment=environment, command=command)
    if chosen.device == "cpu":
        for line in bars([row for row in rows if row.mode == CPU_BARRED]):
            console.print(line, highlight=False)
    console.print(" | ".join(f"{key} {value}" for key, value in environment.items()), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
