"""``structfly.ops.joint_linear_recurrence``; composed as :mod:`structfly.ops.cross_entropy` is."""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.errors import ArgumentError
from structfly.lowering.linear_recurrence.arguments import JOINT_NAME as FUSED
from structfly.lowering.linear_recurrence.arguments import LETTERS, JointArguments
from structfly.lowering.linear_recurrence.op import joint_linear_recurrence as fused
from structfly.lowering.vmap import one_by_one
from structfly.ops import checks
from structfly.ops.recurrence import activations, check_states, is_learned

# The first version goes up with any change of the schema or of what it means; the second is the fused op's.
NAME = f"structfly::called_v1_{FUSED.removeprefix('structfly::')}"


def joint_linear_recurrence(
    joint: Tensor,
    order: str,
    *,
    complement: bool = False,
    gate_activation: str = "none",
    input_activation: str = "none",
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    offsets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`~structfly.ops.linear_recurrence` of gates and inputs that lie side by side in one tensor, as a layer's
    projection makes them, and whose gradients are written side by side into one as well.

    Where slices of a tensor are passed, autograd copies their gradients into one.

    Args:
        joint: (B, T, D len(order)), float32, float64, bfloat16 or float16, of any strides, on a CPU or CUDA device.
        order: what every D channels are, a letter each: "f" the gate, "z" the input, "i" the input gate, "o" the output
            gate; "f" and "z" must be there, and none twice.
        complement, gate_activation, input_activation, initial_state, reset, offsets, reverse: as for
            :func:`~structfly.ops.linear_recurrence`.

    Returns:
        (B, T, D) h in the dtype of ``joint``, and the states after the last steps, as
        :func:`~structfly.ops.linear_recurrence` returns them.

    Raises:
        ArgumentError: a shape, dtype, device or value is not as above.
        UnsupportedError: as for :func:`~structfly.ops.linear_recurrence`.
    """
    output, state = _OP(
        joint, order, initial_state, reset, offsets, complement, gate_activation, input_activation, reverse
    )
    return output, state


torch.library.define(
    NAME,
    "(Tensor joint, str order, Tensor? initial_state, Tensor? reset, Tensor? offsets, bool complement, "
    "str gate_activation, str input_activation, bool reverse) -> (Tensor, Tensor)",
)


@torch.library.impl(NAME, "CompositeImplicitAutograd")
def _composed(
    joint: Tensor,
    order: str,
    initial_state: Tensor | None,
    reset: Tensor | None,
    offsets: Tensor | None,
    complement: bool,
    gate_activation: str,
    input_activation: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    import structfly.lowering.linear_recurrence.flops  # noqa: F401  not at the top: it imports triton

    floating = {"joint": joint, "initial_state": initial_state}
    checks.check_place("joint_linear_recurrence", {**floating, "reset": reset, "offsets": offsets})
    _check_order(order)
    if joint.ndim != 3 or joint.shape[2] % len(order):
        raise ArgumentError(
            f"joint has shape {tuple(joint.shape)}; allowed: (batch, steps, channels of each of the {len(order)} parts "
            f"of {order!r})"
        )
    checks.check_mixed_dtypes(floating)
    if complement and "i" in order:
        raise ArgumentError(
            f"complement is True and order is {order!r}; allowed: complement or an 'i', for each makes w"
        )
    states = (initial_state, reset, offsets)
    options = (complement, *activations(gate_activation, input_activation), reverse)
    check_states(*states, (*joint.shape[:2], joint.shape[2] // len(order)))
    output, final, _ = fused(*JointArguments(joint, order, *states, *options, keep=is_learned(*floating.values())))
    return output, final


def _check_order(order: str) -> None:
    letters = set(order)
    if not letters.issuperset("fz") or not letters.issubset(LETTERS) or len(letters) < len(order):
        meanings = ", ".join(f"{letter!r} for the {name.replace('_', ' ')}" for letter, name in LETTERS.items())
        raise ArgumentError(f"order is {order!r}; allowed: 'f' and 'z' among {meanings}, each once")


_OP = getattr(torch.ops.structfly, NAME.removeprefix("structfly::")).default
torch.library.register_vmap(NAME, one_by_one(_OP))
