"""From a cost record to seconds: each stage takes the longest of its arithmetic, its traffic and a launch.

The roofline model is that of Williams, Waterman and Patterson (2009); Pixelfly's
``Cost_mem * N_blockmem + Cost_flop * N_flop`` is its block-sparse case.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from structfly.records import Cost, CostValues, DeviceProfile
from structfly.records.cost import at_sizes


def evaluate(cost: Cost, sizes: Mapping[sympy.Symbol, int], profile: DeviceProfile) -> CostValues:
    """Seconds and bytes of ``cost`` on ``profile``'s device where each symbol has its example size."""
    seconds = float(cost.opaque_calls) * profile.call_seconds
    for stage in cost.stages:
        arithmetic = 0.0
        if stage.dtype is not None:
            slowdown = 1.0 + profile.half_rate_rows / max(at_sizes(stage.rows, sizes), 1.0)
            arithmetic = at_sizes(stage.flops, sizes) / profile.rate(stage.dtype) * slowdown
        traffic = at_sizes(stage.bytes, sizes) / profile.bandwidth
        launches = at_sizes(stage.launches, sizes)
        seconds += launches * max(arithmetic, traffic, profile.launch_seconds)
    return CostValues(seconds, int(at_sizes(cost.transient_bytes, sizes)), int(at_sizes(cost.saved_bytes, sizes)))
