"""structfly.ops.linear_cross_entropy against torch in float64, in every way it can be called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from structfly.errors import ArgumentError, UnsupportedError
from structfly.lowering.head.chunks import row_stride
from structfly.lowering.head.gradient_sums import GradientSums
from structfly.lowering.linear_cross_entropy import chunked
from structfly.ops import linear_cross_entropy
from tests.oracle import assert_like_eager

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dense(x: Tensor, w: Tensor, target: Tensor, bias: Tensor | None, scale: Tensor | None, **options: Any) -> Tensor:
    """What the function's docstring says, in torch; the loss is float32 at least."""
    z = F.linear(x, w, bias)
    z = z if z.dtype == torch.float64 else z.float()
    z = z * (options.get("logit_scale", 1.0) if scale is None else scale)
    cap = options.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    weight, rows = options.get("class_weight"), options.get("row_weight")
    losses: Tensor = F.cross_entropy(
        z.reshape(-1, z.shape[-1]),
        target.reshape(-1).long(),
        weight=None if weight is None else weight.to(z.dtype),
        ignore_index=-(2**60) if options.get("ignore_index", -100) is None else options.get("ignore_index", -100),
        label_smoothing=options.get("label_smoothing", 0.0),
        reduction="none" if rows is not None else options.get("reduction", "mean"),
    )
    if rows is not None:
        losses = losses.mul(rows.reshape(-1).to(z.dtype)).sum()
    return losses.reshape(target.shape) if options.get("reduction") == "none" else losses


def fused(x: Tensor, w: Tensor, target: Tensor, bias: Tensor | None, scale: Tensor | None, **options: Any) -> Tensor:
    if scale is not None:
        options["logit_scale"] = scale
    return linear_cross_entropy(x, w, target, bias=bias, **options)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any], torch.dtype, Tensor]:
    """Arguments of :func:`dense`, its options, the dtype and an upstream gradient."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(((), (7,), (2, 3), (0, 2), (2, 1, 4), (90,))))
    hidden, classes = draw(st.integers(1, 9)), draw(st.integers(2, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    reduction = draw(st.sampled_from(("mean", "sum", "none")))
    ignored = draw(st.sampled_from((-100, 0, None)))

    def tensor(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype).requires_grad_(draw(st.booleans()))

    weight = tensor(hidden, classes).t() if draw(st.booleans()) else tensor(classes, hidden)
    weight = weight.detach().requires_grad_(draw(st.booleans()))
    target = torch.randint(0, classes, shape, generator=generator)
    if ignored is not None:
        target.masked_fill_(torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.3, 1.0))), ignored)
    options = {
        "ignore_index": ignored,
        "reduction": reduction,
        "label_smoothing": draw(st.sampled_from((0.0, 0.1))),
        "softcap": draw(st.sampled_from((None, 2.5))),
        "logit_scale": draw(st.sampled_from((1.0, -0.5, 1.5))),
        "class_weight": torch.rand(classes, generator=generator) + 0.1 if draw(st.booleans()) else None,
        "row_weight": torch.rand(shape, generator=generator) if reduction == "sum" and draw(st.booleans()) else None,
        "loss_memory": draw(st.sampled_from((None, 1, "2KiB"))),
        "recompute": draw(st.booleans()),
    }
    if ignored is None and draw(st.booleans()):
        target = target.to(draw(st.sampled_from((torch.int32, torch.uint8))))
    scale = tensor().detach().abs().requires_grad_() if draw(st.booleans()) else None
    bias = tensor(classes) if draw(st.booleans()) else None
    upstream = torch.rand(shape if reduction == "none" else (), generator=generator) + 0.5
    return [tensor(*shape, hidden), weight, target, bias, scale], options, dtype, upstream


@settings(max_examples=60)
@given(call=calls())
def test_as_accurate_as_torch(call: tuple[list[Any], dict[str, Any], torch.dtype, Tensor]) -> None:
    arguments, options, dtype, upstream = call
    assert_like_eager(
        lambda *a: fused(*a, **options), lambda *a: dense(*a, **options), arguments, dtype, upstream, roundings=16
    )


def arguments(rows: int = 12, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in ((rows, 8), (37, 8), (37,)))
    return [x, w, torch.randint(0, 37, (rows,), generator=generator), b, torch.tensor(0.7, requires_grad=True)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "structfly"])
def test_in_what_any_backend_compiles(backend: str) -> None:
    torch._dynamo.reset()

    def step(*a: Any) -> Tensor:
        x, *rest = a
        return fused(torch.tanh(x), *rest, softcap=3.0, loss_memory="1KiB") * 2.0

    fast = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for rows in (12, 7):
        assert_like_eager(
            fast, lambda x, *rest: 2.0 * dense(torch.tanh(x), *rest, softcap=3.0), arguments(rows), roundings=16
        )
    torch._dynamo.reset()


def test_under_autocast_the_product_runs_in_its_dtype() -> None:
    x, w, target, b, scale = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused(x, w.bfloat16(), target, b, scale)
    low = fused(x.bfloat16(), w.bfloat16(), target, b.bfloat16(), scale)
    assert torch.equal(loss, low)
    assert [g.dtype for g in torch.autograd.grad(loss, [x, w, b])] == [torch.float32] * 3


def test_vmap_runs_entry_after_entry() -> None:
    x, w, target, b, scale = arguments()
    batch, targets = x.unflatten(0, (3, 4)), target.unflatten(0, (3, 4))
    together = torch.vmap(lambda x, t: fused(x, w, t, b, scale))(batch, targets)
    apart = torch.stack([fused(x, w, t, b, scale) for x, t in zip(batch, targets, strict=True)])
    assert torch.equal(together, apart)
    for one, other in zip(*(torch.autograd.grad(v.sum(), [x, w, b, scale]) for v in (together, apart)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_loss_is_made(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "GradientSums", None)
    with mode():
        torch.testing.assert_close(fused(*arguments()), dense(*arguments()))


def test_gradients_are_made_once_in_a_checkpoint_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counting(*inputs: Any) -> GradientSums:
        made.append(1)
        return GradientSums(*inputs)

    monkeypatch.setattr(chunked, "GradientSums", counting)
    loss = checkpoint(lambda *a: fused(*a, recompute=True), *arguments(), use_reentrant=False)
    loss.backward()
    assert len(made) == 1


def test_less_memory_makes_shorter_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    workspaces: list[int] = []

    def one_row(rows: int, classes: int, dtype: torch.dtype, workspace: int, group: int) -> int:
        workspaces.append(workspace)
        return 1

    monkeypatch.setattr(chunked, "rows_per_chunk", one_row)
    row = row_stride(37) * 4
    for memory in (4 * row, "1KiB", None):
        fused(*arguments(), loss_memory=memory)
    assert workspaces == [3 * row, 5 * row, 12 * row]  # less 4 bytes a row for the scale's gradient


@pytest.mark.parametrize(("reduction", "products"), [("mean", (3, 3)), ("none", (1, 4))], ids=["6NHV", "8NHV"])
def test_operations_are_counted(reduction: str, products: tuple[int, int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    fused(*arguments())  # whose formulas a counter made from here on has
    with FlopCounterMode(display=False) as counter:
        loss = fused(*arguments(), reduction=reduction)
        forward = counter.get_total_flops()
        loss.sum().backward()
    product = 2 * 12 * 8 * 37
    assert (forward, counter.get_total_flops()) == (products[0] * product, products[1] * product)


def test_differentiating_twice_is_refused() -> None:
    x, *rest = arguments()
    (gradient,) = torch.autograd.grad(fused(x, *rest), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="differentiated twice"):
        gradient.sum().backward()


def test_torch_func_grad_is_refused() -> None:
    x, *rest = arguments()
    with pytest.raises(UnsupportedError, match=r"under torch.func.grad.*torch.autograd.grad or backward"):
        torch.func.grad(lambda x: fused(x, *rest))(x.detach())


def test_a_target_out_of_range_is_refused_as_torch_does() -> None:
    x, w, target, *_ = arguments()
    with pytest.raises(IndexError, match="Target 37 is out of bounds"):
        linear_cross_entropy(x, w, target.clone().fill_(37))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(8, 37)}, r"weight has shape \(8, 37\) and input \(12, 8\).*pass weight.t\(\)"),
        ({"input": torch.tensor(1.0)}, "input has no dimensions"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target has shape \(3,\); allowed: \(12,\)"),
        ({"target": torch.rand(12)}, r"target is torch.float32; allowed: integers.*linear_divergence"),
        ({"bias": torch.ones(36)}, r"bias has shape \(36,\); allowed: \(37,\)"),
        ({"weight": torch.ones(37, 8).bfloat16()}, r"weight is torch.bfloat16 and input torch.float32.*cast one"),
        ({"input": torch.ones(12, 8, dtype=torch.int64)}, "input is torch.int64; allowed: torch.float32"),
        ({"class_weight": torch.ones(36)}, "class_weight has shape"),
        ({"class_weight": torch.ones(37, requires_grad=True)}, "class_weight requires a gradient.*detach"),
        ({"row_weight": torch.ones(12)}, "row_weight is given with reduction='mean'; allowed: 'sum'"),
        ({"row_weight": torch.ones(12, requires_grad=True), "reduction": "sum"}, "multiply the losses"),
        ({"reduction": "max"}, "reduction is 'max'; allowed: 'none', 'sum', 'mean'"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; allowed: 0 to 1"),
        ({"softcap": 0.0}, "softcap is 0.0; allowed: finite and above 0"),
        ({"logit_scale": float("nan")}, "logit_scale is nan; allowed: finite"),
        ({"logit_scale": torch.ones(1)}, r"logit_scale has shape \(1,\); allowed: \(\)"),
        ({"loss_memory": "5 bananas"}, "loss_memory is '5 bananas'; allowed: a whole number of bytes"),
        ({"loss_memory": -1}, "loss_memory is '-1 B'"),
        ({"weight": torch.ones(37, 8, device="meta")}, "weight is on meta and input on cpu; move"),
    ],
)
def test_arguments_without_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    x, w, target, *_ = arguments()
    with pytest.raises(ArgumentError, match=message):
        linear_cross_entropy(**{"input": x, "weight": w, "target": target, **changes})


def test_other_devices_are_refused() -> None:
    x, w, target = (torch.ones(s, device="meta") for s in ((12, 8), (37, 8), (12,)))
    with pytest.raises(UnsupportedError, match="input is on meta; supported devices: cpu, cuda"):
        linear_cross_entropy(x, w, target.long())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda(dtype: torch.dtype) -> None:
    on_gpu = [a.detach().cuda().requires_grad_(a.requires_grad) for a in arguments(3000, dtype)]
    assert_like_eager(fused, dense, on_gpu, dtype, roundings=16)
