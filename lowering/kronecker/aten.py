"""Products with Kronecker-sparse factors by torch: each factor is one batched product.

Rows of x stand last in what is between two factors, (d a, i q, N): then the next factor may take as its batch and as
its columns any axes that lie side by side, and the two factors of a Monarch matrix need no copy between them.  Where
axes do not lie side by side, ``reshape`` makes the copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from structfly.lowering.kronecker.reference import FactorShape
from structfly.lowering.layer_products import Applied


def between(call: Applied) -> list[Tensor]:
    """What stands between the factors."""
    x, factors = call.x, call.factors
    shapes = [FactorShape(*factor.shape) for factor in factors]
    features, made = _padded(x, shapes[0].features_in).t(), []
    for factor, shape in zip(factors[:-1], shapes, strict=False):
        made.append(torch.bmm(_matrices(factor, shape), _inputs(features, shape)))
        features = _as_outputs(made[-1], shape)
    return made


def finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    """y."""
    x, factors, (out_features,) = call.x, call.factors, call.static
    shapes = [FactorShape(*factor.shape) for factor in factors]
    last = shapes[-1]
    features = _as_outputs(between[-1], shapes[-2]) if between else _padded(x, last.features_in).t()
    features = _as_outputs(torch.bmm(_matrices(factors[-1], last), _inputs(features, last)), last)
    y = features.permute(4, 0, 1, 2, 3).reshape(x.shape[0], last.features_out)[:, :out_features].contiguous()
    return y if call.bias is None else y.add_(call.bias)


def backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, of x and each factor."""
    x, factors = call.x, call.factors
    shapes = [FactorShape(*factor.shape) for factor in factors]
    gradients: list[Tensor | None] = [None] * len(wanted)
    features = _padded(grad, shapes[-1].features_out).t()
    for t in reversed(range(len(factors))):
        if not any(wanted[: t + 2]):
            break
        shape = shapes[t]
        g = _outputs(features, shape)
        if wanted[t + 1]:
            before = _as_outputs(between[t - 1], shapes[t - 1]) if t else _padded(x, shape.features_in).t()
            gradients[t + 1] = torch.bmm(g, _inputs(before, shape).mT)
        if any(wanted[: t + 1]):
            features = _as_inputs(torch.bmm(_matrices(factors[t], shape).mT, g), shape)
    if wanted[0]:
        rows = features.permute(4, 0, 1, 2, 3).reshape(x.shape[0], shapes[0].features_in)
        gradients[0] = rows[:, : x.shape[1]]
    return gradients


def _padded(rows: Tensor, width: int) -> Tensor:
    return rows if rows.shape[1] == width else F.pad(rows, (0, width - rows.shape[1]))


def _matrices(factor: Tensor, shape: FactorShape) -> Tensor:
    return factor.reshape(shape.matrices, shape.rows, shape.columns)


def _inputs(features: Tensor, shape: FactorShape) -> Tensor:
    """(d a, j p, N) of (*features, N), whose features in order are (a, j, d, p)."""
    axes = features.reshape(shape.a, shape.j, shape.d, shape.p, features.shape[-1]).permute(2, 0, 1, 3, 4)
    return _of_unit_stride(axes.reshape(shape.matrices, shape.columns, features.shape[-1]))


def _outputs(features: Tensor, shape: FactorShape) -> Tensor:
    """(d a, i q, N) of (*features, N), whose features in order are (a, i, d, q)."""
    axes = features.reshape(shape.a, shape.i, shape.d, shape.q, features.shape[-1]).permute(2, 0, 1, 3, 4)
    return _of_unit_stride(axes.reshape(shape.matrices, shape.rows, features.shape[-1]))


def _as_inputs(made: Tensor, shape: FactorShape) -> Tensor:
    """The inverse of :func:`_inputs`, as (a, j, d, p, N); no copy."""
    return made.view(shape.d, shape.a, shape.j, shape.p, made.shape[-1]).permute(1, 2, 0, 3, 4)


def _as_outputs(made: Tensor, shape: FactorShape) -> Tensor:
    """The inverse of :func:`_outputs`, as (a, i, d, q, N); no copy."""
    return made.view(shape.d, shape.a, shape.i, shape.q, made.shape[-1]).permute(1, 2, 0, 3, 4)


def _of_unit_stride(matrices: Tensor) -> Tensor:
    """BLAS takes matrices with neighbours along rows or columns; a copy made here is made once for the whole batch."""
    return matrices if 1 in matrices.stride()[1:] else matrices.contiguous()
