"""Train layers whose masks are learned, cut them to tiles, and see what that does to the loss and how full tiles are.

The task is the next byte of Python's standard library, from the window of bytes before it: their embeddings side by
side, then two layers of generalised block low rank, features -> features and features -> 4 features, each brought to
``--target`` of its dense multiply-adds while it trains.  Every tenth document is held out.

    python -m benchmarks.gblr_training --device cuda

The result holds the masks, one number a component: where its intervals begin and how long they are, in features.
:func:`layers_of` makes layers of such masks again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import recording
from benchmarks.recording import Row
from examples.sources import python_sources
from structfly import measure
from structfly.patterns.gblr_learned import GaudiGBLR
from structfly.patterns.structure import StructuredLinear
from structfly.patterns.width_budget import WidthBudget

KERNEL = "gblr_training"
LAYERS = ("narrow", "wide")
SIZES = {"cpu": {"window": 16, "embedding": 16, "batch": 512}, "cuda": {"window": 32, "embedding": 128, "batch": 2048}}
SIDES = ((128, 128), (64, 128), (128, 64), (64, 64), (32, 32), (32, 16))  # of tiles: features, components
_MULTIPLE = 128  # of components
_SHARPEST = 100.0  # sigma, before the masks become intervals
_EVALUATED = 65536  # held-out bytes
_THRESHOLD = 1e-3  # below which a mask counts as 0


class Window(nn.Module):
    """Logits (batch, 256) of the next byte, of the window (batch, window) of bytes before it."""

    def __init__(self, window: int, embedding: int, target: float) -> None:
        super().__init__()
        features = window * embedding
        self.embedding = nn.Embedding(256, embedding)
        self.narrow = learned(features, features, target)
        self.wide = learned(features, 4 * features, target)
        self.norms = nn.ModuleList([nn.LayerNorm(features), nn.LayerNorm(features), nn.LayerNorm(4 * features)])
        self.head = nn.Linear(4 * features, 256)

    def forward(self, window: Tensor) -> Tensor:
        hidden = self.norms[0](self.embedding(window).flatten(1))
        hidden = hidden + F.gelu(self.narrow(hidden))
        hidden = F.gelu(self.norms[2](self.wide(self.norms[1](hidden))))
        logits: Tensor = self.head(hidden)
        return logits


def learned(in_features: int, out_features: int, target: float) -> GaudiGBLR:
    """A layer that begins with full masks, at twice the target."""
    whole = 2 * target * in_features * out_features / (in_features + out_features)
    components = min(-(-round(whole) // _MULTIPLE) * _MULTIPLE, in_features, out_features)
    return GaudiGBLR(in_features, out_features, components)


class Bytes(NamedTuple):
    """The documents' bytes, one after another: uint8."""

    training: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, documents: Sequence[str]) -> Bytes:
        parts = [[text.encode() for at, text in enumerate(documents) if (at % 10 == 0) == held] for held in (0, 1)]
        training, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
        return cls(training, held_out)


def drawn(source: Tensor, window: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows (count, window) and the byte that follows each (count,), on the source's device."""
    starts = torch.randint(len(source) - window, (count, 1), generator=generator).to(source.device)
    found = source[starts + torch.arange(window + 1, device=source.device)].long()
    return found[:, :-1], found[:, -1]


def mixed(device: str) -> contextlib.AbstractContextManager[object]:
    """bfloat16 products on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


@torch.no_grad()
def held_out_loss(model: nn.Module, source: Tensor, window: int, device: str) -> float:
    """Mean over the same held-out bytes every time."""
    x, y = drawn(source, window, _EVALUATED, torch.Generator().manual_seed(1))
    with mixed(device):
        losses = [F.cross_entropy(model(a).float(), b) for a, b in zip(x.split(2048), y.split(2048), strict=True)]
    return torch.stack(losses).mean().item()


def sigma_at(step: int, steps: int) -> float:
    """From 1 to 100 over four fifths of the steps; then the masks are intervals."""
    share = step / (0.8 * steps)
    return _SHARPEST**share if share < 1 else math.inf


def train(model: Window, data: Bytes, chosen: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """Yields each step's number and loss."""
    generator = torch.Generator().manual_seed(chosen.seed)
    window = SIZES[chosen.device]["window"]
    layers = [getattr(model, name) for name in LAYERS]
    budgets = [WidthBudget(layer, chosen.target, rate=2 / chosen.steps) for layer in layers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, chosen.steps)
    for step in range(chosen.steps):
        for layer in layers:
            layer.anneal(sigma_at(step, chosen.steps))
        x, y = drawn(data.training, window, SIZES[chosen.device]["batch"], generator)
        with mixed(chosen.device):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for budget in budgets:
            budget.step()
        yield step, loss.item()


def intervals(shares: Tensor, features: int) -> list[float]:
    """In whole features."""
    return [float(each) for each in (shares.detach().double() * features).round().tolist()]


def rows_of_masks(name: str, layer: GaudiGBLR) -> list[Row]:
    """One row for each side's beginnings and lengths."""
    parts = {
        "output_starts": (layer.row_locations, layer.out_features),
        "output_lengths": (layer.row_widths, layer.out_features),
        "input_starts": (layer.column_locations, layer.in_features),
        "input_lengths": (layer.column_widths, layer.in_features),
    }
    rows = []
    for metric, (shares, features) in parts.items():
        samples = intervals(shares, features)
        p20, *_, p80 = statistics.quantiles(samples, n=5)
        mode = f"{layer.in_features} -> {layer.out_features}"
        p50 = statistics.median(samples)
        row = Row(
            kernel=KERNEL, provider=name, mode=mode, metric=metric, p20=p20, p50=p50, p80=p80, samples=tuple(samples)
        )
        rows.append(row)
    return rows


def density(layer: GaudiGBLR) -> float:
    """Entries under the masks, as a share of the dense weight's."""
    kept = sum(int((mask.abs() >= _THRESHOLD).sum()) for mask in layer.masks())
    return kept / layer.sizes.parameters


def layers_of(result: Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> dict[str, GaudiGBLR]:
    """Layers with the masks of a result's JSON, by name, their weights random."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for row in json.loads(result.read_text())["rows"]:
        if row["metric"].endswith(("_starts", "_lengths")):
            found.setdefault((row["provider"], row["mode"]), {})[row["metric"]] = torch.tensor(row["samples"])
    layers = {}
    for (name, mode), masks in found.items():
        in_features, out_features = map(int, mode.split(" -> "))
        layer = GaudiGBLR(in_features, out_features, len(masks["input_starts"]), bias=False, device=device, dtype=dtype)
        with torch.no_grad():
            layer.row_locations.copy_(masks["output_starts"] / out_features)
            layer.row_widths.copy_(masks["output_lengths"] / out_features)
            layer.column_locations.copy_(masks["input_starts"] / in_features)
            layer.column_widths.copy_(masks["input_lengths"] / in_features)
        layers[name] = layer
    return layers


def cut(layer: GaudiGBLR, tile: int, group: int) -> StructuredLinear:
    final = layer.finalise(tile, group, _THRESHOLD)
    assert isinstance(final, StructuredLinear)
    return final


def row(name: str, mode: str, metric: str, value: float) -> Row:
    return Row.of_value(value, kernel=KERNEL, provider=name, mode=mode, metric=metric)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--target", type=float, default=0.25, help="multiply-adds of each layer, of its dense one's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(given)
    console = Console(width=150, highlight=False)
    torch.manual_seed(chosen.seed)
    sizes = SIZES[chosen.device]
    data = Bytes(*(part.to(chosen.device) for part in Bytes.of(python_sources())))
    model = Window(sizes["window"], sizes["embedding"], chosen.target).to(chosen.device)
    start = time.perf_counter()
    for step, loss in train(model, data, chosen):
        if step % 100 == 0:
            costs = ", ".join(f"{WidthBudget(getattr(model, name), 1.0, 1.0).cost():.3f}" for name in LAYERS)
            console.print(f"step {step}: loss {loss:.4f}, costs {costs}, {time.perf_counter() - start:.0f} s")
    mode = f"{chosen.steps} steps"
    before = held_out_loss(model, data.held_out, sizes["window"], chosen.device)
    rows = [row("model", mode, "seconds", time.perf_counter() - start), row("model", mode, "held_out_loss", before)]
    layers: dict[str, GaudiGBLR] = {name: getattr(model, name) for name in LAYERS}
    for name, layer in layers.items():
        rows += [*rows_of_masks(name, layer), row(name, mode, "density", density(layer))]
    for tile, group in SIDES:
        mode = f"{chosen.steps} steps, tiles {tile} x {group}"
        for name, layer in layers.items():
            final = cut(layer, tile, group)
            setattr(model, name, final)
            filled = sum(final.factors[side].numel() for side in ("left", "right")) / layer.sizes.parameters
            rows += [row(name, mode, "filled_density", filled), row(name, mode, "fill", density(layer) / filled)]
            console.print(f"{mode}, {name}: density {density(layer):.3f} in tiles of {filled:.3f}")
        after = held_out_loss(model, data.held_out, sizes["window"], chosen.device)
        rows += [row("model", mode, "held_out_loss", after), row("model", mode, "loss_change", after / before - 1)]
        console.print(f"{mode}: held-out loss {before:.5f} before, {after:.5f} after")
    if chosen.output:
        command = recording.command_line("benchmarks.gblr_training", given)
        recording.write(chosen.output, rows, environment=measure.environment(chosen.device), command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
