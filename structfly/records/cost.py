"""What a candidate costs, as sympy expressions over the (possibly symbolic) sizes of its site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import sympy
import torch

Expression: TypeAlias = "sympy.Expr | int | float"


@dataclass(frozen=True)
class Stage:
    """One kind of kernel of a candidate.

    Attributes:
        flops: floating-point operations of one launch; a multiply-add counts two.
        bytes: bytes one launch moves through device memory.
        launches: how often it runs.
        dtype: operand dtype of its matrix products, which sets the rate; None for elementwise work.
        rows: the short side of its matrix products, which sets how much of the rate they reach.
    """

    flops: Expression
    bytes: Expression
    launches: Expression = 1
    dtype: torch.dtype | None = None
    rows: Expression = 1


@dataclass(frozen=True)
class Cost:
    """Cost of one candidate.

    Attributes:
        stages: its kernels; their times add up.
        transient_bytes: memory it takes and gives back within one of its calls, beyond inputs and outputs.
        saved_bytes: memory it keeps from the forward to the backward pass.
        opaque_calls: calls of opaque ops from compiled code, each with a fixed price.
    """

    stages: tuple[Stage, ...]
    transient_bytes: Expression = 0
    saved_bytes: Expression = 0
    opaque_calls: int = 0


class CostValues(NamedTuple):
    """A cost at example sizes: seconds and bytes."""

    seconds: float
    transient_bytes: int
    saved_bytes: int


def at_sizes(value: Expression, sizes: Mapping[sympy.Symbol, int]) -> float:
    """An expression's value where each symbol has its example size.

    Raises:
        KeyError: a symbol has no example size.
    """
    if isinstance(value, (int, float)):
        return value
    missing = value.free_symbols - sizes.keys()
    if missing:
        raise KeyError(f"no example size for {sorted(map(str, missing))}")
    return float(value.xreplace({symbol: sympy.Integer(size) for symbol, size in sizes.items()}))
