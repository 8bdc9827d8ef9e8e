"""How the weight of a linear layer is made of factors: the protocol that every structure fulfils, and the layer itself.

A structure is a frozen record of its settings, such as ``LowRank(rank=64)``.  It knows which factors make a weight of
given sizes, what they cost, how to find them for a given weight, and the op that applies them.
:class:`StructuredLinear` is the module that holds them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from structfly.errors import ArgumentError
from structfly.records.layer import NO_STATISTICS, LayerCost, LayerSizes, LayerStatistics

Factors = Mapping[str, Tensor]


def widened(weight: Tensor) -> Tensor:
    """A weight in the dtype that it is projected in: float32, or its own if that is wider."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


class Factor(NamedTuple):
    """One factor's shape; those that are not ``learned`` are integers (int32) that say where others stand."""

    shape: tuple[int, ...]
    learned: bool = True


class Structure(BaseModel, ABC):
    """One way to make a weight (out, in), with its settings."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ClassVar[str]
    """Stands in plans and reports."""

    @abstractmethod
    def why_not(self, sizes: LayerSizes) -> str:
        """Why a layer of these sizes cannot have this structure and what is allowed, or ""."""

    @abstractmethod
    def factors(self, sizes: LayerSizes) -> Mapping[str, Factor]:
        """The factors by name, in the op's order."""

    @abstractmethod
    def cost(self, sizes: LayerSizes, dtype: torch.dtype) -> LayerCost:
        """What it costs with factors of ``dtype``."""

    @abstractmethod
    def initial(self, sizes: LayerSizes, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Random factors, float32 on the CPU, to train from scratch: the entries of the weight have the variance
        1 / (3 in_features) on average, as those of :class:`torch.nn.Linear` have."""

    @classmethod
    @abstractmethod
    def project_each(
        cls, choices: Iterable[Self], weight: Tensor, statistics: LayerStatistics = NO_STATISTICS
    ) -> Iterator[dict[str, Tensor]]:
        """Factors of several settings, one after another, whose weights are near ``weight`` (out, in), in its dtype,
        which is float32 or float64.  What settings have in common is done once.

        Near in the sense of :meth:`~structfly.records.layer.LayerStatistics.loss_of`, as far as the structure's
        projection can follow it; without statistics in the Frobenius norm.
        """

    @abstractmethod
    def to_dense(self, sizes: LayerSizes, factors: Factors) -> Tensor:
        """The weight (out, in)."""

    @abstractmethod
    def apply(self, sizes: LayerSizes, factors: Factors, x: Tensor, bias: Tensor | None) -> Tensor:
        """W x + bias of x (*rows, in), by the structure's op; no dense weight is made."""

    @classmethod
    @abstractmethod
    def menu(cls, sizes: LayerSizes) -> list[Self]:
        """The settings worth offering for a layer of these sizes, each with fewer parameters than the dense weight."""

    def project(self, weight: Tensor, statistics: LayerStatistics = NO_STATISTICS) -> dict[str, Tensor]:
        """:meth:`project_each` of this setting alone."""
        return next(self.project_each([self], weight, statistics))

    @classmethod
    def losses(
        cls, choices: Iterable[Self], weight: Tensor, statistics: LayerStatistics = NO_STATISTICS
    ) -> Iterator[float]:
        """The loss that each setting's projection is predicted to cost, one after another."""
        choices = list(choices)
        sizes = LayerSizes(weight.shape[1], weight.shape[0])
        for each, factors in zip(choices, cls.project_each(choices, weight, statistics), strict=True):
            yield statistics.loss_of(each.to_dense(sizes, factors) - weight)

    def check(self, sizes: LayerSizes) -> None:
        """Raise ArgumentError if a layer of these sizes cannot have this structure."""
        if reason := self.why_not(sizes):
            raise ArgumentError(f"{self!r} for a layer {sizes.in_features} -> {sizes.out_features}: {reason}")


class StructuredLinear(nn.Module):
    """``y = W x + b`` with W made of factors, in the place of :class:`torch.nn.Linear`.

    Args:
        structure: what W is made of.
        in_features, out_features: W's sizes.
        bias: whether there is b (out_features,).
        device, dtype: of the factors and the bias.

    The factors are parameters under their names (those that are not learned: buffers), the bias is ``bias``.  They
    begin as :meth:`Structure.initial` draws them.

    Raises:
        ArgumentError: the structure does not fit the sizes.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        structure: Structure,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.structure, self.in_features, self.out_features = structure, in_features, out_features
        structure.check(self.sizes)
        dtype = dtype or torch.get_default_dtype()
        factors = structure.factors(self.sizes)
        self._names = tuple(factors)  # a compiler that traces the layer need not ask the structure
        for name, (shape, learned) in factors.items():
            if learned:
                self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
            else:
                self.register_buffer(name, torch.zeros(shape, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, structure: Structure, statistics: LayerStatistics = NO_STATISTICS
    ) -> StructuredLinear:
        """The layer nearest to ``linear``; see :meth:`Structure.project`.  Its bias takes up the mean of the change
        where ``statistics`` have an ``input_mean``."""
        wide = widened(linear.weight.detach())
        factors = structure.project(wide, statistics)
        made = cls.of_factors(linear, structure, factors)
        if made.bias is not None and statistics.input_mean is not None:
            mean = statistics.input_mean.to(wide)[None]
            with torch.no_grad():
                lost = (mean @ wide.t() - structure.apply(made.sizes, factors, mean, None))[0]
                made.bias.add_(lost.to(made.bias.dtype))
        return made

    @classmethod
    def of_factors(cls, linear: nn.Linear, structure: Structure, factors: Factors) -> StructuredLinear:
        """A layer in the place of ``linear``, with its bias, dtype, device and mode, of these factors."""
        made = cls(
            structure,
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",  # where nothing is drawn
            dtype=linear.weight.dtype,
        ).to_empty(device=linear.weight.device)
        made.load_factors(factors)
        if made.bias is not None:
            with torch.no_grad():
                made.bias.copy_(linear.bias)
        for parameter in made.parameters():
            parameter.requires_grad_(linear.weight.requires_grad)
        return made.train(linear.training)

    @property
    def sizes(self) -> LayerSizes:
        """The layer's sizes."""
        return LayerSizes(self.in_features, self.out_features)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name, in the op's order."""
        return {name: getattr(self, name) for name in self._names}

    @torch.no_grad()
    def load_factors(self, factors: Factors) -> None:
        """Copy these factors in, cast to the layer's dtype."""
        for name, own in self.factors.items():
            own.copy_(factors[name])

    def reset_parameters(self) -> None:
        """Draw factors and bias anew."""
        if next(iter(self.factors.values())).device.type != "meta":
            self.load_factors(self.structure.initial(self.sizes))
        if self.bias is not None:
            bound = 1 / math.sqrt(max(self.in_features, 1))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """W x + b of x (*rows, in_features)."""
        return self.structure.apply(self.sizes, self.factors, x, self.bias)

    def to_dense(self) -> Tensor:
        """W (out_features, in_features), differentiable."""
        return self.structure.to_dense(self.sizes, self.factors)

    def to_linear(self) -> nn.Linear:
        """The dense layer that computes the same."""
        dense = self.to_dense().detach()
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=dense.device, dtype=dense.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(dense)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.structure!r}, {self.in_features} -> {self.out_features}, bias={self.bias is not None}"
