"""``structfly.ops.linear_divergence``; composed as :mod:`structfly.ops.cross_entropy` is."""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.errors import ArgumentError
from structfly.lowering.head.linear import DTYPES
from structfly.lowering.linear_divergence import transforms as _transforms  # noqa: F401  registers the fused op
from structfly.lowering.linear_divergence.arguments import NAME as FUSED
from structfly.lowering.linear_divergence.arguments import Arguments
from structfly.lowering.linear_divergence.op import linear_divergence as fused
from structfly.lowering.linear_divergence.rows import KINDS, TEACHER_FORMS
from structfly.lowering.vmap import one_by_one
from structfly.ops import checks
from structfly.ops.plan import CalledDivergence, head_fields, number, plan, softcap_steps

# The first version goes up with any change of the schema or of what it means.  The second is the fused op's: a compile
# cache knows a call by this name alone, and keeps what it was composed of.
NAME = f"structfly::called_v1_{FUSED.removeprefix('structfly::')}"


def linear_divergence(
    input: Tensor,
    weight: Tensor,
    *,
    kind: str,
    bias: Tensor | None = None,
    teacher: Tensor | None = None,
    teacher_form: str = "logits",
    teacher_input: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    beta: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    row_weight: Tensor | None = None,
    loss_memory: int | str | None = None,
    recompute: bool = False,
) -> Tensor:
    """A divergence of a student's distribution p from a teacher's q, row by row, of logits that never exist as a whole.

    p is the softmax of ``cap(input @ weight.t() + bias) / temperature``.  q is that of the teacher's logits, capped and
    divided in the same way, which are given or, given its linear, never exist as a whole either; or q itself is given.

        "cross_entropy"   -sum_v q'_v log p_v,  q' = (1 - label_smoothing) q + label_smoothing / V
        "forward_kl"      sum_v q_v (log q_v - log p_v)
        "reverse_kl"      sum_v p_v (log p_v - log q_v)
        "jsd"             beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

    "cross_entropy" is that of soft targets, "jsd" the generalised Jensen-Shannon divergence (Agarwal et al. 2024).
    6NHV + 2NGV operations for N rows, H hidden units of the student and G of the teacher, V classes; 8NHV + 4NGV with
    ``reduction="none"`` or ``recompute``.  The chunk length is chosen as the backend chooses it.

    Args:
        input: (..., H) hidden states, N of them; float32, float64, bfloat16 or float16, on a CPU or CUDA device.
        weight: (V, H) of the same dtype, rows are classes; one stored (H, V) is passed as ``weight.t()``.
        kind: one of the above.
        bias: (V,) of the same dtype.
        teacher: (..., V) logits, probabilities or log-probabilities of any of those dtypes (float64 with float64).
        teacher_form: "logits", "probabilities" or "log_probabilities"; the latter two are taken as they are, whatever
            they sum to and whatever the temperature.
        teacher_input, teacher_weight, teacher_bias: (..., G), (U, G) and (U,) of one dtype, U at least V, instead of
            ``teacher``: classes beyond the student's are left out.
        temperature: above 0; the loss is not multiplied by its square.
        softcap, teacher_softcap: c of ``cap(z) = c tanh(z / c)``, None for none.
        beta: the teacher's share of the mixture of "jsd", above 0 and below 1.
        label_smoothing: in [0, 1]; only for "cross_entropy".
        reduction: "mean" over rows ("batchmean" of torch's kl_div), "sum" or "none".
        row_weight: (...) weights of the rows, without gradient; only with ``reduction="sum"``.
        loss_memory: bytes that may be taken besides inputs and gradients, an int or as in "512MiB"; None chooses.
        recompute: make the gradients in backward; for calls inside activation checkpoints, whose forward runs twice.

    The teacher is a constant: none of its tensors may require a gradient where gradients are enabled.  0 log 0 is 0.

    Returns:
        () loss, or (...) losses for "none": float32, float64 for float64 inputs, whatever the inputs' dtype.

    Raises:
        ArgumentError: a shape, dtype, device or value is not as above.
        UnsupportedError: the device has no kernels, a tensor is of a wrapper class such as DTensor, or the call is
            under torch.func.grad; in backward: it was differentiated twice.

    Under autocast the linears run in its dtype, as torch's do; under torch.vmap entry after entry.
    """
    result: Tensor = _OP(
        input,
        weight,
        bias,
        teacher,
        teacher_form,
        teacher_input,
        teacher_weight,
        teacher_bias,
        row_weight,
        kind,
        temperature,
        softcap,
        teacher_softcap,
        beta,
        label_smoothing,
        reduction,
        recompute,
        checks.as_text(loss_memory),
    )
    return result


torch.library.define(
    NAME,
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? teacher, str teacher_form, Tensor? teacher_input, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? row_weight, str kind, float temperature, float? softcap, "
    "float? teacher_softcap, float beta, float label_smoothing, str reduction, bool recompute, str? loss_memory) "
    "-> Tensor",
)


@torch.library.impl(NAME, "CompositeImplicitAutograd")
def _composed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | None,
    teacher_form: str,
    teacher_input: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor | None,
    kind: str,
    temperature: float,
    softcap: float | None,
    teacher_softcap: float | None,
    beta: float,
    label_smoothing: float,
    reduction: str,
    recompute: bool,
    loss_memory: str | None,
) -> Tensor:
    linear = {"input": input, "weight": weight, "bias": bias}
    teachers = {"teacher_input": teacher_input, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    checks.check_place("linear_divergence", {**linear, **teachers, "teacher": teacher, "row_weight": row_weight})
    rows, classes = input.shape[:-1], weight.shape[0]
    checks.check_weight("weight", weight, "input", input)
    checks.check_shape("bias", bias, (classes,), "one number a class")
    checks.check_name("kind", kind, KINDS)
    checks.check_name("teacher_form", teacher_form, TEACHER_FORMS)
    checks.check_reduction(reduction)
    checks.check_row_weight(row_weight, rows, reduction)
    for name, cap in (("temperature", temperature), ("softcap", softcap), ("teacher_softcap", teacher_softcap)):
        if cap is not None:
            checks.check_number(name, cap, positive=True)
    checks.check_smoothing(label_smoothing)
    if label_smoothing and kind != "cross_entropy":
        raise ArgumentError(
            f"label_smoothing is {label_smoothing} for kind={kind!r}; allowed: 0 but for 'cross_entropy'"
        )
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise ArgumentError(
            f"beta is {beta} for kind='jsd'; allowed: above 0 and below 1; at the ends use 'reverse_kl' or 'forward_kl'"
        )
    for name, tensor in {**teachers, "teacher": teacher}.items():
        checks.check_constant(name, tensor, f"pass {name}.detach()")
    teacher_dtype = _check_teacher(teacher, teacher_form, teacher_softcap, teachers, input, classes)
    steps, teacher_steps = _steps(softcap, temperature), _steps(teacher_softcap, temperature)
    given_rows = teacher is not None and teacher.stride(-1) == 1
    called = CalledDivergence(
        **head_fields(linear, (), steps, reduction, recompute=recompute),
        kind_name=kind,
        teacher_given=teacher is not None,
        teacher_dtype=teacher_dtype,
        teacher_bytes=0 if given_rows else teacher_dtype.itemsize,
        teacher_hidden_number=0 if teacher_weight is None else number(teacher_weight, teacher_weight.shape[1:]),
    )
    chosen = plan(called, input.device, checks.memory_limit(loss_memory))
    call = Arguments(
        x=input.reshape(-1, input.shape[-1]),
        weight=weight,
        bias=bias,
        adapter_x=None,
        adapter_weight=None,
        adapter_scale=1.0,
        epilogue=steps,
        teacher=None if teacher is None else teacher.reshape(-1, classes),
        teacher_form=teacher_form,
        teacher_x=None if teacher_input is None else teacher_input.reshape(-1, teacher_input.shape[-1]),
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        teacher_epilogue=teacher_steps if teacher_form == "logits" else "",
        row_weight=None if row_weight is None else row_weight.reshape(-1),
        num_classes=classes,
        kind=kind,
        beta=beta,
        label_smoothing=label_smoothing,
        reduction=reduction,
        loss_dtype=called.loss_dtype,
        gradients=called.gradients.flags,
        schedule=chosen.schedule,
        workspace=chosen.workspace,
        autocast=True,
    )
    loss = fused(*call)[0]
    return loss.reshape(rows) if reduction == "none" else loss


def _check_teacher(
    teacher: Tensor | None,
    form: str,
    softcap: float | None,
    linear: dict[str, Tensor | None],
    input: Tensor,
    classes: int,
) -> torch.dtype:
    """Refuse what is no teacher for ``input``; the dtype of its products, or of what is given."""
    features, weight, bias = linear.values()
    if (features is None) != (weight is None) or (teacher is None) == (weight is None):
        names = ", ".join(name for name, tensor in {"teacher": teacher, **linear}.items() if tensor is not None)
        raise ArgumentError(
            f"the teacher is given as {names or 'nothing'}; allowed: teacher, or teacher_input and teacher_weight"
        )
    if form != "logits" and (softcap is not None or teacher is None):
        raise ArgumentError(
            f"teacher_form is {form!r} of a teacher whose logits are made or capped; allowed: 'logits'; give "
            "probabilities as teacher, without teacher_softcap"
        )
    if teacher is not None:
        if bias is not None:
            raise ArgumentError("teacher_bias is given with teacher; allowed: with teacher_input and teacher_weight")
        checks.check_shape("teacher", teacher, (*input.shape[:-1], classes), "a row for each of input's")
        dtype = teacher.dtype
        if dtype not in DTYPES:
            raise ArgumentError(f"teacher is {dtype}; allowed: {', '.join(map(str, DTYPES))}; cast it")
    else:
        assert features is not None
        assert weight is not None
        checks.check_weight("teacher_weight", weight, "teacher_input", features)
        checks.check_shape("teacher_bias", bias, weight.shape[:1], "one number a class")
        shape = (*input.shape[:-1], features.shape[-1])
        checks.check_shape("teacher_input", features, shape, "a row for each of input's")
        if weight.shape[0] < classes:
            raise ArgumentError(
                f"teacher_weight has {weight.shape[0]} classes and weight {classes}; allowed: as many or more"
            )
        dtype = checks.products_dtype(linear)
    if (dtype == torch.float64) != (input.dtype == torch.float64):
        raise ArgumentError(
            f"the teacher is {dtype} and input {input.dtype}; allowed: both float64 or neither; cast one of them"
        )
    return dtype


def _steps(softcap: float | None, temperature: float) -> str:
    """The pointwise chain as the op takes it."""
    return ",".join(filter(None, (softcap_steps(softcap), "" if temperature == 1.0 else f"div:{temperature!r}")))


_OP = getattr(torch.ops.structfly, NAME.removeprefix("structfly::")).default
torch.library.register_vmap(NAME, one_by_one(_OP))
