"""Linear layers in every spelling, and what they should compute once they are restructured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from structfly import Plan
from structfly.patterns.structure import Structure, widened
from structfly.records.layer import LayerSizes
from structfly.restructure import PlannedLayer
from tests.oracle import assert_as_accurate

Spelling = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _biased(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias


# Of x (*rows, in), the weight as it is stored and the bias; those that begin with "in_out" store (in, out).
SPELLINGS: Mapping[str, Spelling] = {
    "linear": F.linear,
    "matmul": lambda x, w, b: _biased(x @ w.t(), b),
    "matmul_T": lambda x, w, b: _biased(torch.matmul(x, w.T), b),
    "matmul_mT": lambda x, w, b: _biased(x.matmul(w.mT), b),
    "transpose": lambda x, w, b: _biased(x @ w.transpose(0, 1), b),
    "mm": lambda x, w, b: _biased(torch.mm(x.reshape(-1, x.shape[-1]), w.t()), b),
    "einsum": lambda x, w, b: _biased(torch.einsum("...h,vh->...v", x, w), b),
    "addmm": lambda x, w, b: torch.addmm(b, x.reshape(-1, x.shape[-1]), w.t()) if b is not None else x @ w.t(),
    "in_out_matmul": lambda x, w, b: _biased(x @ w, b),
    "in_out_einsum": lambda x, w, b: _biased(torch.einsum("...h,hv->...v", x, w), b),
    "in_out_addmm": lambda x, w, b: (
        torch.addmm(b, x.view(-1, x.size(-1)), w).view(*x.shape[:-1], w.shape[1]) if b is not None else x @ w
    ),
}


class Spelled(nn.Module):
    """A layer with a weight of its own, in one spelling."""

    def __init__(self, spelling: str, sizes: LayerSizes, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.spelling = spelling
        shape = sizes if spelling.startswith("in_out") else sizes[::-1]
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype) / sizes.in_features**0.5)
        self.bias = nn.Parameter(torch.randn(sizes.out_features, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return SPELLINGS[self.spelling](x, self.weight, self.bias)


class Model(nn.Module):
    """``layer`` between operations that show its place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.tanh(self.layer(torch.tanh(x)))
        return result


def planned(**layers: tuple[Structure | None, LayerSizes]) -> Plan:
    """A plan of these layers; two underscores in a name stand for a dot."""
    return Plan(
        layers={
            name.replace("__", "."): PlannedLayer(
                in_features=sizes.in_features, out_features=sizes.out_features, structure=structure, predicted_loss=0.25
            )
            for name, (structure, sizes) in layers.items()
        }
    )


def projected(structure: Structure, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense weight, float64, of what is projected of ``weight`` (out, in), with factors rounded to ``dtype``."""
    factors = structure.project(widened(weight.detach()))
    rounded = {
        name: factor.to(dtype).double() if factor.is_floating_point() else factor for name, factor in factors.items()
    }
    sizes = LayerSizes(weight.shape[1], weight.shape[0])
    return structure.to_dense(sizes, rounded)


def assert_structured(
    actual: Tensor,
    module: nn.Module,
    weights: Mapping[str, Tensor],
    x: Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """``actual`` is what ``module`` computes in float64 with these weights in the place of its own, as accurately as it
    does in ``dtype``."""

    def run(to: torch.dtype) -> Tensor:
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **weights}
        with torch.no_grad():
            result: Tensor = functional_call(module, {name: each.to(to) for name, each in tensors.items()}, x.to(to))
        return result

    assert_as_accurate(actual, run(dtype), run(torch.float64), dtype, "value")
