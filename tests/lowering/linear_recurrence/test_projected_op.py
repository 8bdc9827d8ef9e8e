"""The op of a linear map and a recurrence, by either way, against slices of its inputs and the loop over time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import structfly.lowering.linear_recurrence.flops  # noqa: F401  registers the formulas
from structfly.errors import UnsupportedError
from structfly.lowering.linear_recurrence import projected_steps
from structfly.lowering.linear_recurrence.arguments import ProjectedArguments
from structfly.lowering.linear_recurrence.projected import CUTS
from structfly.lowering.linear_recurrence.projected_op import PROJECTED
from structfly.lowering.linear_recurrence.projected_steps import in_one, in_two, why_in_two
from tests.lowering.block_products.test_products import DEVICE, roundings
from tests.lowering.block_products.test_products import DTYPES as GENERATED
from tests.lowering.linear_recurrence.cases import DTYPES, joined, specified
from tests.lowering.linear_recurrence.test_projected import SMALL
from tests.oracle import FEW, assert_like_eager
from tests.precision import matmul_precision

ORDERS = ("zf", "fz", "zfo", "ofz", "zfi", "zfoi", "iozf")


def make_call(
    batch: int = 2,
    steps: int = 21,
    width: int = 8,
    units: int = 8,
    *,
    window: int = 2,
    apart: int | None = None,
    order: str = "zfo",
    dtype: torch.dtype = torch.float32,
    reverse: bool = False,
    bias: bool = True,
    begun: bool = True,
    time_first: bool = False,
    device: str = "cpu",
) -> ProjectedArguments:
    generator = torch.Generator().manual_seed(steps)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    out, inner = len(order) * units, window * width
    beside = 0 if apart is None else min(apart, steps + window - 1)
    return ProjectedArguments(
        inputs=drawn(batch, steps + window - 1 - beside, width).to(device, dtype),
        beside=None if apart is None else drawn(batch, beside, width).to(device, dtype),
        weight=(drawn(out, inner) / inner**0.5).to(device, dtype),
        bias=drawn(out).to(device, dtype) if bias else None,
        initial=drawn(batch, units).to(device, dtype if dtype == torch.float64 else torch.float32) if begun else None,
        order=order,
        window=window,
        reverse=reverse,
        time_first=time_first,
    )


LAYOUTS = ("contiguous", "time first", "part", "one for all")


def laid_out(call: ProjectedArguments, layout: str) -> ProjectedArguments:
    """The same call, its inputs and weight in one of :data:`LAYOUTS`."""
    inputs, weight = call.inputs, call.weight
    if layout == "time first":
        inputs, weight = inputs.transpose(0, 1).contiguous().transpose(0, 1), weight.t().contiguous().t()
    elif layout == "part":  # that begins where no descriptor does
        inputs, weight = (torch.cat([each[..., :1], each], -1)[..., 1:] for each in (inputs, weight))
    elif layout == "one for all" and len(inputs):
        inputs = inputs[:1].expand_as(inputs)
    return call._replace(inputs=inputs, weight=weight)


@st.composite
def calls(draw: st.DrawFn, /, dtypes: tuple[torch.dtype, ...], device: str = "cpu") -> ProjectedArguments:
    """Calls of all kinds, their inputs in several layouts."""
    call = make_call(
        batch=draw(st.integers(0, 2)),
        steps=draw(st.sampled_from((0, 1, 3, 4, 7, 16, 17, 40, 65))),
        width=draw(st.sampled_from((8, 24))),
        units=draw(st.sampled_from((8, 24))),
        window=draw(st.integers(1, 4)),
        apart=draw(st.none() | st.integers(0, 5)),
        order=draw(st.sampled_from(ORDERS)),
        dtype=draw(st.sampled_from(dtypes)),
        reverse=draw(st.booleans()),
        bias=draw(st.booleans()),
        begun=draw(st.booleans()),
        time_first=draw(st.booleans()),
        device=device,
    )
    return laid_out(call, draw(st.sampled_from(LAYOUTS)))


def check(call: ProjectedArguments, by: Callable[[ProjectedArguments], Any], allowed: int) -> None:
    def mine(*tensors: Any) -> Tensor:
        names = ProjectedArguments._fields[: len(tensors)]
        return joined(*by(call._replace(**dict(zip(names, tensors, strict=True)))))

    def theirs(
        inputs: Tensor, beside: Tensor | None, weight: Tensor, bias: Tensor | None, initial: Tensor | None
    ) -> Tensor:
        if beside is not None:
            inputs = torch.cat([inputs, beside] if call.reverse else [beside, inputs], 1)
        rows = torch.cat([inputs[:, place : place + call.steps] for place in range(call.window)], -1)
        joint = call.joint(functional.linear(rows, weight, bias), initial)
        return specified(joint.separate)

    assert_like_eager(mine, theirs, call[:5], call.inputs.dtype, roundings=allowed)


@settings(max_examples=60)
@given(call=calls(DTYPES))
def test_as_accurate_as_the_map_and_the_loop(call: ProjectedArguments) -> None:
    check(call, lambda call: PROJECTED(*call), FEW)


@settings(max_examples=20)
@given(call=calls(GENERATED, DEVICE))
def test_so_is_the_kernel(call: ProjectedArguments) -> None:
    check(call, partial(in_one, cut=SMALL), roundings(call.inputs.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 2])
def test_so_is_the_kernel_wherever_its_inputs_lie(layout: str, window: int) -> None:
    call = laid_out(make_call(window=window, dtype=torch.bfloat16, device=DEVICE), layout)
    check(call, partial(in_one, cut=SMALL), roundings(torch.bfloat16))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_so_are_few_steps_beside_few_or_many(steps: int, reverse: bool) -> None:
    for apart in range(steps + 4):
        call = make_call(1, steps, window=4, apart=apart, dtype=torch.bfloat16, reverse=reverse, device=DEVICE)
        for by in (partial(in_one, cut=SMALL), in_two):
            check(call, by, roundings(torch.bfloat16))


def test_steps_whose_windows_see_others_beside_are_none_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def why(weight: Tensor, order: str, window: int, steps: int, *, tf32: bool) -> str:
        asked.append(steps)
        return "on a CPU"

    monkeypatch.setattr(projected_steps, "why_in_two", why)
    PROJECTED(*make_call(steps=21, window=4, apart=3))
    PROJECTED(*make_call(steps=21, window=4))
    assert asked == [18, 21]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("order", "window", "steps"), [("zfo", 2, 300), ("fz", 1, 4096), ("zfoi", 3, 300)])
def test_as_accurate_on_cuda(dtype: torch.dtype, order: str, window: int, steps: int) -> None:
    allowed = roundings(dtype) if dtype in GENERATED else FEW
    options: dict[str, Any] = {"window": window, "order": order, "dtype": dtype, "device": "cuda"}
    with matmul_precision("tf32"):
        for reverse, apart in product((False, True), (None, window - 1)):
            call = make_call(2, steps, 64, 72, apart=apart, reverse=reverse, **options)
            check(call, lambda call: PROJECTED(*call), allowed)


@pytest.mark.parametrize(
    "options",
    [{}, {"time_first": True, "dtype": torch.bfloat16}, {"window": 1, "bias": False}, {"apart": 1, "reverse": True}],
)
def test_opcheck(options: dict[str, Any]) -> None:
    assert set(opcheck(PROJECTED, tuple(make_call(**options))).values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("time_first", [False, True])
def test_it_lies_as_it_should_whatever_its_inputs_do(layout: str, time_first: bool) -> None:
    call = laid_out(make_call(window=1, time_first=time_first, device=DEVICE), layout)
    for made in (PROJECTED(*call), in_one(call, SMALL)):
        assert (made[0].transpose(0, 1) if time_first else made[0]).is_contiguous()


def test_a_gradient_is_refused() -> None:
    call = make_call()
    output, final = PROJECTED(*call._replace(weight=call.weight.clone().requires_grad_()))
    for made in (output, final):
        with pytest.raises(UnsupportedError, match=r"gradient is asked for.*under torch.no_grad\(\)"):
            made.sum().backward(retain_graph=True)


def test_vmap_runs_entry_after_entry() -> None:
    call = make_call(3)

    def one(inputs: Tensor, initial: Tensor) -> Tensor:
        made: Tensor = PROJECTED(*call._replace(inputs=inputs, initial=initial))[0]
        return made

    assert call.initial is not None
    together = torch.vmap(one)(call.inputs.unsqueeze(1), call.initial.unsqueeze(1))
    torch.testing.assert_close(together.squeeze(1), PROJECTED(*call)[0])


def test_autocast_changes_nothing() -> None:
    call = make_call()
    expected = PROJECTED(*call)
    with torch.autocast("cpu", torch.bfloat16):
        made = PROJECTED(*call)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(made, expected, strict=True))


def test_its_operations_are_those_of_the_map_and_the_recurrence() -> None:
    call = make_call(2, 20, 8, 8, window=3, order="zfo")
    with FlopCounterMode(display=False) as counter:
        PROJECTED(*call)
    assert counter.get_total_flops() == 2 * (2 * 20) * (3 * 8) * (3 * 8) + (2 * 20 * 8) * 4


def on_gpu(*shape: int, dtype: torch.dtype) -> Any:
    size = torch.empty(0, dtype=dtype).element_size
    return SimpleNamespace(is_cuda=True, dtype=dtype, element_size=size, shape=shape, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("order", "shape", "steps", "dtype", "reason"),
    [
        ("zfo", (24, 16), 128, torch.bfloat16, ""),
        ("fz", (16, 16), 128, torch.float16, ""),
        ("zf", (16, 16), 127, torch.bfloat16, "127 steps are less than the 128 of one program"),
        ("zfi", (24, 16), 128, torch.bfloat16, "measured faster in one are zf, zfo, and zfi is not"),
        ("oifz", (32, 16), 128, torch.bfloat16, "and zfoi is not"),
        ("zf", (8, 16), 128, torch.bfloat16, "their sides, 8, 4, are no multiples of 16 bytes"),
        ("zf", (16, 8), 128, torch.bfloat16, "their sides, 4, 8, are no multiples of 16 bytes"),
        ("zf", (16, 16), 128, torch.float32, "where torch's setting lets them be in TF32"),
        ("zf", (16, 16), 128, torch.float64, "they are torch.float64"),
    ],
)
def test_it_says_why_two_kernels_are_needed(
    order: str, shape: tuple[int, int], steps: int, dtype: torch.dtype, reason: str
) -> None:
    found = why_in_two(on_gpu(*shape, dtype=dtype), order, 2, steps, tf32=False)
    assert reason in found
    assert bool(reason) == bool(found)


def test_on_a_cpu_there_are_two() -> None:
    assert set(CUTS) == {"zf", "zfo"}
    assert "they are on cpu" in why_in_two(torch.zeros(24, 16), "zfo", 2, 128, tf32=False)
