"""``structfly::linear_recurrence_v1`` and ``structfly::joint_linear_recurrence_v1``: schemas, fakes, autograd and vmap
of gated recurrences, in the two forms of :mod:`structfly.lowering.linear_recurrence.arguments`.

Autocast leaves the ops alone: states are float32 whatever the inputs have, and those may have different dtypes, as
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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structfly.compat import register_autograd
from structfly.lowering.linear_recurrence import kernels
from structfly.lowering.linear_recurrence.arguments import (
    ARGUMENTS,
    BACKWARD_NAME,
    DIFFERENTIABLE,
    JOINT_ARGUMENTS,
    JOINT_BACKWARD_NAME,
    JOINT_DIFFERENTIABLE,
    JOINT_NAME,
    NAME,
    RESULTS,
    UPSTREAM,
    Arguments,
    JointArguments,
    Outputs,
    kept_rows,
    states_for_backward,
)
from structfly.lowering.replay.replayed import replayed
from structfly.lowering.second_derivative import refuse_second_derivative
from structfly.lowering.vmap import one_by_one

DEVICES = ("cpu", "cuda")


def linear_recurrence(*arguments: Any) -> Outputs:
    """Call the op; see :class:`Arguments`."""
    return Outputs(*_SEPARATE.forward(*arguments))


def joint_linear_recurrence(*arguments: Any) -> Outputs:
    """Call the op; see :class:`JointArguments`."""
    return Outputs(*_JOINT.forward(*arguments))


class _Form(NamedTuple):
    """A form of the op.

    Attributes:
        arguments: its tuple.
        forward, backward: its overloads.
        places: of the differentiable arguments.
    """

    arguments: type[Arguments] | type[JointArguments]
    forward: Any
    backward: Any
    places: list[int]


def _define(
    name: str, backward: str, schema: str, arguments: type[Arguments] | type[JointArguments], learned: Sequence[str]
) -> _Form:
    gradients = ", ".join(f"Tensor grad_{each}" for each in learned)
    torch.library.define(name, f"({schema}) -> ({RESULTS})")
    torch.library.define(backward, f"({UPSTREAM}, {schema}, bool[] wanted) -> ({gradients})")
    forward_op, backward_op = (
        getattr(torch.ops.structfly, each.removeprefix("structfly::")).default for each in (name, backward)
    )
    form = _Form(arguments, forward_op, backward_op, [arguments._fields.index(each) for each in learned])

    def run(*given: Any) -> Outputs:
        return kernels.forward(arguments(*given).separate)

    def fake(*given: Any) -> Outputs:
        return _forward_fake(arguments(*given).separate)

    def run_backward(
        grad_output: Tensor | None, grad_final: Tensor | None, states: Tensor, *given: Any
    ) -> tuple[Tensor, ...]:
        *rest, wanted = given
        call = arguments(*rest)
        made = _empty(call, wanted)
        kernels.backward(call.separate, states, grad_output, grad_final, call.gradients(made))
        return _as_tensors(made, states)

    def backward_fake(_: Tensor | None, __: Tensor | None, states: Tensor, *given: Any) -> tuple[Tensor, ...]:
        *rest, wanted = given
        return _as_tensors(_empty(arguments(*rest), wanted), states)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _setup_context(form, ctx, inputs, output)

    def differentiate(ctx: Any, needed: Sequence[bool], *upstream: Any) -> tuple[Tensor | None, ...]:
        return _differentiate(form, ctx, needed, *upstream)

    torch.library.impl(name, DEVICES)(replayed(run))
    torch.library.impl(backward, DEVICES)(replayed(run_backward))
    torch.library.register_fake(name, fake)
    torch.library.register_fake(backward, backward_fake)
    register_autograd(form.forward, differentiate, setup_context)
    torch.library.register_vmap(name, one_by_one(form.forward))
    torch.library.register_vmap(backward, one_by_one(form.backward))
    return form


def _forward_fake(call: Arguments) -> Outputs:
    width = call.input.shape[2]
    return Outputs(
        torch.empty_like(call.input),
        call.input.new_empty(call.sequences, width, dtype=call.state_dtype),
        call.input.new_empty(kept_rows(call), width, dtype=call.state_dtype),
    )


def _empty(call: Arguments | JointArguments, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients that are not made yet."""
    sources = zip(call.differentiable, wanted, strict=True)
    return [torch.empty_like(each) if want and each is not None else None for each, want in sources]


def _as_tensors(gradients: Sequence[Tensor | None], states: Tensor) -> tuple[Tensor, ...]:
    """As an op returns them: something in the place of those that are not wanted."""
    return tuple(states.new_empty(0) if each is None else each for each in gradients)


def _setup_context(form: _Form, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    call = form.arguments(*inputs)
    made = Outputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(made.kept)
    ctx.places = [place for place, value in enumerate(call) if isinstance(value, Tensor)]
    ctx.others = [None if isinstance(value, Tensor) else value for value in call]
    states = states_for_backward(call.separate, made)
    ctx.save_for_backward(states, *(call[place] for place in ctx.places))


def _differentiate(
    form: _Form,
    ctx: Any,
    needed: Sequence[bool],
    grad_output: Tensor | None,
    grad_final: Tensor | None,
    _: Any,
) -> tuple[Tensor | None, ...]:
    wanted = [needed[place] for place in form.places]
    made: Sequence[Tensor | None] = [None] * len(wanted)
    if any(wanted) and not (grad_output is None and grad_final is None):
        states, *saved = ctx.saved_tensors
        arguments = list(ctx.others)
        for place, tensor in zip(ctx.places, saved, strict=True):
            arguments[place] = tensor
        with torch.no_grad():
            found = form.backward(grad_output, grad_final, states, *arguments, wanted)
        made = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
        if torch.is_grad_enabled():  # create_graph=True: a second differentiation must fail, not find zeros
            sources = [arguments[place] for place in form.places] + [grad_output, grad_final]
            sources = [each for each in sources if each is not None]
            made = refuse_second_derivative(made, sources, _TWICE)
    gradients: list[Tensor | None] = [None] * len(needed)
    for place, gradient in zip(form.places, made, strict=True):
        gradients[place] = gradient
    return tuple(gradients)


_TWICE = (
    "structfly's linear_recurrence was differentiated twice, which it does not support; where a second derivative is "
    "needed, write the recurrence as a loop in torch"
)
_SEPARATE = _define(NAME, BACKWARD_NAME, ARGUMENTS, Arguments, DIFFERENTIABLE)
_JOINT = _define(JOINT_NAME, JOINT_BACKWARD_NAME, JOINT_ARGUMENTS, JointArguments, JOINT_DIFFERENTIABLE)
