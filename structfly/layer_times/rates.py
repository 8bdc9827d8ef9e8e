"""What a device was measured to do: the rates that the roofline predicts layers' times from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from structfly import measure
from structfly.layer_times.store import DeviceRates, Origin, Precision, TimesFile, precision_of, shipped_files
from structfly.lowering.device_profile import device_profile
from structfly.records import DeviceProfile
from structfly.records.layer import DTYPES

# Large enough to reach what the device can do, and small enough for a second.
_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square product
_COPIED = {"cuda": 2**29, "cpu": 2**26}  # bytes, beyond any cache that products of layers stay in


def measured_rates(origin: Origin, device: torch.device, dtypes: Sequence[torch.dtype]) -> DeviceRates:
    """Time a large product of each dtype, a large copy and the smallest call; no mode that the caller stands in, and no
    random number that it draws, is touched."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        rates: dict[Precision, float] = {}
        for dtype in dtypes:
            precision, side = precision_of(dtype, device.type), _SIDE[device.type]
            if precision is not None:
                operand = torch.ones(side, side, dtype=dtype, device=device)
                rates[precision] = 2 * side**3 / _seconds(partial(torch.mm, operand, operand), device)
        source = torch.ones(_COPIED[device.type], dtype=torch.uint8, device=device)
        target, one = torch.empty_like(source), torch.ones(1, device=device)
        bandwidth = 2 * source.numel() / _seconds(lambda: target.copy_(source), device)
        launch = _seconds(lambda: one + one, device)
    return DeviceRates(**origin._asdict(), matrix_rate=rates, bandwidth=bandwidth, launch_seconds=launch)


def profile_on(device: torch.device, origin: Origin, users: TimesFile) -> DeviceProfile:
    """The profile that comes with structfly, with rates that were measured in the place of its own: those of a shipped
    file, and over them the user's."""
    profile = device_profile(device)
    shipped = [each for file in shipped_files() for each in file.devices if each.device == origin.device]
    for each in (*shipped, *(each for each in users.devices if each.origin == origin)):
        named = {dtype: precision_of(dtype, device.type) for dtype in DTYPES}
        rates = {dtype: each.matrix_rate[name] for dtype, name in named.items() if name in each.matrix_rate}
        profile = replace(
            profile,
            matrix_rate={**profile.matrix_rate, **rates},
            bandwidth=each.bandwidth,
            launch_seconds=each.launch_seconds,
        )
    return profile


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    return measure.median_time(call, device, repeats=5, warmups=2).median
