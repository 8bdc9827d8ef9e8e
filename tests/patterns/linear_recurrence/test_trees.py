"""Scans that are written out with whole tensors: doubling in place, and ``associative_scan``'s generic tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_recurrence.programs import inputs

OP = torch.ops.structfly.linear_recurrence_v1.default

Round = Callable[[Tensor, Tensor, int], None]


def set_items(h: Tensor, f: Tensor, k: int) -> None:
    h[:, k:] = h[:, k:] + f[:, k:].clone() * h[:, :-k].clone()
    f[:, k:] = f[:, k:].clone() * f[:, :-k].clone()


def augmented(h: Tensor, f: Tensor, k: int) -> None:
    h[:, k:] += f[:, k:].clone() * h[:, :-k].clone()
    f[:, k:] = f[:, :-k].clone() * f[:, k:].clone()


def methods(h: Tensor, f: Tensor, k: int) -> None:
    h[:, k:].add_(h[:, :-k].clone() * f[:, k:].clone())
    f[..., k:, :].copy_(f[:, :-k].clone() * f.clone()[:, k:])


def narrowed(h: Tensor, f: Tensor, k: int) -> None:
    rest = h.shape[1] - k
    gates = f.clone()
    h.narrow(1, k, rest).addcmul_(gates.narrow(1, k, rest), h.narrow(1, 0, rest).clone())
    f.narrow(1, k, rest).copy_(gates.narrow(1, 0, rest) * gates.narrow(1, k, rest))


ROUNDS: tuple[Round, ...] = (set_items, augmented, methods, narrowed)


def in_place(round: Round, limit: int | None = None) -> Callable[..., Tensor]:
    def function(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
        h, f = z.clone(), f.clone()
        k = 1
        while k < (limit or z.shape[1]):
            round(h, f, k)
            k *= 2
        return h * 2

    return function


@settings(deadline=None, max_examples=15)
@given(round=st.sampled_from(ROUNDS), steps=st.sampled_from((4, 5, 8, 9, 17)))
def test_doubling_in_place_is_rewritten(round: Round, steps: int) -> None:
    function = in_place(round)
    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs(steps=steps))
    assert fast.statuses == ["rewritten"], fast.sites
    (graph,) = fast.graphs
    assert not any(getattr(node.target, "__name__", "") in ("setitem", "iadd") for node in graph.graph.nodes)


@pytest.mark.parametrize("round", ROUNDS)
def test_a_truncated_doubling_in_place_is_a_miss(round: Round) -> None:
    function = in_place(round, limit=4)
    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs(steps=9))
    (site,) = fast.sites
    assert site.status == "missed"
    assert "reaches back 4 of 9 steps" in site.reason


def wrong_order(h: Tensor, f: Tensor, k: int) -> None:
    f[:, k:] = f[:, :-k].clone() * f[:, k:].clone()
    h[:, k:] += f[:, k:].clone() * h[:, :-k].clone()


def gates_are_kept(h: Tensor, f: Tensor, k: int) -> None:
    h[:, k:] += f[:, k:].clone() * h[:, :-k].clone()


def scaled(h: Tensor, f: Tensor, k: int) -> None:
    h[:, k:].add_(f[:, k:].clone() * h[:, :-k].clone(), alpha=2)
    f[:, k:] = f[:, :-k].clone() * f[:, k:].clone()


def otherwise_written(h: Tensor, f: Tensor, k: int) -> None:
    augmented(h, f, k)
    h.mul_(0.5)


def products_are_changed(h: Tensor, f: Tensor, k: int) -> None:
    product = f[:, k:].clone() * h[:, :-k].clone()
    product.add_(1.0)
    h[:, k:] += product
    f[:, k:] = f[:, k:].clone() * f[:, :-k].clone()


def zeros_are_changed(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    for k in (1, 2, 4, 8):
        zeros = torch.zeros_like(z[:, :k])
        zeros.view(-1).add_(1.0)
        z = z + f * torch.cat([zeros, z[:, :-k]], 1)
        f = f * torch.cat([torch.ones_like(f[:, :k]), f[:, :-k]], 1)
    return z


def test_zeros_that_are_changed_through_a_view_are_none() -> None:
    fast = Rewritten(zeros_are_changed)
    assert_like_eager(fast, zeros_are_changed, inputs(steps=9))
    assert fast.statuses == ["missed"], fast.sites
    assert "which this site makes and uses" in fast.sites[0].reason


@pytest.mark.parametrize("round", [wrong_order, gates_are_kept, scaled, otherwise_written])
def test_other_rounds_are_left_alone(round: Round) -> None:
    function = in_place(round)
    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs(steps=9))
    assert not fast.calls_of(OP)


def test_a_product_that_is_changed_is_not_read_as_what_it_was() -> None:
    function = in_place(products_are_changed)
    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs(steps=9))
    assert fast.sites == []


def seen_on_the_way(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    h, f, seen = z.clone(), f.clone(), z.new_zeros(())
    for k in (1, 2, 4, 8):
        augmented(h, f, k)
        seen = seen + h.detach().sum()
    return h + seen


def gates_are_seen(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    h, f = z.clone(), f.clone()
    for k in (1, 2, 4, 8):
        augmented(h, f, k)
    return h + f


def into_a_tensor_that_stays(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    h, f = z * 1.0, f.clone()
    for k in (1, 2, 4, 8):
        augmented(h, f, k)
    return h * 2


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (seen_on_the_way, "which the doubling writes into"),
        (gates_are_seen, "which the doubling writes into"),
        (into_a_tensor_that_stays, "which stays in the graph"),
    ],
)
def test_what_others_see_is_left_and_says_why(function: Callable[..., Tensor], reason: str) -> None:
    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs(steps=9))
    assert fast.statuses == ["missed"], fast.sites
    assert reason in fast.sites[0].reason


# ------------------------------------------------------------------------------------------------- associative_scan


def pair(left: Any, right: Any) -> Any:
    return left[0] * right[0], torch.addcmul(right[1], right[0], left[1])


def dictionary(left: Any, right: Any) -> Any:
    return {"z": right["f"] * left["z"] + right["z"], "f": left["f"] * right["f"]}


def generic(spelling: str, dim: int, reverse: bool) -> Callable[..., Tensor]:
    def function(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
        f, z = (each.movedim(1, dim) for each in (f, z))
        if spelling == "dictionary":
            xs: Any = {"z": z, "f": f}
            made: Any = associative_scan(dictionary, xs, dim, reverse, "generic")
        else:
            made = associative_scan(pair, (f, z), dim, reverse, "generic")
        result: Tensor = made["z" if spelling == "dictionary" else 1].movedim(dim, 1)
        return result

    return function


@settings(deadline=None, max_examples=12)
@given(
    spelling=st.sampled_from(("pair", "dictionary")),
    steps=st.sampled_from((4, 5, 8, 11)),
    dim=st.sampled_from((0, 1, 2)),
    reverse=st.booleans(),
    then=st.sampled_from(("eager", "aot_eager")),
)
def test_the_tree_of_a_generic_scan_is_rewritten(spelling: str, steps: int, dim: int, reverse: bool, then: str) -> None:
    function = generic(spelling, dim, reverse)
    fast = Rewritten(function, then=then)
    assert_like_eager(fast, function, inputs(steps=steps))
    assert fast.statuses == ["rewritten"], fast.sites
    assert len(fast.calls_of(OP)) == 1


def maximum(left: Any, right: Any) -> Any:
    return left[0] * right[0], torch.maximum(right[0] * left[1], right[1])


def summed(left: Any, right: Any) -> Any:
    return left[0] * right[0], left[1] + right[1]


def turned(left: Any, right: Any) -> Any:
    return left[0] * right[0], left[0] * right[1] + left[1]


def multiplied(left: Any, right: Any) -> Any:
    return left[0] * right[0], left[1] * right[0]


@pytest.mark.parametrize(
    ("combine", "operation"),
    [(maximum, "(maximum)"), (summed, "(add)"), (turned, "(add)"), (multiplied, "(mul)")],
)
@pytest.mark.parametrize("steps", [4, 11])
def test_a_generic_scan_of_another_function_is_a_miss(combine: Any, operation: str, steps: int) -> None:
    def function(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = associative_scan(combine, (f, z), 1, False, "generic")[1]
        return result

    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs(steps=steps))
    (site,) = fast.sites
    assert site.status == "missed"
    assert site.reason.startswith("the tree of an associative_scan, in which")
    assert operation in site.reason


def test_one_miss_for_each_scan_of_another_function() -> None:
    def function(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
        f, z = associative_scan(maximum, (f, z), 1, False, "generic")
        result: Tensor = associative_scan(summed, (f, z), 1, False, "generic")[1]
        return result

    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs(steps=8))
    assert fast.statuses == ["missed", "missed"], fast.sites
    assert {"(maximum)" in site.reason for site in fast.sites} == {True, False}


def test_pairs_that_are_rotated_under_a_vmap_are_no_scan() -> None:
    def function(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
        sums = torch.vmap(torch.sub, (1, 1), 1)(f[:, 0::2], f[:, 1::2])
        return torch.stack([sums.sin(), z[:, 0::2]], 2).flatten(1, 2)

    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs(steps=8))
    assert fast.sites == []
