"""Several tensors in one allocation."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from structfly.lowering.linear_cross_entropy.buffers import in_one_buffer

_PARTS = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple), st.sampled_from((torch.bfloat16, torch.float32))
)


@given(parts=st.lists(_PARTS, min_size=1, max_size=5))
def test_parts_are_aligned_and_apart(parts: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    made = in_one_buffer(torch.device("cpu"), *parts)
    assert [(tensor.shape, tensor.dtype) for tensor in made] == [(torch.Size(shape), dtype) for shape, dtype in parts]
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == 1
    assert all(tensor.storage_offset() * tensor.element_size() % 128 == 0 for tensor in made)
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(made))
