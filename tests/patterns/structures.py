"""What every structure is held to: its tests call :func:`check_structure` for settings and sizes that they draw."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from structfly.lowering.layer_op import LayerOp
from structfly.patterns.structure import Structure, StructuredLinear
from structfly.patterns.whitening import Covariances
from structfly.records.layer import NO_STATISTICS, LayerSizes, LayerStatistics
from tests.dispatched import Dispatched
from tests.oracle import assert_like_eager
from tests.patterns.costs import check_cost

# What a product in another order than the dense weight's may round more often, by dtype.
ROUNDINGS = {torch.float64: 1, torch.float32: 16, torch.bfloat16: 8}


def statistics_of(sizes: LayerSizes, seed: int = 0, tokens: int = 200) -> LayerStatistics:
    """Covariances of full rank, far from the identity."""
    generator = torch.Generator().manual_seed(seed)

    def covariance(features: int) -> Tensor:
        scale = torch.logspace(0, -1, features)
        rows = torch.randn(tokens + features, features, generator=generator) * scale
        mix = torch.randn(features, features, generator=generator) / features**0.5
        rows = rows @ mix
        result: Tensor = rows.t() @ rows / len(rows)
        return result

    return LayerStatistics(covariance(sizes.in_features), covariance(sizes.out_features), tokens=tokens)


def check_structure(structure: Structure, sizes: LayerSizes, *ops: LayerOp) -> None:
    """Factors, cost, module and ops of one structure agree with each other and with its dense weight."""
    assert structure.why_not(sizes) == ""
    assert type(structure).model_validate_json(structure.model_dump_json()) == structure
    check_factors(structure, sizes)
    check_cost(structure, sizes, torch.float32, tokens=10)
    for dtype, roundings in ROUNDINGS.items():
        check_products(structure, sizes, dtype, roundings)
    for op in ops:
        check_op(structure, sizes, op)


def layer_of(structure: Structure, sizes: LayerSizes, dtype: torch.dtype, bias: bool = True) -> StructuredLinear:
    """A layer near a random weight, so that indices are those of a projection."""
    torch.manual_seed(0)
    linear = nn.Linear(*sizes, bias, dtype=torch.float32)
    return StructuredLinear.from_linear(linear, structure, statistics_of(sizes)).to(dtype)


def check_factors(structure: Structure, sizes: LayerSizes) -> None:
    shapes = structure.factors(sizes)
    weight = torch.randn(sizes.out_features, sizes.in_features, generator=torch.Generator().manual_seed(0))
    for made in (structure.initial(sizes), structure.project(weight), structure.project(weight.double())):
        assert {name: tensor.shape for name, tensor in made.items()} == {n: f.shape for n, f in shapes.items()}
        assert structure.to_dense(sizes, made).shape == weight.shape
    check_losses(structure, sizes, weight.double())
    learned = [name for name, factor in shapes.items() if factor.learned]
    cost = structure.cost(sizes, torch.float32).at(tokens=10)
    layer = layer_of(structure, sizes, torch.float32, bias=False)
    assert cost["parameters"] == sum(parameter.numel() for parameter in layer.parameters())
    held = [*layer.parameters(), *layer.buffers()]
    assert cost["weight_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert set(dict(layer.named_parameters())) == set(learned)
    again = copy.deepcopy(layer)
    again.reset_parameters()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.to_dense(), layer.to_dense())


def check_losses(structure: Structure, sizes: LayerSizes, weight: Tensor) -> None:
    """What a projection is predicted to cost is what it costs, and no more than the projection without statistics.

    A prediction may count the ridge that a projection adds to covariances, and no more than that.
    """
    statistics = statistics_of(sizes)
    costs = []
    for known in (statistics, NO_STATISTICS):
        change = structure.to_dense(sizes, structure.project(weight, known)) - weight
        (predicted,) = type(structure).losses([structure], weight, known)
        inner, outer = Covariances.of(known, weight)
        ridged = LayerStatistics(inner, outer, tokens=known.tokens)
        rounding = 1e-8 * known.loss_of(weight)  # factors are made with the covariances' inverses
        least, most = known.loss_of(change), ridged.loss_of(change)
        assert least * (1 - 1e-6) - rounding <= predicted <= most * (1 + 1e-6) + rounding
        costs.append(statistics.loss_of(change))
    assert costs[0] <= costs[1] * (1 + 1e-2) + 1e-12


def check_products(
    structure: Structure, sizes: LayerSizes, dtype: torch.dtype, roundings: int, device: str = "cpu"
) -> None:
    """Value and gradients are those of the dense weight, and as accurate."""
    layer = layer_of(structure, sizes, dtype).to(device)
    names = [name for name, factor in structure.factors(sizes).items() if factor.learned]
    assert layer.bias is not None
    x = torch.randn(2, 3, sizes.in_features, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    arguments = [each.detach().requires_grad_() for each in (x, layer.bias, *(layer.factors[name] for name in names))]

    def with_these(learned: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {**layer.factors, **dict(zip(names, learned, strict=True))}

    def fast(x: Tensor, bias: Tensor, *learned: Tensor) -> Tensor:
        return structure.apply(sizes, with_these(learned), x, bias).square().sum()

    def dense(x: Tensor, bias: Tensor, *learned: Tensor) -> Tensor:
        return (x @ structure.to_dense(sizes, with_these(learned)).t() + bias).square().sum()

    assert_like_eager(fast, dense, arguments, dtype, roundings=roundings)


def check_op(structure: Structure, sizes: LayerSizes, op: LayerOp) -> None:
    """torch's own checks of an op, a second derivative, and that no tensor of the dense weight's size is made."""
    layer = layer_of(structure, sizes, torch.float64)
    x = torch.randn(1, sizes.in_features, dtype=torch.float64, requires_grad=True)
    forward, backward = (getattr(torch.ops.structfly, f"{op.name}{end}").default for end in ("", "_backward"))
    with Dispatched() as ran:
        layer(x).sum().backward()
    forwards, backwards = ran.arguments_of([forward]), ran.arguments_of([backward])
    assert forwards, f"{op.name} was not called"
    assert backwards, f"{op.name} has no backward"
    for arguments in forwards:
        opcheck(forward, tree_map(_leaf, arguments))
    assert torch.autograd.gradgradcheck(layer, (x,))
    allowed = max(tensor.numel() for tensor in layer.factors.values())
    with Largest() as largest:
        for kernel, calls in ((op._forward, forwards), (op._backward, backwards)):
            for arguments in calls:
                kernel(*arguments)
    assert largest.elements < max(sizes.parameters, allowed + 1), f"{op.name} makes {largest.elements} elements"


def _leaf(value: Any) -> Any:
    """The same value as a leaf, for opcheck reads the gradients of its arguments."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result
