"""Launches: Triton's dispatch compiles a kernel once, and what it made is launched."""

from __future__ import annotations

import ast
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from structfly.errors import UnsupportedError
from structfly.lowering import launch
from structfly.lowering.launch import Launch, on_device


class Kernel:
    """Stands for a jitted function: notes what it compiles, and as the interpreter what it runs."""

    def __init__(self, *, interpreted: bool) -> None:
        self.interpreted = interpreted
        self.calls: list[tuple[Any, ...]] = []

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **named: Any) -> Compiled | None:
        if self.interpreted:
            return None
        self.calls.append(("compiled", grid, arguments, named))
        return Compiled(self.calls)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert self.interpreted
        return lambda *arguments, **named: self.calls.append(("interpreted", grid, arguments, named))


class Compiled:
    """Stands for a compiled kernel, which takes every argument by position and three axes, of no CUDA device."""

    metadata = SimpleNamespace(target=SimpleNamespace(backend="none"))
    run = None

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.calls.append(("launched", grid, arguments))


def test_a_kernel_is_compiled_once_for_arguments_of_the_same_kinds() -> None:
    kernel = Kernel(interpreted=False)
    tensor, other, half = torch.zeros(3), torch.zeros(4), torch.zeros(5).half()
    for argument in (tensor, other):
        run = Launch(kernel, (7, 2), {"A": 1, "B": 2}, [argument], [half], num_warps=4)
        run(16)
        run(32)
    Launch(kernel, (7, 2), {"A": 1, "B": 2}, [half], [half], num_warps=4)(16)
    named = {"A": 1, "B": 2, "num_warps": 4}
    assert kernel.calls == [
        ("compiled", (7, 2), (half, 16, tensor), named),
        ("launched", (7, 2, 1), (half, 16, tensor, 1, 2)),
        ("launched", (7, 2, 1), (half, 32, tensor, 1, 2)),
        ("launched", (7, 2, 1), (half, 16, other, 1, 2)),
        ("launched", (7, 2, 1), (half, 32, other, 1, 2)),
        ("compiled", (7, 2), (half, 16, half), named),
        ("launched", (7, 2, 1), (half, 16, half, 1, 2)),
    ]


@pytest.mark.parametrize("change", ["constant", "option", "alignment", "one", "multiple of 16", "64 bits", "kernel"])
def test_what_triton_compiles_anew_is_compiled(change: str) -> None:
    buffer = torch.zeros(64)
    kernel, other = Kernel(interpreted=False), Kernel(interpreted=False)
    Launch(kernel, (1,), {"A": 1}, [buffer], num_warps=4)(3)
    constant, option = (2 if change == "constant" else 1), (8 if change == "option" else 4)
    tensor = buffer[1:] if change == "alignment" else buffer
    number = {"one": 1, "multiple of 16": 32, "64 bits": 2**31 + 1}.get(change, 3)
    used = other if change == "kernel" else kernel
    before = len(used.calls)
    Launch(used, (1,), {"A": constant}, [tensor], num_warps=option)(number)
    assert [name for name, *_ in used.calls[before:]] == ["compiled", "launched"]


def test_a_launch_finds_out_anew_how_its_tensors_are_aligned() -> None:
    kernel, buffer = Kernel(interpreted=False), torch.zeros(64)
    launch = Launch(kernel, (1,), {})
    for tensor in (buffer, buffer[1:], buffer[4:], buffer[2:]):
        launch(3, tensor)
    assert [name for name, *_ in kernel.calls] == ["compiled", "launched", "compiled", *["launched"] * 3]


def test_where_nothing_is_compiled_every_call_is_interpreted() -> None:
    kernel = Kernel(interpreted=True)
    run = Launch(kernel, (7,), {})
    run(1)
    run(2)
    assert kernel.calls == [("interpreted", (7,), (number,), {}) for number in (1, 2)]


@dataclass
class Rounding:
    """Stands for a tensor descriptor whose numbers are rounded to TF32."""

    base: torch.Tensor
    block_shape: tuple[int, ...] = (16, 16)
    round_f32_to_tf32: bool = True


@pytest.mark.parametrize("by_triton", [False, True])
@pytest.mark.parametrize("by_driver", [False, True])
def test_operands_are_rounded_by_whichever_launcher_does(
    by_triton: bool, by_driver: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while Triton has hooks, for which its own launcher is there; never are they cut off instead."""
    launched: list[str] = []
    direct = SimpleNamespace(bind=lambda *_: lambda *_: launched.append("driver"))
    monkeypatch.setattr(launch, "triton_rounds", lambda: by_triton)
    monkeypatch.setattr(launch, "direct_kernel", lambda _: direct if by_driver else None)
    monkeypatch.setattr(launch, "has_launch_hooks", lambda: True)
    kernel, operand = Kernel(interpreted=False), Rounding(torch.zeros(16, 16))
    if not by_triton and not by_driver:
        with pytest.raises(UnsupportedError, match="cuts its float32 operands off"):
            Launch(kernel, (1,), {})(operand)
        return
    Launch(kernel, (1,), {})(operand)
    launched += [name for name, *_ in kernel.calls if name == "launched"]
    assert launched == ["launched" if by_triton else "driver"]


def test_a_thread_has_a_context_before_its_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, tensor descriptors cannot be encoded; autograd's threads have none."""
    seen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", seen.append)
    device = torch.device("cuda", 0)
    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:
            for _ in range(3):
                thread.submit(on_device, device).result()
    assert seen == [device] * 2


@pytest.mark.gpu
def test_products_are_launched_from_a_thread_that_has_not_used_the_device() -> None:
    from structfly.lowering.block_products.matrices import matrix_products
    from structfly.lowering.tuning.choice import SAFE

    a, b = (torch.randn(64, 1, 1, 64, device="cuda").bfloat16() for _ in range(2))
    b = b.view(1, 1, 64, 64)
    c = torch.empty_like(a)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(matrix_products, a, b, c, tiles=SAFE).result()
    torch.testing.assert_close(c.view(64, 64), (a.view(64, 64) @ b.view(64, 64).t()), rtol=0.05, atol=0.1)


def test_nothing_else_launches_kernels() -> None:
    """A launch that goes another way would be missing where a call is replayed."""
    folder = Path(launch.__file__).parent
    found = [
        f"{path.relative_to(folder)}:{node.lineno}"
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and (isinstance(node.func.slice, ast.Tuple) or "grid" in ast.unparse(node.func.slice))
    ]
    assert not found, "kernel[grid](...) outside Launch"
