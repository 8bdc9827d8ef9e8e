"""``structfly.ops.linear_cross_entropy``.

The function is an op that is a composition: dispatch runs :func:`_composed` on whatever tensors there are, so that a
compiler sees one call where it does not look inside, and the fused op where it does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.errors import ArgumentError
from structfly.lowering.linear_cross_entropy import transforms as _transforms  # noqa: F401  registers the fused op
from structfly.lowering.linear_cross_entropy.arguments import NAME as FUSED
from structfly.lowering.linear_cross_entropy.arguments import Arguments
from structfly.lowering.linear_cross_entropy.op import linear_cross_entropy as fused
from structfly.lowering.vmap import one_by_one
from structfly.ops import checks
from structfly.ops.plan import CalledCrossEntropy, head_fields, plan, softcap_steps

# The first version goes up with any change of the schema or of what it means.  The second is the fused op's: a compile
# cache knows a call by this name alone, and keeps what it was composed of.
NAME = f"structfly::called_v1_{FUSED.removeprefix('structfly::')}"


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    loss_memory: int | str | None = None,
    recompute: bool = False,
) -> Tensor:
    """Cross-entropy of a linear's logits, which never exist as a whole:
    ``cross_entropy(cap(logit_scale * (input @ weight.t() + bias)), target)``.

    Its gradients are made beside the loss, 6NHV operations for N rows, H hidden units and V classes; 8NHV, in backward,
    with ``reduction="none"`` or ``recompute``; 2NHV more where little ``loss_memory`` is given and the logits are made
    in blocks.  Scheme and chunk length are chosen as the backend chooses them.

    Args:
        input: (..., H) hidden states, N of them; float32, float64, bfloat16 or float16, on a CPU or CUDA device.
        weight: (V, H) of the same dtype, rows are classes; one stored (H, V) is passed as ``weight.t()``, and not
            copied.
        target: (...) integers in [0, V), or ``ignore_index``.
        bias: (V,) of the same dtype.
        ignore_index: rows with this target are left out; None if no value is.
        reduction: "mean" over the rows that are not left out (weighted by ``class_weight`` as in torch), "sum", "none".
        label_smoothing: share of the targets that is spread evenly over the classes, in [0, 1].
        class_weight: (V,) weights of the classes, without gradient.
        row_weight: (...) weights of the rows, without gradient, of any sign; only with ``reduction="sum"``.  It keeps
            what multiplying the losses of "none" would cost: gradients are still made beside the loss.
        logit_scale: a number, or a tensor () that may be learned.
        softcap: c of ``cap(z) = c tanh(z / c)``, None for none.
        loss_memory: bytes that may be taken besides inputs and gradients, an int or as in "512MiB"; None chooses: see
            docs/linear_cross_entropy.md.
        recompute: make the gradients in backward; for calls inside activation checkpoints, whose forward runs twice.

    Returns:
        () loss, or (...) losses for "none": float32, float64 for float64 inputs, whatever the inputs' dtype.

    Raises:
        ArgumentError: a shape, dtype, device or value is not as above.
        UnsupportedError: the device has no kernels, a tensor is of a wrapper class such as DTensor, or the call is
            under torch.func.grad; in backward: it was differentiated twice.
        IndexError: a target is out of range (on CUDA devices the program fails, as torch's own cross_entropy does).

    Under autocast the linear runs in its dtype, as torch's does; under torch.vmap entry after entry.  The method is
    that of Liger Kernel (Hsu et al. 2024); the schemes of exponentials and blocks, on Hopper GPUs, are
    this project's own.
    """
    learned = isinstance(logit_scale, Tensor)
    result: Tensor = _OP(
        input,
        weight,
        target,
        bias,
        class_weight,
        row_weight,
        logit_scale if learned else None,
        1.0 if learned else logit_scale,
        softcap,
        ignore_index,
        label_smoothing,
        reduction,
        recompute,
        checks.as_text(loss_memory),
    )
    return result


torch.library.define(
    NAME,
    "(Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, Tensor? row_weight, "
    "Tensor? learned_scale, float logit_scale, float? softcap, int? ignore_index, float label_smoothing, "
    "str reduction, bool recompute, str? loss_memory) -> Tensor",
)


@torch.library.impl(NAME, "CompositeImplicitAutograd")
def _composed(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    learned_scale: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int | None,
    label_smoothing: float,
    reduction: str,
    recompute: bool,
    loss_memory: str | None,
) -> Tensor:
    linear = {"input": input, "weight": weight, "bias": bias}
    beside = {"target": target, "class_weight": class_weight, "row_weight": row_weight, "logit_scale": learned_scale}
    checks.check_place("linear_cross_entropy", {**linear, **beside})
    checks.check_weight("weight", weight, "input", input)
    checks.check_shape("bias", bias, weight.shape[:1], "one number a class")
    checks.check_shape("target", target, input.shape[:-1], "one class for each row of input")
    checks.check_shape("class_weight", class_weight, weight.shape[:1], "one number a class")
    checks.check_shape("logit_scale", learned_scale, (), "one number; use logit_scale.squeeze()")
    checks.check_reduction(reduction)
    checks.check_row_weight(row_weight, target.shape, reduction)
    checks.check_constant("class_weight", class_weight, "torch's cross_entropy gives it none either; detach it")
    checks.check_number("logit_scale", logit_scale)
    checks.check_smoothing(label_smoothing)
    if softcap is not None:
        checks.check_number("softcap", softcap, positive=True)
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ArgumentError(
            f"target is {target.dtype}; allowed: integers; for probabilities use structfly.ops.linear_divergence with "
            "kind='cross_entropy'"
        )
    steps = _steps(learned_scale, logit_scale, softcap)
    learned = [] if learned_scale is None else [learned_scale]
    fields = head_fields(linear, learned, steps, reduction, recompute=recompute)
    called = CalledCrossEntropy(**fields, label_smoothing=label_smoothing)
    chosen = plan(called, input.device, checks.memory_limit(loss_memory))
    call = Arguments(
        x=input.reshape(-1, input.shape[-1]),
        weight=weight,
        bias=bias,
        target=target.reshape(-1).to(torch.int64),
        choices=None,
        class_weight=class_weight,
        row_weight=None if row_weight is None else row_weight.reshape(-1),
        adapter_x=None,
        adapter_weight=None,
        adapter_scale=1.0,
        epilogue=steps,
        operands=learned,
        num_classes=weight.shape[0],
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        statistics="",
        row_loss="",
        row_operands=[],
        row_group=[],
        loss_dtype=called.loss_dtype,
        gradients=called.gradients.flags,
        schedule=chosen.schedule,
        scheme=chosen.scheme,
        workspace=chosen.workspace,
        autocast=True,
    )
    loss: Tensor = fused(*call)[0]
    return loss.reshape(target.shape) if reduction == "none" else loss


def _steps(learned_scale: Tensor | None, logit_scale: float, softcap: float | None) -> str:
    """The pointwise chain as the op takes it."""
    scale = "mul:scalar0" if learned_scale is not None else f"mul:{logit_scale!r}" if logit_scale != 1.0 else ""
    return ",".join(filter(None, (scale, softcap_steps(softcap))))


_OP = getattr(torch.ops.structfly, NAME.removeprefix("structfly::")).default
torch.library.register_vmap(NAME, one_by_one(_OP))
