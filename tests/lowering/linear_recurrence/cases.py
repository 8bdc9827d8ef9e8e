"""Random calls of the op, and what they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.linear_recurrence.arguments import LETTERS, Arguments, Gradients, JointArguments
from structfly.lowering.linear_recurrence.op import joint_linear_recurrence, linear_recurrence
from structfly.lowering.linear_recurrence.reference import linear_recurrence_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# 1, primes, and powers of two with their neighbours.
LENGTHS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 61, 64, 65, 127)
# Where gates lie: anywhere, next to 1 as those of slow channels are, and at both ends exactly.
GATES = ("any", "slow", "ends")


def make_call(
    batch: int = 2,
    length: int = 37,
    width: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    gate_dtype: torch.dtype | None = None,
    gates: str = "any",
    layout: str = "BTD",
    weight: str = "none",
    output_gate: bool = False,
    initial: bool = True,
    reset: float = 0.0,
    lengths: tuple[int, ...] = (),
    sigmoid: bool = False,
    tanh: bool = False,
    reverse: bool = False,
    keep: bool = True,
    frozen: frozenset[str] = frozenset(),
    seed: int = 0,
    device: str = "cpu",
) -> Arguments:
    """A call; ``weight`` is "none", "complement" or "gate", ``lengths`` are those of packed sequences, which then are
    the batch, and ``frozen`` names what needs no gradient."""
    generator = torch.Generator().manual_seed(seed)
    if lengths:
        batch, length = 1, sum(lengths)

    def leaf(name: str, values: Tensor, to: torch.dtype = dtype) -> Tensor:
        return values.to(device, to).detach().requires_grad_(name not in frozen)

    def laid_out(values: Tensor) -> Tensor:
        if layout == "BDT":
            return values.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "TBD":
            return values.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "part":  # of a wider projection
            return torch.cat([values, values, values], -1)[..., width : 2 * width]
        return values

    def sequence(name: str, values: Tensor, to: torch.dtype = dtype) -> Tensor:
        return laid_out(values.to(device, to)).detach().requires_grad_(name not in frozen)

    def normal() -> Tensor:
        return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)

    gate = torch.rand(batch, length, width, generator=generator, dtype=torch.float64)
    if gates == "slow":
        gate = 1.0 - 1e-3 * gate
    elif gates == "ends":
        gate = torch.where(gate < 0.2, 0.0, torch.where(gate > 0.6, 1.0, gate))
    others = {"input_gate": weight == "gate", "output_gate": output_gate}
    sequences = max(1, len(lengths)) if lengths else batch
    offsets = torch.tensor((0, *lengths)).cumsum(0).to(device) if lengths else None
    return Arguments(
        gate=sequence("gate", torch.logit(gate, eps=1e-9) if sigmoid else gate, gate_dtype or dtype),
        input=sequence("input", normal()),
        initial=leaf("initial", torch.randn(sequences, width, generator=generator, dtype=torch.float64))
        if initial
        else None,
        reset=(torch.rand(batch, length, generator=generator) < reset).to(device) if reset else None,
        offsets=offsets,
        complement=weight == "complement",
        sigmoid=sigmoid,
        tanh=tanh,
        reverse=reverse,
        keep=keep,
        **{name: sequence(name, normal()) if there else None for name, there in others.items()},
    )


@st.composite
def calls(
    draw: st.DrawFn, /, dtypes: tuple[torch.dtype, ...] = DTYPES, lengths: tuple[int, ...] = LENGTHS, **options: Any
) -> Arguments:
    """Calls of all kinds."""
    dtype = draw(st.sampled_from(dtypes))
    wide = dtype == torch.float64
    sigmoid = draw(st.booleans())
    # torch's own gradient of sigmoid cancels next to 1, and in float64 it is the oracle.
    gates = "any" if wide and sigmoid else draw(st.sampled_from(GATES))
    packed = st.lists(st.sampled_from((0, 1, 5, 17)), max_size=5).filter(any)
    return make_call(
        batch=draw(st.integers(0, 3)),
        length=draw(st.sampled_from(lengths)),
        width=draw(st.integers(1, 5)),
        dtype=dtype,
        gate_dtype=dtype if wide else draw(st.sampled_from((dtype, torch.float32))),
        gates=gates,
        layout=draw(st.sampled_from(("BTD", "BDT", "TBD", "part"))),
        weight=draw(st.sampled_from(("none", "complement", "gate"))),
        output_gate=draw(st.booleans()),
        initial=draw(st.booleans()),
        reset=draw(st.sampled_from((0.0, 0.1, 1.0))),
        lengths=tuple(draw(packed)) if draw(st.booleans()) else (),
        sigmoid=sigmoid,
        tanh=draw(st.booleans()),
        reverse=draw(st.booleans()),
        frozen=frozenset(draw(st.sets(st.sampled_from(("gate", "input", "initial")), max_size=2))),
        seed=draw(st.integers(0, 2**16)),
        **options,
    )


def leaves_of(call: Arguments) -> list[Tensor | None]:
    """The arguments that have gradients."""
    return list(call.differentiable)


def with_leaves(call: Arguments, leaves: Any) -> Arguments:
    gate, input, input_gate, output_gate, initial = leaves
    return call._replace(gate=gate, input=input, input_gate=input_gate, output_gate=output_gate, initial=initial)


def joined(output: Tensor, final: Tensor) -> Tensor:
    """All that is differentiated, in one tensor; a channel a row, for the oracle's rows."""
    width = output.shape[2]
    return torch.cat([output.reshape(-1, width).to(final.dtype), final]).t()


def run(call: Arguments, *leaves: Any) -> Tensor:
    """What the op gives for these leaves."""
    output, final, _ = linear_recurrence(*with_leaves(call, leaves))
    return joined(output, final)


def specified(call: Arguments) -> Tensor:
    """What the specification gives, made on the CPU: a loop of small operations, which take a GPU longer."""
    on_cpu: list[Any] = [each.cpu() if isinstance(each, Tensor) else each for each in call[:-1]]
    return joined(*linear_recurrence_reference(*on_cpu)).to(call.input.device)


def run_reference(call: Arguments, *leaves: Any) -> Tensor:
    """What the specification gives for these leaves."""
    return specified(with_leaves(call, leaves))


def joint_of(call: Arguments, order: str) -> JointArguments:
    """The same call with its sequences side by side, in the dtype and layout of the input; ``order`` has a letter for
    each that there is."""
    parts = [getattr(call, LETTERS[letter]).detach().to(call.input.dtype) for letter in order]
    needs = any(getattr(call, LETTERS[letter]).requires_grad for letter in order)
    return JointArguments(torch.cat(parts, 2).requires_grad_(needs), order, *call[4:])


def run_joint(call: JointArguments, joint: Any, initial: Any) -> Tensor:
    """What the op gives for these leaves."""
    output, final, _ = joint_linear_recurrence(*call._replace(joint=joint, initial=initial))
    return joined(output, final)


def run_joint_reference(call: JointArguments, joint: Any, initial: Any) -> Tensor:
    """What the specification gives for slices of these leaves."""
    return specified(call._replace(joint=joint, initial=initial).separate)


def backward_by(
    lowering: Any,
    call: Arguments,
    states: Tensor,
    grad_output: Tensor | None,
    grad_final: Tensor | None,
    wanted: Sequence[bool],
    *shape: Any,
) -> Gradients:
    """The gradients that are ``wanted``, as the lowering writes them."""
    sources = zip(call.differentiable, wanted, strict=True)
    made = Gradients(*(torch.empty_like(each) if want and each is not None else None for each, want in sources))
    lowering.backward(call, states, grad_output, grad_final, made, *shape)
    return made


def upstream_for(call: Arguments) -> Tensor:
    """Gradients of both signs."""
    batch, length, width = call.input.shape
    generator = torch.Generator().manual_seed(1)
    return torch.randn(width, batch * length + call.sequences, generator=generator).to(call.input.device)
