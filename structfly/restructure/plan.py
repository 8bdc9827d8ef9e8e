"""What becomes of each layer, what that is predicted to cost, and what it was measured to cost."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from structfly.config.json_lines import line_of, problems_in
from structfly.errors import PlanError
from structfly.patterns.structures import NamedStructure
from structfly.records.layer import TIMES_FROM, LayerSizes, TimeSource
from structfly.rewriter.layer_costs import used

_FORMAT = 1


class PlannedLayer(BaseModel):
    """What becomes of one layer."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    in_features: int = Field(ge=1)
    """Inputs of the layer."""

    out_features: int = Field(ge=1)
    """Outputs of the layer."""

    structure: NamedStructure | None = None
    """What its weight is made of; None leaves it dense."""

    predicted_loss: float = 0.0
    """How much the loss is predicted to rise by it."""

    costs: dict[str, float] = Field(default_factory=dict)
    """Its cost of each resource, predicted."""

    dense_costs: dict[str, float] = Field(default_factory=dict)
    """What it costs while it is dense."""

    time_from: TimeSource = "roofline"
    """Where the time among its costs comes from: the roofline alone, the roofline corrected by measurements of other
    layers, or measurements of its own, at just as many tokens or interpolated between more and fewer."""

    @property
    def sizes(self) -> LayerSizes:
        """Its sizes."""
        return LayerSizes(self.in_features, self.out_features)


class Measured(BaseModel):
    """The loss on calibration data before and after."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    dense: float
    """Of the dense model."""

    structured: float
    """Of the restructured model."""


class Plan(BaseModel):
    """A way to restructure a model: print it, save it, edit it, apply it again."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: int = Field(default=_FORMAT, ge=_FORMAT, le=_FORMAT)
    """Version of the file format."""

    layers: dict[str, PlannedLayer]
    """By qualified name."""

    left: dict[str, str] = Field(default_factory=dict)
    """Linear layers that were not looked at, and why."""

    strategy: str = "solver"
    """How the structures were chosen."""

    budget: dict[str, Any] = Field(default_factory=dict)
    """The budget, as it was given."""

    limits: dict[str, float] = Field(default_factory=dict)
    """The budget in each resource's own unit."""

    tokens: int = Field(default=1, ge=1)
    """Tokens of a forward pass that costs are of."""

    predicted_loss: float = 0.0
    """How much the loss is predicted to rise."""

    bound: float | None = None
    """No choice among what was offered within the budget is predicted to raise it by less (with ``budget.loss``: to
    take less time); None where nothing was proven."""

    gap: float | None = None
    """How far the choice may be from that bound, relative to it."""

    untimed: int = Field(default=0, ge=0)
    """How many measurements of layers' times were left out, for the time allowed for them was up."""

    measured: Measured | None = None
    """The loss, where it was measured."""

    def total(self, resource: str, *, dense: bool = False) -> float:
        """What the layers use of a resource together, or would while they are dense; of "loss" what is predicted."""
        if resource == "loss":
            return 0.0 if dense else self.predicted_loss
        return used((layer.dense_costs if dense else layer.costs for layer in self.layers.values()), resource)

    @property
    def met(self) -> dict[str, bool]:
        """Whether each limit of the budget is kept by what is predicted."""
        return {name: self.total(name) <= limit * (1 + 1e-9) for name, limit in self.limits.items()}

    # ------------------------------------------------------------------------------------------------------ files

    def save(self, path: Path | str) -> None:
        """Write it as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read it from JSON.

        Raises:
            PlanError: the file is no plan; the message has the line, what is wrong there, and what is allowed.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{path}, line {error.lineno}: no JSON: {error.msg}") from None
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            raise PlanError("\n".join(problems_in(error, str(path), text))) from None
        for name, layer in plan.layers.items():
            reason = layer.structure.why_not(layer.sizes) if layer.structure is not None else ""
            if reason:
                where = f"{path}, line {line_of(text, ('layers', name, 'structure'))}"
                raise PlanError(f"{where}: layers.{name}.structure is {layer.structure!r}; {reason}")
        return plan

    # --------------------------------------------------------------------------------------------------- printing

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, record=True)
        table = Table()
        for heading in ("layer", "sizes", "structure", "parameters", "x dense", "predicted loss"):
            table.add_column(heading, justify="left" if heading in ("layer", "structure") else "right", overflow="fold")
        for name, layer in self.layers.items():
            used, dense = layer.costs.get("params", 0.0), layer.dense_costs.get("params", 0.0)
            table.add_row(
                name,
                f"{layer.in_features} -> {layer.out_features}",
                "dense" if layer.structure is None else f"{layer.structure!r}",
                f"{used:,.0f}",
                f"{used / dense:.3f}" if dense else "",
                f"{layer.predicted_loss:.3g}",
            )
        console.print(table)
        for line in self._summary():
            console.print(line, markup=False, highlight=False)
        return console.export_text().rstrip()

    def _summary(self) -> Iterator[str]:
        proven = ""
        if self.gap is not None:
            proven = ", proven best of what was offered" if self.gap == 0 else f", within {self.gap:.2g} of the bound"
        yield f"strategy {self.strategy}: loss predicted to rise by {self.predicted_loss:.4g}{proven}"
        if self.measured is not None:
            rise = self.measured.structured - self.measured.dense
            yield f"measured: {self.measured.dense:.4g} dense, {self.measured.structured:.4g} restructured, {rise:+.4g}"
        for name, kept in self.met.items():
            used, dense = self.total(name), self.total(name, dense=True)
            share = f", {used / dense:.3f} of dense" if dense else ""
            yield f"{name}: {used:,.6g} of {self.limits[name]:,.6g}{share}: {'kept' if kept else 'EXCEEDED'}"
        if not self.limits.keys().isdisjoint(("time", "loss")):
            sources = Counter(layer.time_from for layer in self.layers.values())
            counts = ", ".join(f"{sources[source]} {words}" for source, words in TIMES_FROM.items() if sources[source])
            untimed = f"; {self.untimed} that were to be timed were not, for the time was up" if self.untimed else ""
            yield f"times of layers: {counts}{untimed}"
        for name, reason in self.left.items():
            yield f"left: {name}: {reason}"
