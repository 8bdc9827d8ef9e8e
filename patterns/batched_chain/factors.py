"""Which chains of batched products are products of Kronecker-sparse factors.

A factor takes features ordered (a, j, d, p) and gives features ordered (a, i, d, q), see
:class:`~structfly.lowering.kronecker.reference.FactorShape`: its batches are a and d, what it contracts is j and p,
what it makes i and q.  The order of the features that a chain takes, and of those that it gives, is the program's.
That of the features between two products is seen by nobody else, so that any order will do that suits both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations

from structfly.lowering.kronecker.reference import FactorShape
from structfly.patterns.batched_chain.axes import Axes, Dims, product_of

_MOST = 4  # new axes of a product, whose orders are all tried


@dataclass(frozen=True)
class Contraction:
    """One product, by what it does to axes.

    Attributes:
        batches: of the data and the factor.
        contracted: of both, and not of the product.
        made: of the factor and the product.
        factor: the factor's dimensions.
    """

    batches: Axes
    contracted: Axes
    made: Axes
    factor: Dims


@dataclass(frozen=True)
class OrderedFactor:
    """How a factor's axes are put in order: (d, a, i, q, j, p)."""

    segments: tuple[Axes, Axes, Axes, Axes, Axes, Axes]

    @property
    def shape(self) -> FactorShape:
        """Its shape."""
        return FactorShape(*(int(product_of(segment)) for segment in self.segments))


def ordered(taken: Axes, contractions: Sequence[Contraction], given: Axes) -> list[OrderedFactor] | None:
    """The factors of a chain that takes features in the order ``taken`` and gives them in the order ``given``; None if
    it is no product of Kronecker-sparse factors."""
    if not contractions:
        return [] if taken == given else None
    first, *others = contractions
    for factor, made in _ways(taken, first):
        if not others and made != given:
            continue
        rest = ordered(made, others, given)
        if rest is not None:
            return [factor, *rest]
    return None


def _ways(taken: Axes, contraction: Contraction) -> Iterator[tuple[OrderedFactor, Axes]]:
    """Every way to see a product of features in this order as a factor, with the order that it gives."""
    if len(contraction.made) > _MOST:
        return
    batches, contracted = set(contraction.batches), set(contraction.contracted)
    for one, two, three in _cuts(len(taken)):
        a, j, d, p = taken[:one], taken[one:two], taken[two:three], taken[three:]
        if batches.issuperset(a + d) and contracted.issuperset(j + p):
            for order in permutations(contraction.made):
                for cut in reversed(range(len(order) + 1)):  # q empty first
                    i, q = order[:cut], order[cut:]
                    yield OrderedFactor((d, a, i, q, j, p)), a + i + d + q


def _cuts(length: int) -> list[tuple[int, int, int]]:
    """Places to cut into four segments, those with the last ones empty first."""
    cuts = combinations_with_replacement(range(length + 1), 3)
    return sorted(((a, b, c) for a, b, c in cuts), key=lambda cut: (-cut[2], -cut[1], cut[0]))
