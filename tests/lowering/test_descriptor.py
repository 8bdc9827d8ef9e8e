"""Tensor descriptors: what is checked once for a shape, and what for every tensor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from structfly.errors import UnsupportedError
from structfly.lowering.descriptor import descriptor, has_descriptor, operand, rounds_to_tf32, why_no_rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_those_of_a_shape_seen_before_differ_in_their_base_alone(dtype: torch.dtype) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    tensors = [torch.randn(3, 40, 16).to(dtype).transpose(0, 1) for _ in range(3)]
    for tensor in tensors:
        made = descriptor(tensor, 16, 1, 16)
        expected = TensorDescriptor.from_tensor(tensor, [16, 1, 16])
        assert type(made) is TensorDescriptor
        assert made.base is tensor
        rest = [{name: value for name, value in vars(each).items() if name != "base"} for each in (made, expected)]
        assert rest[0] == rest[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_operands_of_float32_are_rounded_and_results_are_not(dtype: torch.dtype) -> None:
    tensor = torch.randn(24, 40).to(dtype)
    for _ in range(2):  # the second time its shape is known
        assert rounds_to_tf32(operand(tensor, 16, 16)) == (dtype == torch.float32)
        assert not rounds_to_tf32(descriptor(tensor, 16, 16))


@pytest.mark.parametrize(("fields", "driver", "told"), [(True, None, False), (False, 1, False), (False, None, True)])
def test_why_operands_would_not_be_rounded(
    fields: bool, driver: object, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.tools import tensor_descriptor

    known = {"base", "round_f32_to_tf32"} if fields else {"base"}
    monkeypatch.setattr(tensor_descriptor, "TensorDescriptor", SimpleNamespace(__dataclass_fields__=known))
    monkeypatch.setattr("structfly.lowering.descriptor.driver", lambda: driver)
    assert ("rounds them to TF32; Triton does from 3.7 on" in why_no_rounding()) == told


def test_another_box_or_other_strides_are_another_descriptor() -> None:
    tensor = torch.randn(64, 64)
    assert descriptor(tensor, 16, 16).block_shape == [16, 16]
    assert descriptor(tensor, 16, 32).block_shape == [16, 32]
    assert tuple(descriptor(torch.randn(64, 128)[:, :64], 16, 16).strides) == (128, 1)


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(16, 17)[:, :16], torch.randn(16, 16).t(), torch.randn(16 * 16 + 4)[1:-3].view(16, 16)],
    ids=["rows", "columns", "base"],
)
def test_what_has_none_is_refused_each_time(tensor: torch.Tensor) -> None:
    descriptor(torch.randn(16, 16), 16, 16)  # of the shape and strides of the last
    for _ in range(2):
        assert not has_descriptor(tensor)
        with pytest.raises(UnsupportedError, match="multiples of 16 bytes"):
            descriptor(tensor, 16, 16)
