"""Generalised block low rank while it is learned: components whose masks have learned widths and locations.

W = sum_k (m_k * u_k) (n_k * v_k)^T, with masks m_k of the outputs and n_k of the inputs
(:mod:`structfly.patterns.gaussian_dirichlet`).  For a convolution W is the unfolded weight (out, in * kh * kw).  Train
with :class:`structfly.patterns.width_budget.WidthBudget`, raising sigma towards infinity; then
:meth:`GaudiGBLR.finalise` cuts the components to tiles.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structfly.errors import ArgumentError
from structfly.lowering.low_rank.op import LOW_RANK
from structfly.patterns.gaussian_dirichlet import gaussian_dirichlet_masks
from structfly.patterns.gblr_tiles import GPU_TILES, USUAL_TILES, cut_to_tiles
from structfly.patterns.low_rank import LowRank
from structfly.patterns.structure import StructuredLinear
from structfly.patterns.unfolded_conv import UnfoldedConv2d, unfolded_weight
from structfly.records.layer import NO_STATISTICS, LayerSizes, LayerStatistics


class GaudiGBLR(nn.Module):
    """``y = W x + b`` with masked components.

    Args:
        in_features, out_features: W's sizes.
        components: how many, at most min(in_features, out_features), which is the default.
        bias: whether there is b.
        width: share of a side that every mask begins with, at random places unless it is 1.
        device, dtype: of the parameters.

    Parameters: ``right`` (components, in), ``left`` (out, components), and for every component ``row_widths``,
    ``row_locations``, ``column_widths``, ``column_locations`` (components,), shares of a side in float32 at least, for
    bfloat16 cannot count to 1000.  ``sigma`` () float32 is a buffer: infinite until :meth:`anneal` sets it.

    Raises:
        ArgumentError: components or width out of range.
    """

    sigma: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        components: int | None = None,
        bias: bool = True,
        *,
        width: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        most = min(in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.components = most if components is None else components
        if not 1 <= self.components <= most:
            raise ArgumentError(
                f"components={components} for a layer {in_features} -> {out_features}: 1 to {most} there"
            )
        if not 0 < width <= 1:
            raise ArgumentError(f"width={width}: a share of a side, above 0 and up to 1")
        dtype = dtype or torch.get_default_dtype()
        # The entries of W have the variance 1 / (3 in) on average: components * width^2 of them reach one.
        right = torch.randn(self.components, in_features, dtype=dtype, device=device) / in_features**0.5
        left = torch.randn(out_features, self.components, dtype=dtype, device=device)
        self.right = nn.Parameter(right)
        self.left = nn.Parameter(left / (3 * self.components * width**2) ** 0.5)
        shares = torch.promote_types(dtype, torch.float32)
        for side in ("row", "column"):
            places = torch.rand(self.components, dtype=shares, device=device)
            places = torch.zeros_like(places) if width == 1 else places
            self.register_parameter(f"{side}_widths", nn.Parameter(torch.full_like(places, width)))
            self.register_parameter(f"{side}_locations", nn.Parameter(places))
        self.register_buffer("sigma", torch.tensor(math.inf, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(in_features**-0.5), in_features**-0.5)

    row_widths: nn.Parameter
    row_locations: nn.Parameter
    column_widths: nn.Parameter
    column_locations: nn.Parameter

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, components: int | None = None, statistics: LayerStatistics = NO_STATISTICS
    ) -> Self:
        """The layer nearest to ``linear`` with all masks full: the same function, with all components.

        With fewer components it is the best of that rank under ``statistics``.
        """
        made = cls(
            linear.in_features,
            linear.out_features,
            components,
            linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        made._load(linear.weight, linear.bias, statistics)
        return made.train(linear.training)

    @torch.no_grad()
    def _load(self, weight: Tensor, bias: Tensor | None, statistics: LayerStatistics) -> None:
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        factors = LowRank(rank=self.components).project(wide, statistics)
        self.right.copy_(factors["right"])
        self.left.copy_(factors["left"])
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    @property
    def sizes(self) -> LayerSizes:
        """The sizes of W."""
        return LayerSizes(self.in_features, self.out_features)

    def anneal(self, sigma: float) -> None:
        """Set the masks' sharpness; the paper raises it from 1 to 100 while training.

        Raises:
            ArgumentError: sigma is not positive.
        """
        if not sigma > 0:
            raise ArgumentError(f"sigma={sigma}: above 0, or infinite")
        self.sigma.fill_(sigma)

    def masks(self) -> tuple[Tensor, Tensor]:
        """Of the outputs (components, out) and of the inputs (components, in)."""
        return (
            gaussian_dirichlet_masks(self.row_widths, self.row_locations, self.out_features, self.sigma),
            gaussian_dirichlet_masks(self.column_widths, self.column_locations, self.in_features, self.sigma),
        )

    def masked(self) -> tuple[Tensor, Tensor]:
        """``left`` (out, components) and ``right`` (components, in) under their masks."""
        rows, columns = self.masks()
        return self.left * rows.t().to(self.left.dtype), self.right * columns.to(self.right.dtype)

    def to_dense(self) -> Tensor:
        """W (out, in), differentiable."""
        left, right = self.masked()
        return left @ right

    def forward(self, x: Tensor) -> Tensor:
        """W x + b of x (*rows, in); W is not made."""
        left, right = self.masked()
        return LOW_RANK(x, [right, left], self.bias)

    @torch.no_grad()
    def finalise(
        self,
        tile: int | None = None,
        group: int | None = None,
        threshold: float = 1e-3,
        *,
        rematerialise: bool = False,
    ) -> nn.Module:
        """The layer with its components cut to tiles: a :class:`StructuredLinear` of :class:`GBLR`.

        Components are grouped so that those of a group have few tiles besides their own; every tile that an interval
        touches is kept whole, with zeros outside the interval.  What it computes changes only where masks of a finite
        sigma are below ``threshold``, which become 0.

        Tiles are ``tile`` features of ``group`` components; without them 128 of 128 on a GPU, where smaller ones take
        longer than what they leave out, and 32 of 16 elsewhere.  ``rematerialise`` is the structure's.

        Raises:
            ArgumentError: all components are empty.
        """
        return self._linear(tile, group, threshold, rematerialise)

    def _linear(self, tile: int | None, group: int | None, threshold: float, rematerialise: bool) -> StructuredLinear:
        usual = GPU_TILES if self.left.is_cuda else USUAL_TILES
        tile, group = tile or usual[0], group or usual[1]
        rows, columns = (mask * (mask.abs() >= threshold) for mask in self.masks())
        left = self.left * rows.t().to(self.left.dtype)
        right = self.right * columns.to(self.right.dtype)
        cut = cut_to_tiles(rows.t() != 0, columns != 0, tile, group)
        like = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=left.device, dtype=left.dtype
        )
        if self.bias is not None:
            like.bias.copy_(self.bias)
        structure = cut.structure.model_copy(update={"rematerialise": rematerialise})
        return StructuredLinear.of_factors(like, structure, cut.factors(left, right)).train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, components={self.components}, bias={self.bias is not None}"


class GaudiGBLRConv2d(GaudiGBLR):
    """A convolution whose unfolded weight (out, in * kh * kw) is made of masked components.

    The components of the inputs are a convolution with as many output channels, those of the outputs one of 1 x 1.

    Args:
        like: a convolution with one group and zero padding, whose sizes and bias it takes.
        components, width: as :class:`GaudiGBLR` has them.

    Raises:
        ArgumentError: components or width out of range, or a convolution of another kind.
    """

    def __init__(self, like: nn.Conv2d, components: int | None = None, *, width: float = 1.0) -> None:
        weight = unfolded_weight(like)
        super().__init__(
            weight.shape[1],
            weight.shape[0],
            components,
            like.bias is not None,
            width=width,
            device=weight.device,
            dtype=weight.dtype,
        )
        self.in_channels, self.kernel_size = like.in_channels, like.kernel_size
        self.stride, self.padding, self.dilation = like.stride, like.padding, like.dilation

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, components: int | None = None, statistics: LayerStatistics = NO_STATISTICS
    ) -> Self:
        """The layer nearest to ``conv`` with all masks full; ``statistics`` are of the unfolded inputs."""
        made = cls(conv, components)
        made._load(unfolded_weight(conv), conv.bias, statistics)
        return made.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, out, height, width) of x (N, in_channels, height, width)."""
        left, right = self.masked()
        kernels = right.view(self.components, self.in_channels, *self.kernel_size)
        seen = F.conv2d(x, kernels, None, self.stride, self.padding, self.dilation)
        return F.conv2d(seen, left[:, :, None, None], self.bias)

    @torch.no_grad()
    def finalise(
        self,
        tile: int | None = None,
        group: int | None = None,
        threshold: float = 1e-3,
        *,
        rematerialise: bool = False,
    ) -> nn.Module:
        """As :meth:`GaudiGBLR.finalise`, an :class:`UnfoldedConv2d` of such a layer."""
        linear = self._linear(tile, group, threshold, rematerialise)
        return UnfoldedConv2d(linear, self.kernel_size, self.stride, self.padding, self.dilation).train(self.training)
