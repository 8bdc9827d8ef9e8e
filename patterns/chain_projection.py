"""The chain of Kronecker-sparse factors nearest to a weight.

Two neighbours, L = (d1, a1, i1, q1, j1, p) applied after R = (d2, a2, i2, p, j2, p2), with a2 = a1 f, d1 = d2 e, have
j1 = f r, i2 = r e, and between them features (a1, f, r, e, d2, p).  Their product has for each (a1, f, e, d2) one block
of rows (i1, q1) and columns (j2, p2), which is L[e d2, a1, :, :, f :, :] R[d2, a1 f, : e, :, :, :]: of rank r p, and
otherwise free.  So the best L R for a weight is the truncated SVD of each block, and its error squared is the tail of
their singular values.  A longer chain is split in the same way again and again, from the left, with orthonormal
columns on the left so that the errors' squares add up (Le et al., arXiv 2411.04506).

Under ``tr(G dW A dW^T)`` the SVDs are of G^(1/2) W A^(1/2) with the diagonal blocks of A and G alone.  From there, or
from the projection without statistics where that is nearer, each factor in turn is moved towards the minimum with the
others fixed, under all of A and G: w in P w Q solves P^T G P w Q A Q^T = P^T G W A Q^T on its support.  Conjugate
gradients do that, preconditioned with the blocks of P^T G P (x) Q A Q^T that stand on the diagonal, which is exact
where the other blocks vanish.

Neighbours are determined up to a matrix between them: for each (a1, f, e, d2), L T^(-1) and T R have the same product.
Steps may end where both are large and all but cancel, and what rounds them then rounds the product far more.  So in the
end each L gets orthonormal columns, with T of its QR.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from structfly.lowering.kronecker.reference import FactorShape, kronecker_reference
from structfly.patterns.conjugate_gradients import conjugate_gradients
from structfly.patterns.nearest import nearest
from structfly.patterns.whitening import has_metric, in_metric, root, with_ridge
from structfly.records.layer import NO_STATISTICS, LayerStatistics

_SWEEPS = 4  # over all factors, at most
_STEPS = 3  # of conjugate gradients for one factor; more sweeps gain more than more steps
_RESIDUAL = 1e-2  # of the first step's energy: what conjugate gradients leave
_GAIN = 1e-2  # of the first sweep's: a sweep that gains less is the last


def project_chain(
    weight: Tensor, shapes: Sequence[FactorShape], statistics: LayerStatistics = NO_STATISTICS
) -> list[Tensor]:
    """Factors of these shapes, the first applied first, whose product is near ``weight`` (out, in)."""
    padded = F.pad(weight, (0, shapes[0].features_in - weight.shape[1], 0, shapes[-1].features_out - weight.shape[0]))
    if not has_metric(statistics):
        factors = split(padded, shapes)
        if len(shapes) > 2:  # of two factors these are the best
            factors = _refined(factors, padded, None, None)
        return _balanced(factors, shapes)

    def dense(factors: Sequence[Tensor]) -> Tensor:
        one = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return kronecker_reference(one, factors, weight.shape[0]).t()

    plain = project_chain(weight, shapes)
    inner = _metric(statistics.input_covariance, padded, padded.shape[1])
    outer = _metric(statistics.output_fisher, padded, padded.shape[0])
    start = nearest(weight, statistics, dense, split(padded, shapes, inner, outer), plain)
    return _balanced(nearest(weight, statistics, dense, _refined(start, padded, inner, outer), plain), shapes)


def split(
    weight: Tensor, shapes: Sequence[FactorShape], inner: Tensor | None = None, outer: Tensor | None = None
) -> list[Tensor]:
    """By SVDs of the blocks of ``weight``, of exactly the chain's sizes; under the diagonal blocks of A = ``inner`` and
    G = ``outer``."""
    first, last = shapes[-1], shapes[0]
    e, f = first.d // last.d, last.a // first.a
    rest = _blocks(
        weight, (first.a, first.i * e, last.d, first.q), (first.a, f * last.j, last.d, last.p)
    )  # (d, a, rows (i, e, q), columns (f, j, p)), until nothing is left of e and f
    made = []
    for left, right in zip(shapes[:0:-1], shapes[-2::-1], strict=True):
        e, e_rest = left.d // right.d, right.d // last.d
        f, f_rest = right.a // left.a, last.a // right.a
        d, a, rank = last.d, left.a, left.j // f
        blocks = rest.view(d, a, left.i, e, e_rest, left.q, f, f_rest, last.columns)
        blocks = blocks.permute(0, 1, 6, 3, 4, 2, 5, 7, 8).reshape(d, a, f, e, e_rest, left.rows, f_rest * last.columns)
        axes = (right.a, f_rest * last.j, d, last.p)
        columns = root(None if inner is None else _blocks(inner, axes, axes).unflatten(1, (a, f)), weight)
        axes = (a, left.i, left.d, left.q)
        rows = root(None if outer is None else _blocks(outer, axes, axes).unflatten(0, (e, e_rest, d)), weight)
        if columns is not None:
            blocks = blocks @ columns.of[:, :, :, None, None]
        if rows is not None:
            blocks = rows.of.permute(2, 3, 0, 1, 4, 5)[:, :, None] @ blocks
        u, s, vt = _truncated(blocks, rank * left.p)
        if columns is not None:
            vt = vt @ columns.inverse[:, :, :, None, None]
        if rows is not None:
            u = rows.inverse.permute(2, 3, 0, 1, 4, 5)[:, :, None] @ u
        u = u.unflatten(5, (left.i, left.q)).unflatten(7, (rank, left.p))
        made.append(u.permute(3, 4, 0, 1, 5, 6, 2, 7, 8).reshape(left))
        rest = (s[..., None] * vt).unflatten(5, (rank, left.p)).permute(0, 1, 2, 5, 3, 4, 6, 7)
        rest = rest.reshape(d, right.a, right.i * e_rest * right.q, f_rest * last.columns)
        outer = None  # what is left of the chain stands behind orthonormal columns
    return [*reversed([*made, rest.reshape(last)])]


def _refined(factors: Sequence[Tensor], weight: Tensor, inner: Tensor | None, outer: Tensor | None) -> list[Tensor]:
    """The factors after alternating least squares under A = ``inner`` and G = ``outer``, None for the identity."""
    if weight.shape[0] < weight.shape[1]:  # what follows holds matrices of as many columns as the weight
        turned = _refined([_transposed(factor) for factor in reversed(factors)], weight.t(), outer, inner)
        return [_transposed(factor) for factor in reversed(turned)]
    made = list(factors)
    target = in_metric(weight, outer, inner)
    one = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    first = 0.0
    for _ in range(_SWEEPS):
        grams, wanted = [outer], [target]  # P^T G P and P^T G W A of each factor, the last applied first
        for factor in reversed(made[1:]):
            grams.append(_gram(factor, grams[-1]))
            wanted.append(_times(_transposed(factor), wanted[-1]))
        before, weighed, gain = one, one if inner is None else inner, 0.0  # Q and Q A
        for t in range(len(made)):
            made[t], gained = _solved(made[t], grams[-1 - t], before, weighed, wanted[-1 - t])
            before, weighed, gain = _times(made[t], before), _times(made[t], weighed), gain + gained
        first = first or gain
        if gain <= _GAIN * first:
            break
    return made


def _solved(
    factor: Tensor, gram: Tensor | None, before: Tensor, weighed: Tensor, wanted: Tensor
) -> tuple[Tensor, float]:
    """w with gram w (Q A) Q^T = ``wanted`` Q^T on w's support, from ``factor`` on, by conjugate gradients; and by how
    much that lowers the loss.  ``before`` is Q, ``weighed`` Q A."""
    shape = FactorShape(*factor.shape)
    inputs = _strips(before, (shape.a, shape.j, shape.d, shape.p))
    rows = (shape.a, shape.i, shape.d, shape.q)

    def applied(w: Tensor) -> Tensor:
        spread = _times(w.view(shape), weighed)
        return _strips(spread if gram is None else gram @ spread, rows) @ inputs.mT

    left = None if gram is None else _cholesky(_blocks(gram, rows, rows).flatten(0, 1))
    right = _cholesky(_strips(weighed, (shape.a, shape.j, shape.d, shape.p)) @ inputs.mT)

    def preconditioned(residual: Tensor) -> Tensor:
        residual = residual if left is None else torch.cholesky_solve(residual, left)
        return torch.cholesky_solve(residual.mT, right).mT

    start = factor.reshape(shape.matrices, shape.rows, shape.columns)
    target = _strips(wanted, rows) @ inputs.mT
    w, gain = conjugate_gradients(applied, target, start, preconditioned, steps=_STEPS, tolerance=_RESIDUAL)
    return w.view(shape), gain


def _orthonormal(factors: Sequence[Tensor], shapes: Sequence[FactorShape]) -> list[Tensor]:
    """The same product, where all factors but the first have orthonormal columns, or zeros, in each block."""
    made = list(factors)
    for t in range(len(made) - 1, 0, -1):
        left, right = shapes[t], shapes[t - 1]
        e, f = left.d // right.d, right.a // left.a
        rank = left.j // f
        blocks = made[t].view(e, right.d, left.a, left.i, left.q, f, rank, left.p)
        blocks = blocks.permute(1, 2, 5, 0, 3, 4, 6, 7).flatten(4, 5).flatten(5, 6)  # (d2, a1, f, e, i1 q1, r p)
        rest = made[t - 1].view(right.d, left.a, f, rank, e, left.p, right.j, right.p)
        rest = rest.permute(0, 1, 2, 4, 3, 5, 6, 7).flatten(4, 5).flatten(5, 6)  # (d2, a1, f, e, r p, j2 p2)
        q, remainder = torch.linalg.qr(blocks)
        missing = rank * left.p - q.shape[-1]
        q, rest = F.pad(q, (0, missing)), F.pad(remainder @ rest, (0, 0, 0, missing))
        q = q.unflatten(5, (rank, left.p)).unflatten(4, (left.i, left.q))
        made[t] = q.permute(3, 0, 1, 4, 5, 2, 6, 7).reshape(left)
        rest = rest.unflatten(5, (right.j, right.p)).unflatten(4, (rank, left.p))
        made[t - 1] = rest.permute(0, 1, 2, 4, 3, 5, 6, 7).reshape(right)
    return made


def _balanced(factors: Sequence[Tensor], shapes: Sequence[FactorShape]) -> list[Tensor]:
    """The same product without cancellation, where what a feature between two factors is multiplied by has one norm on
    both sides."""
    made = _orthonormal(factors, shapes)
    for t in range(len(made) - 1, 0, -1):
        right, left = made[t - 1], made[t]
        given = right.square().sum((4, 5)).permute(1, 2, 0, 3).sqrt().flatten()  # features in order (a, i, d, q)
        taken = left.square().sum((2, 3)).permute(1, 2, 0, 3).sqrt().flatten()  # (a, j, d, p)
        scale = torch.where((given > 0) & (taken > 0), (taken / given).sqrt(), 1.0)
        of_right = scale.view(shapes[t - 1].a, shapes[t - 1].i, shapes[t - 1].d, shapes[t - 1].q)
        of_left = scale.view(shapes[t].a, shapes[t].j, shapes[t].d, shapes[t].p)
        made[t - 1] = right * of_right.permute(2, 0, 1, 3)[..., None, None]
        made[t] = left / of_left.permute(2, 0, 1, 3)[:, :, None, None]
    return made


def _metric(matrix: Tensor | None, like: Tensor, width: int) -> Tensor | None:
    """The covariance, with a ridge, for features padded to ``width``."""
    if matrix is None:
        return None
    metric = F.pad(matrix.to(like), (0, width - len(matrix), 0, width - len(matrix)))
    return with_ridge(metric, like)


def _blocks(matrix: Tensor, rows: tuple[int, int, int, int], columns: tuple[int, int, int, int]) -> Tensor:
    """(d, a, i q, j p): of a matrix with rows (a, i, d, q) and columns (a, j, d, p), where a and d are the same."""
    a, i, d, q = rows
    _, j, _, p = columns
    same = matrix.reshape(*rows, *columns).diagonal(0, 0, 4).diagonal(0, 1, 4)  # (i, q, j, p, a, d)
    return same.permute(5, 4, 0, 1, 2, 3).reshape(d, a, i * q, j * p)


def _truncated(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The SVDs to ``rank``, with zeros where they have fewer singular values."""
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    missing = max(0, rank - s.shape[-1])
    u, s, vt = u[..., :rank], s[..., :rank], vt[..., :rank, :]
    return F.pad(u, (0, missing)), F.pad(s, (0, missing)), F.pad(vt, (0, 0, 0, missing))


def _gram(factor: Tensor, gram: Tensor | None) -> Tensor:
    """factor^T @ gram @ factor, None for the identity."""
    turned = _transposed(factor)
    if gram is None:
        one = torch.eye(FactorShape(*factor.shape).features_in, dtype=factor.dtype, device=factor.device)
        return _times(turned, _times(factor, one))
    return _times(turned, _times(turned, gram).mT)


def _strips(matrix: Tensor, axes: tuple[int, int, int, int]) -> Tensor:
    """(d a, rows of one of a factor's small matrices, columns) of a matrix whose rows are features with these axes."""
    a, i, d, q = axes
    return matrix.reshape(*axes, -1).permute(2, 0, 1, 3, 4).reshape(d * a, i * q, matrix.shape[-1])


def _times(factor: Tensor, matrix: Tensor) -> Tensor:
    """factor @ matrix, the factor on the first axis."""
    result: Tensor = kronecker_reference(matrix.mT, [factor], FactorShape(*factor.shape).features_out).mT
    return result


def _transposed(factor: Tensor) -> Tensor:
    """The factor of the transposed matrix."""
    return factor.permute(0, 1, 4, 5, 2, 3)


def _cholesky(matrices: Tensor) -> Tensor:
    """Of the matrices with a ridge, for what only steers the way to a solution."""
    diagonal = matrices.diagonal(0, -1, -2)
    ridge = 1e-5 * diagonal.mean(-1).clamp_min(0) + torch.finfo(torch.float32).tiny
    result: Tensor = torch.linalg.cholesky_ex(matrices + torch.diag_embed(ridge[..., None].expand_as(diagonal)))[0]
    return result
