"""What was found out about tensors of indices, kept until they are written.

Whatever reads such a tensor on the host waits for its device: once for each layer, not once in each step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from structfly.lowering.replay.recorder import recorder, unseen

Found = TypeVar("Found")


class _Entry(NamedTuple):
    others: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    found: object


_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by the first tensor


def remembered(find: Callable[..., Found], *arguments: Tensor | Hashable) -> Found:
    """``find(*arguments)``, called again only when one of the tensors among them was written.

    Args:
        find: a function whose result holds none of the tensors nor views of them: it would keep them alive.
        arguments: tensors, at least one of them, and what else ``find`` takes.

    Inference tensors do not count how often they were written: about them everything is found anew.
    """
    found = _found(find, arguments)
    if (recording := recorder()) is not None:
        recording.found(remembered, (find, *arguments), found)
    return found


def _found(find: Callable[..., Found], arguments: tuple[Tensor | Hashable, ...]) -> Found:
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    if any(each.is_inference() for each in tensors):
        with unseen():
            return find(*arguments)
    first, *others = tensors
    known: dict[Hashable, _Entry] = _KNOWN.setdefault(first, {})
    key = (find, *(Tensor if isinstance(each, Tensor) else each for each in arguments))
    versions = tuple(each._version for each in tensors)
    entry = known.get(key)
    if entry is not None and entry.versions == versions and _are(entry.others, others):
        return cast(Found, entry.found)  # by this very function
    with unseen(), torch.inference_mode(False):  # what is found serves later calls that may record gradients
        found = find(*arguments)
    known[key] = _Entry(tuple(map(weakref.ref, others)), versions, found)
    return found


def _are(references: tuple[weakref.ref[Tensor], ...], tensors: list[Tensor]) -> bool:
    return all(reference() is each for reference, each in zip(references, tensors, strict=True))
