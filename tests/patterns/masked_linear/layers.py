"""Masked linears in every spelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from structfly.records.layer import LayerSizes
from tests.patterns.linear.layers import SPELLINGS


def halves(weight: Tensor) -> tuple[int, ...]:
    """A shape of four dimensions for a matrix, two of them along each side."""
    first, second = (2 if size % 2 == 0 else 1 for size in weight.shape)
    return first, weight.shape[0] // first, second, weight.shape[1] // second


# Of W, the mask in W's dtype and the same as bool.
MASKINGS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "w * mask": lambda w, m, b: w * m,
    "mask * w": lambda w, m, b: m * w,
    "mul": lambda w, m, b: torch.mul(w, b),
    "method": lambda w, m, b: m.mul(w),
    "masked_fill": lambda w, m, b: w.masked_fill(~b, 0),
    "masked_fill of zeros": lambda w, m, b: w.masked_fill(m == 0, 0.0),
    "where": lambda w, m, b: torch.where(b, w, 0),
    "where not": lambda w, m, b: torch.where(b.logical_not(), torch.zeros_like(w), w),
    "where of a tensor": lambda w, m, b: torch.where(m > 0, w, torch.tensor(0.0, dtype=w.dtype)),
    "cast": lambda w, m, b: w * b.to(w.dtype),
    "in blocks": lambda w, m, b: (w.view(*halves(w)) * m.view(*halves(w))).view(w.shape),
    "in blocks, filled": lambda w, m, b: w.reshape(-1).unsqueeze(0).masked_fill(~b.flatten(), 0).reshape(w.shape),
    "transposed": lambda w, m, b: (w.t() * m.t()).t(),
}


def block_mask(sizes: LayerSizes, block_out: int, block_in: int, density: float, seed: int) -> Tensor:
    """A bool mask (out, in) of random blocks, one kept at least."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = -(-sizes.out_features // block_out), -(-sizes.in_features // block_in)
    kept = torch.rand(rows, columns, generator=generator) < density
    kept[seed % rows, seed % columns] = True
    spread = kept.repeat_interleave(block_out, 0).repeat_interleave(block_in, 1)
    return spread[: sizes.out_features, : sizes.in_features].contiguous()


class Masked(nn.Module):
    """A layer whose weight is masked, in one spelling of the linear and one of the mask."""

    mask: Tensor
    kept: Tensor

    def __init__(
        self, mask: Tensor, spelling: str = "linear", masking: str = "w * mask", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        out_features, in_features = mask.shape
        mask = mask.t().contiguous() if spelling.startswith("in_out") else mask
        self.spelling, self.masking = spelling, masking
        self.weight = nn.Parameter(torch.randn(mask.shape, dtype=dtype) / in_features**0.5)
        self.bias = nn.Parameter(torch.randn(out_features, dtype=dtype))
        self.register_buffer("mask", mask.to(dtype))
        self.register_buffer("kept", mask.bool())

    def apply_to(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with this weight and bias."""
        masked = MASKINGS[self.masking](weight, self.mask.to(weight.dtype), self.kept)
        return SPELLINGS[self.spelling](x, masked, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(x, self.weight, self.bias)
