"""Choices for a graph's layers: against brute force, and the reasons given."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly import Budget
from structfly.errors import PlanError
from structfly.records import LayerCandidate, LayerMenu
from structfly.records.layer import TimeSource
from structfly.rewriter.layer_choosing import LayerOrder, choose_layers
from structfly.rewriter.layer_costs import used

RESOURCES = ("params", "flops", "weight_bytes", "activation_bytes", "time")


@dataclass(frozen=True)
class Toy:
    """A candidate of given numbers."""

    name: str
    loss: float
    costs: Mapping[str, float]
    time_from: TimeSource = "roofline"

    @property
    def rewrites(self) -> bool:
        return self.name != "dense"


def toy(name: str, loss: float, amount: float, transient: float = 0.0, time: float | None = None) -> Toy:
    costs = dict.fromkeys(("params", "flops", "weight_bytes", "saved_bytes"), amount)
    return Toy(name, loss, {**costs, "transient_bytes": transient, "time": amount if time is None else time})


amounts = st.integers(1, 20).map(float)
structures = st.lists(st.builds(toy, st.just("some"), amounts, amounts, amounts, amounts), max_size=4)
menus = st.lists(
    st.builds(lambda dense, some: (toy("dense", 0.0, dense), *some), amounts, structures), min_size=1, max_size=4
)
limits = st.dictionaries(st.sampled_from(RESOURCES), st.floats(0.05, 1.2), min_size=1, max_size=3)


def orders_of(menus: Sequence[tuple[Toy, ...]], *, always: bool = False) -> list[LayerOrder]:
    return [LayerOrder(f"layer{n}", LayerMenu(menu, basis="guessed"), always) for n, menu in enumerate(menus)]


@settings(max_examples=200, deadline=None)
@given(menus=menus, ratios=limits, loss=st.none() | st.just(0.0) | st.floats(1e-3, 30), always=st.booleans())
def test_equals_brute_force(
    menus: list[tuple[Toy, ...]], ratios: dict[str, float], loss: float | None, always: bool
) -> None:
    dense = [menu[0].costs for menu in menus]
    bounds = {name: ratio * used(dense, name) for name, ratio in ratios.items()}

    def total(choice: Sequence[Toy]) -> float:
        return sum(each.loss if loss is None else each.costs["time"] for each in choice)

    def fits(choice: Sequence[Toy]) -> bool:
        costs = [each.costs for each in choice]
        kept = all(used(costs, name) <= bound * (1 + 1e-12) for name, bound in bounds.items())
        return kept and (loss is None or sum(each.loss for each in choice) <= loss)

    eligible = [menu[1:] if always and len(menu) > 1 else menu for menu in menus]
    best = min((total(choice) for choice in itertools.product(*eligible) if fits(choice)), default=None)
    budget = Budget(**ratios, loss=loss)
    if best is None:
        with pytest.raises(PlanError, match="no choice of structures keeps the budget"):
            choose_layers(orders_of(menus, always=always), budget)
        return
    choices = choose_layers(orders_of(menus, always=always), budget)
    chosen = [choice.candidate for choice in choices]
    assert fits(chosen)  # type: ignore[arg-type]
    assert total(chosen) == pytest.approx(best)  # type: ignore[arg-type]
    assert all(candidate in menu for candidate, menu in zip(chosen, eligible, strict=True))
    assert [choice.dense for choice in choices] == [menu[0] for menu in menus]


def test_settled_layers_are_neither_chosen_nor_counted() -> None:
    menu = (toy("dense", 0.0, 10.0), toy("half", 1.0, 5.0))
    settled = [
        LayerOrder("head", LayerMenu((toy("dense", 0.0, 1000.0),), "a head"), True),
        LayerOrder("planned", LayerMenu((toy("dense", 0.0, 1000.0), toy("huge", 9.0, 2000.0)), "planned so"), False),
    ]
    choices = choose_layers([settled[0], *orders_of([menu, menu]), settled[1]], Budget(params=15))
    assert [choice.candidate.name for choice in choices] in (
        ["dense", "half", "dense", "huge"],
        ["dense", "dense", "half", "huge"],
    )
    assert (choices[0].reason, choices[-1].reason) == ("a head", "planned so")
    with pytest.raises(PlanError):
        choose_layers([settled[0], *orders_of([menu, menu]), settled[1]], Budget(params=0.4))


def test_a_budget_that_the_dense_layers_keep_restructures_none() -> None:
    menu = (toy("dense", 0.0, 10.0), toy("half", 1e-9, 5.0))
    for budget in (Budget(params=1.0), Budget(time=1.0, params=20)):
        assert [choice.candidate.name for choice in choose_layers(orders_of([menu, menu]), budget)] == ["dense"] * 2
    chosen = choose_layers(orders_of([menu, menu], always=True), Budget(params=1.0))
    assert [choice.candidate.name for choice in chosen] == ["half"] * 2


def test_under_a_limit_of_loss_no_layer_becomes_slower() -> None:
    menu = (toy("dense", 0.0, 10.0), toy("small but slow", 0.1, 5.0, time=12.0), toy("fast", 0.5, 9.0))
    names = [choice.candidate.name for choice in choose_layers(orders_of([menu, menu]), Budget(loss=0.7))]
    assert sorted(names) == ["dense", "fast"]
    choices = choose_layers(orders_of([menu]), Budget(loss=0.7, params=0.6))
    assert choices[0].candidate.name == "small but slow"
    assert choices[0].reason.endswith("predicted to be slower than dense")


def test_reasons_say_what_was_sought_within_what() -> None:
    menu = (toy("dense", 0.0, 10.0), toy("half", 1.0, 5.0))
    half, dense, alone = choose_layers(
        orders_of([menu, (toy("dense", 0.0, 4.0), menu[1]), menu[:1]]), Budget(params=0.8)
    )
    aim = "least predicted loss within params <= 19.2 (dense 24), proven best for the 3 layers of this graph; guessed"
    assert (half.reason, dense.reason) == (aim, f"left dense: {aim}")
    assert alone.reason == "no structure is offered here that has fewer parameters than the dense weight"
    (choice,) = choose_layers(orders_of([menu]), Budget(time="5s"))
    assert choice.reason.startswith("least predicted loss within time <= 5 s (dense 10), proven best for the one layer")
    (choice,) = choose_layers(orders_of([menu]), Budget(loss=2))
    assert choice.reason.startswith("least predicted time within a predicted loss <= 2, proven best")


def test_an_impossible_budget_names_the_layers_it_is_of() -> None:
    menu = (toy("dense", 0.0, 10.0), toy("half", 1.0, 5.0))
    with pytest.raises(PlanError) as caught:
        choose_layers(orders_of([menu] * 7), Budget(params=30, time="2s"))
    assert str(caught.value) == (
        "no choice of structures keeps the budget: params 30 (least possible alone: 35), time 2 (least possible alone: "
        "35); together they can be kept at 17.5 times these limits; raise it, or offer more structures.  The budget "
        "holds for the layers of each compiled graph, in this one layer0, layer1, layer2, layer3, layer4 and 2 more; "
        "switch the rule linear off for a layer to leave it out of the budget"
    )


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Device:
    """Times candidates of a layer: so many at most, all layers together."""

    true: Mapping[str, float]
    left: list[None]
    toys: tuple[Toy, ...]
    known: set[str] = field(default_factory=set)

    def measure(self, candidate: LayerCandidate) -> bool:
        if candidate.name in self.known or not self.left:
            return False
        self.left.pop()
        self.known |= {candidate.name, "dense"}
        return True

    def menu(self) -> LayerMenu:
        def seen(each: Toy) -> Toy:
            if each.name not in self.known:
                return each
            return replace(each, costs={**each.costs, "time": self.true[each.name]}, time_from="measured")

        return LayerMenu(tuple(map(seen, self.toys)), basis="guessed", timing=self)


@st.composite
def devices(draw: st.DrawFn) -> list[Device]:
    """Up to four layers that are faster or slower than predicted, and how many measurements there is time for."""
    left: list[None] = [None] * draw(st.integers(0, 8))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        names = ["dense", *(f"structure {n}" for n in range(draw(st.integers(0, 4))))]
        toys = [
            toy(name, 0.0 if name == "dense" else draw(amounts), draw(amounts), 0.0, draw(amounts)) for name in names
        ]
        found.append(Device({name: draw(amounts) for name in names}, left, tuple(toys)))
    return found


@settings(max_examples=200)
@given(
    layers=devices(),
    budget=st.sampled_from([Budget(loss=30), Budget(time=0.8), Budget(time="30s"), Budget(loss=30, params=0.9)]),
)
def test_what_is_chosen_is_measured_while_there_is_time_and_not_slower_than_dense(
    layers: list[Device], budget: Budget
) -> None:
    def orders() -> list[LayerOrder]:
        return [LayerOrder(f"layer{n}", each.menu(), False) for n, each in enumerate(layers)]

    try:
        choices = choose_layers(orders(), budget)
    except PlanError:
        return
    for layer, choice in zip(layers, choices, strict=True):
        chosen = choice.candidate
        if chosen.rewrites and layer.left:
            assert chosen.name in layer.known
        if chosen.name in layer.known:
            assert chosen.time_from == "measured"
            assert chosen.costs["time"] == layer.true[chosen.name] <= layer.true["dense"]
    assert choose_layers(orders(), budget) == choices  # of what is known now


def known(name: str, loss: float, amount: float, time: float) -> Toy:
    return replace(toy(name, loss, amount, time=time), time_from="measured")


def test_a_layer_that_was_measured_slower_is_chosen_only_where_time_does_not_count() -> None:
    menu = (known("dense", 0.0, 10.0, 10.0), known("small", 0.1, 5.0, 10.1), known("smaller", 0.5, 4.0, 3.0))

    def chosen(budget: Budget, *, always: bool = False) -> tuple[str, str]:
        (choice,) = choose_layers(orders_of([menu], always=always), budget)
        return choice.candidate.name, choice.reason

    assert chosen(Budget(params=0.6))[0] == "small"
    for budget in (Budget(params=0.6, loss=5), Budget(params=0.6, time=2.0), Budget(time=0.9)):
        name, reason = chosen(budget)
        assert name == "smaller"
        assert reason.endswith("; left out, for they were measured slower than dense: 1 of 3 candidates")
    name, reason = chosen(Budget(params=0.6, time=2.0), always=True)
    assert name == "small"
    assert reason.endswith("measured to be slower than dense")


def test_a_budget_that_only_slow_layers_could_keep_says_so() -> None:
    menu = (known("dense", 0.0, 10.0, 10.0), known("small", 0.1, 5.0, 10.1))
    with pytest.raises(PlanError, match=r"measured slower than dense: 1 of 2 candidates\.  The budget"):
        choose_layers(orders_of([menu]), Budget(params=0.6, time=2.0))
