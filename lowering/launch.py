"""Launching a generated kernel many times."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.descriptor import rounds_to_tf32, triton_rounds
from structfly.lowering.direct_launch import DirectKernel, direct_kernel, has_launch_hooks


class Launch:
    """A kernel with its grid, its compile-time constants, and the arguments that stay the same.

    Triton's dispatch, which takes the host long, compiles the kernel for the first launch with arguments of some kinds.
    What is compiled is launched by the CUDA driver where that is possible (:mod:`~structfly.lowering.direct_launch`),
    else, and while Triton has launch hooks, by Triton's launcher.  Within a launch, calls may differ only in arguments
    that the kernel's ``do_not_specialize`` names.

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
        self._straight: Callable[..., None] | None = None

    def __call__(self, *arguments: Any) -> None:
        """Launch it on the current device and stream with the call's own arguments."""
        if self._straight is None:
            every = (*self._first, *arguments, *self._arguments)
            options = tuple(self._options.items())
            key = (self._kernel, tuple(self._constants.values()), options, tuple(map(_kind, every)), _current_device())
            found = _COMPILED.get(key)
            if found is None:
                named = {**self._constants, **self._options}
                compiled = self._kernel.warmup(*every, grid=self._grid, **named)
                if compiled is None:  # the interpreter compiles nothing
                    self._kernel[self._grid](*every, **named)
                    return
                rounds = any(map(rounds_to_tf32, every))
                found = _COMPILED[key] = _Compiled(compiled, direct_kernel(compiled), rounds)
            self._straight = self._bound(found, len(arguments))
        self._straight(*arguments)

    def _bound(self, found: _Compiled, own: int) -> Callable[..., None]:
        """Launches of what was found, each given so many arguments of its own.

        Raises:
            UnsupportedError: operands are to be rounded to TF32, and neither launcher would.
        """
        grid = (*self._grid, 1, 1)[:3]
        by_driver = found.rounds and not triton_rounds()
        if by_driver and found.direct is None:
            raise UnsupportedError(
                "the driver does not launch this kernel, and this Triton cuts its float32 operands off where they are "
                "to be rounded to TF32; use Triton 3.7 or later, or full float32"
            )
        if found.direct is not None and (by_driver or not has_launch_hooks()):
            return found.direct.bind(grid, self._first, own, self._arguments)
        launch, first, last = found.kernel[grid], self._first, (*self._arguments, *self._constants.values())
        return lambda *arguments: launch(*first, *arguments, *last)


class _Compiled(NamedTuple):
    """What Triton's dispatch found, and whether operands are rounded to TF32 as they are loaded."""

    kernel: Any
    direct: DirectKernel | None
    rounds: bool


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches in this context are on ``device``, which this thread has a context on."""
    if device.type == "cuda" and not _THREAD.has_context:
        torch.cuda.mem_get_info(device)  # any call of CUDA's runtime makes one; encoding a tensor descriptor does not
        _THREAD.has_context = True
    elsewhere = device.type == "cuda" and device.index not in (None, _current_device())
    return torch.cuda.device(device) if elsewhere else nullcontext()


class _Thread(threading.local):
    """Autograd's threads begin without a context, and torch makes one only where it calls CUDA's runtime itself."""

    has_context = False


_THREAD = _Thread()
_COMPILED: dict[tuple[Any, ...], _Compiled] = {}


def _current_device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


def _kind(argument: Any) -> tuple[Any, ...]:
    """What of an argument Triton compiles a kernel anew for, or a launch depends on."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0, argument.is_cuda
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return argument.base.dtype, tuple(argument.block_shape), rounds_to_tf32(argument)  # a tensor descriptor
