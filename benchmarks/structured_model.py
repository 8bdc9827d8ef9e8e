"""A training step of a deep model of structured layers: does the GPU wait for the host that launches its kernels?

The model is a stack of blocks like those of a Llama, with seven linears each, whose input and gradient are given: 32
blocks of 1536 hidden units and 4096 between are 224 linears of 0.9e9 parameters where they are dense.  A block is
compiled once for all of them.  A step is forward, backward and AdamW.  The trace of some steps, one after another, says
how long the GPU was idle because what comes next had not been launched; a step is GPU-bound if that is at most 5%.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import recording, structured_layers
from benchmarks.busy import host_seconds
from benchmarks.device_trace import profiled
from benchmarks.recording import Row
from benchmarks.structured_layers import DENSE, SETTINGS, Place, Provider
from examples.gpt import rotary_tables, rotate
from structfly import measure
from structfly.records.layer import LayerSizes

KERNEL = "structured_model"
HEAD_WIDTH = 64
MOST_WAITING = 0.05
PROVIDERS = (DENSE, *SETTINGS)
DEFAULTS = (
    DENSE,
    "pixelfly, grid 16, 3 factors, rank 128",
    "monarch, 4 blocks",
    "low rank, a quarter",
)
_PROFILED_STEPS = 3


@dataclass(frozen=True)
class Shape:
    """Of a model and its input."""

    blocks: int
    hidden: int
    between: int
    tokens: int
    dtype: str

    @property
    def mode(self) -> str:
        """The conditions in one line."""
        sizes = f"{self.blocks} blocks, {self.hidden} hidden units, {self.between} between"
        return f"{sizes}, {self.tokens} tokens, {self.dtype}, forward+backward+AdamW"


class Block(nn.Module):
    """Causal attention and a gated feed-forward layer, each normalised before and added to the residual stream."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, provider: Provider, place: Place) -> None:
        super().__init__()
        hidden, between = shape.hidden, shape.between
        inner, up, down = LayerSizes(hidden, hidden), LayerSizes(hidden, between), LayerSizes(between, hidden)
        self.norm_attention, self.norm_mlp = (
            nn.RMSNorm(hidden, device=place.device, dtype=place.dtype) for _ in range(2)
        )
        self.q, self.k, self.v, self.o = (provider.build(inner, place) for _ in range(4))
        self.gate, self.up = (provider.build(up, place) for _ in range(2))
        self.down = provider.build(down, place)
        for name, table in zip(("cos", "sin"), rotary_tables(shape.tokens, HEAD_WIDTH), strict=True):
            self.register_buffer(name, table.to(place.device, place.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, hidden) to the same."""
        h = self.norm_attention(x)
        q, k, v = (each(h).unflatten(-1, (-1, HEAD_WIDTH)).transpose(0, 1)[None] for each in (self.q, self.k, self.v))
        q, k = (rotate(each, self.cos, self.sin) for each in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended[0].transpose(0, 1).flatten(1))
        h = self.norm_mlp(x)
        y: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return y


class Model:
    """The blocks, compiled, with an optimizer; ``step`` trains them.

    Args:
        shape: of the model and its input.
        provider: makes and compiles the linear layers.
        device: "cpu" or "cuda".
        graph: whether steps can be captured in a CUDA graph.
    """

    def __init__(self, shape: Shape, provider: Provider, device: str, *, graph: bool = False) -> None:
        place = Place(device, getattr(torch, shape.dtype))
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(shape, provider, place) for _ in range(shape.blocks))
        for block in self.blocks:
            block.compile(backend=provider.backend, fullgraph=True, dynamic=False)
        self.optimizer = torch.optim.AdamW(self.blocks.parameters(), lr=1e-5, fused=True, capturable=graph)
        self.x, self.upstream = (
            torch.randn(shape.tokens, shape.hidden, device=device).to(place.dtype) for _ in range(2)
        )
        self.x.requires_grad_()

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(parameter.numel() for parameter in self.blocks.parameters())

    def step(self) -> None:
        """Forward, backward, AdamW."""
        y = self.x
        for block in self.blocks:
            y = block(y)
        y.backward(self.upstream)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None

    def captured(self) -> Callable[[], object]:
        """A step as one CUDA graph, which the host launches as a whole; after a step that was none."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def measure_model(
    shape: Shape, name: str, provider: Provider, device: str, repeats: int, traces: Path | None, graph: bool = False
) -> list[Row]:
    """All rows of one model, of steps as a CUDA graph where ``graph`` says so."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = Model(shape, provider, device, graph=graph)
    start = time.perf_counter()
    for _ in range(2):  # gradients of the first step, then with the optimizer's state
        model.step()
    if device == "cuda":
        torch.cuda.synchronize()
    values = {
        "first_steps_s": time.perf_counter() - start,
        "parameters": float(model.parameters),
        "graphs": float(counters["stats"]["unique_graphs"]),
    }
    step = model.captured() if graph else model.step
    timings = {"time_s": measure.median_time(step, device, repeats=repeats, warmups=1)}
    if device == "cuda":
        timings["host_s"] = measure.summarize([host_seconds(step) for _ in range(repeats)])
        keep = traces and traces / f"{name.replace(', ', '_').replace(' ', '-')}.json.gz"
        activity = profiled(step, _PROFILED_STEPS, keep)
        values |= {
            "kernels": activity.kernels / _PROFILED_STEPS,
            "kernels_s": activity.kernel_seconds / _PROFILED_STEPS,
            "busy_share": activity.busy_seconds / activity.span_seconds,
            "waiting_share": activity.waiting_share,
        }
    mode = f"{shape.mode}, a CUDA graph a step" if graph else shape.mode
    of = {"kernel": KERNEL, "provider": name, "mode": mode}
    rows = [Row.of_timing(timing, **of, metric=metric) for metric, timing in timings.items()]
    return rows + [Row.of_value(value, **of, metric=metric) for metric, value in values.items()]


def bound(values: Mapping[str, float]) -> str:
    """What a step is bound by, "" where no trace says it."""
    if "waiting_share" not in values:
        return ""
    return "GPU" if values["waiting_share"] <= MOST_WAITING else "HOST"


def table_of(rows: Sequence[Row]) -> Table:
    """One line a model."""
    table = Table(title=rows[0].mode, title_justify="left")
    table.add_column("layers")
    columns = {
        "parameters": ("1e9 parameters", 1e-9, ".3f"),
        "first_steps_s": ("first steps, s", 1, ".1f"),
        "graphs": ("graphs", 1, ".0f"),
        "time_s": ("step, ms", 1e3, ".2f"),
        "host_s": ("host, ms", 1e3, ".2f"),
        "kernels_s": ("kernels, ms", 1e3, ".2f"),
        "kernels": ("kernels", 1, ".0f"),
        "busy_share": ("busy", 1, ".1%"),
        "waiting_share": ("waiting for the host", 1, ".1%"),
    }
    for heading, *_ in columns.values():
        table.add_column(heading, justify="right")
    table.add_column("bound by")
    for provider in dict.fromkeys(row.provider for row in rows):
        values = {row.metric: row.p50 for row in rows if row.provider == provider}
        cells = (
            format(values[metric] * unit, form) if metric in values else ""
            for metric, (_, unit, form) in columns.items()
        )
        table.add_row(provider, *cells, bound(values))
    return table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1536, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--between", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--layers", nargs="+", choices=PROVIDERS, metavar="NAME", default=list(DEFAULTS))
    parser.add_argument("--graph", action="store_true", help="capture each step in a CUDA graph")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--traces", type=Path, help="a folder that the traces are kept in")
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    chosen = parser.parse_args(arguments)
    if chosen.hidden % HEAD_WIDTH:
        parser.error(f"--hidden is {chosen.hidden}; it must be a multiple of {HEAD_WIDTH}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parse_arguments(given)
    console = Console(width=None if sys.stdout.isatty() else 170)
    shape = Shape(chosen.blocks, chosen.hidden, chosen.between, chosen.tokens, chosen.dtype)
    known = {DENSE: structured_layers.dense(), **structured_layers.structured(None)}
    if chosen.traces:
        chosen.traces.mkdir(parents=True, exist_ok=True)
    environment = measure.environment(chosen.device)
    command = recording.command_line("benchmarks.structured_model", given)
    rows: list[Row] = []
    for name in chosen.layers:
        rows += measure_model(shape, name, known[name], chosen.device, chosen.repeats, chosen.traces, chosen.graph)
        if chosen.output:
            recording.write(chosen.output, rows, environment=environment, command=command)
    console.print(table_of(rows))
    console.print(" | ".join(f"{key} {value}" for key, value in environment.items()), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
