"""The calls of CUDA's driver that a kernel's launch needs, by their documented interface (CUDA driver API, sections
"Execution Control" and "Module Management")."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

PARAMETER_BUFFER, PARAMETER_BUFFER_SIZE, PARAMETERS_END = 1, 2, 0
"""CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE and _END: what stands in the list that says where parameters are."""


class ParameterPlace(NamedTuple):
    """Where a kernel's parameter lies among its parameters, in bytes."""

    offset: int
    size: int


@lru_cache(maxsize=1)
def driver() -> Any:
    """The driver's library, None where there is none that can say where a kernel's parameters lie (CUDA 12.4)."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.cuFuncGetParamInfo.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
        library.cuLaunchKernel.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_uint] * 7,
            *[ctypes.c_void_p] * 3,
        ]
    except (OSError, AttributeError):
        return None
    return library


def parameter_places(function: int) -> list[ParameterPlace]:
    """Of all parameters of a kernel, in order.

    Args:
        function: its CUfunction.
    """
    places: list[ParameterPlace] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while not driver().cuFuncGetParamInfo(function, len(places), ctypes.byref(offset), ctypes.byref(size)):
        places.append(ParameterPlace(offset.value, size.value))
    return places


def check(result: int, what: str) -> None:
    """Raise what the driver says of a result that is no success.

    Raises:
        RuntimeError: always, unless ``result`` is 0.
    """
    if result:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: CUDA error {result}, {(text.value or b'unknown').decode()}")
