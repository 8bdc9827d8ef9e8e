"""The calls of CUDA's driver that launches need, by their documented interface (CUDA driver API, sections "Execution
Control", "Module Management", "Tensor Map Object Management", "Memory Management", "Event Management" and "Stream
Management")."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

_PARAMETER_BUFFER, _PARAMETER_BUFFER_SIZE, _PARAMETERS_END = 1, 2, 0  # CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE and _END
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of CUlaunchAttributeID


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
        library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
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


class Program(NamedTuple):
    """What is launched.

    Attributes:
        function: a kernel's CUfunction.
        grid: programs along each axis.
        threads: of a program.
        shared: bytes of shared memory of a program.
        waits: whether each program waits by itself for the kernels launched before (``griddepcontrol.wait``) ahead of
            all that it reads and writes.  Then it may start before they end: a programmatic dependent launch.
    """

    function: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    waits: bool = False


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of those whose value is an int."""

    _fields_ = (("id", ctypes.c_uint), ("unused", ctypes.c_uint), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


class KernelLauncher:
    """Launches of a program with parameters that are read where they lie, by one thread at a time.

    Args:
        program: what is launched.
        address, size: of the buffer of parameters.
    """

    def __init__(self, program: Program, address: int, size: int) -> None:
        self._launch, self._function = driver().cuLaunchKernelEx, program.function
        self._size = ctypes.c_size_t(size)  # which the list has the address of
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)  # and this one the configuration
        self._config = _Config(
            program.grid,
            (program.threads, 1, 1),
            program.shared,
            attributes=ctypes.addressof(self._attribute),
            count=program.waits,
        )
        self._at = ctypes.addressof(self._config)
        self._parameters = (ctypes.c_void_p * 5)(
            _PARAMETER_BUFFER, address, _PARAMETER_BUFFER_SIZE, ctypes.addressof(self._size), _PARAMETERS_END
        )

    def __call__(self, stream: int) -> None:
        """Launch it in a stream."""
        self._config.stream = stream
        check(self._launch(self._at, self._function, None, self._parameters), "the launch of a kernel")


def check(result: int, what: str) -> None:
    """Raise what the driver says of a result that is no success.

    Raises:
        RuntimeError: always, unless ``result`` is 0.
    """
    if result:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: CUDA error {result}, {(text.value or b'unknown').decode()}")
