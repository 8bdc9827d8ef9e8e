"""What CUDA's driver is told in a replay."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from structfly.lowering import cuda_driver
from structfly.lowering.cuda_driver import Program
from structfly.lowering.direct_launch import Address, Parameters
from structfly.lowering.replay import steps
from structfly.lowering.replay.steps import Fork, Join, KernelLaunch, Zeros
from structfly.lowering.replay.values import Frame, View
from tests.lowering.drivers import NotingDriver

PROGRAM = Program(77, (5, 1, 1), 128, 4096, waits=True)
FIXED = (77, 5, 1, 1, 128, 1, 1, 4096)
STREAM, SIDE = 9, 11


@dataclass
class Driver(NotingDriver):
    """Notes all else in ``calls``; a tensor map is the address that it has, and zeros."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    refuses: str = ""

    def cuTensorMapReplaceAddress(self, at: int, address: int) -> int:  # noqa: N802
        assert at % 64 == 0
        self.calls.append(("moved", address))
        if self.refuses == "moved":
            return 1
        ctypes.memmove(at, struct.pack("=Q", address), 8)
        return 0

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> int:  # noqa: N802
        self.calls.append(("zeros", address, value, size, stream))
        return 0

    def cuEventRecord(self, event: int, stream: int) -> int:  # noqa: N802
        self.calls.append(("recorded", event, stream))
        return 0

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> int:  # noqa: N802
        self.calls.append(("waits", event, stream, flags))
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    for module in (cuda_driver, steps):
        monkeypatch.setattr(module, "driver", lambda: made)
    event = SimpleNamespace(cuda_event=55, record=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    return made


def frame(*addresses: int) -> Frame:
    made = Frame([], len(addresses), STREAM)
    made.addresses[:] = addresses
    return made


def view(memory: int, offset: int, *shape: int, dtype: torch.dtype = torch.float32) -> View:
    return View(memory, offset, dtype, torch.Size(shape), (1,) * len(shape))


def launch(beside: Any = None) -> KernelLaunch:
    """Of a map of 128 bytes, a number, and two addresses, the last of them in the memory of the map."""
    packed = struct.pack("=Q120xi4xQQ", 1, 42, 2, 3)
    places = [
        Address(0, torch.empty(0), True),
        Address(136, torch.empty(0), False),
        Address(144, torch.empty(0), False),
    ]
    kernel: Any = None
    parameters = Parameters(kernel, PROGRAM, packed, places)
    return KernelLaunch(parameters, [view(1, 0, 4), view(0, 16, 4), view(1, 8, 4)], beside)


def test_a_launch_has_the_addresses_of_its_own_tensors(driver: Driver) -> None:
    step = launch()
    for addresses in ((1024, 2048), (1024, 2048), (1024, 4096), (512, 4096)):
        step(frame(*addresses))
    assert driver.launches == [
        ((*FIXED, STREAM), struct.pack("=Q120xi4xQQ", second, 42, first + 16, second + 8))
        for first, second in ((1024, 2048), (1024, 2048), (1024, 4096), (512, 4096))
    ]
    assert all(driver.early)
    moved = [call[1] for call in driver.calls if call[0] == "moved"]
    assert moved == [2048, 4096, 4096]  # not where all lay where it did before


def test_a_launch_in_another_stream(driver: Driver) -> None:
    launch(SimpleNamespace(cuda_stream=SIDE))(frame(1024, 2048))
    assert driver.launches[-1][0] == (*FIXED, SIDE)


def test_what_the_driver_refuses_to_move_is_moved_again(driver: Driver) -> None:
    step = launch()
    driver.refuses = "moved"
    with pytest.raises(RuntimeError, match="moving a tensor map failed: CUDA error 1, no such thing"):
        step(frame(1024, 2048))
    driver.refuses = ""
    step(frame(1024, 2048))
    assert struct.unpack_from("=Q", driver.launches[-1][1]) == (2048,)


def test_zeros(driver: Driver) -> None:
    Zeros(view(1, 8, 3, 5, dtype=torch.bfloat16), None)(frame(0, 256))
    side: Any = SimpleNamespace(cuda_stream=SIDE)
    Zeros(view(0, 0, 7), side)(frame(64, 256))
    Zeros(view(0, 0, 0, 4), None)(frame(0, 256))  # of which there is no address
    assert driver.calls == [("zeros", 264, 0, 30, STREAM), ("zeros", 64, 0, 28, SIDE)]


def test_streams_wait_for_each_other(driver: Driver) -> None:
    side: Any = SimpleNamespace(cuda_stream=SIDE)
    Fork(side)(frame())
    Join(side)(frame())
    assert driver.calls == [
        ("recorded", 55, STREAM),
        ("waits", 55, SIDE, 0),
        ("recorded", 55, SIDE),
        ("waits", 55, STREAM, 0),
    ]
