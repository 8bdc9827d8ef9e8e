"""``associative_scan`` of trees: leaves in any order, several recurrences, sums, logarithms, and carried resets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.compiling import Rewritten
from tests.patterns.linear_recurrence.programs import inputs

OP = torch.ops.structfly.linear_recurrence_v1.default
SCAN: Any = torch.ops.higher_order.associative_scan
Program = Callable[[Tensor, Tensor, Tensor], Any]


def scan(combine: Callable[[Any, Any], Any], xs: Any, dim: int = 1, *, reverse: bool = False) -> Any:
    """``associative_scan`` with ``combine_mode="pointwise"`` as torch writes it, which it refuses to do on a CPU."""
    leaves, spec = pytree.tree_flatten(xs)
    count = len(leaves)

    def flat(*both: Tensor) -> Sequence[Tensor]:
        left, right = (pytree.tree_unflatten(list(each), spec) for each in (both[:count], both[count:]))
        return pytree.tree_leaves(combine(left, right))

    leaves = [leaf.movedim(dim, 0) for leaf in leaves]
    leaves = [leaf.flip([0]) for leaf in leaves] if reverse else leaves
    made = SCAN(flat, leaves, ())
    made = [leaf.flip([0]) for leaf in made] if reverse else made
    return pytree.tree_unflatten([leaf.movedim(0, dim) for leaf in made], spec)


def by_steps(combine: Callable[[Any, Any], Any], xs: Any, dim: int = 1, *, reverse: bool = False) -> Any:
    """The same, one step after another: the specification."""
    leaves, spec = pytree.tree_flatten(xs)
    steps = list(zip(*(leaf.unbind(dim) for leaf in leaves), strict=True))[:: -1 if reverse else 1]
    before = pytree.tree_unflatten(list(steps[0]), spec)
    made = [steps[0]]
    for step in steps[1:]:
        before = combine(before, pytree.tree_unflatten(list(step), spec))
        made.append(tuple(pytree.tree_leaves(before)))
    made = made[:: -1 if reverse else 1]
    return pytree.tree_unflatten([torch.stack(each, dim) for each in zip(*made, strict=True)], spec)


Run = Callable[..., Any]


def pair(scan: Run, **options: Any) -> Program:
    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return lambda f, z, mask: scan(combine, (f, z), **options)[1]


def input_first(scan: Run, **options: Any) -> Program:
    def combine(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
        return [torch.addcmul(right[0], left[0], right[1]), right[1] * left[1]]

    return lambda f, z, mask: scan(combine, [z, f], **options)[0]


def dictionary(scan: Run, **options: Any) -> Program:
    def combine(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"state": right["state"] + left["state"] * right["gate"], "gate": left["gate"] * right["gate"]}

    return lambda f, z, mask: scan(combine, {"state": z, "gate": f}, **options)["state"]


def two_recurrences(scan: Run, **options: Any) -> Program:
    def combine(left: Any, right: Any) -> Any:
        return [(a * a_right, a_right * b + b_right) for (a, b), (a_right, b_right) in zip(left, right, strict=True)]

    def program(f: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        (_, one), (products, other) = scan(combine, [(f, z), (f * 0.5, f - z)], **options)
        result: Tensor = one * other + products
        return result

    return program


def one_gate_for_two(scan: Run, **options: Any) -> Program:
    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1], left[2] * right[0] + right[2]

    return lambda f, z, mask: torch.cat(scan(combine, (f, z, z * z), **options)[1:], -1)


def with_a_sum(scan: Run, **options: Any) -> Program:
    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1], left[2] + right[2]

    return lambda f, z, mask: torch.cat(scan(combine, (f, z, z * 0.25), **options)[1:], -1)


def of_logarithms(scan: Run, **options: Any) -> Program:
    def combine(left: Any, right: Any) -> Any:
        return left[0] + right[0], torch.exp(right[0]) * left[1] + right[1]

    return lambda f, z, mask: scan(combine, ((f + 0.1).log(), z), **options)[1]


def with_resets(scan: Run, **options: Any) -> Program:
    def combine(left: Any, right: Any) -> Any:
        (a, b, _), (a_right, b_right, reset) = left, right
        return (
            torch.where(reset, a_right, a * a_right),
            torch.where(reset, b_right, a_right * b + b_right),
            left[2] | reset,
        )

    def program(f: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        products, states, _ = scan(combine, (f, z, mask.unsqueeze(-1).expand_as(f)), **options)
        result: Tensor = products + states
        return result

    return program


def with_resets_of_states_alone(scan: Run, **options: Any) -> Program:
    def combine(left: Any, right: Any) -> Any:
        states = torch.where(right["reset"], right["b"], right["a"] * left["b"] + right["b"])
        return {"a": left["a"] * right["a"], "b": states, "reset": right["reset"].logical_or(left["reset"])}

    def program(f: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = scan(combine, {"a": f, "b": z, "reset": mask.unsqueeze(-1)}, **options)["b"]
        return result

    return program


PROGRAMS: dict[Callable[..., Program], int] = {
    pair: 1,
    input_first: 1,
    dictionary: 1,
    two_recurrences: 3,
    one_gate_for_two: 2,
    with_a_sum: 2,
    of_logarithms: 1,
    with_resets: 2,
    with_resets_of_states_alone: 1,
}


@settings(deadline=None, max_examples=25)
@given(
    program=st.sampled_from(list(PROGRAMS)),
    steps=st.sampled_from((2, 3, 7, 8)),
    dim=st.sampled_from((0, 1)),
    reverse=st.booleans(),
    then=st.sampled_from(("eager", "aot_eager")),
)
def test_leaves_of_any_tree(program: Callable[..., Program], steps: int, dim: int, reverse: bool, then: str) -> None:
    f, z, _, mask = inputs(steps=steps)
    if dim == 0:
        f, z = (each.detach().transpose(0, 1).contiguous().requires_grad_() for each in (f, z))
        mask = mask.t()
    exact = [each.detach().double().requires_grad_() for each in (f, z)]
    expected = program(by_steps, dim=dim, reverse=reverse)(exact[0], exact[1], mask)
    theirs = torch.autograd.grad(expected.square().sum(), exact)
    fast = Rewritten(program(scan, dim=dim, reverse=reverse), then=then)
    output = fast(f, z, mask)
    mine = torch.autograd.grad(output.square().sum(), [f, z])
    assert fast.statuses == ["rewritten"], fast.sites
    assert len(fast.calls_of(OP)) == PROGRAMS[program]
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def no_product(left: Any, right: Any) -> Any:
    return right[0].clone(), right[0] * left[1] + right[1], left[2] | right[2]


def gate_of_the_left(left: Any, right: Any) -> Any:
    return left[0] * right[0], left[0] * left[1] + right[1], left[2] | right[2]


def half_gate(left: Any, right: Any) -> Any:
    return left[0] * right[0], 0.5 * right[0] * left[1] + right[1], left[2] | right[2]


def shifted_input(left: Any, right: Any) -> Any:
    return left[0] * right[0], right[0] * left[1] + right[1] * 2, left[2] | right[2]


def squashed(left: Any, right: Any) -> Any:
    return left[0] * right[0], torch.tanh(right[0] * left[1]) + right[1], left[2] | right[2]


def resets_of_gates_alone(left: Any, right: Any) -> Any:
    return (
        torch.where(right[2], right[0], left[0] * right[0]),
        right[0] * left[1] + right[1],
        left[2] | right[2],
    )


def resets_forgotten(left: Any, right: Any) -> Any:
    return left[0] * right[0], torch.where(right[2], right[1], right[0] * left[1] + right[1]), right[2].clone()


def resets_by_channel(left: Any, right: Any) -> Any:
    return left[0] * right[0], torch.where(right[2], right[1], right[0] * left[1] + right[1]), left[2] | right[2]


NOT_ASSOCIATIVE = "leaf 1 of its function is not shown to be associative"


@pytest.mark.parametrize(
    ("combine", "reason"),
    [
        (no_product, NOT_ASSOCIATIVE),
        (gate_of_the_left, NOT_ASSOCIATIVE),
        (half_gate, NOT_ASSOCIATIVE),
        (shifted_input, NOT_ASSOCIATIVE),
        (squashed, "leaf 1 of its function: tanh of the state"),
        (resets_of_gates_alone, NOT_ASSOCIATIVE),
        (resets_forgotten, "is not r | r' of masks"),
        (resets_by_channel, "leaf 2 of its function is not known to reset all channels"),
    ],
)
def test_near_misses(combine: Callable[[Any, Any], Any], reason: str) -> None:
    def program(f: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = scan(combine, (f, z, mask))[1]
        return result

    f, z, *_ = inputs()
    fast = Rewritten(program)
    with torch.no_grad():
        fast(f, z, z > 0)
    assert fast.statuses == ["missed"]
    assert reason in fast.sites[0].reason
