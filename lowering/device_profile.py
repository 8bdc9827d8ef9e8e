"""Shipped device profiles: what the cost model assumes about a device that nobody has measured.

The H200's rates are a little below those of large products and copies under benchmarks/results; the other rows follow
the vendors' data in proportion, and unknown devices are taken to be slow, so that a rewrite is chosen for the work it
saves and not for a rate nobody has seen.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from structfly.lowering.precision import tf32_allowed
from structfly.records import DeviceModel, DeviceProfile

MIB = 2**20
_CPU_FLOPS_PER_THREAD = 50e9
_CPU_BANDWIDTH_PER_THREAD = 8e9
_CPU_BANDWIDTH_CAP = 100e9

# name prefix -> (16-bit rate, TF32 rate, float32 rate, float64 rate, bandwidth)
_CUDA_RATES = {
    "NVIDIA H200": (700e12, 350e12, 50e12, 50e12, 4.0e12),
    "NVIDIA H100": (700e12, 350e12, 50e12, 50e12, 2.8e12),
    "NVIDIA A100": (240e12, 120e12, 18e12, 18e12, 1.4e12),
}
_CUDA_OTHER = (60e12, 30e12, 12e12, 0.4e12, 0.5e12)


def device_profile(device: torch.device) -> DeviceProfile:
    """The profile of ``device``; reads its name, and for CPUs the number of threads torch may use."""
    return _cuda(device) if device.type == "cuda" else _cpu()


@lru_cache(maxsize=16)
def device_model(device: torch.device) -> DeviceModel:
    """The :attr:`~structfly.records.DeviceProfile.model` of the profile of ``device``."""
    return device_profile(device).model


def _cpu() -> DeviceProfile:
    threads = torch.get_num_threads()
    single = threads * _CPU_FLOPS_PER_THREAD
    return DeviceProfile(
        name=f"CPU, {threads} threads",
        kind="cpu",
        capability=None,
        matrix_rate={torch.float32: single, torch.float64: single / 2},
        bandwidth=min(threads * _CPU_BANDWIDTH_PER_THREAD, _CPU_BANDWIDTH_CAP),
        launch_seconds=5e-6,
        call_seconds=150e-6,
        half_rate_rows=48,
        fast_rows=256,
        workspace_cap=256 * MIB,
        processors=threads,
        generated_products=False,
    )


def _cuda(device: torch.device) -> DeviceProfile:
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    rates = next((row for prefix, row in _CUDA_RATES.items() if name.startswith(prefix)), _CUDA_OTHER)
    half, tf32, single, double, bandwidth = rates
    return DeviceProfile(
        name=name,
        kind="cuda",
        capability=capability,
        matrix_rate={
            torch.bfloat16: half,
            torch.float16: half,
            torch.float32: tf32 if tf32_allowed() else single,
            torch.float64: double,
        },
        bandwidth=bandwidth,
        launch_seconds=4e-6,
        call_seconds=60e-6,
        half_rate_rows=128,
        fast_rows=3072,
        workspace_cap=1024 * MIB,
        processors=torch.cuda.get_device_properties(device).multi_processor_count,
        generated_products=capability == (9, 0),
    )
