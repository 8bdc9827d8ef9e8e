"""Launching a generated kernel many times."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.descriptor import rounds_to_tf32, triton_rounds
from structfly.lowering.direct_launch import DirectKernel, direct_kernel, has_launch_hooks
from structfly.lowering.replay.recorder import Recorder, recorder


class Launch:
    """A kernel with its grid, its compile-time constants, and the arguments that stay the same.

    Triton's dispatch, which takes the host long, compiles the kernel for the first launch with arguments of some kinds.
    What is compiled is launched by the CUDA driver where that is possible (:mod:`~structfly.lowering.direct_launch`),
    else, and while Triton has launch hooks, by Triton's launcher.  Within a launch, which is of one device, calls may
    differ only in where tensors and descriptors begin, in descriptors' sizes and strides, and in numbers that the
    kernel's ``do_not_specialize`` names.

    Args:
        kernel: a function of :func:`triton.jit`.
        grid: programs along each axis.
        constants: the kernel's compile-time constants, which stand last in its signature, in its order.
        arguments: those before them that stay the same.
        first: those that stay the same and stand before a call's own.
        options: Triton's options, such as ``num_warps``.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        constants: Mapping[str, int],
        arguments: Sequence[Any] = (),
        first: Sequence[Any] = (),
        **options: int,
    ) -> None:
        self._kernel, self._grid, self._first, self._arguments = kernel, grid, tuple(first), tuple(arguments)
        self._constants, self._options = constants, options
        self._tensors: list[int] | None = None  # among a call's own arguments, those that Triton asks for an alignment
        self._straight: dict[tuple[bool, ...], _Straight] = {}

    def __call__(self, *arguments: Any) -> None:
        """Launch it on the current device and stream with the call's own arguments."""
        if self._tensors is None:
            self._tensors = [place for place, each in enumerate(arguments) if isinstance(each, Tensor)]
        aligned = tuple([arguments[place].data_ptr() % 16 == 0 for place in self._tensors])
        straight = self._straight.get(aligned)
        if straight is None:
            straight = self._straight[aligned] = self._found(arguments)
        launch = straight.hooked if has_launch_hooks() else straight.usual
        if (recording := recorder()) is None:
            launch(*arguments)
        else:
            self._recorded(recording, straight, arguments)

    def _recorded(self, recording: Recorder, straight: _Straight, arguments: tuple[Any, ...]) -> None:
        """The same while a call is recorded, as none is while Triton has launch hooks."""
        every = (*self._first, *arguments, *self._arguments)
        if straight.direct is None:
            recording.call(straight.of_every, every)
        elif 0 not in self._grid:
            parameters = straight.direct.parameters(_along_axes(self._grid), every)
            straight.usual(*arguments)
            recording.launched(parameters)

    def _found(self, arguments: tuple[Any, ...]) -> _Straight:
        """Launches with arguments of the kinds that these have.

        Raises:
            UnsupportedError: operands are to be rounded to TF32, and neither launcher would.
        """
        first, last = self._first, self._arguments
        every = (*first, *arguments, *last)
        options = tuple(self._options.items())
        key = (self._kernel, tuple(self._constants.values()), options, tuple(map(_kind, every)), _current_device())
        found = _COMPILED.get(key)
        if found is None:
            named = {**self._constants, **self._options}
            compiled = self._kernel.warmup(*every, grid=self._grid, **named)
            if compiled is None:  # the interpreter compiles nothing
                interpreted = partial(self._kernel[self._grid], **named)
                around = _around(interpreted, first, last)
                return _Straight(around, around, interpreted, None)
            rounds = any(map(rounds_to_tf32, every))
            found = _COMPILED[key] = _Compiled(compiled, direct_kernel(compiled), rounds)
        grid = _along_axes(self._grid)
        of_every = _around(found.kernel[grid], (), tuple(self._constants.values()))
        by_triton = _around(of_every, first, last)
        by_driver = None if found.direct is None else found.direct.bind(grid, first, len(arguments), last)
        if found.rounds and not triton_rounds():
            if by_driver is None:
                raise UnsupportedError(
                    "the driver does not launch this kernel, and this Triton cuts its float32 operands off where they "
                    "are to be rounded to TF32; use Triton 3.7 or later, or full float32"
                )
            return _Straight(by_driver, by_driver, of_every, found.direct)
        return _Straight(by_driver or by_triton, by_triton, of_every, found.direct)


class _Straight(NamedTuple):
    """Launches that take the arguments of a call.

    Attributes:
        usual: the usual ones.
        hooked: those while Triton has launch hooks.
        of_every: Triton's, of all arguments up to the constants.
        direct: what the usual ones are by, None for Triton.
    """

    usual: Callable[..., None]
    hooked: Callable[..., None]
    of_every: Callable[..., None]
    direct: DirectKernel | None


class _Compiled(NamedTuple):
    """What Triton's dispatch found, and whether operands are rounded to TF32 as they are loaded."""

    kernel: Any
    direct: DirectKernel | None
    rounds: bool


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches in this context are on ``device``, which this thread has a context on."""
    if device.type != "cuda":
        return _HERE
    if not _THREAD.has_context:
        torch.cuda.mem_get_info(device)  # any call of CUDA's runtime makes one; encoding a tensor descriptor does not
        _THREAD.has_context = True
    return _HERE if device.index in (None, _current_device()) else torch.cuda.device(device)


_HERE = nullcontext()


class _Thread(threading.local):
    """Autograd's threads begin without a context, and torch makes one only where it calls CUDA's runtime itself."""

    has_context = False


_THREAD = _Thread()
_COMPILED: dict[tuple[Any, ...], _Compiled] = {}


def _around(launch: Callable[..., None], first: tuple[Any, ...], last: tuple[Any, ...]) -> Callable[..., None]:
    """The same launch of what stands between these arguments."""
    return lambda *arguments: launch(*first, *arguments, *last)


def _along_axes(grid: tuple[int, ...]) -> tuple[int, ...]:
    return (*grid, 1, 1)[:3]


def _current_device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


def _kind(argument: Any) -> tuple[Any, ...]:
    """What of an argument Triton compiles a kernel anew for, or a launch depends on."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0, argument.is_cuda
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return argument.base.dtype, tuple(argument.block_shape), rounds_to_tf32(argument)  # a tensor descriptor
