"""Linear layers restructured inside torch.compile, through Inductor."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
import torch._inductor.config
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from transformers import GPT2Config, GPT2LMHeadModel

import structfly
from structfly import Plan
from structfly.patterns.low_rank import LowRank
from structfly.records import SiteReport
from structfly.records.layer import LayerSizes
from tests.compiling import Rewritten
from tests.patterns.linear.layers import planned

# Inductor's compile workers and torch's own deprecations warn.
pytestmark = pytest.mark.filterwarnings("ignore")
BUDGET: Any = {"budget": {"params": 0.5}, "structures": ["low_rank"], "rewrite": "always"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


def blocks(count: int = 2, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(count))).to(dtype).eval()


def plan_of(sites: Sequence[SiteReport], model: nn.Module) -> Plan:
    """What the report says, where low rank is all that is offered."""
    layers = {}
    for site in sites:
        rank = re.match(r"LowRank\(rank=(\d+)", site.candidate)
        assert site.status == "rewritten"
        assert rank is not None
        weight = model.get_parameter(f"{site.name}.weight")
        stored = weight.shape[::-1] if isinstance(model.get_submodule(site.name), nn.Linear) else weight.shape
        layers[site.name] = (LowRank(rank=int(rank[1])), LayerSizes(*stored))
    return planned(**layers)


def restructured(model: nn.Module, plan: Plan) -> nn.Module:
    """The same done to a copy of the model outside of the backend, with the same projections."""
    other = copy.deepcopy(model)
    structfly.apply_(other, plan)
    return other


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_computes_what_the_restructured_one_does(mode: Any, dtype: torch.dtype) -> None:
    model, x = blocks(dtype=dtype), torch.randn(3, 5, 32, dtype=dtype)
    with mode():
        report = structfly.explain(model, options=BUDGET)(x)
        expected = restructured(model, plan_of(report.sites, model))
        fast = torch.compile(model, backend="structfly", options=BUDGET, fullgraph=True)
        torch.testing.assert_close(fast(x), expected(x))
        assert (fast(x) - model(x)).norm() > 0.1
    used, dense = (sum(costs["params"] for costs in each) for each in zip(*map(_costs, report.sites), strict=True))
    assert 0.4 * dense < used <= 0.5 * dense


def _costs(site: SiteReport) -> tuple[Mapping[str, float], Mapping[str, float]]:
    return site.costs, site.costs_kept


def test_a_plan_that_restructure_made_gives_the_same_model(tmp_path: Path) -> None:
    model, x = blocks(), torch.randn(4, 32)
    other = copy.deepcopy(model)
    plan = structfly.restructure_(
        other, structfly.Budget(params=0.4), structures=["monarch", "low_rank"], progress=False
    )
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        torch._dynamo.reset()
        options: Any = {"plan": given}
        fast = torch.compile(model, backend="structfly", options=options)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), other(x))


def test_dynamic_batches_take_one_graph() -> None:
    model = blocks()
    fast = Rewritten(model, BUDGET, then="inductor")
    x = torch.randn(6, 5, 32)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        first = fast(x)
        expected = restructured(model, plan_of(fast.sites, model))
        torch.testing.assert_close(first, expected(x))
        for batch in (torch.randn(3, 5, 32), torch.randn(9, 5, 32)):
            torch.testing.assert_close(fast(batch), expected(batch))
    assert len(fast.graphs) == 1


def test_graphs_on_both_sides_of_a_break_each_keep_the_budget() -> None:
    model = blocks()

    def step(x: Tensor) -> Tensor:
        x = model[0](x)
        torch._dynamo.graph_break()
        result: Tensor = model(x)  # the first block again
        return result

    report = structfly.explain(step, options=BUDGET)
    x = torch.randn(4, 32)
    with torch.no_grad():
        sites = report(x).sites
        fast = torch.compile(step, backend="structfly", options=BUDGET)
        value = fast(x)
        again = fast(x)
    assert [site.graph for site in sites] == [0, 0, 1, 1, 1, 1]
    for graph in (0, 1):
        mine = [site for site in sites if site.graph == graph]
        assert sum(site.costs["params"] for site in mine) <= 0.5 * sum(site.costs_kept["params"] for site in mine)
    assert torch.equal(value, again)


def test_regions_that_are_compiled_once_are_projected_for_themselves() -> None:
    model, x = blocks(3), torch.randn(4, 32)
    plan = planned(up=(LowRank(rank=9), LayerSizes(32, 64)), down=(LowRank(rank=7), LayerSizes(64, 32)))
    whole = Plan(layers={f"{n}.{name}": layer for n in range(3) for name, layer in plan.layers.items()})
    expected = restructured(model, whole)
    graphs: list[fx.GraphModule] = []

    def counted(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        graphs.append(gm)
        return structfly.backend.structfly(gm, inputs, **options)

    for block in model:
        block.compile(backend=counted, options={"plan": plan})
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x))
    assert len(graphs) == 1


def test_no_dense_weight_is_made() -> None:
    made: list[int] = []

    def record(gm: fx.GraphModule, _: Any) -> Any:
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            if node.op != "placeholder" and isinstance(value, Tensor):
                made.append(value.numel())
        return gm.forward

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        outcome = structfly.backend.rewrite(gm, structfly.backend.read_config(BUDGET))
        compiled = aot_autograd(fw_compiler=record)(outcome.module, [*inputs, *outcome.examples])
        return structfly.backend.with_inputs(compiled, outcome)

    with torch.no_grad():
        torch.compile(blocks(), backend=backend)(torch.randn(2, 32))
    assert made
    assert max(made) <= 2 * 64 < 32 * 64


def test_cuda_graphs_may_take_weights_and_factors_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor is told which inputs keep their addresses: all but the hidden states."""
    static: list[list[int]] = []
    original = torch._inductor.compile_fx.get_static_input_idxs

    def spy(fixed: int) -> list[int]:
        static.append(original(fixed))
        return static[-1]

    monkeypatch.setattr(torch._inductor.compile_fx, "get_static_input_idxs", spy)
    fast = Rewritten(blocks(1), BUDGET, then="inductor")
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        fast(torch.randn(4, 32))
    names = [node.name for node in fast.graphs[0].graph.find_nodes(op="placeholder")]
    factors = 2 * len(fast.calls_of(torch.ops.structfly.low_rank_v3.default))
    inputs = [number for number, name in enumerate(names) if "parameters" not in name]
    assert len(inputs) == 1
    assert sorted(static[0]) == [n for n in range(len(names) + factors) if n not in inputs]


@pytest.mark.gpu
def test_a_recorded_cuda_graph_follows_a_weight_that_changes() -> None:
    model, x = blocks().cuda(), torch.randn(4, 32, device="cuda")
    options: Any = {**BUDGET, "mode": "reduce-overhead"}
    fast = torch.compile(model, backend="structfly", options=options)
    with torch.no_grad():
        plan = plan_of(structfly.explain(model, options=BUDGET)(x).sites, model)
        for _ in range(2):
            expected = restructured(model, plan)(x)
            for _ in range(3):  # a run before the recording, the recording, a replay
                torch.testing.assert_close(fast(x).clone(), expected)
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


def test_a_model_of_transformers() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_head=2, n_layer=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    model: nn.Module = GPT2LMHeadModel(config)
    model.eval()
    ids = torch.randint(0, 64, (2, 8))
    fast = Rewritten(model, {**BUDGET, "strict": True}, then="inductor")
    with torch.no_grad():
        logits = fast(ids).logits
        *layers, head = fast.sites
        assert (head.name, head.status) == ("lm_head", "missed")
        assert "read by something else than linears, too: embedding" in head.reason
        assert len(layers) == 8
        torch.testing.assert_close(logits, restructured(model, plan_of(layers, model))(ids).logits)


def test_an_impossible_budget_says_what_is_possible() -> None:
    options: Any = {"budget": {"params": 10}}
    fast = torch.compile(blocks(1), backend="structfly", options=options)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        fast(torch.randn(4, 32))
    assert isinstance(caught.value.inner_exception, structfly.PlanError)
    message = str(caught.value.inner_exception)
    assert "params 10 (least possible alone: " in message
    assert "The budget holds for the layers of each compiled graph, in this one 0.up, 0.down" in message


CACHE_PROGRAM = """
import json, sys
import torch, structfly
from torch import nn
torch.manual_seed(int(sys.argv[2]))
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
x = torch.linspace(-1, 1, 128).reshape(4, 32)
from structfly import Plan
plan = Plan.load(sys.argv[1])
with torch.no_grad():
    value = torch.compile(model, backend="structfly", options={"plan": plan})(x)
    structfly.apply_(model, plan)
    error = (value - model(x)).abs().max().item()
from torch._dynamo.utils import counters
hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
print(json.dumps([error, value.norm().item(), hits]))
"""


def run_cached(folder: Path, plan: Path, seed: int) -> list[Any]:
    program = folder / "program.py"
    program.write_text(CACHE_PROGRAM, encoding="utf-8")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    command = [sys.executable, str(program), str(plan), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_cached_graph_serves_other_weights_and_no_other_structure(tmp_path: Path) -> None:
    sizes = LayerSizes(32, 64), LayerSizes(64, 32)
    for rank in (5, 6):
        layers = planned(**{"0": (LowRank(rank=rank), sizes[0]), "2": (LowRank(rank=rank), sizes[1])})
        layers.save(tmp_path / f"{rank}.json")
    first = run_cached(tmp_path, tmp_path / "5.json", 0)
    again = run_cached(tmp_path, tmp_path / "5.json", 1)
    other = run_cached(tmp_path, tmp_path / "6.json", 0)
    assert again[2] > 0, "the second process did not use the cache, so this test shows nothing"
    assert max(first[0], again[0], other[0]) < 1e-5
    assert len({first[1], again[1], other[1]}) == 3
