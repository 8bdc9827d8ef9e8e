"""Triton's interpreter, quicker by what it does again and again, or number by number; what it computes is the same."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Replace three of its functions; to be called before kernels run."""
    look_up, patch = interpreter._get_np_dtype, interpreter._patch_lang
    known: dict[str, Any] = {}

    def numpy_type(of: Any) -> Any:
        """The interpreter makes a table of all types for each that it looks up."""
        name = "pointer" if isinstance(of.scalar, tl.pointer_type) else of.scalar.name
        if name not in known:
            known[name] = look_up(of)
        return known[name]

    def patch_what_is_not(function: Any) -> Any:
        """The language's operations are replaced by the interpreter's when a kernel is launched.  In each call of a
        function within it the whole language would be looked through again, where none is left to be replaced."""
        seen = [each for each in function.__globals__.values() if inspect.ismodule(each) and each in (tl, tl.core)]
        if any(tl.core.is_builtin(each.load) for each in seen):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._get_np_dtype = numpy_type
    interpreter._patch_lang = patch_what_is_not
    interpreter.ScanOps.generic_scan = _scan


def _scan(self: Any, tensors: Sequence[Any]) -> list[Any]:
    """Along the axis one step after another, as it was, and in each step all numbers beside it at once."""
    given = [np.moveaxis(each.handle.data, self.axis, 0) for each in tensors]
    made = [np.empty_like(each) for each in given]
    last: tuple[Any, ...] = ()
    for step in range(len(given[0])):
        now = tuple(self.to_tensor(data[step], each.dtype) for data, each in zip(given, tensors, strict=True))
        combined = self.combine_fn.fn(*last, *now) if step else now
        last = combined if isinstance(combined, tuple) else (combined,)
        for data, each in zip(made, last, strict=True):
            data[step] = each.handle.data.reshape(data[step].shape)
    return [
        self.to_tensor(np.moveaxis(data, 0, self.axis), each.dtype) for data, each in zip(made, tensors, strict=True)
    ]
