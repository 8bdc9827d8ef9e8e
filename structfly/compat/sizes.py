"""Symbolic sizes of example values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._sympy.functions import FloorDiv


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """The size as a sympy expression; reading it adds no guard."""
    if isinstance(size, torch.SymInt):
        found = cast(sympy.Expr, size.node.expr)
        return found.replace(FloorDiv, _quotient) if found.has(FloorDiv) else found
    return sympy.Integer(size)


def _quotient(size: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    """``size // divisor``, which torch leaves as it stands, without the division where nothing is left over."""
    exact = sympy.cancel(size / divisor)
    whole = exact.is_polynomial() and all(number.is_integer for number in exact.as_coefficients_dict().values())
    return cast(sympy.Expr, exact if whole else FloorDiv(size, divisor))


def size_hints(value: Tensor) -> dict[sympy.Symbol, int]:
    """The example values of the symbols in a tensor's shape; reading them adds no guard.

    A size that depends on data has none; Inductor's own guess stands for it.
    """
    from torch._inductor import config

    guess: int = config.unbacked_symint_fallback
    hints: dict[sympy.Symbol, int] = {}
    for size in value.shape:
        if isinstance(size, torch.SymInt):
            environment = size.node.shape_env
            renamed = hasattr(environment, "backed_var_to_val")  # since torch 2.12
            known = environment.backed_var_to_val if renamed else environment.var_to_val
            for symbol in size.node.expr.free_symbols:
                hints[symbol] = int(known.get(symbol, guess))
    return hints


def size_hint(size: int | torch.SymInt) -> int | None:
    """The example value of a size, None for one that depends on data; reading it adds no guard."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else None


def equal_sizes(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two sizes are equal; where only the example says so, with a guard."""
    hint = size_hint(one)
    return hint is not None and hint == size_hint(other) and bool(one == other)


def fake_mode_of(values: Iterable[object]) -> Any:
    """The fake mode that example values were made under, or None for real tensors."""
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


@contextmanager
def example_mode(mode: Any) -> Iterator[None]:
    """Run operations on example values: under their fake mode, outside the compiler's trace, adding no guard."""
    with ExitStack() as stack:
        stack.enter_context(torch._guards.tracing(None))
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
        yield
