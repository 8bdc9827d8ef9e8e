"""``structfly.tune``: time the tiles of the loss head's generated products on a device, and keep the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from structfly.errors import ArgumentError, UnsupportedError
from structfly.lowering.device_profile import device_profile
from structfly.lowering.gemm import TORCH_MM, Cut
from structfly.lowering.head.chunks import row_stride
from structfly.lowering.linear_cross_entropy.tiles import (
    PRODUCTS,
    HeadClass,
    HeadTiles,
    head_class,
    shipped_head_tiles,
)
from structfly.lowering.linear_cross_entropy.tuning import HeadShape, HeadTimer
from structfly.lowering.tuning.choice import choices_are_made
from structfly.lowering.tuning.search import Search, search
from structfly.lowering.tuning.table import Table, read_user_table, write_user_table
from structfly.ops.plan import softcap_steps
from structfly.records import DeviceProfile


@dataclass(frozen=True)
class TuningReport:
    """What :func:`tune` tried and chose.

    Attributes:
        device: its name.
        shapes: of the heads, in order.
        searches: one for each product of each shape, in the order of the shapes.
        path: the table that the choices are kept in.
        in_effect: whether this process takes them, too; otherwise those that start later do.
    """

    device: str
    shapes: tuple[HeadShape, ...]
    searches: tuple[tuple[Search, ...], ...]
    path: Path
    in_effect: bool

    def __str__(self) -> str:
        lines = [f"Tiles of generated products on {self.device}"]
        for shape, searches in zip(self.shapes, self.searches, strict=True):
            size = f"{shape.rows}x{shape.hidden}x{shape.classes}"
            lines.append(f"\n{size}{', weight transposed' if shape.transposed else ''}{shape.chain and ', softcap'}")
            for name, found in zip(PRODUCTS, searches, strict=True):
                lines += _described(name, found)
        here = "this process" if self.in_effect else "processes that start from now on"
        return "\n".join([*lines, "", f"Kept in {self.path}; {here} will use them."])


def tune(
    shapes: Sequence[tuple[int, int, int]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    transposed: bool = False,
    softcap: float | None = None,
    seconds: float = 300.0,
) -> TuningReport:
    """Time candidate tiles for each generated product of loss heads, and keep the fastest in the user's table.

    Nothing else ever tunes.  Products of one class share an entry, so one shape stands for all whose hidden units and
    classes round up to the same powers of two.  Tiles change the order of sums, and with it the last bits of results: a
    process that has made a product keeps to what it has read.

    Args:
        shapes: (rows, hidden units, classes) of each head.
        dtype: of hidden states and weight.
        device: a CUDA device.
        transposed: whether the weights lie as (hidden units, classes).
        softcap: of the heads' logits; any number stands for all.
        seconds: bounds the time in all; each product gets an equal share of what is left, and one trial at least.

    Raises:
        ArgumentError: a shape, the dtype or the time is not one that can be tuned.
        ConfigError: the user's table has something wrong in it.
        StructflyError: the table cannot be written.
        UnsupportedError: there is no such CUDA device.
    """
    _check(shapes, dtype, seconds)
    place = torch.device(device)
    if place.type != "cuda" or not torch.cuda.is_available():
        there = "there is no CUDA device" if place.type == "cuda" else f"device is {str(device)!r}"
        raise UnsupportedError(f"{there}; products are generated, and tuned, on CUDA devices only")
    profile = device_profile(place)
    heads = tuple(HeadShape(*shape, transposed, softcap_steps(softcap)) for shape in shapes)
    table, ends = read_user_table(), time.monotonic() + seconds
    all_searches = []
    path = write_user_table(table)  # now, rather than after minutes, is the time to learn that it cannot be written
    for number, shape in enumerate(heads):
        kind, timer = _prepared(shape, place, profile)
        until = time.monotonic() + (ends - time.monotonic()) / (len(heads) - number)
        searches = search_products(kind, timer.seconds, table, until=until)
        del timer
        table = table.with_choices([(found.product, found.chosen) for found in searches if found.chosen is not None])
        path = write_user_table(table)
        all_searches.append(searches)
    return TuningReport(profile.name, heads, tuple(all_searches), path, in_effect=not choices_are_made())


def search_products(
    kind: HeadClass,
    seconds_of: Callable[[str, HeadTiles], float],
    table: Table,
    *,
    until: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Search, ...]:
    """Search each of a head's products, starting from what is shipped and what ``table`` has.

    Args:
        seconds_of: the time of a product's launch, by its name, where the head has these tiles.
        until: when the last trial may begin, by ``clock``.
    """
    shipped = shipped_head_tiles(kind)
    searches = []
    for number, name in enumerate(PRODUCTS):
        product = getattr(kind, name)
        found = table.find(product)
        start = [getattr(shipped, name), *([] if found is None else [found])]
        if "every row" in product.hooks:
            start += [TORCH_MM, shipped.hidden_product]

        def with_these(tiles: Cut, name: str = name) -> float:
            return seconds_of(name, shipped.with_one(name, tiles))

        share = max(until - clock(), 0.0) / (len(PRODUCTS) - number)
        searches.append(search(product, start, with_these, seconds=share, clock=clock))
    return tuple(searches)


def _prepared(shape: HeadShape, device: torch.device, profile: DeviceProfile) -> tuple[HeadClass, HeadTimer]:
    kind = head_class(
        profile.model,
        hidden=shape.hidden,
        classes=shape.classes,
        weight_row=shape.classes if shape.transposed else shape.hidden,
        nonlinear=bool(shape.chain),
    )
    # As many rows as a head has by default: a quarter of the logits, within the device's cap.
    workspace = min(shape.rows * row_stride(shape.classes) * 2 // 4, profile.workspace_cap)
    return kind, HeadTimer(shape, device, workspace, shipped_head_tiles(kind))


def _check(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, seconds: float) -> None:
    if not shapes:
        raise ArgumentError("shapes is empty; give (rows, hidden units, classes) of at least one head")
    for shape in shapes:
        if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ArgumentError(f"a shape is {shape!r}; allowed: rows, hidden units and classes, all above 0")
        if shape[1] % 8:
            raise ArgumentError(f"a shape has {shape[1]} hidden units; generated products take multiples of 8")
    if dtype != torch.bfloat16:
        raise ArgumentError(f"dtype is {dtype}; allowed: torch.bfloat16, which is what products are generated in")
    if not seconds > 0:
        raise ArgumentError(f"seconds is {seconds!r}; allowed: a number above 0")


def _described(name: str, found: Search) -> list[str]:
    """A product's trials, the chosen one marked."""
    product = found.product
    hooks = f" ({', '.join(product.hooks)})" if product.hooks else ""
    lines = [f"  {name}: {product.template}{hooks}, {product.layout}", "      m    n    k group parts warps stages"]
    for trial in found.trials:
        cut = trial.cut
        if cut == TORCH_MM:
            columns = f"{TORCH_MM:40}"
        else:
            columns = f"{cut.m:5}{cut.n:5}{cut.k:5}{cut.group:6}{cut.parts:6}{cut.warps:6}{cut.stages:7}"
        seconds = trial.problem.splitlines()[0] if trial.seconds is None else f"{trial.seconds * 1e3:9.3f} ms"
        lines.append(f"  {columns}  {seconds}{'  chosen' if cut == found.chosen else ''}")
    if found.chosen is None:
        lines.append("  nothing could be measured; what is shipped stays")
    if not found.complete:
        lines.append("  the time was up before everything was tried")
    return lines
