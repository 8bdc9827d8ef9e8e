"""Launches of compiled Triton kernels by CUDA's driver, with arguments that are read once where they stay the same.

Triton's own launcher encodes every tensor descriptor anew at each launch, asks the driver about every pointer and calls
hooks, which takes the host longer than the launch itself.  What a kernel takes is what Triton's signature of it says:
scalars and addresses, a descriptor as its CUtensorMap of 128 bytes with its sizes and strides, then the addresses of
two scratch spaces.  The driver is asked where each of these lies; a kernel of which it says anything else, or that
needs what is not done here (clusters, scratch space, a cooperative launch), is left to Triton's launcher, as all are
while Triton has hooks, but for those with operands that only the driver's launch rounds.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structfly.lowering.cuda_driver import KernelLauncher, ParameterPlace, Program, driver, parameter_places
from structfly.lowering.descriptor import rounds_to_tf32

TENSOR_MAP_BYTES = 128
TFLOAT32 = 11
"""CU_TENSOR_MAP_DATA_TYPE_TFLOAT32: numbers of float32, rounded to TF32 as they are loaded."""
_SCALARS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
_SCALARS |= {"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
_ADDRESS = "Q"
_SCRATCH_SPACES = 2
_WAIT = "griddepcontrol.wait"
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


class _Buffer(threading.local):
    """A thread's own parameters of a launch, for the driver reads them while other threads may run."""

    def __init__(self, program: Program, size: int) -> None:
        self.bytes = bytearray(size)
        self.launch = KernelLauncher(program, ctypes.addressof((ctypes.c_char * size).from_buffer(self.bytes)), size)


class Address(NamedTuple):
    """Where an address lies among a launch's parameters.

    Attributes:
        offset: of the parameter, in bytes.
        tensor: what begins at the address.
        in_map: whether the parameter is a tensor map, which has the address in it.
    """

    offset: int
    tensor: Tensor
    in_map: bool


class Parameters(NamedTuple):
    """All that the driver is given of a launch but the stream.

    Attributes:
        kernel: the kernel, which lives as long.
        program: what of it is launched.
        packed: the bytes of its parameters.
        addresses: of tensors, among those.
    """

    kernel: DirectKernel
    program: Program
    packed: bytes
    addresses: Sequence[Address]


class DirectKernel:
    """A compiled kernel that the driver launches.

    Args:
        compiled: Triton's compiled kernel, loaded on the current device.
        arguments: those that have parameters.
        places: of the parameters.
    """

    def __init__(self, compiled: Any, arguments: Sequence[Argument], places: Sequence[ParameterPlace]) -> None:
        from triton.runtime import driver as active_driver

        self._compiled, self._waits = compiled, _WAIT in compiled.asm["ptx"]
        device, current_stream = torch.cuda.current_device(), active_driver.active.get_current_stream
        self._stream: Callable[[], int] = lambda: current_stream(device)
        codes, end = ["="], 0
        for code, place in zip((code for argument in arguments for code in argument.codes), places, strict=False):
            codes.append(f"{place.offset - end}x{code}")
            end = place.offset + place.size
        self._pack: Callable[..., None] = struct.Struct("".join(codes)).pack_into
        self._size = places[-1].offset + places[-1].size
        self._arguments = [(each.position, _numbers_of(each)) for each in arguments]
        self._addresses, parameter = [], 0
        for each in arguments:
            if each.metadata is not None or each.codes == (_ADDRESS,):
                self._addresses.append((each.position, places[parameter].offset, each.metadata is not None))
            parameter += len(each.codes)

    def parameters(self, grid: tuple[int, ...], every: Sequence[Any]) -> Parameters:
        """Those of a launch of so many programs along each of three axes, with these arguments up to the constants."""
        numbers = [number for position, numbers_of in self._arguments for number in numbers_of(every[position])]
        packed = bytearray(self._size)
        self._pack(packed, 0, *numbers)
        addresses = []
        for position, offset, in_map in self._addresses:
            tensor = every[position].base if in_map else every[position]
            if isinstance(tensor, Tensor):
                addresses.append(Address(offset, tensor, in_map))
        return Parameters(self, self._program(grid), bytes(packed), addresses)

    def bind(self, grid: tuple[int, ...], first: Sequence[Any], own: int, last: Sequence[Any]) -> Callable[..., None]:
        """Launches of so many programs along each of three axes.

        Args:
            first, last: the arguments before and after a launch's own, up to the constants: they are read now.
            own: how many those are.
        """
        begin, end = len(first), len(first) + own
        before: list[Any] = []
        readers: list[tuple[int, Callable[[Any], Sequence[Any]]]] = []
        after: list[Any] = []
        for position, numbers_of in self._arguments:
            if position < begin:
                before += numbers_of(first[position])
            elif position < end:
                readers.append((position - begin, numbers_of))
            else:
                after += numbers_of(last[position - end])
        buffer, empty = _Buffer(self._program(grid), self._size), 0 in grid

        def launch(*own: Any) -> None:
            if empty:
                return
            numbers = before.copy()
            for place, numbers_of in readers:
                numbers += numbers_of(own[place])
            self._pack(buffer.bytes, 0, *numbers, *after)
            buffer.launch(self._stream())

        return launch

    def _program(self, grid: tuple[int, ...]) -> Program:
        metadata = self._compiled.metadata
        return Program(self._compiled.function, grid, 32 * metadata.num_warps, metadata.shared, self._waits)


def _numbers_of(argument: Argument) -> Callable[[Any], Sequence[Any]]:
    """What an argument's parameters are made from."""
    if argument.metadata is not None:
        return _Descriptors(argument.metadata)
    return _address if argument.codes == (_ADDRESS,) else _itself


def _address(value: Any) -> tuple[int]:
    return (value.data_ptr() if isinstance(value, Tensor) else value,)


def _itself(value: Any) -> tuple[Any]:
    return (value,)


class _Descriptors:
    """Encodes an argument that is a tensor descriptor.

    Args:
        metadata: Triton's of its map.
    """

    def __init__(self, metadata: dict[str, Any]) -> None:
        self._metadata = metadata
        self._known: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, value: Any) -> tuple[Any, ...]:
        """The map, sizes and strides, which depend on nothing but what they are remembered by."""
        key = (value.base.data_ptr(), value.shape, value.strides, value.padding, rounds_to_tf32(value))
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _MOST_MAPS:
                self._known.clear()
            found = self._known[key] = self._encoded(value)
        return found

    def _encoded(self, value: Any) -> tuple[Any, ...]:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        # Triton's own does so from 3.7 on; before that it passes on what it takes for the type of the numbers.
        metadata = {**self._metadata, "elem_type": TFLOAT32} if rounds_to_tf32(value) else self._metadata
        tensor_map, *numbers = make_tensordesc_arg(value, metadata)  # an object that ends with the map
        begin = id(tensor_map) + type(tensor_map).__basicsize__ - TENSOR_MAP_BYTES
        return ctypes.string_at(begin, TENSOR_MAP_BYTES), *numbers


def direct_kernel(compiled: Any) -> DirectKernel | None:
    """The kernel for launches by the driver, None if it is left to Triton's launcher.

    Args:
        compiled: a compiled kernel of Triton, which is loaded on the current device if it is not.
    """
    _ = compiled.run  # which loads it
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
    return DirectKernel(compiled, arguments, places)


def has_launch_hooks() -> bool:
    """Whether something of Triton's is to be called at launches, as its profiler does."""
    runtime = _triton_runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@lru_cache(maxsize=1)
def _triton_runtime() -> Any:
    from triton import knobs

    return knobs.runtime
