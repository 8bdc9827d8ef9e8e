"""The calls of CUDA's driver that launches need, by their documented interface (CUDA driver API, sections "Execution
Control", "Module Management", "Tensor Map Object Management", "Memory Management", "Event Management" and "Stream
Management")."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

_PARAMETER_BUFFER, _PARAMETER_BUFFER_SIZE, _PARAMETERS_END = 1, 2, 0  # CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE and _END


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
        library.cuTensorMapReplaceAddress.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.cuMemsetD8Async.argtypes = [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p]
        library.cuEventRecord.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.cuStreamWaitEvent.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
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


class ParametersAt:
    """What a launch is told of where its parameters are.

    Args:
        address, size: of the buffer that they lie in.

    Attributes:
        pointers: the list that the driver takes.
    """

    def __init__(self, address: int, size: int) -> None:
        self._size = ctypes.c_size_t(size)  # which the list has the address of
        self.pointers = (ctypes.c_void_p * 5)(
            _PARAMETER_BUFFER, address, _PARAMETER_BUFFER_SIZE, ctypes.addressof(self._size), _PARAMETERS_END
        )


def check(result: int, what: str) -> None:
    """Raise what the driver says of a result that is no success.

    Raises:
        RuntimeError: always, unless ``result`` is 0.
    """
    if result:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: CUDA error {result}, {(text.value or b'unknown').decode()}")
