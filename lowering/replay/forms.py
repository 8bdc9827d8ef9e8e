"""What of tensors and numbers launches depend on."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from structfly.lowering.descriptor import ALIGNED


def form_of(value: Any) -> tuple[Hashable, list[Tensor]]:
    """The form of nested lists and tuples, and the tensors in them, in order.

    Of tensors that is all but where they begin and what they hold; of several that share memory also how they lie
    there; of all else the value itself.
    """
    tensors: list[Tensor] = []
    return _form(value, tensors, {}), tensors


def _form(value: Any, tensors: list[Tensor], begins: dict[int, tuple[int, int]]) -> Hashable:
    """The form; adds to the tensors, and to which of them is the first in each memory, and where that begins."""
    if isinstance(value, Tensor):
        address = value.data_ptr()
        memory = address - int(value.storage_offset()) * value.itemsize
        first, begin = begins.setdefault(memory, (len(tensors), address))
        tensors.append(value)
        place = (first, address - begin, address % ALIGNED)
        return value.dtype, value.shape, value.stride(), value.device, value.requires_grad, place
    if isinstance(value, (list, tuple)):
        return tuple([_form(each, tensors, begins) for each in value])
    other: Hashable = value
    return other
