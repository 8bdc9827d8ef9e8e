"""What the op computes, in plain torch: the loop over time.  The specification of every lowering."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_recurrence_reference(
    gate: Tensor,
    input: Tensor,
    input_gate: Tensor | None = None,
    output_gate: Tensor | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    offsets: Tensor | None = None,
    complement: bool = False,
    sigmoid: bool = False,
    tanh: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """``c_t = f_t c_{t-1} + w_t z_t``, ``h_t = o_t c_t``, one step after another.

    Args:
        gate: (B, T, D) f, or with ``sigmoid`` y of which f = sigmoid(y).
        input: (B, T, D) z, or with ``tanh`` that of which z is the tanh.
        input_gate: (B, T, D) w, or with ``sigmoid`` that of which w is the sigmoid; None for 1, or 1 - f if
            ``complement``, which is sigmoid(-y) where y is given.
        output_gate: (B, T, D) o, in the same way; None for 1.
        initial: (B, D), or (N, D) of packed sequences, the states before the first steps; None for zeros.
        reset: (B, T) bool; such a step takes 0 for the state before it.
        offsets: (N + 1,) integers from 0 to T, in order: with B = 1, the steps from offsets[n] up to offsets[n + 1] are
            the n-th sequence.
        reverse: the last step comes first.

    Returns:
        h (B, T, D) in the dtype of ``input``, and the states after the last steps, (B, D) or (N, D), in the dtype of
        the states: float32, or float64 for float64 inputs.
    """
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32

    def activated(tensor: Tensor) -> Tensor:
        return torch.sigmoid(tensor.to(wide)) if sigmoid else tensor.to(wide)

    f, z = activated(gate), input.to(wide)
    z = torch.tanh(z) if tanh else z
    if input_gate is not None:
        z = activated(input_gate) * z
    elif complement:
        z = (torch.sigmoid(-gate.to(wide)) if sigmoid else 1 - f) * z
    batch, length, width = input.shape
    bounds = [0, length] if offsets is None else offsets.tolist()
    before = torch.zeros(len(bounds) - 1, batch, width, dtype=wide, device=input.device)
    if initial is not None:
        before = initial.to(wide).view_as(before)
    # Steps are taken apart at once: the gradient of each slice of all steps would be as long as all of them.
    f_of, z_of = f.unbind(1), z.unbind(1)
    let_out = None if output_gate is None else activated(output_gate).unbind(1)
    finals: list[Tensor] = []
    outputs = [z[:, :0]] * length
    for state, first, end in zip(before, bounds, bounds[1:], strict=False):
        for t in reversed(range(first, end)) if reverse else range(first, end):
            if reset is not None:
                state = torch.where(reset[:, t, None], 0.0, state)
            state = f_of[t] * state + z_of[t]
            outputs[t] = state if let_out is None else let_out[t] * state
        finals.append(state)
    output = torch.stack(outputs, 1) if length else z
    return output.to(input.dtype), torch.cat(finals)
