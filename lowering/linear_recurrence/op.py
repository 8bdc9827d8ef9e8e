"""``structfly::linear_recurrence_v1``: schema, fake, autograd and vmap of gated recurrences.

Autocast leaves the op alone: states are float32 whatever the inputs have, and those may have different dtypes, as
autocast leaves them.

The gradient
------------
With x_t = c_{t-1}, the state that step t takes (0 where it is reset),

    c_t = f_t x_t + w_t z_t,      h_t = o_t c_t,

let g_t be the gradient of h_t and G_t that of c_t, all its uses counted.  c_t goes into h_t and, unless step t + 1 is
reset, into c_{t+1}:

    G_t = o_t g_t + e_{t+1},      e_t = f_t G_t, or 0 where step t is reset,

with the gradient of the final state in the place of e after the last step.  e is a recurrence with the same gates the
other way, and what it ends with is the gradient of the initial state.  The rest is local:

    df_t = G_t x_t,    dw_t = G_t z_t,    dz_t = G_t w_t,    do_t = g_t c_t.

With w = 1 - f, f is in both terms: df_t = G_t (x_t - z_t).  Nothing divides by a gate, so that gates of 0 are as good
as any.  Where f = sigmoid(y), dy = df sigmoid(y) sigmoid(-y), which does not cancel as f (1 - f) does near 1; where
z = tanh(u), du = dz (1 - z^2).

The kernels read the states from the output where that is what it is.  Elsewhere they are not saved but made again, a
chunk at a time, from the few that were kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structfly.compat import register_autograd
from structfly.lowering.linear_recurrence import kernels
from structfly.lowering.linear_recurrence.arguments import (
    ARGUMENTS,
    BACKWARD_NAME,
    DIFFERENTIABLE,
    GRADIENTS,
    NAME,
    RESULTS,
    UPSTREAM,
    Arguments,
    Outputs,
    kept_rows,
    states_for_backward,
)
from structfly.lowering.second_derivative import refuse_second_derivative
from structfly.lowering.vmap import one_by_one

DEVICES = ("cpu", "cuda")

torch.library.define(NAME, f"({ARGUMENTS}) -> ({RESULTS})")
torch.library.define(BACKWARD_NAME, f"({UPSTREAM}, {ARGUMENTS}, bool[] wanted) -> ({GRADIENTS})")
torch.library.impl(NAME, DEVICES)(kernels.forward)
torch.library.impl(BACKWARD_NAME, DEVICES)(kernels.backward)

_FORWARD: Any = torch.ops.structfly.linear_recurrence_v1.default
_BACKWARD: Any = torch.ops.structfly.linear_recurrence_backward_v1.default


def linear_recurrence(*arguments: Any) -> Outputs:
    """Call the op; see :class:`Arguments`."""
    return Outputs(*_FORWARD(*arguments))


def _forward_fake(*arguments: Any) -> Outputs:
    call = Arguments(*arguments)
    width = call.input.shape[2]
    return Outputs(
        torch.empty_like(call.input),
        call.input.new_empty(call.sequences, width, dtype=call.state_dtype),
        call.input.new_empty(kept_rows(call), width, dtype=call.state_dtype),
    )


def _backward_fake(
    grad_output: Tensor | None, grad_final: Tensor | None, states: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *rest, wanted = arguments
    sources = zip(Arguments(*rest).differentiable, wanted, strict=True)
    return tuple(torch.empty_like(each) if want and each is not None else states.new_empty(0) for each, want in sources)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    call = Arguments(*inputs)
    made = Outputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(made.kept)
    ctx.places = [place for place, value in enumerate(call) if isinstance(value, Tensor)]
    ctx.others = [None if isinstance(value, Tensor) else value for value in call]
    ctx.save_for_backward(states_for_backward(call, made), *(call[place] for place in ctx.places))


def _differentiate(
    ctx: Any, needed: Sequence[bool], grad_output: Tensor | None, grad_final: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    wanted = [needed[place] for place in _PLACES]
    made: Sequence[Tensor | None] = [None] * len(wanted)
    if any(wanted) and not (grad_output is None and grad_final is None):
        states, *saved = ctx.saved_tensors
        arguments = list(ctx.others)
        for place, tensor in zip(ctx.places, saved, strict=True):
            arguments[place] = tensor
        with torch.no_grad():
            found = _BACKWARD(grad_output, grad_final, states, *arguments, wanted)
        made = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
        if torch.is_grad_enabled():  # create_graph=True: a second differentiation must fail, not find zeros
            sources = [arguments[place] for place in _PLACES] + [grad_output, grad_final]
            sources = [each for each in sources if each is not None]
            made = refuse_second_derivative(made, sources, _TWICE)
    gradients: list[Tensor | None] = [None] * len(needed)
    for place, gradient in zip(_PLACES, made, strict=True):
        gradients[place] = gradient
    return tuple(gradients)


_PLACES = [Arguments._fields.index(name) for name in DIFFERENTIABLE]
_TWICE = (
    "structfly's linear_recurrence was differentiated twice, which it does not support; where a second derivative is "
    "needed, write the recurrence as a loop in torch"
)

torch.library.register_fake(NAME, _forward_fake)
torch.library.register_fake(BACKWARD_NAME, _backward_fake)
register_autograd(_FORWARD, _differentiate, _setup_context)
torch.library.register_vmap(NAME, one_by_one(_FORWARD))
torch.library.register_vmap(BACKWARD_NAME, one_by_one(_BACKWARD))
