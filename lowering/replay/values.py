"""What a recorded call passes on: tensors by where they lie, and all else as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Frame:
    """What one replay has at hand.

    Attributes:
        tensors: the tensor that each memory is known by; None before it is made and after its last use.
        addresses: where those begin.
        stream: the one that is replayed on, as CUDA's driver has it.
    """

    __slots__ = ("addresses", "stream", "tensors")

    def __init__(self, inputs: Sequence[Tensor], memories: int, stream: int) -> None:
        missing = memories - len(inputs)
        self.tensors: list[Tensor | None] = [*inputs, *[None] * missing]
        self.addresses: list[int] = [*[tensor.data_ptr() for tensor in inputs], *[0] * missing]
        self.stream = stream

    def hold(self, memory: int, tensor: Tensor) -> None:
        """Know a memory by this tensor."""
        self.tensors[memory], self.addresses[memory] = tensor, tensor.data_ptr()


class View(NamedTuple):
    """A tensor in one of the memories, which begins so many bytes after what that is known by."""

    memory: int
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    @property
    def memories(self) -> frozenset[int]:
        return frozenset((self.memory,))

    def of(self, frame: Frame) -> Tensor:
        """The tensor in a replay."""
        known = frame.tensors[self.memory]
        assert known is not None, "a tensor was let go of before its last use"
        same = known.dtype is self.dtype
        if same and not self.offset and known.shape == self.shape and known.stride() == self.strides:
            return known
        first = (known.storage_offset() * known.itemsize + self.offset) // self.dtype.itemsize
        if same:
            return known.as_strided(self.shape, self.strides, first)
        other = torch.empty(0, dtype=self.dtype, device=known.device)
        return other.set_(known.untyped_storage(), first, self.shape, self.strides)


class Constant(NamedTuple):
    """Anything that is the same in every replay."""

    value: Any
    memories: frozenset[int] = frozenset()

    def of(self, _: Frame) -> Any:
        return self.value


class Described(NamedTuple):
    """One of Triton's tensor descriptors: its fields, and what it describes."""

    kind: type
    fields: dict[str, Any]
    base: View

    @property
    def memories(self) -> frozenset[int]:
        return self.base.memories

    def of(self, frame: Frame) -> Any:
        made: Any = object.__new__(self.kind)
        made.__dict__.update(self.fields, base=self.base.of(frame))
        return made


class Several(NamedTuple):
    """A list or a tuple of these."""

    each: tuple[Value, ...]
    kind: type

    @property
    def memories(self) -> frozenset[int]:
        return frozenset().union(*(value.memories for value in self.each))

    def of(self, frame: Frame) -> Any:
        return self.kind([value.of(frame) for value in self.each])


Value = View | Constant | Described | Several


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested lists and tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, (list, tuple)) else []
