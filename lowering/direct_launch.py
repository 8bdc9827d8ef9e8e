"""Launches of compiled Triton kernels by CUDA's driver, with parameters that are packed where they change.

Triton's own launcher encodes every tensor descriptor anew at each launch and calls hooks, which takes the host 15 to
40 us where the driver needs 2.  What a kernel takes is what Triton's signature of it says: scalars and addresses, a
descriptor as its CUtensorMap of 128 bytes with its sizes and strides, then the addresses of two scratch spaces.  The
driver is asked where each of these lies; a kernel of which it says anything else, or that needs what is not done here
(clusters, scratch space, a cooperative launch), is left to Triton's launcher, as all are while Triton has hooks.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.cuda_driver import (
    PARAMETER_BUFFER,
    PARAMETER_BUFFER_SIZE,
    PARAMETERS_END,
    ParameterPlace,
    check,
    driver,
    parameter_places,
)

TENSOR_MAP_BYTES = 128
_SCALARS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
_SCALARS |= {"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
_ADDRESS = "Q"
_SCRATCH_SPACES = 2
_MOST_MAPS = 256  # descriptors that are remembered for each argument of a kernel


class Argument(NamedTuple):
    """An argument of a kernel that has parameters.

    Attributes:
        position: among all arguments, compile-time constants included.
        codes: of its parameters, as :mod:`struct` has them: one, or a descriptor's map, sizes and strides.
        metadata: Triton's of a descriptor's map, None of others.
    """

    position: int
    codes: tuple[str, ...]
    metadata: dict[str, Any] | None = None

    @property
    def sizes(self) -> list[int]:
        """Of its parameters, in bytes."""
        return [struct.calcsize("=" + code) for code in self.codes]


def arguments_of(signature: Sequence[str], descriptors: Sequence[dict[str, Any]] | None) -> list[Argument] | None:
    """The arguments that have parameters, None if one is of a kind that is not known here.

    Args:
        signature: Triton's types of all arguments.
        descriptors: Triton's metadata of those that are tensor descriptors, in order, None where those are taken apart.
    """
    arguments, of_maps = [], iter(descriptors or ())
    for position, kind in enumerate(signature):
        if kind == "constexpr":
            continue
        box = re.match(r"tensordesc<[^\[]*\[([^\]]*)\]", kind) if isinstance(kind, str) else None
        if box is not None:
            sides, metadata = box[1].count(",") + 1, next(of_maps, None)
            if metadata is None:
                return None
            codes = (f"{TENSOR_MAP_BYTES}s", *["i"] * sides, *["q"] * sides)
            arguments.append(Argument(position, codes, metadata))
        elif isinstance(kind, str) and kind.startswith("*"):
            arguments.append(Argument(position, (_ADDRESS,)))
        elif kind in _SCALARS:
            arguments.append(Argument(position, (_SCALARS[kind],)))
        else:
            return None
    return arguments


class Packer:
    """Writes an argument where the kernel has it.

    Args:
        argument: the argument.
        places: its parameters'.
    """

    def __init__(self, argument: Argument, places: Sequence[ParameterPlace]) -> None:
        self.position, self._metadata = argument.position, argument.metadata
        begin = places[0].offset
        self._fields = [
            (struct.Struct("=" + code), place.offset - begin)
            for code, place in zip(argument.codes, places, strict=True)
        ]
        self._part = slice(begin, places[-1].offset + places[-1].size)
        self._maps: dict[tuple[Any, ...], bytes] = {}

    def __call__(self, buffer: memoryview, value: Any) -> None:
        """Write ``value`` into a kernel's parameters.

        Raises:
            UnsupportedError: a tensor that is not on a GPU.
        """
        if self._metadata is not None:
            buffer[self._part] = self._descriptor(value)
            return
        if isinstance(value, Tensor):
            if not value.is_cuda:
                raise UnsupportedError(f"a tensor on {value.device} in a kernel's launch; allowed: those on GPUs")
            value = value.data_ptr()
        self._fields[0][0].pack_into(buffer, self._part.start, value)

    def _descriptor(self, value: Any) -> bytes:
        """A descriptor's map, sizes and strides, which depend on nothing but what they are remembered by."""
        key = (value.base.data_ptr(), value.shape, value.strides, value.padding)
        packed = self._maps.get(key)
        if packed is None:
            if len(self._maps) >= _MOST_MAPS:
                self._maps.clear()
            packed = self._maps[key] = self._packed_descriptor(value)
        return packed

    def _packed_descriptor(self, value: Any) -> bytes:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        tensor_map, *numbers = make_tensordesc_arg(value, self._metadata)  # an object that ends with the map
        begin = id(tensor_map) + type(tensor_map).__basicsize__ - TENSOR_MAP_BYTES
        packed = bytearray(self._part.stop - self._part.start)
        values = (ctypes.string_at(begin, TENSOR_MAP_BYTES), *numbers)
        for (field, offset), each in zip(self._fields, values, strict=True):
            field.pack_into(packed, offset, each)
        return bytes(packed)


@dataclass(frozen=True)
class DirectKernel:
    """A compiled kernel that the driver launches; made by :func:`direct_kernel`.

    Attributes:
        function: its CUfunction.
        threads, shared: of a program; bytes of shared memory.
        packers: of its arguments that have parameters.
        parameter_bytes: of all its parameters.
        stream: gives the current stream of the device it is loaded on.
    """

    function: int
    threads: int
    shared: int
    packers: tuple[Packer, ...]
    parameter_bytes: int
    stream: Callable[[], int]

    def bind(self, grid: tuple[int, ...]) -> Callable[[Sequence[Any]], None]:
        """Launches of so many programs along each of three axes, each given all arguments up to the constants.

        An argument that is the same object as in the launch before is not packed again.
        """
        parameters = (ctypes.c_char * self.parameter_bytes)()
        buffer, size = memoryview(parameters).cast("B"), ctypes.c_size_t(self.parameter_bytes)
        where = (ctypes.c_void_p * 5)(
            *(PARAMETER_BUFFER, ctypes.addressof(parameters), PARAMETER_BUFFER_SIZE, ctypes.addressof(size)),
            PARAMETERS_END,
        )
        fixed = (self.function, *grid, self.threads, 1, 1, self.shared)
        packers, launch, stream = [(each.position, each) for each in self.packers], driver().cuLaunchKernel, self.stream
        seen: dict[int, Any] = {}
        empty = 0 in grid

        def launch_with(arguments: Sequence[Any], _alive: ctypes.c_size_t = size) -> None:
            for position, pack in packers:
                value = arguments[position]
                if value is not seen.get(position, seen):
                    pack(buffer, value)
                    seen[position] = value
            if not empty:
                check(launch(*fixed, stream(), None, where), "the launch of a kernel")

        return launch_with


def direct_kernel(compiled: Any) -> DirectKernel | None:
    """The kernel for launches by the driver, None if it is left to Triton's launcher.

    Args:
        compiled: a compiled kernel of Triton, loaded on the current device.
    """
    metadata = compiled.metadata
    if metadata.target.backend != "cuda" or driver() is None:
        return None
    special = (
        metadata.num_ctas != 1
        or metadata.global_scratch_size
        or metadata.profile_scratch_size
        or metadata.launch_cooperative_grid
        or metadata.launch_pdl
    )
    arguments = arguments_of(list(compiled.src.signature.values()), getattr(metadata, "tensordesc_meta", None))
    if special or arguments is None:
        return None
    places = parameter_places(compiled.function)
    sizes = [size for argument in arguments for size in argument.sizes] + [8] * _SCRATCH_SPACES
    if sizes != [each.size for each in places]:
        return None
    from triton.runtime import driver as active_driver

    device, current_stream = torch.cuda.current_device(), active_driver.active.get_current_stream
    remaining = iter(places)
    return DirectKernel(
        compiled.function,
        32 * metadata.num_warps,
        metadata.shared,
        tuple(Packer(argument, [next(remaining) for _ in argument.sizes]) for argument in arguments),
        places[-1].offset + places[-1].size,
        lambda: current_stream(device),
    )


def has_launch_hooks() -> bool:
    """Whether something of Triton's is to be called at launches, as its profiler does."""
    runtime = _triton_runtime()
    return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))


@lru_cache(maxsize=1)
def _triton_runtime() -> Any:
    from triton import knobs

    return knobs.runtime
