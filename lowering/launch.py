"""Launching a generated kernel many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Launch:
    """A kernel with its grid, its compile-time constants, and the arguments that stay the same.

    The first call goes through Triton's dispatch, which compiles the kernel or finds it compiled for arguments like
    these.  Later calls go straight to what it found, which takes the host less time.  So they may differ from the
    first only in arguments that the kernel's ``do_not_specialize`` names.

    Args:
        kernel: a function of :func:`triton.jit`.
        grid: programs along each axis.
        constants: the kernel's compile-time constants, which stand last in its signature, in its order.
        arguments: those before them that stay the same; a call's own come first.
        options: Triton's options, such as ``num_warps``.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        constants: Mapping[str, int],
        arguments: Sequence[Any] = (),
        **options: int,
    ) -> None:
        self._kernel, self._grid = kernel, grid
        self._constants, self._arguments, self._options = constants, tuple(arguments), options
        self._again: Callable[..., None] | None = None

    def __call__(self, *arguments: Any) -> None:
        """Launch it on the current device and stream with the call's own arguments."""
        if self._again is not None:
            self._again(*arguments, *self._arguments, *self._constants.values())
            return
        compiled = self._kernel[self._grid](*arguments, *self._arguments, **self._constants, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            self._again = compiled[(*self._grid, 1, 1)[:3]]
