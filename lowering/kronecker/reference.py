"""The eager reference, which is the op's specification, and the shape of one factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class FactorShape(NamedTuple):
    """One factor w (d, a, i, q, j, p): many small matrices (i q) x (j p), one for each index of (d, a).

    It acts on features that are ordered (a, j, d, p) and gives features that are ordered (a, i, d, q):

        y[a, i, d, q] = sum over j, p of w[d, a, i, q, j, p] x[a, j, d, p].

    With p = q = 1 this is the Kronecker-sparse pattern (a, b = i, c = j, d) of Le et al. (arXiv 2411.04506), whose
    support is I_a (x) 1_(b x c) (x) I_d.
    """

    d: int
    a: int
    i: int
    q: int
    j: int
    p: int

    @property
    def matrices(self) -> int:
        """How many small matrices there are."""
        return self.d * self.a

    @property
    def rows(self) -> int:
        """Of each small matrix."""
        return self.i * self.q

    @property
    def columns(self) -> int:
        """Of each small matrix."""
        return self.j * self.p

    @property
    def features_out(self) -> int:
        """That the factor gives."""
        return self.matrices * self.rows

    @property
    def features_in(self) -> int:
        """That the factor takes."""
        return self.matrices * self.columns

    @property
    def parameters(self) -> int:
        """Entries of the factor."""
        return self.matrices * self.rows * self.columns


def kronecker_reference(x: Tensor, factors: Sequence[Tensor], out_features: int, bias: Tensor | None = None) -> Tensor:
    """y = the first ``out_features`` of (last factor ... first factor) (x, 0) + bias.

    Args:
        x: (*rows, in); it is padded with zeros to what the first factor takes.
        factors: of six axes each, as :class:`FactorShape` has them; the first is applied first.
        out_features: what is taken of what the last factor gives.
        bias: (out_features,), or None.

    Returns:
        (*rows, out_features).
    """
    rows = x.shape[:-1]
    z = F.pad(x, (0, FactorShape(*factors[0].shape).features_in - x.shape[-1]))
    for factor in factors:
        shape = FactorShape(*factor.shape)
        z = z.reshape(*rows, shape.a, shape.j, shape.d, shape.p)
        z = torch.einsum("daiqjp, ...ajdp -> ...aidq", factor, z).flatten(-4)
    y = z[..., :out_features]
    return y if bias is None else y + bias
