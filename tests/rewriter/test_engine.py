"""The engine with toy rules: what it keeps, what it reports, and that failures never change a program."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from structfly.backend import with_inputs
from structfly.config import Config, SiteSettings, load_config
from structfly.errors import PlanError, RewriteError
from structfly.lowering.device_profile import device_profile
from structfly.patterns.linear.candidates import Candidate as Layer
from structfly.records import Candidate, Cost, DeviceProfile, LayerMenu, Menu, Miss, Site, Stage
from structfly.rewriter.editor import Editor
from structfly.rewriter.engine import Outcome, rewrite_graph
from structfly.rewriter.inputs import ExtraInputs, InputLike, UnfitError, copy_of
from structfly.rewriter.region import Region


class SineOfDouble:
    """Replaces ``torch.sin(x)`` by ``torch.sin(x + x) `` or by what ``write`` inserts."""

    name = "sine"

    def __init__(self, write: Callable[[Editor, fx.Node], fx.Node] | None = None, seconds: float = 0.0) -> None:
        self.write = write
        self.seconds = seconds

    def find(self, region: Region) -> Sequence[Site | Miss]:
        results: list[Site | Miss] = []
        for node in region.graph.nodes:
            if node.target is torch.cos:
                results.append(Miss(self.name, node, "a cosine is no sine", 1, node))
                results.append(Miss(self.name, node, "not even close", 0, node))
            if node.target is torch.sin:
                results.append(Site(self.name, f"at.{node.name}", node, torch.device("cpu"), {}))
        return results

    def menu(self, site: Site, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        cost = Cost((Stage(0, self.seconds * profile.bandwidth),))
        alone = Cost((Stage(0, 0.5 * profile.bandwidth),))
        return Menu((Candidate("alone", alone, rewrites=False), Candidate("double", cost)), peak_limit=0)

    def rewrite(self, site: Site, candidate: Candidate, editor: Editor) -> None:
        (x,) = site.node.args
        assert isinstance(x, fx.Node)
        new = self.write(editor, x) if self.write else editor.call(torch.sin, editor.call(operator.add, x, x))
        editor.replace(site.node, new)
        editor.erase([site.node])


def run(
    rule: SineOfDouble | Sequence[SineOfDouble],
    function: Callable[..., Any],
    *arguments: Any,
    config: Config | None = None,
) -> tuple[Any, list[Outcome], list[fx.GraphModule]]:
    outcomes: list[Outcome] = []
    graphs: list[fx.GraphModule] = []
    rules = rule if isinstance(rule, Sequence) else (rule,)

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        outcomes.append(rewrite_graph(gm, rules, config or Config(), device_profile))
        graphs.append(outcomes[-1].module)
        return with_inputs(outcomes[-1].module.forward, outcomes[-1])

    torch._dynamo.reset()
    return torch.compile(function, backend=backend)(*arguments), outcomes, graphs


X = torch.linspace(-1, 1, 7)


def test_a_site_is_rewritten_and_reported_with_its_source() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.sin(x) * 2

    value, (outcome,), (gm,) = run(SineOfDouble(), function, X)
    assert torch.equal(value, torch.sin(2 * X) * 2)
    (site,) = outcome.sites
    assert (site.rule, site.status, site.candidate, site.name) == ("sine", "rewritten", "double", "at.sin")
    assert site.source.startswith(__file__)
    assert site.source.endswith("return torch.sin(x) * 2")
    assert outcome.changed
    assert [node.target for node in gm.graph.nodes].count(torch.sin) == 1


def test_of_several_failed_attempts_the_furthest_is_reported() -> None:
    _, (outcome,), _ = run(SineOfDouble(), torch.cos, X)
    assert [(site.status, site.reason) for site in outcome.sites] == [("missed", "a cosine is no sine")]
    assert not outcome.changed


class _NoSines(SineOfDouble):
    name = "no sines"

    def find(self, region: Region) -> Sequence[Site | Miss]:
        nodes = (node for node in region.graph.nodes if node.op == "call_function")
        return [Miss(self.name, node, "not read", 0, node) for node in nodes]


def test_what_one_rule_rewrites_is_no_miss_of_another() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.sin(x) * torch.cos(x)

    outcomes: list[Outcome] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        outcomes.append(rewrite_graph(gm, (_NoSines(), SineOfDouble()), Config(), device_profile))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(X)
    missed = [site.nodes for site in outcomes[0].sites if site.rule == "no sines"]
    assert missed == [("cos",), ("mul",)]


class _AlsoSines(SineOfDouble):
    name = "also sines"


def test_what_one_rule_finds_a_later_one_does_not() -> None:
    """Nor where the earlier one keeps it; where it is switched off, it does."""
    for seconds, status in ((0.0, "rewritten"), (2.0, "kept")):
        rules = (SineOfDouble(seconds=seconds), _AlsoSines())
        lines = [(site.rule, site.status) for site in run(rules, torch.sin, X)[1][0].sites]
        assert lines == [("sine", status)]
    off = load_config({"rules": {"sine": False}}, known_rules=("sine",))
    lines = [(site.rule, site.status) for site in run(rules, torch.sin, X, config=off)[1][0].sites]
    assert lines == [("sine", "kept"), ("also sines", "rewritten")]


@dataclass(frozen=True)
class _Sines(Site):
    """Two sines that are rewritten each in its own place, or where the last of them stands."""

    nodes: tuple[fx.Node, ...] = ()
    apart: bool = True

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        return self.nodes

    @property
    def groups(self) -> tuple[tuple[fx.Node, ...], ...]:
        return tuple((node,) for node in self.nodes) if self.apart else (self.nodes,)


@pytest.mark.parametrize("apart", [True, False])
def test_a_write_between_the_nodes_of_a_site_matters_where_they_are_computed_together(apart: bool) -> None:
    class Both(SineOfDouble):
        def find(self, region: Region) -> Sequence[Site | Miss]:
            nodes = tuple(node for node in region.graph.nodes if node.target is torch.sin)
            return [_Sines(self.name, "both", nodes[0], torch.device("cpu"), {}, nodes, apart)]

        def rewrite(self, site: Site, candidate: Candidate, editor: Editor) -> None:
            for node in site.dead_nodes:
                editor.before(node)
                editor.replace(node, editor.call(torch.sin, *node.args))

    def function(x: Tensor) -> Tensor:
        x = x + 0
        first = torch.sin(x)
        x.add_(1)
        return first + torch.sin(x)

    value, (outcome,), _ = run(Both(), function, X)
    assert torch.equal(value, function(X))
    assert [site.status for site in outcome.sites] == ["rewritten" if apart else "missed"]


class _Impossible(SineOfDouble):
    def menu(self, site: Site, profile: DeviceProfile, settings: SiteSettings) -> LayerMenu:  # type: ignore[override]
        costs = {"params": 4.0, "saved_bytes": 0.0, "transient_bytes": 0.0, "time": 1.0}
        return LayerMenu((Layer(None, 0.0, costs),))


def test_a_budget_of_layers_that_cannot_be_kept_is_the_users_error() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        run(_Impossible(), torch.sin, X, config=load_config({"budget": {"params": 0.5}}))
    assert isinstance(caught.value.inner_exception, PlanError)


def test_a_rewrite_predicted_to_be_slower_is_kept_unless_always() -> None:
    slow = SineOfDouble(seconds=2.0)
    _, (outcome,), _ = run(slow, torch.sin, X)
    assert outcome.sites[0].status == "kept"
    assert "rewrite='always' overrides" in outcome.sites[0].reason
    _, (outcome,), _ = run(slow, torch.sin, X, config=load_config({"rewrite": "always"}, None))
    assert outcome.sites[0].status == "rewritten"


def test_a_rule_can_be_switched_off_at_one_site() -> None:
    config = load_config({"overrides": {"at.*": {"rules": {"sine": False}}}}, None, known_rules=("sine",))
    value, (outcome,), _ = run(SineOfDouble(), torch.sin, X, config=config)
    assert torch.equal(value, torch.sin(X))
    assert outcome.sites[0].status == "kept"
    assert "switched off" in outcome.sites[0].reason


def test_a_rewrite_may_add_graph_inputs() -> None:
    factor = torch.tensor(3.0)

    def write(editor: Editor, x: fx.Node) -> fx.Node:
        like = InputLike((), torch.float32, torch.device("cpu"))
        extra = editor.add_inputs({"factor": like, "shift": like}, lambda arguments: [factor, arguments[0][0]])
        return editor.call(torch.add, editor.call(torch.mul, x, extra["factor"]), extra["shift"])

    value, (outcome,), (gm,) = run(SineOfDouble(write), lambda x: torch.sin(x) + 1, X)
    assert torch.equal(value, X * 3 + X[0] + 1)
    assert [node.target for node in gm.graph.nodes if node.op == "placeholder"][-2:] == ["factor", "shift"]
    assert [example.shape for example in outcome.examples] == [(), ()]


def failing(editor: Editor, x: fx.Node) -> fx.Node:
    editor.call(torch.exp, x)
    raise ZeroDivisionError("no such thing")


def test_a_failing_rule_leaves_the_graph_as_it_was() -> None:
    value, (outcome,), (gm,) = run(SineOfDouble(failing), torch.sin, X)
    assert torch.equal(value, torch.sin(X))
    assert outcome.sites[0].status == "failed"
    assert "ZeroDivisionError: no such thing" in outcome.sites[0].reason
    assert torch.exp not in [node.target for node in gm.graph.nodes]


def test_a_failing_rule_raises_if_strict() -> None:
    config = load_config({"strict": True}, None)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        run(SineOfDouble(failing), torch.sin, X, config=config)
    assert isinstance(caught.value.inner_exception, RewriteError)


def used_before_it_is_made(editor: Editor, x: fx.Node) -> fx.Node:
    (last,) = (node for node in x.graph.nodes if node.op == "output")
    editor.before(last)
    return editor.call(torch.exp, x)


def test_a_rewrite_that_breaks_the_graph_is_undone() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.sin(x) * 2 + torch.sin(x + 1)

    value, (outcome,), (gm,) = run(SineOfDouble(used_before_it_is_made), function, X)
    assert torch.equal(value, function(X))
    assert [site.status for site in outcome.sites] == ["failed", "failed"]
    assert torch.exp not in [node.target for node in gm.graph.nodes]
    assert not outcome.changed


def test_a_failing_choice_leaves_all_sites_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError("no optimum")

    monkeypatch.setattr("structfly.rewriter.engine.choose", fail)
    value, (outcome,), _ = run(SineOfDouble(), lambda x: torch.sin(x) + torch.sin(x + 1), X)
    assert torch.equal(value, torch.sin(X) + torch.sin(X + 1))
    assert [site.status for site in outcome.sites] == ["failed", "failed"]
    assert "no optimum" in outcome.sites[0].reason


class _FailsToFind(SineOfDouble):
    def find(self, region: Region) -> Sequence[Site | Miss]:
        raise KeyError("lost")


def test_a_rule_that_fails_to_read_is_reported() -> None:
    value, (outcome,), _ = run(_FailsToFind(), torch.sin, X)
    assert torch.equal(value, torch.sin(X))
    assert [(site.status, "KeyError" in site.reason) for site in outcome.sites] == [("failed", True)]


def test_a_failing_check_of_a_site_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise LookupError("no storage")

    monkeypatch.setattr("structfly.rewriter.engine.why_pinned", fail)
    value, (outcome,), _ = run(SineOfDouble(), torch.sin, X)
    assert torch.equal(value, torch.sin(X))
    assert [(site.status, "no storage" in site.reason) for site in outcome.sites] == [("failed", True)]


def test_checkpoint_bodies_are_entered() -> None:
    def function(x: Tensor) -> Tensor:
        result: Tensor = checkpoint(torch.sin, x, use_reentrant=False)
        return result

    value, (outcome,), _ = run(SineOfDouble(), function, X.clone().requires_grad_())
    torch.testing.assert_close(value, torch.sin(2 * X))
    assert [site.status for site in outcome.sites] == ["rewritten"]


def test_sites_are_reported_in_the_order_of_their_graphs() -> None:
    def function(x: Tensor) -> Tensor:
        inside: Tensor = checkpoint(lambda y: torch.sin(y) + torch.cos(y), x, use_reentrant=False)
        return inside + torch.cos(x) + torch.sin(x + 1) + torch.cos(x)

    _, (outcome,), _ = run(SineOfDouble(), function, X.clone().requires_grad_())
    assert [site.status for site in outcome.sites] == ["missed", "rewritten", "missed", "rewritten", "missed"]


def test_an_input_cannot_be_added_inside_a_body() -> None:
    def function(x: Tensor) -> Tensor:
        result: Tensor = checkpoint(torch.sin, x, use_reentrant=False)
        return result

    def write(editor: Editor, x: fx.Node) -> fx.Node:
        return editor.add_inputs({"extra": InputLike(X.shape, X.dtype, X.device)}, lambda arguments: [X])["extra"]

    rule = SineOfDouble(write)
    _, (outcome,), _ = run(rule, function, X.clone().requires_grad_())
    assert "cannot add graph inputs" in outcome.sites[0].reason


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sin(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _custom(x: Tensor) -> Any:
    return _Custom.apply(x)  # type: ignore[no-untyped-call]


# Dynamo instantiates the function, which torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_custom_autograd_bodies_are_left_alone() -> None:
    value, (outcome,), _ = run(SineOfDouble(), _custom, X.clone().requires_grad_())
    assert torch.equal(value, torch.sin(X))
    assert [site.status for site in outcome.sites] == ["missed"]
    assert "custom autograd function" in outcome.sites[0].reason


def test_torch_func_regions_are_left_alone() -> None:
    value, outcomes, _ = run(SineOfDouble(), lambda x: torch.func.grad(lambda y: torch.sin(y).sum())(x), X)
    torch.testing.assert_close(value, torch.cos(X))
    sines = [site for outcome in outcomes for site in outcome.sites if "sine" not in site.reason]
    assert [site.status for site in sines] == ["missed"]
    assert "torch.func" in sines[0].reason


def test_a_second_run_changes_nothing() -> None:
    rule = SineOfDouble(lambda editor, x: editor.call(torch.neg, x))
    _, _, (gm,) = run(rule, torch.sin, X)
    before = gm.code
    assert not rewrite_graph(gm, (rule,), Config(), device_profile).changed
    assert gm.code == before


def test_arguments_that_do_not_fit_need_the_graph_as_it_was() -> None:
    """Without it, of a site that was not said to be conditional, the error is the caller's."""

    def unfit(arguments: Sequence[Any]) -> Sequence[Tensor]:
        raise UnfitError(f"{len(arguments)} arguments do not fit")

    gm = fx.symbolic_trace(lambda x: torch.sin(x))
    for original, expected in ((None, None), (copy_of(gm), X.sin())):
        outcome = Outcome(gm, inputs=[ExtraInputs((), unfit)], original=original)
        call = with_inputs(torch.cos, outcome)
        if expected is None:
            with pytest.raises(UnfitError, match="1 arguments do not fit"):
                call(X)
        else:
            torch.testing.assert_close(call(X), expected)
