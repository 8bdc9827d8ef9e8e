"""The steps of a recorded call."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from structfly.lowering.cuda_driver import KernelLauncher, check, driver
from structfly.lowering.direct_launch import Parameters
from structfly.lowering.replay.values import Constant, Frame, Value, View, tensors_in

_NOW = nullcontext()  # the stream that is replayed on is the current one
_MAP_ALIGNMENT = 64  # bytes: what CUDA's driver asks of a tensor map


class Step(Protocol):
    """What is done in each replay.

    Attributes:
        memories: those that it reads, writes or makes.
        beside: the stream that it runs on, None for the one that is replayed on.
    """

    @property
    def memories(self) -> frozenset[int]: ...

    @property
    def beside(self) -> torch.cuda.Stream | None: ...

    def __call__(self, frame: Frame, /) -> None: ...


class Call:
    """A call of a function, an operation of torch for one.

    Args:
        function: what is called.
        arguments, keywords: what it takes.
        made: the memories that the tensors it gives make, None for those that lie in others.
        beside: the stream.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Value],
        keywords: Mapping[str, Value],
        made: Sequence[int | None],
        beside: torch.cuda.Stream | None,
    ) -> None:
        self._function, self.beside = function, beside
        self._arguments = [each.value if isinstance(each, Constant) else None for each in arguments]
        self._varying = [(place, each) for place, each in enumerate(arguments) if not isinstance(each, Constant)]
        self._keywords = {name: each.value if isinstance(each, Constant) else None for name, each in keywords.items()}
        self._varying_keywords = [(name, each) for name, each in keywords.items() if not isinstance(each, Constant)]
        self._made = [(place, memory) for place, memory in enumerate(made) if memory is not None]
        read = (each.memories for each in (*arguments, *keywords.values()))
        self.memories = frozenset().union(*read, (memory for _, memory in self._made))

    def __call__(self, frame: Frame) -> None:
        arguments, keywords = self._arguments.copy(), self._keywords
        for place, value in self._varying:
            arguments[place] = value.of(frame)
        if self._varying_keywords:
            keywords = {**keywords, **{name: value.of(frame) for name, value in self._varying_keywords}}
        with _NOW if self.beside is None else torch.cuda.stream(self.beside):
            given = self._function(*arguments, **keywords)
        if self._made:
            tensors = tensors_in(given)
            for place, memory in self._made:
                frame.hold(memory, tensors[place])


class Allocation:
    """A tensor without numbers, made with less ado than by the operation that was called.

    Args:
        like: a tensor of the form.
        memory: what it makes.
        beside: the stream.
    """

    def __init__(self, like: Tensor, memory: int, beside: torch.cuda.Stream | None) -> None:
        self._shape, self._strides, self._dtype, self._device = like.shape, like.stride(), like.dtype, like.device
        self._memory, self.memories, self.beside = memory, frozenset((memory,)), beside

    def __call__(self, frame: Frame) -> None:
        with _NOW if self.beside is None else torch.cuda.stream(self.beside):
            made = torch.empty_strided(self._shape, self._strides, dtype=self._dtype, device=self._device)
        frame.hold(self._memory, made)


class Zeros:
    """Zeros that are written by CUDA's driver.

    Args:
        view: contiguous memory.
        beside: the stream.
    """

    def __init__(self, view: View, beside: torch.cuda.Stream | None) -> None:
        self._memory, self._offset, self.memories, self.beside = view.memory, view.offset, view.memories, beside
        self._bytes = view.shape.numel() * view.dtype.itemsize
        self._set: Callable[..., int] = driver().cuMemsetD8Async

    def __call__(self, frame: Frame) -> None:
        if not self._bytes:
            return
        stream = frame.stream if self.beside is None else self.beside.cuda_stream
        address = frame.addresses[self._memory] + self._offset
        check(self._set(address, 0, self._bytes, stream), "writing zeros")


class KernelLaunch:
    """A launch by CUDA's driver, with parameters of its own that are changed only where an address did.

    Args:
        parameters: the launch's.
        views: what lies at each of their addresses.
        beside: the stream.
    """

    def __init__(self, parameters: Parameters, views: Sequence[View], beside: torch.cuda.Stream | None) -> None:
        self.beside, self._kernel = beside, parameters.kernel
        self._side = None if beside is None else beside.cuda_stream
        space = ctypes.create_string_buffer(len(parameters.packed) + _MAP_ALIGNMENT)
        self._begin = -ctypes.addressof(space) % _MAP_ALIGNMENT
        self._buffer = space
        struct.pack_into(f"{len(parameters.packed)}s", space, self._begin, parameters.packed)
        at = ctypes.addressof(space) + self._begin
        self._launch = KernelLauncher(parameters.program, at, len(parameters.packed))
        self._addresses = [
            (view.memory, self._begin + place.offset, view.offset, place.in_map)
            for view, place in zip(views, parameters.addresses, strict=True)
        ]
        self._memories = sorted({view.memory for view in views})
        self._known: list[int] = []
        self.memories = frozenset(self._memories)

    def __call__(self, frame: Frame) -> None:
        addresses = frame.addresses
        now = [addresses[memory] for memory in self._memories]
        if now != self._known:
            self._move(addresses)
            self._known = now
        self._launch(frame.stream if self._side is None else self._side)

    def _move(self, addresses: Sequence[int]) -> None:
        self._known = []  # of which nothing is right if the driver refuses one
        for memory, place, offset, in_map in self._addresses:
            address = addresses[memory] + offset
            if in_map:
                at = ctypes.addressof(self._buffer) + place
                check(driver().cuTensorMapReplaceAddress(at, address), "moving a tensor map")
            else:
                struct.pack_into("=Q", self._buffer, place, address)


class _Order:
    """The order of two streams: one waits for what has been launched in the other.

    Args:
        beside: the stream that is not replayed on.
    """

    memories: frozenset[int] = frozenset()

    def __init__(self, beside: torch.cuda.Stream) -> None:
        self.beside, self._event = beside, _Event()


class Fork(_Order):
    """The stream beside begins to work, after what has been launched so far."""

    def __call__(self, frame: Frame) -> None:
        self._event.between(frame.stream, self.beside.cuda_stream)


class Join(_Order):
    """The stream that is replayed on waits for the one beside, and has all to itself again."""

    def __call__(self, frame: Frame) -> None:
        self._event.between(self.beside.cuda_stream, frame.stream)


class _Event:
    """One that is recorded again and again: a wait is for what was recorded last before it."""

    def __init__(self) -> None:
        self._torch = torch.cuda.Event()
        self._torch.record()  # which makes it
        self._record, self._wait = driver().cuEventRecord, driver().cuStreamWaitEvent

    def between(self, earlier: int, later: int) -> None:
        """What is launched in the one stream from now on waits for what has been in the other."""
        event = self._torch.cuda_event
        check(self._record(event, earlier), "recording an event")
        check(self._wait(later, event, 0), "waiting for an event")
