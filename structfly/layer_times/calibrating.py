"""``structfly.time_layers``: time layers before they are needed, and keep what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from structfly.errors import ArgumentError, UnsupportedError
from structfly.layer_times import store
from structfly.layer_times.known import SPREAD, LayerTimes
from structfly.layer_times.rates import measured_rates, profile_on
from structfly.layer_times.store import (
    DeviceRates,
    TimedLayer,
    add_times,
    origin_on,
    precision_of,
    read_times,
    write_times,
)
from structfly.patterns.structures import OFFERED, STRUCTURES
from structfly.records.layer import LayerSizes, Passes, Shape


@dataclass(frozen=True)
class LayerTimesReport:
    """What :func:`time_layers` measured.

    Attributes:
        rates: of the device.
        layers: what was measured now; what the file had before is not measured again.
        refused: how many measurements were left out, for the time was up, or memory was short.
        path: the file that they are kept in.
    """

    rates: DeviceRates
    layers: tuple[TimedLayer, ...]
    refused: int
    path: Path

    def __str__(self) -> str:
        rates = self.rates
        lines = [f"Times of layers on {rates.device}"]
        lines += [f"products in {name}: {rate / 1e12:.4g} TFLOP/s" for name, rate in rates.matrix_rate.items()]
        lines += [
            f"memory: {rates.bandwidth / 1e9:.4g} GB/s",
            f"the smallest call: {rates.launch_seconds * 1e6:.3g} us",
        ]
        for each in self.layers:
            what = f"{each.in_features}x{each.out_features}, {each.tokens} tokens, {each.precision}, {each.passes}"
            lines.append(f"\n{what}: dense {each.dense * 1e6:.4g} us")
            lines += [f"{time:8.3f} of dense  {structure!r}" for structure, time in each.relative.items()]
        if self.refused:
            lines.append(f"\n{self.refused} measurements were left out: the time was up, or memory was short.")
        return "\n".join([*lines, "", f"Kept in {self.path}."])


def time_layers(
    layers: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    structures: Sequence[str] = OFFERED,
    passes: Sequence[Passes] = ("forward",),
    seconds: float = 300.0,
    path: Path | str | None = None,
) -> LayerTimesReport:
    """Measure the device's rates, unless the file has them, then time dense layers, and beside each five settings of
    every structure, spread over its menu.

    Plans under a budget of time take what is measured here, at these numbers of tokens and interpolated between two
    that are no more than an octave apart.  What the file has already of this device is not measured again.

    Args:
        layers: (inputs, outputs) of each.
        tokens: rows of their inputs.
        dtype: of weights and inputs.
        device: a CPU or a CUDA device.
        structures: names of those to time.
        passes: "forward", a pass without gradients, "training", forward and backward, or both.
        seconds: of measuring; no measurement begins when so many have been spent.  What is most wanted comes first for
            all layers: the dense ones, then the middle of each menu.
        path: the file, or None for the user's.

    Raises:
        ArgumentError: an argument is wrong.
        ConfigError: the file has something wrong in it.
        StructflyError: the file cannot be written.
        UnsupportedError: there is no such device, or nothing can be measured on it.
    """
    place = torch.device(device)
    _check(layers, tokens, structures, passes, seconds)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("there is no CUDA device; name another one, such as cpu")
    origin, file = origin_on(place), store.user_path() if path is None else Path(path)
    precision = precision_of(dtype, place.type)
    if precision is None:
        raise ArgumentError(f"dtype is {dtype}; allowed: float64, float32, bfloat16 and float16")
    offered = {Shape(LayerSizes(*sizes), dtype): [STRUCTURES[name] for name in structures] for sizes in layers}
    write_times(
        file, read_times(file)
    )  # now, rather than after minutes, is the time to learn that it cannot be written
    rates = read_times(file).rates_of(origin)
    if rates is None or precision not in rates.matrix_rate:  # other rates would spread settings otherwise
        rates = measured_rates(origin, place, [dtype])
        write_times(file, read_times(file).with_rates(rates))
    known = [each for each in read_times(file).layers if each.origin == origin]
    profile = profile_on(place, origin, read_times(file))
    found: list[TimedLayer] = []
    refused, left = 0, seconds
    for each in passes:
        times = LayerTimes(place, profile, known, passes=each, seconds=left)
        for rounds in range(len(SPREAD)):
            for count in tokens:
                times.spread(offered, count, rounds=rounds + 1)
        found += times.entries()
        refused, left = refused + len(times.refused), left - times.spent
        add_times(file, times.entries())
    return LayerTimesReport(rates, tuple(found), refused, file)


def _check(
    layers: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    structures: Sequence[str],
    passes: Sequence[Passes],
    seconds: float,
) -> None:
    for problem in _problems(layers, tokens, structures, passes, seconds):
        raise ArgumentError(problem)


def _problems(
    layers: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    structures: Sequence[str],
    passes: Sequence[Passes],
    seconds: float,
) -> Iterator[str]:
    if not layers or not tokens:
        yield f"{'tokens' if layers else 'layers'} is empty; give at least one"
    for sizes in layers:
        if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
            yield f"a layer is {sizes!r}; allowed: inputs and outputs, both above 0"
    for count in tokens:
        if not isinstance(count, int) or count < 1:
            yield f"tokens has {count!r}; allowed: whole numbers above 0"
    for name in structures:
        if name not in STRUCTURES:
            yield f"there is no structure {name!r}; there are {', '.join(STRUCTURES)}"
    for each in passes:
        if each not in get_args(Passes):
            yield f"passes has {each!r}; allowed: {', '.join(get_args(Passes))}"
    if not seconds > 0:
        yield f"seconds is {seconds!r}; allowed: a number above 0"
