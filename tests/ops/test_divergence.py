"""structfly.ops.linear_divergence against torch in float64, in every way it can be called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.errors import ArgumentError, UnsupportedError
from structfly.lowering.linear_divergence.rows import KINDS
from structfly.ops import linear_divergence
from tests.lowering.linear_divergence.cases import given_teacher
from tests.oracle import assert_like_eager

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LINEAR = ("teacher_input", "teacher_weight", "teacher_bias")


def wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def capped(z: Tensor, cap: float | None, temperature: float) -> Tensor:
    return (z if cap is None else cap * torch.tanh(z / cap)) / temperature


def dense(x: Tensor, w: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """What the function's docstring says, in torch; the loss is float32 at least."""
    kind, form, smoothing = options["kind"], options.get("teacher_form", "logits"), options.get("label_smoothing", 0.0)
    temperature, beta = options.get("temperature", 1.0), options.get("beta", 0.5)
    log_p = capped(wide(F.linear(x, w, bias)), options.get("softcap"), temperature).log_softmax(-1)
    teacher = options.get("teacher")
    if teacher is None:
        features, weight, shift = (options.get(name) for name in LINEAR)
        assert features is not None
        assert weight is not None
        teacher = F.linear(features.to(x.dtype), weight.to(x.dtype), None if shift is None else shift.to(x.dtype))
        teacher = teacher[..., : w.shape[0]]
    teacher = teacher.to(log_p.dtype)
    if form == "probabilities":
        log_q = teacher.log()
    elif form == "logits":
        log_q = capped(teacher, options.get("teacher_softcap"), temperature).log_softmax(-1)
    else:
        log_q = teacher
    p, q = log_p.exp(), log_q.exp()
    if kind == "cross_entropy":
        losses: Tensor = -(((1 - smoothing) * q + smoothing / q.shape[-1]) * log_p).sum(-1)
    elif kind == "forward_kl":
        losses = F.kl_div(log_p, q, reduction="none").sum(-1)
    elif kind == "reverse_kl":
        losses = F.kl_div(log_q, p, reduction="none").sum(-1)
    else:
        m = (beta * q + (1 - beta) * p).log()
        losses = beta * (q * (log_q - m)).sum(-1) + (1 - beta) * (p * (log_p - m)).sum(-1)
    rows, reduction = options.get("row_weight"), options.get("reduction", "mean")
    if rows is not None:
        losses = losses * rows.to(losses.dtype)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()


def fused(x: Tensor, w: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    return linear_divergence(x, w, bias=bias, **options)


Call = tuple[list[Any], dict[str, Any], torch.dtype, Tensor]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Arguments of :func:`dense`, its options, the dtype and an upstream gradient."""
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(KINDS))
    shape = draw(st.sampled_from(((), (7,), (2, 3), (2, 1, 4), (60,))))
    hidden, classes = draw(st.integers(1, 9)), draw(st.integers(8, 50))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    form = draw(st.sampled_from(("linear", "logits", "probabilities", "log_probabilities")))
    reduction = draw(st.sampled_from(("mean", "sum", "none")))
    logits = form in ("linear", "logits")

    def tensor(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    rows = max(1, torch.Size(shape).numel())
    options: dict[str, Any] = {
        "kind": kind,
        "teacher_form": "logits" if logits else form,
        "temperature": draw(st.sampled_from((1.0, 2.0))),
        "softcap": draw(st.sampled_from((None, 2.5))),
        "teacher_softcap": draw(st.sampled_from((None, 3.0))) if logits else None,
        "beta": draw(st.sampled_from((0.5, 0.1, 0.9))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1))) if kind == "cross_entropy" else 0.0,
        "reduction": reduction,
        "row_weight": torch.rand(shape, generator=generator) if reduction == "sum" and draw(st.booleans()) else None,
        "loss_memory": draw(st.sampled_from((None, 1, "2KiB"))),
        "recompute": draw(st.booleans()),
    }
    if form == "linear":
        shift = tensor(classes + 2) if draw(st.booleans()) else None
        options |= dict(zip(LINEAR, (tensor(*shape, 3), tensor(classes + 2, 3), shift), strict=True))
    else:
        teacher = given_teacher(form, rows, classes, generator).reshape(*shape, classes)
        options["teacher"] = teacher.to(torch.float64 if dtype == torch.float64 else draw(st.sampled_from(DTYPES[::2])))
    leaves = (tensor(*shape, hidden), tensor(classes, hidden), tensor(classes))
    x, w, bias = (leaf.requires_grad_(draw(st.booleans())) for leaf in leaves)
    upstream = torch.rand(shape if reduction == "none" else (), generator=generator) + 0.5
    return [x, w, bias if draw(st.booleans()) else None], options, dtype, upstream


@settings(max_examples=60)
@given(call=calls())
def test_as_accurate_as_torch(call: Call) -> None:
    arguments, options, dtype, upstream = call

    def expected(*a: Any) -> Tensor:
        exact = a[0].dtype == torch.float64
        return dense(*a, **{n: v.double() if exact and isinstance(v, Tensor) else v for n, v in options.items()})

    # Where p is close to q the gradient is a small difference of them.
    assert_like_eager(lambda *a: fused(*a, **options), expected, arguments, dtype, upstream, roundings=64)


def arguments(dtype: torch.dtype = torch.float32) -> tuple[list[Any], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in ((12, 8), (37, 8), (37,)))
    features, weight = (torch.randn(s, generator=generator).to(dtype) for s in ((12, 5), (37, 5)))
    return [x, w, b], {"kind": "jsd", "teacher_input": features, "teacher_weight": weight, "temperature": 2.0}


@pytest.mark.filterwarnings("ignore")
def test_in_what_a_backend_compiles() -> None:
    tensors, options = arguments()
    torch._dynamo.reset()
    fast = torch.compile(lambda x, *a: fused(torch.tanh(x), *a, **options), backend="aot_eager", fullgraph=True)
    assert_like_eager(fast, lambda x, *a: dense(torch.tanh(x), *a, **options), tensors, roundings=64)
    torch._dynamo.reset()


def test_under_autocast_the_products_run_in_its_dtype() -> None:
    tensors, options = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused(*tensors, **options)
    low = {name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in options.items()}
    assert torch.equal(loss, fused(*(tensor.bfloat16() for tensor in tensors), **low))


def test_vmap_runs_entry_after_entry() -> None:
    (x, w, b), options = arguments()
    features = options.pop("teacher_input")

    def loss(x: Tensor, features: Tensor) -> Tensor:
        return fused(x, w, b, teacher_input=features, **options)

    pairs = (x.unflatten(0, (3, 4)), features.unflatten(0, (3, 4)))
    apart = torch.stack([loss(*pair) for pair in zip(*pairs, strict=True)])
    assert torch.equal(torch.vmap(loss)(*pairs), apart)


def test_torch_func_grad_is_refused() -> None:
    (x, w, b), options = arguments()
    with pytest.raises(UnsupportedError, match=r"linear_divergence is called under torch.func.grad"):
        torch.func.grad(lambda x: fused(x, w, b, **options))(x.detach())


GIVEN = torch.ones(12, 37)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "wasserstein"}, "kind is 'wasserstein'; allowed: 'cross_entropy'"),
        ({"teacher_form": "odds"}, "teacher_form is 'odds'; allowed: 'logits'"),
        ({"reduction": "batchmean"}, "reduction is 'batchmean'; allowed: 'none', 'sum', 'mean'"),
        ({"beta": 1.0}, "beta is 1.0 for kind='jsd'; allowed: above 0 and below 1"),
        ({"label_smoothing": 0.1}, "label_smoothing is 0.1 for kind='jsd'; allowed: 0 but for 'cross_entropy'"),
        ({"temperature": 0.0}, "temperature is 0.0; allowed: finite and above 0"),
        ({"teacher": GIVEN}, "given as teacher, teacher_input, teacher_weight; allowed: teacher, or"),
        ({"teacher_weight": None}, "given as teacher_input; allowed"),
        ({"teacher_input": None, "teacher_weight": None}, "given as nothing; allowed"),
        ({"teacher_form": "probabilities"}, "teacher_form is 'probabilities' of a teacher whose logits are made"),
        ({"teacher_weight": torch.ones(36, 5)}, "teacher_weight has 36 classes and weight 37; allowed: as many"),
        ({"teacher_weight": torch.ones(5, 37)}, r"pass teacher_weight.t\(\)"),
        ({"teacher_weight": torch.ones(37, 5, requires_grad=True)}, r"teacher_weight requires a gradient.*detach\(\)"),
        ({"teacher_input": torch.ones(11, 5)}, r"teacher_input has shape \(11, 5\); allowed: \(12, 5\)"),
        ({"teacher_bias": torch.ones(36)}, "teacher_bias has shape"),
        ({"row_weight": torch.ones(12)}, "row_weight is given with reduction='mean'"),
    ],
)
def test_arguments_without_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    tensors, options = arguments()
    with pytest.raises(ArgumentError, match=message):
        fused(*tensors, **{**options, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": GIVEN[:, :36]}, r"teacher has shape \(12, 36\); allowed: \(12, 37\)"),
        ({"teacher": GIVEN.double()}, "the teacher is torch.float64 and input torch.float32"),
        ({"teacher": GIVEN.long()}, "teacher is torch.int64; allowed"),
        ({"teacher": GIVEN, "teacher_bias": torch.ones(37)}, "teacher_bias is given with teacher"),
        ({"teacher": GIVEN, "teacher_form": "probabilities", "teacher_softcap": 2.0}, "made or capped"),
    ],
)
def test_a_given_teacher_without_meaning_is_refused(changes: dict[str, Any], message: str) -> None:
    tensors, _ = arguments()
    with pytest.raises(ArgumentError, match=message):
        fused(*tensors, kind="forward_kl", **changes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda(dtype: torch.dtype) -> None:
    tensors, options = arguments(dtype)
    options = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in tensors]

    def expected(*a: Any) -> Tensor:
        return dense(*a, **{n: v.to(a[0].dtype) if isinstance(v, Tensor) else v for n, v in options.items()})

    assert_like_eager(lambda *a: fused(*a, **options), expected, on_gpu, dtype, roundings=64)
