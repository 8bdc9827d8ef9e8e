"""What a device can do, as far as the cost model needs to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceModel:
    """What kind of device it is.

    Attributes:
        name: as its driver gives it.
        capability: a CUDA device's compute capability, None for a CPU.
    """

    name: str
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class DeviceProfile:
    """Rates of one device.

    Attributes:
        name: the device, for reports.
        kind: "cpu" or "cuda".
        capability: a CUDA device's compute capability, None for a CPU.
        matrix_rate: floating-point operations a second of large matrix products, by operand dtype.
        bandwidth: bytes a second through device memory.
        launch_seconds: time of the smallest kernel or ATen call.
        call_seconds: extra time of an opaque op's call from compiled code.
        half_rate_rows: a matrix product whose short side is r runs at ``matrix_rate * r / (r + half_rate_rows)``.
        fast_rows: rows from which a chunk's matrix products run near ``matrix_rate``.
        workspace_cap: bytes the loss head's default workspace does not exceed.
        processors: multiprocessors of a GPU, threads of a CPU.
        generated_products: products generated from templates are known to run well on it.
    """

    name: str
    kind: str
    capability: tuple[int, int] | None
    matrix_rate: Mapping[torch.dtype, float]
    bandwidth: float
    launch_seconds: float
    call_seconds: float
    half_rate_rows: int
    fast_rows: int
    workspace_cap: int
    processors: int
    generated_products: bool

    @property
    def model(self) -> DeviceModel:
        """What kind of device it is of."""
        return DeviceModel(self.name, self.capability)

    def rate(self, dtype: torch.dtype) -> float:
        """The matrix rate of ``dtype``, of float32 for a dtype the profile does not list."""
        return self.matrix_rate.get(dtype, self.matrix_rate[torch.float32])
