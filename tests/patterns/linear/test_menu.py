"""What layers of a graph are offered and what they become: under a budget, by name, or as a plan says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import structfly
from structfly import Budget, PlanError
from structfly.patterns.low_rank import LowRank
from structfly.records import SiteReport
from structfly.records.layer import LayerSizes
from structfly.rewriter.layer_costs import used
from tests.compiling import Rewritten
from tests.patterns.linear.layers import planned

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.tiny, self.lm_head = nn.Linear(32, 1), nn.Linear(32, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        result: Tensor = self.lm_head(x * torch.sigmoid(self.tiny(x)))
        return result


def sites_of(options: Any, x: Tensor | None = None) -> dict[str, SiteReport]:
    torch.manual_seed(0)
    fast = Rewritten(Net().eval(), {"strict": True, **options})
    with torch.no_grad():
        fast(torch.randn(6, 32) if x is None else x)
    return {site.name: site for site in fast.sites}


LAYERS = ("up", "down", "tiny")


@settings(max_examples=25, deadline=None)
@given(
    limits=st.dictionaries(
        st.sampled_from(["params", "flops", "weight_bytes"]), st.floats(0.25, 1.1), min_size=1, max_size=3
    ),
    rows=st.integers(1, 9),
)
def test_the_choice_is_that_of_restructure_and_keeps_the_budget(limits: dict[str, float], rows: int) -> None:
    sites = sites_of({"budget": limits}, torch.randn(rows, 32))
    torch.manual_seed(0)
    plan = structfly.restructure_(Net(), Budget(**limits), tokens=rows, progress=False)
    assert {n: layer.predicted_loss for n, layer in plan.layers.items()} == {n: sites[n].loss for n in LAYERS}
    for name, layer in plan.layers.items():
        candidate = "dense" if layer.structure is None else repr(layer.structure)
        assert sites[name].candidate == candidate
        assert sites[name].costs == {**layer.costs, "saved_bytes": 0.0}
        assert sites[name].costs_kept == layer.dense_costs
    for resource, share in limits.items():
        taken = used([sites[name].costs for name in LAYERS], resource)
        assert taken <= share * used([sites[name].costs_kept for name in LAYERS], resource) * (1 + 1e-12)


def test_a_head_is_left_dense_and_does_not_count_unless_it_is_named() -> None:
    sites = sites_of({"budget": {"params": 0.5}})
    assert (sites["lm_head"].status, sites["lm_head"].candidate) == ("kept", "dense")
    assert sites["lm_head"].reason == "a head is left dense; overrides.lm_head.structures names what it may become"
    assert sites_of({"budget": {"params": 0.5}, "structures": ["low_rank"]})["lm_head"].status == "kept"
    named = sites_of({"budget": {"params": 0.5}, "overrides": {"lm_*": {"structures": ["low_rank"]}}})
    assert "of this graph" in named["lm_head"].reason
    total = sum(site.costs_kept["params"] for site in named.values())
    assert f"(dense {total:,.6g})" in named["up"].reason


def test_structures_by_name() -> None:
    options = {"budget": {"params": 0.6}, "structures": ["monarch"], "rewrite": "always"}
    sites = sites_of({**options, "overrides": {"d*": {"structures": ["low_rank", "block_sparse"]}}})
    assert sites["up"].candidate.startswith("Monarch(")
    assert sites["down"].candidate.startswith(("LowRank(", "BlockSparse("))
    sites = sites_of({**options, "budget": {"params": 0.8}, "overrides": {"down": {"structures": []}}})
    assert (sites["down"].status, sites["up"].status) == ("kept", "rewritten")
    assert "no structure is offered here" in sites["down"].reason
    assert f"(dense {2 * 32 * 64 + 32:,.6g})" in sites["up"].reason  # the layer that is left counts


def test_a_layer_too_small_for_any_structure_says_so() -> None:
    site = sites_of({"budget": {"params": 0.5}})["tiny"]
    assert (site.status, "fewer parameters than the dense weight" in site.reason) == ("kept", True)


def test_a_graph_of_a_head_alone_has_nothing_to_keep_a_budget_with() -> None:
    module = nn.ModuleDict({"head": nn.Linear(8, 8)})
    fast = Rewritten(lambda x: module["head"](x), {"budget": {"params": 3}, "strict": True})
    with torch.no_grad():
        fast(torch.randn(2, 8))
    assert [(site.status, site.name) for site in fast.sites] == [("kept", "head")]


def test_the_least_time_within_a_loss() -> None:
    sites = sites_of({"budget": {"loss": 1e9}, "timing_seconds": 0}, torch.randn(50_000, 32))
    times = {name: (sites[name].costs["time"], sites[name].costs_kept["time"]) for name in LAYERS}
    assert times["up"][0] < times["up"][1]
    assert all(chosen <= dense for chosen, dense in times.values())
    assert sites_of({"budget": {"loss": 0}})["up"].candidate == "dense"


def test_a_layer_that_is_called_twice_pays_its_weight_once() -> None:
    layer = nn.Linear(32, 32)
    fast = Rewritten(lambda x: layer(layer(x)), {"budget": {"params": 0.5}, "strict": True})
    once = Rewritten(lambda x: layer(x), {"budget": {"params": 0.5}, "strict": True})
    with torch.no_grad():
        fast(torch.randn(6, 32))
        (twice,) = fast.sites
        once(torch.randn(6, 32))
        (single,) = once.sites
    for name, times in {"params": 1, "weight_bytes": 1, "transient_bytes": 1, "flops": 2, "time": 2}.items():
        assert twice.costs[name] == pytest.approx(times * single.costs[name]), name
        assert twice.costs_kept[name] == pytest.approx(times * single.costs_kept[name]), name


# ---------------------------------------------------------------------------------------------------------- plans


def test_a_plan_says_what_each_layer_becomes() -> None:
    up, down, head = LayerSizes(32, 64), LayerSizes(64, 32), LayerSizes(32, 40)
    plan = planned(up=(LowRank(rank=5), up), down=(None, down), lm_head=(LowRank(rank=2), head))
    sites = sites_of({"plan": plan})
    assert {name: (site.status, site.candidate) for name, site in sites.items()} == {
        "up": ("rewritten", repr(LowRank(rank=5))),
        "down": ("kept", "dense"),
        "tiny": ("missed", ""),
        "lm_head": ("rewritten", repr(LowRank(rank=2))),
    }
    assert sites["down"].reason == "the plan leaves it dense"
    assert sites["tiny"].reason == "the plan does not name it"
    assert sites["up"].loss == 0.25
    assert sites["up"].costs["params"] == 5 * (32 + 64)
    assert sites["up"].costs["flops"] == 6 * 2 * sites["up"].costs["params"]


def test_a_plan_that_does_not_fit_the_model_says_why() -> None:
    plan = planned(up=(LowRank(rank=5), LayerSizes(32, 65)), down=(LowRank(rank=40), LayerSizes(64, 32)))
    sites = sites_of({"plan": plan})
    assert sites["up"].reason == (
        "the plan has it as LayerSizes(in_features=32, out_features=65); here it is LayerSizes(in_features=32, "
        "out_features=64)"
    )
    assert sites["down"].reason == "rank is at most 32 there"


def test_explain_names_layers_of_the_plan_that_are_not_there(tmp_path: Path) -> None:
    layer = (LowRank(rank=5), LayerSizes(32, 64))
    planned(up=layer, pu=layer).save(tmp_path / "a.json")
    with torch.no_grad():
        report = structfly.explain(Net().eval(), options={"plan": str(tmp_path / "a.json")})(torch.randn(6, 32))
    assert report.unmatched_layers == ["pu"]
    text = str(report)
    assert "the plan's layer 'pu' is the name of no site above" in text
    assert "stay in memory" in text
    assert "predicted loss: +0.25" in text
    assert "params: 480; dense: 2,048" in text


def test_a_plan_that_is_none_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"layers": 3}')
    with pytest.raises(PlanError, match="line 1: layers"):
        structfly.explain(Net(), options={"plan": tmp_path / "a.json"})


def test_the_model_stays_as_it_is() -> None:
    model, x = Net().eval(), torch.randn(6, 32)
    before = copy.deepcopy(model.state_dict())
    fast = Rewritten(model, {"budget": {"params": 0.5}, "strict": True})
    with torch.no_grad():
        fast(x)
    assert all(torch.equal(mine, before[name]) for name, mine in model.state_dict().items())
    assert fast(x).requires_grad  # it can still be trained, and is then compiled for that
    assert fast.statuses[-4:] == ["missed"] * 4
