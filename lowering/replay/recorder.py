"""What records a call: it sees every operation of torch, and is told of launches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from structfly.compat import TorchDispatchMode, storage_key, unseen_by_modes
from structfly.lowering.cuda_driver import driver
from structfly.lowering.direct_launch import Parameters
from structfly.lowering.replay.lookup import Lookup
from structfly.lowering.replay.steps import Allocation, Call, Fork, Join, KernelLaunch, Step, Zeros
from structfly.lowering.replay.values import Constant, Described, Several, Value, View, tensors_in

_READ_ON_THE_HOST = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_ZEROS = {
    torch.ops.aten.zero_.default,
    torch.ops.aten.zeros.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_zeros.default,
}


class Recorder(TorchDispatchMode):
    """Records what is called in its context.  It keeps no tensor alive but the inputs and what is looked up.

    Args:
        inputs: the tensors of the call that is recorded.

    Attributes:
        steps: what a replay does.
        lookups: what it looks up before.
        memories: how many there are; the first are those of the inputs, in order.
        why_not: why the call cannot be replayed, "" as long as it can.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.lookups: list[Lookup] = []
        self.why_not = ""
        self._device = inputs[0].device
        self._main = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        if self._device.type == "cuda" and driver() is None:
            self.why_not = "there is no CUDA driver that launches kernels directly"
        self._of_storage: dict[int, int] = {}
        self._begins: list[int] = []
        # As long as one of these is there, no other storage has the same address.
        self._held: list[StorageWeakRef] = []
        self._alive: list[Any] = [inputs]
        self._known = {id(tensor): self._add(tensor) for tensor in inputs}

    @property
    def memories(self) -> int:
        return len(self._begins)

    def __enter__(self) -> Recorder:
        _THREAD.recorder = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _THREAD.recorder = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in func.tags for tag in _READ_ON_THE_HOST):
            self._refuse(f"{func} reads on the host what a tensor holds")
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._refuse(f"{func} draws random numbers")
        return self._called(func, args, kwargs or {}, is_view=not func._schema.is_mutable)

    def call(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """Call a function that gives nothing, in this call and in each replay."""
        with unseen():
            self._called(function, arguments, {}, is_view=False)

    def launched(self, parameters: Parameters) -> None:
        """A kernel was launched, as it is to be in each replay."""
        views = [self._view(address.tensor) for address in parameters.addresses]
        if not self.why_not:
            self.steps.append(KernelLaunch(parameters, views, self._beside()))

    def forked(self, stream: torch.cuda.Stream) -> None:
        """From now on this stream works beside."""
        if not self.why_not:
            self.steps.append(Fork(stream))

    def joined(self, stream: torch.cuda.Stream) -> None:
        """It has been waited for."""
        if not self.why_not:
            self.steps.append(Join(stream))

    def found(self, look_up: Callable[..., Any], arguments: Sequence[Any], found: Any) -> None:
        """``look_up(*arguments)`` gave that, as it is to in each replay."""
        values = [self._itself(each) if isinstance(each, Tensor) else Constant(each) for each in arguments]
        if not self.why_not:
            memories = [self._add(tensor) for tensor in tensors_in(found)]
            self._known.update(zip(map(id, tensors_in(found)), memories, strict=True))
            self._alive.append(found)
            self.lookups.append(Lookup(look_up, values, found, memories))

    # ---------------------------------------------------------------------------------------------------- memories

    def _called(self, function: Callable[..., Any], arguments: Any, keywords: dict[str, Any], *, is_view: bool) -> Any:
        """Call it, and note that unless all that it did was to look at memories in another way."""
        values = [self.value(each) for each in arguments]
        named = {name: self.value(each) for name, each in keywords.items()}
        given = function(*arguments, **keywords)
        made = [self._made(tensor) for tensor in tensors_in(given)]
        if not self.why_not and not (is_view and given is not None and all(each is None for each in made)):
            self.steps += self._steps(function, values, named, given, made)
        return given

    def _steps(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Value],
        keywords: Mapping[str, Value],
        given: Any,
        made: Sequence[int | None],
    ) -> list[Step]:
        """The call of a function, or what does the same in less of the host's time."""
        beside = self._beside()
        if function in _ALLOCATIONS and made[0] is not None:
            return [Allocation(given, made[0], beside)]
        if function in _ZEROS and given.is_cuda and given.is_contiguous():
            zeros = Zeros(self._view(given), beside)
            return [zeros] if made[0] is None else [Allocation(given, made[0], beside), zeros]
        return [Call(function, arguments, keywords, made, beside)]

    def _made(self, tensor: Tensor) -> int | None:
        """The memory that a result begins, None if it lies in one that there was."""
        known = storage_key(tensor) in self._of_storage
        return None if known else self._add(tensor)

    def _add(self, tensor: Tensor) -> int:
        """The memory of this tensor.  If it is another's, too, what lies there is known by that one."""
        self._refuse(_why_no_address(tensor))
        if not self.why_not:
            self._of_storage.setdefault(storage_key(tensor), self.memories)
            self._held.append(StorageWeakRef(tensor.untyped_storage()))
        self._begins.append(0 if self.why_not else tensor.data_ptr())
        return self.memories - 1

    def _view(self, tensor: Tensor) -> View:
        """Where the tensor lies; anywhere, if the call is not replayed."""
        memory = 0 if self.why_not else self._of_storage.get(storage_key(tensor))
        if memory is None or tensor.device != self._device:
            self._refuse(f"a tensor of {tuple(tensor.shape)} {tensor.dtype} came from elsewhere")
        self._refuse(_why_no_address(tensor))
        if self.why_not or memory is None:
            return View(0, 0, tensor.dtype, torch.Size(), ())
        offset = tensor.data_ptr() - self._begins[memory] if tensor.numel() else 0
        return View(memory, offset, tensor.dtype, tensor.shape, tensor.stride())

    def _itself(self, tensor: Tensor) -> View:
        """A tensor that a lookup knows again: one of the inputs, or of what was looked up before."""
        memory = self._known.get(id(tensor))
        if memory is None or tensor.is_inference():
            self._refuse("what is looked up about a tensor is not remembered")
            memory = 0
        return View(memory, 0, tensor.dtype, tensor.shape, tensor.stride())

    def value(self, given: Any) -> Value:
        """How a replay gets what this call has."""
        if isinstance(given, Tensor):
            number = given.ndim == 0 and given.is_cpu and storage_key(given) not in self._of_storage
            return Constant(given) if number else self._view(given)  # torch makes tensors of numbers that it is given
        if isinstance(given, (list, tuple)):
            each = tuple(map(self.value, given))
            kind = list if isinstance(given, list) else tuple
            return Several(each, kind) if any(value.memories for value in each) else Constant(given)
        if hasattr(given, "base") and hasattr(given, "block_shape"):
            fields = {name: value for name, value in vars(given).items() if name != "base"}
            return Described(type(given), fields, self._view(given.base))
        return Constant(given)

    def _beside(self) -> torch.cuda.Stream | None:
        if self._main is None:
            return None
        stream = torch.cuda.current_stream(self._device)
        return None if stream == self._main else stream

    def _refuse(self, reason: str) -> None:
        self.why_not = self.why_not or reason


def _why_no_address(tensor: Tensor) -> str:
    """Why a tensor is not all that lies from an address on, or ""."""
    if tensor.layout != torch.strided:
        return "a tensor is not strided"
    return "a tensor is a conjugate or negative view" if tensor.is_conj() or tensor.is_neg() else ""


class _Thread(threading.local):
    recorder: Recorder | None = None


_THREAD = _Thread()


def recorder() -> Recorder | None:
    """What records the call that this thread is in, None if nothing does."""
    return _THREAD.recorder


@contextmanager
def unseen() -> Iterator[None]:
    """Nothing is recorded in this context."""
    recording = _THREAD.recorder
    if recording is None:
        yield
        return
    _THREAD.recorder = None
    try:
        with unseen_by_modes():
            yield
    finally:
        _THREAD.recorder = recording
