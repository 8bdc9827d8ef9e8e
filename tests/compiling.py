"""Run functions through structfly's pass without paying for Inductor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn

from structfly.backend import read_config, rewrite, with_inputs
from structfly.lowering.linear_cross_entropy.arguments import Arguments
from structfly.patterns import DEFAULT_RULES
from structfly.records import DeviceProfile, SiteReport
from structfly.rewriter.engine import rewrite_graph
from structfly.rewriter.rule import Rule

ALWAYS: Mapping[str, object] = {"rewrite": "always", "strict": True}


class Rewritten:
    """A function compiled with structfly's pass alone; ``sites`` and ``graphs`` collect what happened.

    ``then`` is the backend that runs the rewritten graph: "eager" runs it as it is, "aot_eager" traces forward and
    backward as Inductor would.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        options: Mapping[str, object] = ALWAYS,
        *,
        then: str = "eager",
        dynamic: bool | None = None,
    ) -> None:
        self.sites: list[SiteReport] = []
        self.graphs: list[fx.GraphModule] = []
        self._options = options
        self._then = torch._dynamo.lookup_backend(then)
        torch._dynamo.reset()
        self._compiled = torch.compile(function, backend=self._backend, dynamic=dynamic)

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        outcome = rewrite(gm, read_config(self._options))
        self.sites.extend(outcome.sites)
        self.graphs.append(gm)
        return with_inputs(self._then(outcome.module, [*example_inputs, *outcome.examples]), outcome, self._backend)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._compiled(*arguments, **named)

    @property
    def statuses(self) -> list[str]:
        return [site.status for site in self.sites]

    def statuses_of(self, rule: str) -> list[str]:
        """Those of one rule's sites."""
        return [site.status for site in self.sites if site.rule == rule]

    @property
    def arguments(self) -> list[Arguments]:
        """The arguments of these calls, tensors as nodes."""
        return [Arguments._make(cast(Iterable[Any], call.args)) for call in self.calls]

    @property
    def calls(self) -> list[fx.Node]:
        """Calls of structfly's head op in all graphs and their bodies."""
        return self.calls_of(torch.ops.structfly.linear_cross_entropy_v4.default)

    def calls_of(self, op: Any) -> list[fx.Node]:
        """Calls of an op in all graphs and their bodies."""
        bodies = [module for gm in self.graphs for module in gm.modules() if isinstance(module, fx.GraphModule)]
        return [node for body in bodies for node in body.graph.nodes if node.target is op]


def sites_on(
    profile: DeviceProfile,
    model: nn.Module,
    *shape: int,
    dtype: torch.dtype = torch.bfloat16,
    rules: Sequence[Rule[Any]] = DEFAULT_RULES,
) -> list[SiteReport]:
    """What the rules would do to a model that is given zeros of such a shape, on a device that is not there."""
    sites: list[SiteReport] = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        sites.extend(rewrite_graph(gm, rules, read_config({"strict": True}), lambda device: profile).sites)
        return lambda *arguments: (torch.empty(1),)

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(torch.zeros(shape, dtype=dtype))
    return sites
