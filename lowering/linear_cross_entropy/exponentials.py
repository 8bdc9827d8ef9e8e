"""The head in chunks of exponentials: no pass over the logits between the products, on GPUs in bfloat16.

bfloat16 has float32's exponents.  So a product's epilogue can turn its float32 sums into e = exp(u - r) and store that
at once, with any row reference r that keeps e in range; row sums s come out of the same epilogue.  With p = e / s and
the target's entry put right, the gradients are plain products of e:

    dz_nv = c_n f'_nv (p_nv - [v = t_n]) = factor_n E_nv
    E_nv = f'_nv (e_nv - [v = t_n] s_n),    factor_n = c_n / s_n
    dx = factor (E W),    dW = E^T (factor x)

and nothing but the target's entries is ever read or written elementwise.  r is the larger of the target's u and the
largest of a few sampled classes': a lower bound of the row's maximum, so that s is no less than about 1.  A chunk in
which e overflows all the same is done again with r = the largest u, which costs it two further products and no
synchronisation with the host: the launches are always made and find nothing to do.

Rows that do not count (ignored, or of coefficient 0) are left out: the rows that do are gathered one after another, and
the kernels read on the device how many there are.  The weight's gradient is summed over chunks in float32 without its
lowest 8 bits, the upper 16 of the 24 in the gradient's own memory.

Label smoothing takes c_n f' w_v share off every dz_nv, share = smoothing / C: an outer product, which goes into the
gradients' epilogues as one, -c_n f' share (sum_v w_v W_v) for dx and -w_v (sum_n c_n f' share x_n) for dW.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from structfly.lowering.gemm import Blocks, Product, best_split, has_descriptor, programs_on, tiles_for
from structfly.lowering.linear_cross_entropy.chunked import Gradients, Head, Wanted, allocate_gradients, class_terms
from structfly.lowering.linear_cross_entropy.rows import ClassTerms
from structfly.lowering.linear_cross_entropy.schedule import exponential_rows, low_stride, row_stride
from structfly.lowering.template import Parameter, load, render

_SAMPLED_CLASSES = 8
_HIDDEN_BLOCK = 1024
_BLOCK_ROWS = 2048  # of what is upcast at a time


def run_exponentials(
    head: Head, coefficient: Tensor | None, wanted: Wanted | None, workspace: int
) -> tuple[Tensor, Gradients | None]:
    """Fulfils the contract of :func:`~structfly.lowering.linear_cross_entropy.chunked.run_chunks`, for heads that
    :func:`~structfly.lowering.linear_cross_entropy.schedule.why_no_exponentials` has nothing against."""
    rows = head.x.shape[0]
    losses = head.x.new_zeros(rows, dtype=torch.float32)
    gradients = None if wanted is None else allocate_gradients(head, wanted)
    if gradients is not None:
        gradients.x.zero_()  # rows that do not count are never written
        gradients.weight[head.num_classes if rows else 0 :].zero_()
    if rows:
        with torch.cuda.device(head.x.device) if head.x.is_cuda else nullcontext():
            _Run(head, coefficient, gradients, workspace, losses).run()
    return losses, gradients


class _Run:
    """Buffers that every chunk uses anew, the kernels over them, and the loop over chunks."""

    def __init__(
        self, head: Head, coefficient: Tensor | None, gradients: Gradients | None, workspace: int, losses: Tensor
    ) -> None:
        self.head, self.coefficient, self.losses = head, coefficient, losses
        self.terms = class_terms(head)
        self.x = head.x if head.x.stride(1) == 1 else head.x.contiguous()
        self.weight = head.weight[: head.num_classes]
        if not has_descriptor(self.weight):  # a view of a larger buffer that begins anywhere
            self.weight = self.weight.clone(memory_format=torch.contiguous_format)
        self.mask = None if self.terms.mask is None else self.terms.mask.contiguous().view(torch.uint8)
        rows, self.hidden = head.x.shape
        self.length = exponential_rows(rows, head.num_classes, workspace)
        self.starts = range(0, rows, self.length)
        self.share = head.label_smoothing / head.num_classes
        self._find_rows()
        self.split = 1
        if gradients is not None and gradients.x.numel():
            self.split = best_split(self.length, self.hidden, programs_on(self.x.device), tiles_for(self.x.device))
        self._make_buffers(gradient=gradients is not None)
        self._make_exponentials(gradient=gradients is not None)
        self.hidden_product: Product | None = None
        self.weight_products: list[Product] = []
        if gradients is not None and gradients.x.numel():
            self._make_hidden_product(gradients.x)
        if gradients is not None and gradients.weight.numel():
            self._make_weight_product(gradients.weight[: head.num_classes])

    def run(self) -> None:
        for number, start in enumerate(self.starts):
            self._exponentials(start, self.overflowed[number])
            if self.hidden_product is not None:
                self.hidden_product(self.live, start)
                self.kernels.scatter[(self.length,)](
                    *(self.index, self.live, start, self.hidden_sums, self.factor, self._given(self.coefficient)),
                    *(self.weighted_classes, self.dx, self.dx.stride(0)),
                    **self.hidden_blocks,
                )
            if self.weight_products:
                self.weight_products[number > 0](self.live, start)

    # ------------------------------------------------------------------------------------------------ preparation

    def _find_rows(self) -> None:
        """Where the rows that count stand, and how many they are; both stay on the device."""
        counts = torch.ones_like(self.head.target, dtype=torch.bool)
        if self.head.ignore_index is not None:
            counts &= self.head.target != self.head.ignore_index
        if self.coefficient is not None:
            counts &= self.coefficient != 0
        self.index = torch.nonzero_static(counts, size=counts.numel()).squeeze(1)
        self.live = counts.sum(dtype=torch.int32)
        self.counts = counts

    def _make_buffers(self, *, gradient: bool) -> None:
        classes = self.head.num_classes
        self.tiles = -(-classes // tiles_for(self.x.device).n)
        self.x_chunk = self.x.new_empty(self.length, self.hidden)
        self.exps = self.x.new_empty((self.length, row_stride(classes)) if gradient else (1, 16))[:, :classes]
        self.tile_values = self.x.new_empty(self.length, self.tiles, dtype=torch.float32)
        self.u_target, self.slope_target, self.u_sum, self.reference, self.factor = (
            self.x.new_empty(self.length, dtype=torch.float32) for _ in range(5)
        )
        self.weighted_classes = self.weighted_bias = self.weight_sum = self.factor
        if self.share:
            self.weighted_classes, self.weighted_bias = self._weighted_classes()
            sum_of_ones = self.factor.new_full((), float(classes))
            self.weight_sum = sum_of_ones if self.terms.weight_sum is None else self.terms.weight_sum
        self.hidden_sums = self.factor
        self.overflowed = torch.zeros(len(self.starts), dtype=torch.int32, device=self.x.device)
        self.hidden_blocks = {"HIDDEN": self.hidden, "BLOCK": min(_HIDDEN_BLOCK, _power_of_two(self.hidden))}

    def _weighted_classes(self) -> tuple[Tensor, Tensor]:
        """sum_v w_v W_v (H,) and sum_v w_v b_v (), in float32."""
        total = self.x.new_zeros(self.hidden, dtype=torch.float32)
        class_weight, bias = self.terms.weight, self.terms.bias
        for start in range(0, self.head.num_classes, _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            block = self.weight[part].float()
            total += block.sum(0) if class_weight is None else class_weight[part] @ block
        if bias is None:
            return total, total.new_zeros(())
        return total, bias.float().sum() if class_weight is None else class_weight @ bias.float()

    def _weighted_rows(self) -> Tensor:
        """sum_n c_n f' share x_n (H,) over the rows that count, in float32."""
        weights = self.counts.float() if self.coefficient is None else self.coefficient * self.counts
        total = self.x.new_zeros(self.hidden, dtype=torch.float32)
        for start in range(0, self.x.shape[0], _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            total += weights[part] @ self.x[part].float()
        return total * (_constant_slope(self.terms) * self.share)

    def _make_exponentials(self, *, gradient: bool) -> None:
        chain: dict[str, Parameter] = {
            "steps": tuple((step.operation, step.constant) for step in self.terms.epilogue.steps),
            "nonlinear": not self.terms.epilogue.linear,
            "has_bias": self.terms.bias is not None,
            "has_mask": self.mask is not None,
            "gradient": gradient,
        }
        rows: dict[str, Parameter] = {
            "constant_slope": _constant_slope(self.terms),
            "class_weight": self.terms.weight is not None,
            "coefficient": self.coefficient is not None,
            "clear": self.split > 1,
            "smoothing": self.head.label_smoothing,
            "share": self.share,
            "interpreted": not self.x.is_cuda,
        }
        self.kernels = _row_module(tuple({**chain, **rows}.items()))
        arguments = [
            *(self.reference, self.tile_values, self.tiles),
            Blocks(self.exps, cut=False) if gradient else self.factor,
            *(self._given(self.terms.bias), self._given(self.mask)),
        ]
        self.exponentials, self.largest = (
            Product(
                "linear_cross_entropy_exponentials",
                self.x_chunk,
                self.weight.t(),
                arguments,
                {**chain, "largest": largest},
            )
            for largest in (False, True)
        )

    def _given(self, tensor: Tensor | None) -> Tensor:
        """The tensor, or for None one that the kernel does not read."""
        return self.factor if tensor is None else tensor.contiguous()

    def _make_hidden_product(self, dx: Tensor) -> None:
        self.dx = dx
        self.hidden_sums = self.x.new_empty(self.length, self.hidden, dtype=torch.float32)
        self.hidden_product = Product(
            "linear_cross_entropy_hidden", self.exps, self.weight, [Blocks(self.hidden_sums)], split=self.split
        )

    def _make_weight_product(self, dw: Tensor) -> None:
        a, b, high = self.exps.t(), self.x_chunk, dw.view(torch.uint16)
        if dw.stride(1) != 1:  # stored (hidden, classes): so is what is made
            a, b, high = b.t(), a.t(), high.t()
        low, single = high, len(self.starts) == 1
        if not single:
            low = torch.empty(high.shape[0], low_stride(high.shape[1]), dtype=torch.uint8, device=high.device)
            low = low[:, : high.shape[1]]
        outer: list[Tensor] = []
        if self.share:
            ones = self.factor.new_ones(self.head.num_classes)
            outer = [ones if self.terms.weight is None else self.terms.weight, self._weighted_rows()]
            outer = outer if dw.stride(1) == 1 else outer[::-1]
        self.weight_products = [
            Product(
                "linear_cross_entropy_weight",
                a,
                b,
                [Blocks(high), Blocks(low), *(outer if first else ())],
                {"first": first, "single": single, "uniform": bool(outer) and first},
            )
            for first in ((True,) if single else (True, False))
        ]

    # ------------------------------------------------------------------------------------------------ one chunk

    def _exponentials(self, start: int, overflowed: Tensor) -> None:
        """Exponentials, losses and factors of the rows from ``start`` on; ``x_chunk`` becomes factor x."""
        head, terms = self.head, self.terms
        self.kernels.gather[(self.length,)](
            *(self.x, self.x.stride(0), self.weight, *self.weight.stride()),
            *(self._given(terms.bias), self._given(self.mask), self.weighted_classes, self.weighted_bias),
            *(head.target, self.index, self.live, start),
            *(self.x_chunk, self.u_target, self.slope_target, self.u_sum, self.reference),
            CLASSES=head.num_classes,
            SAMPLES=_SAMPLED_CLASSES,
            **self.hidden_blocks,
        )
        self.exponentials(self.live, start, overflowed)
        # Once more with the largest logits, if some were too large; else these launches find no rows.
        self.largest(overflowed, start, overflowed)
        self.kernels.raise_reference[(self.length,)](
            *(overflowed, start, self.tile_values, self.reference), TILES=self.tiles, BLOCK=_power_of_two(self.tiles)
        )
        self.exponentials(overflowed, start, overflowed)
        self.kernels.finish[(self.length,)](
            *(self.index, self.live, start, head.target, self._given(self.coefficient), self._given(terms.weight)),
            *(self.weight_sum, self.tile_values, self.reference, self.u_target, self.slope_target, self.u_sum),
            *(self.losses, self.exps, self.exps.stride(0), self.x_chunk, self.factor, self.hidden_sums),
            TILES=self.tiles,
            TILE_BLOCK=_power_of_two(self.tiles),
            **self.hidden_blocks,
        )


@lru_cache(maxsize=256)
def _row_module(parameters: tuple[tuple[str, Parameter], ...]) -> Any:
    return load(render("linear_cross_entropy_exponential_rows", **dict(parameters)))


def _constant_slope(terms: ClassTerms) -> float:
    """f' where it is a number; where it is not, it stands in the exponentials."""
    return float(terms.epilogue.apply_(torch.zeros(()), derivative=True)) if terms.epilogue.linear else 1.0


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 1).bit_length()
