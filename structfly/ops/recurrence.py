"""``structfly.ops.linear_recurrence``; composed as :mod:`structfly.ops.cross_entropy` is."""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.errors import ArgumentError
from structfly.lowering.linear_recurrence.arguments import NAME as FUSED
from structfly.lowering.linear_recurrence.arguments import Arguments
from structfly.lowering.linear_recurrence.op import linear_recurrence as fused
from structfly.lowering.vmap import one_by_one
from structfly.ops import checks

# The first version goes up with any change of the schema or of what it means; the second is the fused op's.
NAME = f"structfly::called_v1_{FUSED.removeprefix('structfly::')}"

_GATE_ACTIVATIONS = ("none", "sigmoid")
_INPUT_ACTIVATIONS = ("none", "tanh")


def linear_recurrence(
    gate: Tensor,
    input: Tensor,
    *,
    input_gate: Tensor | None = None,
    output_gate: Tensor | None = None,
    complement: bool = False,
    gate_activation: str = "none",
    input_activation: str = "none",
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    offsets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """A gated linear recurrence over time, ``c_t = f_t c_{t-1} + w_t z_t`` and ``h_t = o_t c_t``, in time that grows
    with T and is spent in parallel.

    All pooling of quasi-recurrent networks is this: f-pooling with ``complement``, fo-pooling with an ``output_gate``
    besides, ifo-pooling with an ``input_gate``.  States are float32 whatever the inputs have.  On GPUs the
    backward reads them from the output, which must not be changed in place before; with an output gate, and on CPUs, it
    makes them again from a few that are kept (one in 256 steps on GPUs, one in 1024 on CPUs).

    Args:
        gate: (B, T, D) f, or with ``gate_activation="sigmoid"`` y of which f = sigmoid(y): of gates close to 1 the rest
            to 1 is then not lost to rounding.  float32, float64, bfloat16 or float16, on a CPU or CUDA device.
        input: (B, T, D) z, or with ``input_activation="tanh"`` that of which z is the tanh.
        input_gate: (B, T, D) w, activated as ``gate`` is; None for 1.
        output_gate: (B, T, D) o, activated as ``gate`` is; None for 1.
        complement: w = 1 - f, made as sigmoid(-y) where f = sigmoid(y).
        gate_activation: "none" or "sigmoid", of all gates.
        input_activation: "none" or "tanh".
        initial_state: (B, D) c_0, or (N, D) of packed sequences; None for zeros.
        reset: (B, T) bool; such a step takes 0 for the state before it, whatever that is.
        offsets: (N + 1,) integers from 0 up to T: with B = 1, the steps from offsets[n] up to offsets[n + 1] are a
            sequence of its own, with a state of its own.
        reverse: the last step comes first.

    The tensors may have any strides and are not copied: one stored (B, D, T) is passed as ``x.transpose(1, 2)``.  They
    may be of different dtypes, but for float64, which all are or none.

    Returns:
        (B, T, D) h in the dtype and layout of ``input``, and the states after the last steps, (B, D) or (N, D), in
        float32, or float64 for float64 inputs.  Both can be differentiated, with respect to gates, input and initial
        state.

    Raises:
        ArgumentError: a shape, dtype, device or value is not as above.
        UnsupportedError: the device has no kernels, a tensor is of a wrapper class such as DTensor, or the call is
            under torch.func.grad; in backward: it was differentiated twice.

    Autocast changes nothing; under torch.vmap entry runs after entry.  Quasi-recurrent networks: Bradbury et al. 2017;
    recurrences as a scan in parallel: Martin and Cundy 2018, of blocks: Blelloch 1990.
    """
    output, state = _OP(
        gate,
        input,
        input_gate,
        output_gate,
        initial_state,
        reset,
        offsets,
        complement,
        gate_activation,
        input_activation,
        reverse,
    )
    return output, state


torch.library.define(
    NAME,
    "(Tensor gate, Tensor input, Tensor? input_gate, Tensor? output_gate, Tensor? initial_state, Tensor? reset, "
    "Tensor? offsets, bool complement, str gate_activation, str input_activation, bool reverse) -> (Tensor, Tensor)",
)


@torch.library.impl(NAME, "CompositeImplicitAutograd")
def _composed(
    gate: Tensor,
    input: Tensor,
    input_gate: Tensor | None,
    output_gate: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    offsets: Tensor | None,
    complement: bool,
    gate_activation: str,
    input_activation: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    import structfly.lowering.linear_recurrence.flops  # noqa: F401  not at the top: it imports triton

    sequences = {"input": input, "gate": gate, "input_gate": input_gate, "output_gate": output_gate}
    floating = {**sequences, "initial_state": initial_state}
    checks.check_place("linear_recurrence", {**floating, "reset": reset, "offsets": offsets})
    if input.ndim != 3:
        raise ArgumentError(f"input has shape {tuple(input.shape)}; allowed: (batch, steps, channels); unsqueeze it")
    for name, tensor in sequences.items():
        checks.check_shape(name, tensor, input.shape, "as input has")
    checks.check_mixed_dtypes(floating)
    if complement and input_gate is not None:
        raise ArgumentError("complement is True and there is an input_gate; allowed: one of them, for each makes w")
    gates, states = (gate, input, input_gate, output_gate), (initial_state, reset, offsets)
    options = (complement, *activations(gate_activation, input_activation), reverse)
    check_states(*states, tuple(input.shape))
    output, final, _ = fused(*Arguments(*gates, *states, *options, keep=is_learned(*floating.values())))
    return output, final


def is_learned(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of them may be asked for."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def activations(gate_activation: str, input_activation: str) -> tuple[bool, bool]:
    """Whether gates are sigmoids, and inputs tanhs; names that are neither are refused."""
    checks.check_name("gate_activation", gate_activation, _GATE_ACTIVATIONS)
    checks.check_name("input_activation", input_activation, _INPUT_ACTIVATIONS)
    return gate_activation == "sigmoid", input_activation == "tanh"


def check_states(initial: Tensor | None, reset: Tensor | None, offsets: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse what does not fit sequences of ``shape`` (batch, steps, channels)."""
    batch, _, width = shape
    checks.check_shape("reset", reset, shape[:2], "one for each step")
    if reset is not None and reset.dtype != torch.bool:
        raise ArgumentError(f"reset is {reset.dtype}; allowed: torch.bool; use reset != 0")
    _check_offsets(offsets, batch)
    states = batch if offsets is None else offsets.shape[0] - 1
    checks.check_shape("initial_state", initial, (states, width), "a state for each sequence")


def _check_offsets(offsets: Tensor | None, batch: int) -> None:
    if offsets is None:
        return
    if offsets.ndim != 1 or offsets.shape[0] < 2 or offsets.is_floating_point() or offsets.dtype == torch.bool:
        raise ArgumentError(
            f"offsets has shape {tuple(offsets.shape)} and {offsets.dtype}; allowed: (sequences + 1,) integers, the "
            "running sum of the lengths, from 0"
        )
    if batch != 1:
        raise ArgumentError(
            f"offsets are given with {batch} rows of input; allowed: 1, in which the sequences follow one "
            "another; use input.reshape(1, -1, channels)"
        )


_OP = getattr(torch.ops.structfly, NAME.removeprefix("structfly::")).default
torch.library.register_vmap(NAME, one_by_one(_OP))
