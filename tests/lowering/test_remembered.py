"""What was found out about tensors: once, until they are written."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from structfly.lowering.remembered import remembered

FOUND: list[int] = []


@pytest.fixture(autouse=True)
def none_found() -> None:
    FOUND.clear()


def total(first: Tensor, second: Tensor | None, times: int) -> int:
    FOUND.append(1)
    return times * int(first.sum() + (0 if second is None else second.sum()))


def test_found_once_until_a_tensor_is_written() -> None:
    first, second = torch.tensor([1, 2]), torch.tensor([3])
    assert [remembered(total, first, second, 2) for _ in range(3)] == [12] * 3
    assert len(FOUND) == 1
    second.add_(1)
    assert remembered(total, first, second, 2) == 14
    first.zero_()
    assert remembered(total, first, second, 2) == 8
    assert len(FOUND) == 3


def test_other_arguments_are_other_questions() -> None:
    first, second, equal = torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([30])
    assert remembered(total, first, second, 1) == 6
    assert remembered(total, first, second, 2) == 12
    assert remembered(total, first, None, 1) == 3
    assert remembered(total, first, equal, 1) == 33
    assert remembered(total, first, second, 2) == 12
    assert len(FOUND) == 4


def test_tensors_are_not_kept_alive() -> None:
    first, second = torch.tensor([1]), torch.tensor([2])
    remembered(total, first, second, 1)
    gone = weakref.ref(first), weakref.ref(second)
    del first, second
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_inference_tensors_are_asked_anew() -> None:
    with torch.inference_mode():
        first = torch.tensor([1])
        assert remembered(total, first, None, 1) == 1
        first.add_(1)
        assert remembered(total, first, None, 1) == 2


def test_what_is_found_in_inference_mode_serves_training() -> None:
    first = torch.tensor([1, 0])
    with torch.inference_mode():
        remembered(torch.argsort, first)
    assert not remembered(torch.argsort, first).is_inference()
