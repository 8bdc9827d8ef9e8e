"""Whole quasi-recurrent layers: the op takes their projection as it is, and its backward joins no gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.linear_recurrence.arguments import JointArguments
from tests.compiling import ALWAYS, Rewritten
from tests.dispatched import Dispatched
from tests.oracle import assert_like_eager
from tests.patterns.linear_recurrence.programs import calls

OP = torch.ops.structfly.linear_recurrence_v1.default
JOINT_OP = torch.ops.structfly.joint_linear_recurrence_v1.default
BATCH, STEPS, INPUTS, UNITS = 2, 7, 3, 4

SPLITS: dict[str, Callable[[Tensor, int], Any]] = {
    "chunk": lambda y, count: y.chunk(count, -1),
    "split": lambda y, count: torch.split(y, UNITS, 2),
    "slices": lambda y, count: [y[..., at * UNITS : (at + 1) * UNITS] for at in range(count)],
    "narrow": lambda y, count: [y.narrow(2, at * UNITS, UNITS) for at in range(count)],
}


@dataclass(frozen=True)
class Layer:
    """How a layer is written.

    Attributes:
        order: what its projection makes, in this order.
        split: one of :data:`SPLITS`, or "step", of a step's part of the projection.
        before: whether activations are those of whole tensors.
        reverse: whether it goes from the last step to the first.
        time_first: whether time is the first dimension.
        begun: whether it begins with the first input.
    """

    order: str
    split: str = "chunk"
    before: bool = False
    reverse: bool = False
    time_first: bool = False
    begun: bool = False

    def __call__(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        def taken(y: Tensor) -> dict[str, Any]:
            parts = SPLITS["chunk" if self.split == "step" else self.split](y, len(self.order))
            parts = dict(zip(self.order, parts, strict=True))
            return {k: v.tanh() if k == "z" else v.sigmoid() for k, v in parts.items()} if self.before else parts

        dim = 0 if self.time_first else 1
        x = x.transpose(0, 1) if self.time_first else x
        y = F.linear(x, w, b)
        whole = {} if self.split == "step" else taken(y)
        c = x.select(dim, 0)[:, :1].expand(-1, UNITS) if self.begun else torch.zeros_like(y.select(dim, 0)[:, :UNITS])
        hs = []
        for t in reversed(range(STEPS)) if self.reverse else range(STEPS):
            step = {name: part.select(dim, t) for name, part in whole.items()} or taken(y.select(dim, t))
            if not self.before:
                step = {name: part.tanh() if name == "z" else part.sigmoid() for name, part in step.items()}
            c = step["f"] * c + step.get("i", 1 - step["f"]) * step["z"]
            hs.append(step["o"] * c if "o" in step else c)
        out = torch.stack(hs[::-1] if self.reverse else hs, dim)
        return torch.cat([out.transpose(0, 1) if self.time_first else out, c.unsqueeze(1)], 1)


def arguments(parts: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH, STEPS, INPUTS), (parts * UNITS, INPUTS), (parts * UNITS,))
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def joint_call(fast: Rewritten) -> JointArguments:
    (node,) = fast.calls_of(JOINT_OP)
    assert not fast.calls_of(OP)
    given: Any = node.args
    return JointArguments(*given)


@settings(deadline=None, max_examples=25)
@given(
    letters=st.sampled_from(("fz", "fzo", "fzio", "fzi")).flatmap(st.permutations),
    split=st.sampled_from((*SPLITS, "step")),
    before=st.booleans(),
    reverse=st.booleans(),
    time_first=st.booleans(),
    begun=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_a_layer_is_taken_whole(letters: list[str], split: str, dtype: torch.dtype, **options: bool) -> None:
    layer = Layer("".join(letters), split, **options)
    fast = Rewritten(layer, then="aot_eager")
    assert_like_eager(fast, layer, arguments(len(letters), dtype), dtype, roundings=32)
    assert fast.statuses_of("linear_recurrence") == ["rewritten"], fast.sites
    call = joint_call(fast)
    assert call.order == layer.order
    assert (call.sigmoid, call.tanh, call.complement) == (True, True, "i" not in layer.order)


def test_a_batch_may_have_any_size() -> None:
    layer = Layer("zfo", time_first=True)
    fast = Rewritten(layer)
    x, w, b = arguments(3)
    for rows in (1, 5):
        batch = x[:1].detach().repeat(rows + 1, 1, 1)
        torch._dynamo.mark_dynamic(batch, 0)
        torch.testing.assert_close(fast(batch, w, b), layer(batch, w, b))
    assert joint_call(fast).order == "zfo"  # of one graph


def both_directions(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z, f = F.linear(x, w, b).chunk(2, -1)
    outputs = []
    for times in (range(x.shape[1]), reversed(range(x.shape[1]))):
        h, hs = x.new_zeros(x.shape[0], UNITS), []
        for t in times:
            h = torch.lerp(z[:, t], h, f[:, t].sigmoid())
            hs.append(h)
        outputs.append(torch.stack(hs, 1))
    return torch.cat(outputs, -1)


def test_a_projection_that_long_loops_share_is_taken_apart() -> None:
    fast = Rewritten(both_directions)
    x, w, b = arguments(2)
    x = torch.randn(1, 300, INPUTS)
    torch.testing.assert_close(fast(x, w, b), both_directions(x, w, b))
    assert fast.statuses_of("linear_recurrence") == ["rewritten", "rewritten"], fast.sites
    assert len(fast.calls_of(OP)) == 2


@pytest.mark.parametrize("order", ["zf", "zfo", "ofzi"])
def test_its_backward_joins_nothing(order: str) -> None:
    fast = Rewritten(Layer(order), then="aot_eager")
    output = fast(*arguments(len(order)))
    with Dispatched() as ran:
        output.backward(torch.ones_like(output))
    assert ran.names.count("joint_linear_recurrence_backward_v1") == 1
    assert not {"cat", "slice_backward", "slice_scatter", "stack"} & set(ran.names), ran.names


def test_without_gradients_slices_are_as_good() -> None:
    layer = Layer("zfo")
    fast = Rewritten(layer, {**ALWAYS, "rules": {"projected_recurrence": False}})
    with torch.no_grad():
        torch.testing.assert_close(fast(*arguments(3)), layer(*arguments(3)))
    assert not fast.calls_of(JOINT_OP)
    assert len(fast.calls_of(OP)) == 1


def pooled(y: Tensor, z: Tensor, f: Tensor, o: Tensor) -> Tensor:
    c, hs = y.new_zeros(BATCH, UNITS), []
    for t in range(STEPS):
        c = f[:, t].sigmoid() * c + (1 - f[:, t].sigmoid()) * z[:, t]
        hs.append(o[:, t].sigmoid() * c)
    return torch.stack(hs, 1)


def projected(x: Tensor, w: Tensor, b: Tensor, count: int = 3) -> Tensor:
    return F.linear(x, w[: count * UNITS], b[: count * UNITS])


def of_slices_alone(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = projected(x, w, b)
    return pooled(y, *y.chunk(3, -1))


def of_zeros_like_a_slice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z, f, o = projected(x, w, b).chunk(3, -1)
    return pooled(z[:, 0], z, f, o)


def projection_is_changed_before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = projected(x, w, b)
    y.add_(1.0)
    return pooled(y, *y.chunk(3, -1))


@pytest.mark.parametrize("function", [of_slices_alone, of_zeros_like_a_slice])
def test_slices_of_what_nothing_else_uses_are_taken_together(function: Callable[..., Tensor]) -> None:
    fast = Rewritten(function)
    assert_like_eager(fast, function, arguments(4), roundings=32)
    assert joint_call(fast).order == "zfo"


def projection_is_seen(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = projected(x, w, b)
    return pooled(y, *y.chunk(3, -1)) + y.sum()


def input_is_seen(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = projected(x, w, b)
    z, f, o = y.chunk(3, -1)
    return pooled(y, z, f, o) + z


def more_than_the_op_takes(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = projected(x, w, b, 4)
    z, f, o, _ = y.chunk(4, -1)
    return pooled(y, z, f, o)


def a_part_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = projected(x, w, b)
    z, f, _ = y.chunk(3, -1)
    return pooled(y, z, f, f)


def a_part_without_gradient(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = projected(x, w, b)
    z, f, o = y.chunk(3, -1)
    return pooled(y, z.detach(), f, o)


def a_part_taken_without_gradient(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = projected(x, w, b)
    with torch.no_grad():
        z = y[..., :UNITS]
    return pooled(y, z, *y[..., UNITS:].chunk(2, -1))


def a_part_that_is_changed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = projected(x, w, b)
    z, f, o = y.chunk(3, -1)
    return pooled(y, z * 2.0, f, o)


def projections_of_their_own(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = projected(x, w, b)
    z, f, o = (F.linear(x, part) for part in w[: 3 * UNITS].chunk(3))
    return pooled(y, z, f, o)


def turned_in_one_part(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = projected(x, w, b)
    z, f, o = y.chunk(3, -1)
    return pooled(y, z, f, o.flip(1))


@pytest.mark.parametrize(
    "function",
    [
        projection_is_seen,
        projection_is_changed_before,
        input_is_seen,
        more_than_the_op_takes,
        a_part_twice,
        a_part_without_gradient,
        a_part_taken_without_gradient,
        a_part_that_is_changed,
        projections_of_their_own,
        turned_in_one_part,
    ],
)
def test_other_slices_are_taken_one_by_one(function: Callable[..., Tensor]) -> None:
    fast = Rewritten(function)
    assert_like_eager(fast, function, arguments(4), roundings=32)
    assert not fast.calls_of(JOINT_OP)
    (call,) = calls(fast)
    assert call.output_gate is not None


# ---------------------------------------------------------------------------------------------------- output gates


def states_are_seen(y: Tensor, z: Tensor, f: Tensor, o: Tensor) -> Tensor:
    c, cs, hs = y.new_zeros(BATCH, UNITS), [], []
    for t in range(STEPS):
        c = f[:, t].sigmoid() * c + z[:, t]
        cs.append(c)
        hs.append(o[:, t].sigmoid() * c)
    return torch.stack(hs, 1) + torch.stack(cs, 1)


def one_state_is_seen(y: Tensor, z: Tensor, f: Tensor, o: Tensor) -> Tensor:
    c, cs, hs = y.new_zeros(BATCH, UNITS), [], []
    for t in range(STEPS):
        c = f[:, t].sigmoid() * c + z[:, t]
        cs.append(c)
        hs.append(o[:, t].sigmoid() * c)
    return torch.stack(hs, 1) + cs[2].unsqueeze(1)


def one_output_is_seen(y: Tensor, z: Tensor, f: Tensor, o: Tensor) -> Tensor:
    c, hs = y.new_zeros(BATCH, UNITS), []
    for t in range(STEPS):
        c = f[:, t].sigmoid() * c + z[:, t]
        hs.append(o[:, t].sigmoid() * c)
    return torch.stack(hs, 1) + hs[2].unsqueeze(1)


def gate_of_another_kind(y: Tensor, z: Tensor, f: Tensor, o: Tensor) -> Tensor:
    c, hs = y.new_zeros(BATCH, UNITS), []
    for t in range(STEPS):
        c = f[:, t].sigmoid() * c + z[:, t]
        hs.append(o[:, t] * c)
    return torch.stack(hs, 1)


def of_a_part_of_the_steps(y: Tensor, z: Tensor, f: Tensor, o: Tensor) -> Tensor:
    c, hs = y.new_zeros(BATCH, UNITS), []
    for t in range(STEPS):
        c = f[:, t].sigmoid() * c + z[:, t]
        hs.append(o[:, t].sigmoid() * c)
    return torch.stack(hs[1:], 1)


def two_gates(y: Tensor, z: Tensor, f: Tensor, o: Tensor) -> Tensor:
    c, hs, gs = y.new_zeros(BATCH, UNITS), [], []
    for t in range(STEPS):
        c = f[:, t].sigmoid() * c + z[:, t]
        hs.append(o[:, t].sigmoid() * c)
        gs.append(z[:, t].sigmoid() * c)
    return torch.stack(hs, 1) + torch.stack(gs, 1)


def gate_of_the_other_direction(y: Tensor, z: Tensor, f: Tensor, o: Tensor) -> Tensor:
    c, hs = y.new_zeros(BATCH, UNITS), []
    for t in range(STEPS):
        c = f[:, t].sigmoid() * c + z[:, t]
        hs.append(o[:, -1 - t].sigmoid() * c)
    return torch.stack(hs, 1)


def gate_made_later(y: Tensor, z: Tensor, f: Tensor, o: Tensor) -> Tensor:
    c, cs = y.new_zeros(BATCH, UNITS), []
    for t in range(STEPS):
        c = f[:, t].sigmoid() * c + z[:, t]
        cs.append(c)
    later = o * 2.0
    return torch.stack([later[:, t].sigmoid() * c for t, c in enumerate(cs)], 1)


FORMS: list[tuple[Callable[..., Tensor], bool]] = [
    (states_are_seen, False),
    (one_state_is_seen, False),
    (one_output_is_seen, False),
    (gate_of_another_kind, False),
    (of_a_part_of_the_steps, False),
    (two_gates, False),
    (gate_of_the_other_direction, True),
    (gate_made_later, False),
]


@pytest.mark.parametrize(("function", "taken"), FORMS)
def test_output_gates_of_states_that_are_otherwise_unseen_are_the_ops(
    function: Callable[..., Tensor], taken: bool
) -> None:
    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = projected(x, w, b)
        return function(y, *y.chunk(3, -1))

    fast = Rewritten(layer)
    assert_like_eager(fast, layer, arguments(4), roundings=32)
    assert fast.statuses_of("linear_recurrence") == ["rewritten"], fast.sites
    assert [each.output_gate is not None for each in calls(fast)] == [taken]
    (graph,) = fast.graphs
    assert sum(node.target is operator.mul for node in graph.graph.nodes) < STEPS  # no step is left


def by_doubling(x: Tensor, w: Tensor, b: Tensor, *, begins: bool = False, activated: bool = True) -> Tensor:
    """fo-pooling; with ``begins`` a state is used besides, and with ``activated`` the output gate is a sigmoid."""
    z, f, o = projected(x, w, b).chunk(3, -1)
    f, o = f.sigmoid(), o.sigmoid() if activated else o
    c, k = (1 - f) * z.tanh(), 1
    while k < STEPS:
        c = c + f * F.pad(c[:, :-k], (0, 0, k, 0))
        f = f * F.pad(f[:, :-k], (0, 0, k, 0), value=1.0)
        k *= 2
    return o * c + c[:, :1] if begins else o * c


@pytest.mark.parametrize(("begins", "activated"), [(False, True), (True, True), (False, False)])
def test_output_gates_of_doubling(begins: bool, activated: bool) -> None:
    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return by_doubling(x, w, b, begins=begins, activated=activated)

    fast = Rewritten(layer)
    assert_like_eager(fast, layer, arguments(4), roundings=32)
    assert fast.statuses == ["rewritten"], fast.sites
    (call,) = calls(fast)
    assert (call.output_gate is not None) == (activated and not begins)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("order", ["zf", "zfo", "zfoi"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_layer_of_a_convolution(window: int, order: str, turned: bool) -> None:
    """With time behind the channels, where the convolution has it, or turned back at once."""
    conv = torch.nn.Conv1d(INPUTS, len(order) * UNITS, window)
    dim, channels = (1, 2) if turned else (2, 1)

    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.conv1d(F.pad(x.transpose(1, 2), (window - 1, 0)), w, b)
        parts = dict(zip(order, (y.transpose(1, 2) if turned else y).chunk(len(order), channels), strict=True))
        z, f, o, i = parts["z"].tanh(), parts["f"].sigmoid(), parts.get("o"), parts.get("i")
        c, hs = torch.zeros_like(z.select(dim, 0)), []
        for t in range(x.shape[1]):
            weight = 1 - f.select(dim, t) if i is None else i.select(dim, t).sigmoid()
            c = f.select(dim, t) * c + weight * z.select(dim, t)
            hs.append(c if o is None else o.select(dim, t).sigmoid() * c)
        return torch.stack(hs, dim)

    fast = Rewritten(layer, then="aot_eager")
    given = [arguments(1)[0], *(each.detach().clone().requires_grad_() for each in conv.parameters())]
    assert_like_eager(fast, layer, given, roundings=32)
    assert fast.statuses_of("linear_recurrence") == ["rewritten"], fast.sites
    ((call,),) = (calls(fast),)
    assert (call.sigmoid, call.tanh, call.complement) == (True, True, "i" not in order)
