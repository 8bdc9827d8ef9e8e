"""Launching a generated kernel many times."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structfly.lowering.direct_launch import DirectKernel, direct_kernel, has_launch_hooks


class Launch:
    """A kernel with its grid, its compile-time constants, and the arguments that stay the same.

    Triton's dispatch, which takes the host long, compiles the kernel for the first launch with arguments of some kinds.
    What is compiled is launched by the CUDA driver where that is possible (:mod:`~structfly.lowering.direct_launch`),
    else by Triton's launcher.  Within a launch, which is of one device, calls may differ only in where tensors and
    descriptors begin, in descriptors' sizes and strides, and in numbers that the kernel's ``do_not_specialize`` names.

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
        if straight.direct is not None and not has_launch_hooks():
            straight.direct(*arguments)
        else:
            straight.by_triton(*arguments)

    def _found(self, arguments: tuple[Any, ...]) -> _Straight:
        """Launches with arguments of the kinds that these have."""
        first, last = self._first, self._arguments
        every = (*first, *arguments, *last)
        options = tuple(self._options.items())
        key = (self._kernel, tuple(self._constants.values()), options, tuple(map(_kind, every)), _current_device())
        found = _COMPILED.get(key)
        if found is None:
            named = {**self._constants, **self._options}
            compiled = self._kernel.warmup(*every, grid=self._grid, **named)
            if compiled is None:  # the interpreter compiles nothing
                run = self._kernel[self._grid]
                return _Straight(None, lambda *arguments: run(*first, *arguments, *last, **named))
            found = _COMPILED[key] = _Compiled(compiled, direct_kernel(compiled))
        grid, constants = (*self._grid, 1, 1)[:3], tuple(self._constants.values())
        return _Straight(
            None if found.direct is None else found.direct.bind(grid, first, len(arguments), last),
            lambda *arguments: found.kernel[grid](*first, *arguments, *last, *constants),
        )


class _Straight(NamedTuple):
    """Launches that take the arguments of a call."""

    direct: Callable[..., None] | None
    by_triton: Callable[..., None]


class _Compiled(NamedTuple):
    """What Triton's dispatch found."""

    kernel: Any
    direct: DirectKernel | None


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


def _current_device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


def _kind(argument: Any) -> tuple[Any, ...]:
    """What of an argument Triton compiles a kernel anew for, or refuses."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0, argument.is_cuda
    return argument.base.dtype, tuple(argument.block_shape)  # a tensor descriptor
