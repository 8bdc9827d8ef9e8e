"""Dynamo and Inductor, and the functions that they compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import fx

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: list[Any], options: Mapping[str, object]
) -> Callable[..., Any]:
    """Inductor on a Dynamo graph."""
    import torch._inductor

    return cast(Callable[..., Any], torch._inductor.compile(gm, example_inputs, options=dict(options) or None))


def inductor_modes() -> dict[str, dict[str, object]]:
    """Inductor's modes and the options each stands for."""
    import torch._inductor

    return cast(dict[str, dict[str, object]], torch._inductor.list_mode_options())


def inductor_options() -> frozenset[str]:
    """Names of all options Inductor knows."""
    import torch._inductor

    return frozenset(torch._inductor.list_options())


def inductor_option_type(name: str) -> Any:
    """The type, or union of types, that Inductor declares for an option."""
    from torch._inductor import config

    return config.get_type(name)  # type: ignore[attr-defined]


def original_callable(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the user wrote, under any torch.compile wrapping."""
    if isinstance(function, torch._dynamo.OptimizedModule):
        return cast(Callable[..., Any], function._orig_mod)
    return cast(Callable[..., Any], getattr(function, "_torchdynamo_orig_callable", function))


def constant_in_graphs(function: FunctionT) -> FunctionT:
    """Dynamo calls the function while it traces, and takes the result for a constant.

    As :func:`torch.compiler.assume_constant_result`, without importing Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def with_code_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own, so that nothing compiled before answers for it.

    Its name is its own, too: by file, line and name Dynamo remembers which sizes varied, and takes them for dynamic.
    """
    if not isinstance(function, FunctionType):

        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        fresh = cast(FunctionType, call)
    else:
        fresh = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        fresh.__kwdefaults__ = function.__kwdefaults__
    code = fresh.__code__
    fresh.__code__ = code.replace(co_name=f"{code.co_name}_{next(_NUMBERS)}")
    return fresh


_NUMBERS = count(1)


@contextmanager
def graph_breaks() -> Iterator[list[str]]:
    """Collects why Dynamo broke graphs while the context was open; filled when it closes."""
    from torch._dynamo.utils import graph_break_reasons

    start = len(graph_break_reasons)
    found: list[str] = []
    try:
        yield found
    finally:
        found.extend(str(reason.reason) for reason in graph_break_reasons[start:] if reason.graph_break)
