"""Results on disk: a tidy CSV, one line a number, and a JSON with every raw sample beside it."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from structfly.measure import Timing


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number.

    Attributes:
        kernel: what is measured.
        provider: who does it.
        mode: under which conditions: shape, dtype, passes.
        metric: the quantity with its unit, such as "time_s".
        p20: its 20th percentile.
        p50: its median.
        p80: its 80th percentile.
        samples: the raw values, in the order they were taken; they go to the JSON alone.
    """

    kernel: str
    provider: str
    mode: str
    metric: str
    p20: float
    p50: float
    p80: float
    samples: tuple[float, ...]

    @classmethod
    def of_timing(cls, timing: Timing, *, kernel: str, provider: str, mode: str, metric: str = "time_s") -> Row:
        """A row of samples, seconds unless ``metric`` says otherwise."""
        return cls(
            kernel=kernel,
            provider=provider,
            mode=mode,
            metric=metric,
            p20=timing.p20,
            p50=timing.median,
            p80=timing.p80,
            samples=timing.samples,
        )

    @classmethod
    def of_value(cls, value: float, *, kernel: str, provider: str, mode: str, metric: str) -> Row:
        """A row of one number that was taken once."""
        percentiles = {"p20": value, "p50": value, "p80": value}
        return cls(kernel=kernel, provider=provider, mode=mode, metric=metric, samples=(value,), **percentiles)


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command that reproduces a run, without ``--output`` and ``--traces``: where results go is no part of it."""
    kept = list(arguments)
    for option in ("--output", "--traces"):
        while option in kept:
            position = kept.index(option)
            del kept[position : position + 2]
    return shlex.join(["python", "-m", module, *kept])


def write(output: Path, rows: Iterable[Row], *, environment: Mapping[str, str], command: str) -> list[Path]:
    """Write ``output`` with the endings .csv and .json, and return both paths."""
    rows = list(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    table, raw = (output.with_name(f"{output.name}.{ending}") for ending in ("csv", "json"))
    provenance = {**environment, "command": command}
    with table.open("w", newline="") as file:
        names = [name for name in Row.__dataclass_fields__ if name != "samples"]
        writer = csv.DictWriter(file, [*names, *provenance], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(row), **provenance} for row in rows)
    raw.write_text(json.dumps({**provenance, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return [table, raw]
