"""Loops over time as programs write them: every way of taking slices, of a step, and of keeping states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.linear_recurrence.arguments import LETTERS, Arguments
from tests.compiling import Rewritten
from tests.oracle import assert_like_eager

Step = Callable[[Tensor, Tensor, Tensor], Tensor]

SLICES: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "getitem": lambda x: [x[:, t] for t in range(x.shape[1])],
    "getitem of all dimensions": lambda x: [x[:, t, :] for t in range(x.shape[1])],
    "ellipsis": lambda x: [x[..., t, :] for t in range(x.shape[1])],
    "select": lambda x: [x.select(1, t) for t in range(x.shape[1])],
    "unbind": lambda x: x.unbind(1),
    "split": lambda x: [part.squeeze(1) for part in x.split(1, 1)],
    "chunk": lambda x: [part[:, 0] for part in x.chunk(x.shape[1], 1)],
    "narrow": lambda x: [x.narrow(1, t, 1).squeeze(1) for t in range(x.shape[1])],
    "time first": lambda x: [x.transpose(0, 1)[t] for t in range(x.shape[1])],
    "time last": lambda x: [x.transpose(1, 2).contiguous()[..., t] for t in range(x.shape[1])],
    "half of the channels": lambda x: [torch.cat([x, x], -1)[:, t, x.shape[2] :] for t in range(x.shape[1])],
}

STEPS: dict[str, Step] = {
    "gated sum": lambda f, h, z: f * h + z,
    "sum the other way": lambda f, h, z: z + h * f,
    "f pooling": lambda f, h, z: f * h + (1 - f) * z,
    "update gate": lambda f, h, z: (1 - f) * h + f * z,
    "lerp": lambda f, h, z: torch.lerp(z, h, f),
    "lerp by a number": lambda f, h, z: torch.lerp(h, z, 0.25),
    "addcmul": lambda f, h, z: torch.addcmul(z, f, h),
    "addcmul with a value": lambda f, h, z: torch.addcmul(z, h, f, value=0.5),
    "difference": lambda f, h, z: z + f * (h - z),
    "difference the other way": lambda f, h, z: h - f * (h - z),
    "scalar EMA": lambda f, h, z: 0.9 * h + 0.1 * z,
    "in place": lambda f, h, z: (f * h).add_(z),
    "augmented": lambda f, h, z: _augmented(f, h, z),
    "divided": lambda f, h, z: (h * f - z) / 2,
    "negative": lambda f, h, z: -(h * f) + z.tanh(),
    "sigmoid inside": lambda f, h, z: torch.sigmoid(f) * h + torch.sigmoid(-f) * torch.tanh(z),
    "alpha": lambda f, h, z: torch.sub(f * h, z, alpha=0.5),
    "zoned out": lambda f, h, z: torch.where(z > 1.0, h, f * h + z),
    "no input": lambda f, h, z: f * h + 1.0,
}


def _augmented(f: Tensor, h: Tensor, z: Tensor) -> Tensor:
    h = h * f
    h += z
    return h


RESETS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "none": None,
    "where": lambda h, mask: torch.where(mask, 0.0, h),
    "where of zeros": lambda h, mask: torch.where(mask, torch.zeros_like(h), h),
    "masked_fill": lambda h, mask: h.masked_fill(mask, 0.0),
    "masked_fill with a number": lambda h, mask: h.masked_fill(mask, 1.5),
    "product": lambda h, mask: h * (~mask),
    "kept elsewhere": lambda h, mask: torch.where(~mask, h, 0.0),
}

COLLECTIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "stack": lambda hs: torch.stack(hs, 1),
    "stack first": lambda hs: torch.stack(hs).transpose(0, 1),
    "stack last": lambda hs: torch.stack(hs, -1).transpose(1, 2),
    "cat": lambda hs: torch.cat([h.unsqueeze(1) for h in hs], 1),
    "cat of indexed": lambda hs: torch.cat([h[:, None] for h in hs], dim=1),
    "setitem": lambda hs: _set(hs, torch.empty(hs[0].shape[0], len(hs), hs[0].shape[1], dtype=hs[0].dtype)),
    "setitem of zeros": lambda hs: _set(hs, hs[0].new_zeros(hs[0].shape[0], len(hs), hs[0].shape[1])),
    "setitem of slices": lambda hs: _set_slices(hs),
    "sum": lambda hs: torch.stack([sum(hs[1:], hs[0]) * 0.1, hs[1]], 1),
    "every other": lambda hs: torch.stack(hs[::2], 1),
    "but for the first": lambda hs: torch.stack(hs[1:], 1),
    "what is made of them": lambda hs: torch.stack([torch.tanh(h) * 2 for h in hs], 1),
}


def _set(hs: list[Tensor], out: Tensor) -> Tensor:
    for t, h in enumerate(hs):
        out[:, t] = h
    return out


def _set_slices(hs: list[Tensor]) -> Tensor:
    out = torch.zeros(len(hs), *hs[0].shape, dtype=hs[0].dtype)
    for t, h in enumerate(hs):
        out[t] = h
    return out.transpose(0, 1)


INITIALS = ("zeros", "given", "row", "number", "first input")


@dataclass(frozen=True)
class Program:
    """Names of the choices above, and: whether time goes backwards, and whether the last state is returned as well."""

    slices: str = "getitem"
    step: str = "gated sum"
    reset: str = "none"
    collection: str = "stack"
    initial: str = "zeros"
    backward: bool = False
    final: bool = False

    def __call__(self, f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D) of f and z, an initial state (B, D), and a mask (B, T)."""
        step, reset = STEPS[self.step], RESETS[self.reset]
        fs, zs, masks = SLICES[self.slices](f), SLICES[self.slices](z), mask.unsqueeze(-1).unbind(1)
        h: Any = {
            "zeros": torch.zeros_like(h0),
            "given": h0,
            "row": h0[:1],
            "number": 0.0,
            "first input": zs[-1] if self.backward else zs[0],
        }[self.initial]
        times = list(range(len(fs)))[:: -1 if self.backward else 1][self.initial == "first input" :]
        hs: list[Tensor] = [h] if self.initial == "first input" else []
        for t in times:
            if reset is not None and isinstance(h, Tensor):  # there is nothing to reset in a number
                h = reset(h, masks[t])
            h = step(fs[t], h, zs[t])
            hs.append(h)
        out = COLLECTIONS[self.collection](hs[::-1] if self.backward else hs)
        return torch.cat([out, (hs[-1] * 3).unsqueeze(1)], 1) if self.final else out


def programs() -> st.SearchStrategy[Program]:
    """Programs of all kinds."""
    return st.builds(
        Program,
        slices=st.sampled_from(list(SLICES)),
        step=st.sampled_from(list(STEPS)),
        reset=st.sampled_from(list(RESETS)),
        collection=st.sampled_from(list(COLLECTIONS)),
        initial=st.sampled_from(INITIALS),
        backward=st.booleans(),
        final=st.booleans(),
    ).filter(_makes_sense)


def _makes_sense(program: Program) -> bool:
    """A number has no lerp; and a first state that is made in place, behind slices taken before, is a miss."""
    unlike = ("lerp", "lerp by a number", "addcmul", "addcmul with a value", "zoned out", "in place", "augmented")
    return program.initial != "number" or program.step not in unlike


def inputs(
    batch: int = 2, steps: int = 9, width: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """f between 0 and 1, z, an initial state, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.rand(batch, steps, width, generator=generator).to(dtype).requires_grad_()
    z, h0 = (
        torch.randn(*s, generator=generator).to(dtype).requires_grad_() for s in ((batch, steps, width), (batch, width))
    )
    return [f, z, h0, torch.rand(batch, steps, generator=generator) < 0.3]


@st.composite
def any_inputs(draw: st.DrawFn) -> list[Tensor]:
    """The same of two steps or more, of any size, in either wide dtype."""
    sizes = (draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(1, 3)))
    return inputs(*sizes, draw(st.sampled_from((torch.float32, torch.float64))))


def rewritten(program: Callable[..., Tensor], given: list[Tensor], options: Mapping[str, Any]) -> Rewritten:
    """The program with its one recurrence rewritten, which gives what eager does."""
    fast = Rewritten(program, options)
    assert_like_eager(fast, program, given, given[0].dtype)
    assert fast.statuses == ["rewritten"], fast.sites
    return fast


def calls(fast: Rewritten) -> list[Arguments]:
    """The op's calls in either form, tensors as nodes; a tensor that is taken whole stands for each of its parts."""
    found: list[Any] = fast.calls_of(torch.ops.structfly.linear_recurrence_v1.default)
    joint: list[Any] = fast.calls_of(torch.ops.structfly.joint_linear_recurrence_v1.default)
    made = [node.args for node in found]
    for node in joint:
        whole, order, *rest = node.args
        made.append((*(whole if letter in order else None for letter in LETTERS), *rest))
    return [Arguments(*each) for each in made]
