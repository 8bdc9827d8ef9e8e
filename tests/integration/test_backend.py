"""The registered backend through Inductor: numbers, options, failures, caches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import structfly
from structfly import backend
from structfly.lowering.linear_cross_entropy import chunked, kernels
from structfly.patterns.linear_cross_entropy import LinearCrossEntropy
from tests.compiling import Rewritten
from tests.oracle import assert_like_eager

# Inductor's compile workers and torch's own deprecations warn.
pytestmark = pytest.mark.filterwarnings("ignore")
ALWAYS: Any = {"rewrite": "always"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def head(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(torch.tanh(x), w).float(), labels)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(30, 8, generator=generator).to(dtype).requires_grad_()
    return x, w, torch.randint(0, 30, (40,), generator=generator)


def wide_head(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(torch.tanh(x), w), labels)


def test_inductor_runs_the_fused_head_as_accurately_as_eager() -> None:
    fast = torch.compile(wide_head, backend="structfly", options=ALWAYS)
    assert_like_eager(fast, wide_head, inputs())


def learned_chains(x: Tensor, w: Tensor, labels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    z = F.linear(torch.tanh(x), w)
    temperature = x[:, :1].square() + 1.0
    mean = F.cross_entropy(4.0 * torch.sigmoid(z * scale.exp()) / temperature + shift, labels)
    losses = F.cross_entropy(torch.where(shift > 0, F.linear(x, w) * scale, shift), labels, reduction="none")
    z = F.linear(x * 0.5, w) * scale + shift
    return mean + (losses * losses.mean()).mean() + (z.logsumexp(-1) - 1).square().mean()


def test_inductor_gives_learned_operands_their_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    scale, shift = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((), (30,)))
    fast = Rewritten(learned_chains, then="inductor")
    assert_like_eager(fast, learned_chains, (*inputs(), scale, shift))
    assert [call.schedule for call in fast.arguments] == ["forward", "backward", "forward"]


def ratio_head(x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(torch.tanh(x), w)
    log_p = z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(log_p - log_p.detach()) * (labels - 12.0)
    entropy = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
    return (-torch.min(ratio, ratio.clamp(-5.0, 5.0)) - 0.1 * entropy).mean(), entropy.detach().mean()


def test_inductor_runs_a_loss_of_single_rows() -> None:
    report = structfly.explain(ratio_head, options=ALWAYS)(*inputs())
    assert "loss and entropy, gradients in forward (class B)" in report.sites[0].candidate
    torch._dynamo.reset()
    fast = torch.compile(ratio_head, backend="structfly", options=ALWAYS)
    assert_like_eager(lambda *arguments: fast(*arguments)[0], lambda *arguments: ratio_head(*arguments)[0], inputs())
    torch.testing.assert_close(fast(*inputs())[1], ratio_head(*inputs())[1])


def test_an_unknown_option_is_refused_before_anything_is_compiled() -> None:
    wrong: Any = {"budget": {"loss_memry": 1}}
    with pytest.raises(Exception, match=r"loss_memry.*loss_memory") as caught:
        torch.compile(head, backend="structfly", options=wrong)(*inputs())
    assert "ConfigError" in str(caught.value)


def test_a_failing_rule_never_breaks_the_program_unless_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr(LinearCrossEntropy, "rewrite", fail)
    report = structfly.explain(head, options=ALWAYS)(*inputs())
    assert [site.status for site in report.sites] == ["failed"]
    fast = torch.compile(head, backend="structfly", options=ALWAYS)
    torch.testing.assert_close(fast(*inputs()), head(*inputs()))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="broken on purpose"):
        torch.compile(head, backend="structfly", options={**ALWAYS, "strict": True})(*inputs())


def test_explain_reports_and_forgets_nothing() -> None:
    step = torch.compile(head, backend="structfly", options=ALWAYS)
    for _ in range(12):  # more often than torch would recompile
        report = structfly.explain(step, options=ALWAYS)(*inputs())
    (site,) = report.sites
    assert (site.status, site.name, report.graphs) == ("rewritten", "w", 1)
    assert site.source.endswith("return F.cross_entropy(F.linear(torch.tanh(x), w).float(), labels)")
    assert "rewritten" in str(report)
    assert "linear_cross_entropy" in str(report)


def test_explain_lists_overrides_that_match_no_site() -> None:
    overrides: Any = {"w": {"loss_memory": "1MiB"}, "lm_heda": {"rewrite": "auto"}}
    report = structfly.explain(head, options={**ALWAYS, "overrides": overrides})(*inputs())
    assert report.unmatched_overrides == ["lm_heda"]
    assert "override 'lm_heda' matches the name of no site above" in str(report)


def test_torch_logs_shows_what_was_done() -> None:
    program = """
import torch
def step(x, w, t):
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), t)
x, w, t = torch.randn(4, 8), torch.randn(30, 8), torch.tensor([1, 2, 3, 4])
torch.compile(step, backend="structfly", options={"rewrite": "always"})(x, w, t)
"""
    environment = {**os.environ, "TORCH_LOGS": "+structfly"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "linear_cross_entropy rewritten at w" in done.stderr


@pytest.mark.parametrize("backend", ["inductor", "structfly"])
def test_retain_graph_works_wherever_inductors_does(backend: str) -> None:
    options = ALWAYS if backend == "structfly" else None
    x, w, labels = inputs()
    with torch._functorch.config.patch(donated_buffer=False):
        loss = torch.compile(head, backend=backend, options=options)(x, w, labels)
        first = torch.autograd.grad(loss, [x, w], retain_graph=True)
        second = torch.autograd.grad(loss, [x, w])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_under_autocast_the_products_run_in_its_dtype() -> None:
    def step(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(F.linear(x, w), labels)

    fast = Rewritten(step, then="aot_eager")
    x, w, labels = inputs()
    loss, eager = fast(x, w, labels), step(x, w, labels)
    assert loss.dtype == eager.dtype == torch.float32
    (call,) = fast.calls
    assert call.args[0].meta["example_value"].dtype == torch.bfloat16  # type: ignore[union-attr]
    mine, theirs = torch.autograd.grad(loss, [x, w]), torch.autograd.grad(eager, [x, w])
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=3e-2, atol=1e-3)


def test_under_autocast_operands_keep_their_precision() -> None:
    def step(x: Tensor, w: Tensor, labels: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(F.linear(x, w) * b[0].exp() + b, labels)

    x, w, labels = inputs()
    b = (1.0 + torch.randn(30, generator=torch.Generator().manual_seed(1)) / 1000).requires_grad_()
    fast = Rewritten(step, then="aot_eager")
    loss, eager = fast(x, w, labels, b), step(x, w, labels, b)
    assert fast.statuses == ["rewritten"]
    (arguments,) = fast.arguments
    assert [operand.meta["example_value"].dtype for operand in arguments.operands] == [torch.float32] * 2  # type: ignore[attr-defined]
    mine, theirs = torch.autograd.grad(loss, [x, w, b]), torch.autograd.grad(eager, [x, w, b])
    for a, c in zip(mine, theirs, strict=True):
        assert a.dtype == c.dtype
        torch.testing.assert_close(a, c, rtol=3e-2, atol=2e-3)


def test_the_linear_keeps_its_own_precision_where_only_the_loss_is_under_autocast() -> None:
    def step(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        z = F.linear(x, w)
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(z, labels)

    assert_like_eager(Rewritten(step, then="aot_eager"), step, inputs())


def test_inputs_that_share_memory_do_not_stand_in_the_way() -> None:
    model = torch.nn.Linear(8, 30, bias=False)
    with torch.no_grad():
        model.weight.mul_(2.0)

    def step(parameters: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), labels)

    x, _, labels = inputs()
    fast = Rewritten(step)
    parameters = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    torch.testing.assert_close(fast(parameters, x, labels), step(parameters, x, labels))
    assert fast.statuses == ["rewritten"]


def test_without_gradients_only_the_losses_are_made() -> None:
    fast = Rewritten(head, then="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs()), head(*inputs()))
    (call,) = fast.arguments
    assert call.gradients == [False] * 5


def test_a_frozen_head_gets_no_gradient() -> None:
    fast = Rewritten(head, then="aot_eager")
    x, w, labels = inputs()
    w.requires_grad_(False)
    fast(x, w, labels).backward()
    (call,) = fast.arguments
    assert call.gradients == [True, False, False, False, False]


def test_in_a_checkpoint_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    original = chunked.run_chunks

    def counting(head: Any, coefficient: Any, wanted: Any, *rest: Any) -> Any:
        passes.append("losses" if wanted is None else "gradients")
        return original(head, coefficient, wanted, *rest)

    monkeypatch.setattr(kernels, "run_chunks", counting)

    def step(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = checkpoint(wide_head, x, w, labels, use_reentrant=False)
        return result

    fast = Rewritten(step, then="aot_eager")
    assert fast.statuses == []
    fast(*inputs()).backward()
    assert fast.statuses == ["rewritten"]
    assert passes.count("gradients") == 1
    assert passes.count("losses") <= 2


CACHE_PROGRAM = """
import json, sys
import torch
memory = int(sys.argv[1])
from structfly.lowering.linear_cross_entropy import kernels
seen = []
original = kernels.run_chunks
def spy(head, coefficient, wanted, workspace, row_step):
    seen.append(workspace)
    return original(head, coefficient, wanted, workspace, row_step)
kernels.run_chunks = spy
def step(x, w, t):
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), t)
torch.manual_seed(0)
x, w = torch.randn(512, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
t = torch.randint(0, 300, (512,))
options = {"rewrite": "always", "budget": {"loss_memory": memory}}
loss = torch.compile(step, backend="structfly", options=options)(x, w, t)
loss.backward()
from torch._dynamo.utils import counters
hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
print(json.dumps([loss.item(), x.grad.norm().item(), seen, hits]))
"""


def another_version(folder: Path) -> None:
    """A copy of the package in which the autograd formula is another (twice the gradient) and so is the ABI version."""
    shutil.copytree(Path(structfly.__file__).parent, folder / "structfly", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (folder / "structfly").rglob("*.py"):
        text = file.read_text(encoding="utf-8").replace("cross_entropy_v4", "cross_entropy_v5")
        text = text.replace("cross_entropy_backward_v4", "cross_entropy_backward_v5")
        if file.parent.name == "head" and file.name == "autograd.py":
            assert "(gradient.to(scale.dtype) * scale)" in text
            text = text.replace("(gradient.to(scale.dtype) * scale)", "(gradient.to(scale.dtype) * scale * 2)")
        file.write_text(text, encoding="utf-8")


def run_cached(folder: Path, memory: int) -> list[Any]:
    program = folder / "program.py"
    program.write_text(CACHE_PROGRAM, encoding="utf-8")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    command = [sys.executable, str(program), str(memory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_stale_compile_cache_is_never_served(tmp_path: Path) -> None:
    first = run_cached(tmp_path, 200 * 304 * 4)
    again = run_cached(tmp_path, 200 * 304 * 4)
    smaller = run_cached(tmp_path, 64 * 304 * 4)
    assert again[:3] == first[:3]
    assert again[3] > 0, "the second process did not use the cache, so this test shows nothing"
    assert smaller[2][0] < first[2][0]
    assert smaller[0] == pytest.approx(first[0], rel=1e-6)
    another_version(tmp_path)
    doubled = run_cached(tmp_path, 200 * 304 * 4)
    assert doubled[0] == first[0]
    assert doubled[1] == pytest.approx(2 * first[1], rel=1e-6)


def test_explaining_modules_of_other_sizes_makes_none_dynamic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo remembers sizes by where code stands, which for all modules that are explained is one place."""
    seen: list[torch.Size] = []
    original = backend.rewrite

    def noted(gm: torch.fx.GraphModule, config: Any) -> Any:
        seen.extend(node.meta["example_value"].shape for node in gm.graph.find_nodes(op="placeholder"))
        return original(gm, config)

    monkeypatch.setattr("structfly.explanation.rewrite", noted)
    for size in (8, 12, 16):
        structfly.explain(torch.nn.Softmax(-1))(torch.randn(size, size))
    assert [tuple(shape) for shape in seen] == [(8, 8), (12, 12), (16, 16)]
