"""Kronecker-sparse chains (Le et al., arXiv 2411.04506), and N-dimensional lattices among them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

from pydantic import Field

from structfly.errors import ArgumentError
from structfly.lowering.kronecker.reference import FactorShape
from structfly.patterns.chain import Chain, why_not_chain
from structfly.records.layer import LayerSizes

_Positive = Annotated[int, Field(ge=1)]

_AXES = (2, 3)  # of the lattices of like axes that a menu offers
_OUTER = (2, 4, 8)  # first and last axes of the others, whose middle factor has most of the parameters


class KroneckerSparse(Chain):
    """W = K_1 K_2 ... K_T, where pattern (a, b, c, d) says that K_t is zero outside I_a (x) 1_(b x c) (x) I_d.

    Sizes that the chain exceeds are padded.
    """

    name: ClassVar[str] = "kronecker_sparse"

    patterns: Annotated[
        tuple[tuple[_Positive, _Positive, _Positive, _Positive], ...],
        Field(min_length=1),
    ]
    """(a, b, c, d) of K_1, ..., K_T: K_t is (a b d, a c d).  K_T is applied first."""

    @classmethod
    def lattice(cls, axes_in: Sequence[int], axes_out: Sequence[int], rank: int = 1) -> Self:
        """The chain that works along each axis of a lattice in turn, the last axis first.

        Args:
            axes_in: lengths n_1, ..., n_T of the lattice of inputs; their product is at least ``in_features``.
            axes_out: lengths m_1, ..., m_T of the lattice of outputs, likewise.
            rank: how many numbers stand at each point between two factors.

        Along axis t there is one matrix (m_t rank, n_t rank), without the rank where it is the first or the last, for
        every index of the other axes.  Two axes make a Monarch matrix.

        Raises:
            ArgumentError: the lattices have not equally many axes.
        """
        if len(axes_in) != len(axes_out) or not axes_in:
            raise ArgumentError(
                f"a lattice has as many axes of inputs as of outputs, and one at least; got {len(axes_in)} and "
                f"{len(axes_out)}"
            )
        last = len(axes_in) - 1
        return cls(
            patterns=tuple(
                (
                    math.prod(axes_in[:t]),
                    axes_out[t] * (rank if t > 0 else 1),
                    axes_in[t] * (rank if t < last else 1),
                    math.prod(axes_out[t + 1 :]),
                )
                for t in range(last + 1)
            ),
        )

    def shapes(self, sizes: LayerSizes) -> tuple[FactorShape, ...]:
        return tuple(FactorShape(d=d, a=a, i=b, q=1, j=c, p=1) for a, b, c, d in reversed(self.patterns))

    def why_not(self, sizes: LayerSizes) -> str:
        return why_not_chain(self.shapes(sizes), sizes)

    @classmethod
    def menu(cls, sizes: LayerSizes) -> list[Self]:
        lattices = [(balanced_axes(sizes.in_features, n), balanced_axes(sizes.out_features, n)) for n in _AXES]
        lattices += [((n, -(-sizes.in_features // n**2), n), (n, -(-sizes.out_features // n**2), n)) for n in _OUTER]
        made: list[Self] = []
        for axes in lattices:
            choices = (cls.lattice(*axes, 2**power) for power in itertools.count())
            made += itertools.takewhile(lambda choice: choice.is_worthwhile(sizes), choices)
        return made


def balanced_axes(size: int, count: int) -> tuple[int, ...]:
    """``count`` lengths, ascending and none more than twice another, whose product is ``size`` or little more."""
    for padded in itertools.count(size):
        axes, rest = [], padded
        for left in range(count, 1, -1):
            axes.append(next(n for n in range(round(rest ** (1 / left)), 0, -1) if rest % n == 0))
            rest //= axes[-1]
        axes.append(rest)
        if max(axes) <= 2 * min(axes):
            return tuple(sorted(axes))
    raise AssertionError("a power of two has such lengths")
