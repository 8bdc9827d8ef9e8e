"""Plain square products: the rate of an idle device."""

from __future__ import annotations

import torch

from benchmarks.recording import Row
from structfly import measure


def matmul_rate(device: str, dtype: str, size: int, repeats: int) -> Row:
    """A square product of torch.mm, in operations a second."""
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    timing = measure.median_time(lambda: a @ b, device, repeats=repeats)
    rates = measure.summarize([2 * size**3 / seconds for seconds in timing.samples])
    return Row(
        kernel="matmul",
        provider="torch.mm",
        mode=f"{size}x{size}x{size} {dtype}",
        metric="rate_flop_per_s",
        p20=rates.p20,
        p50=rates.median,
        p80=rates.p80,
        samples=rates.samples,
    )
