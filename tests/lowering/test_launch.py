"""Launches: through Triton's dispatch once, then straight to what it found."""

from __future__ import annotations

from typing import Any

from structfly.lowering.launch import Launch


class Kernel:
    """Stands for a jitted function: notes its launches, and returns a compiled kernel that notes its own."""

    def __init__(self, *, interpreted: bool) -> None:
        self.interpreted = interpreted
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def dispatch(*arguments: Any, **named: Any) -> Compiled | None:
            self.calls.append(("dispatched", grid, arguments, named))
            return None if self.interpreted else Compiled(self.calls)

        return dispatch


class Compiled:
    """Stands for a compiled kernel, which takes every argument by position and three axes."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.calls.append(("straight", grid, arguments))


def test_later_calls_go_straight_to_the_compiled_kernel() -> None:
    kernel = Kernel(interpreted=False)
    launch = Launch(kernel, (7, 2), {"A": 1, "B": 2}, ["kept"], num_warps=4)
    launch("first")
    launch("second")
    assert kernel.calls == [
        ("dispatched", (7, 2), ("first", "kept"), {"A": 1, "B": 2, "num_warps": 4}),
        ("straight", (7, 2, 1), ("second", "kept", 1, 2)),
    ]


def test_where_nothing_is_compiled_every_call_is_dispatched() -> None:
    kernel = Kernel(interpreted=True)
    launch = Launch(kernel, (7,), {})
    launch(1)
    launch(2)
    assert [call[0] for call in kernel.calls] == ["dispatched"] * 2
