"""What a pass over a head's rows takes, and what it leaves of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LateCoefficients:
    """What the rows' losses are multiplied with in the sum whose gradients are made, known when it is needed.

    Attributes:
        chosen: (N,) numbers, 0 for rows that do not count, or None where all may.
        make: makes them, (N,) float32, of the number () of rows that count.
    """

    chosen: Tensor | None
    make: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ChunkRows:
    """The buffers of a chunk's R rows.

    Attributes:
        exps: (R, C) exponentials with their target's entry put right, bfloat16.
        factor_x: (R, H) factor x, bfloat16.
        factor, entry: (R,) float32; entry is the target's before it was rounded.
    """

    exps: Tensor
    factor_x: Tensor
    factor: Tensor
    entry: Tensor


@dataclass(frozen=True)
class KeptRows:
    """What the gradients of the rows that count need of their logits, one after another.

    Attributes:
        lse, factor, entry, uniform: (N,) float32; of classes v but the target, dz_v = factor f'_v exp(u_v - lse) -
            uniform w_v with w the classes' weights and f' without its leading steps; entry is the target's.
        label: (N,) int32 targets.
    """

    lse: Tensor
    factor: Tensor
    entry: Tensor
    uniform: Tensor
    label: Tensor
