"""A survey: what is known of a model before a budget is, and the plan that any budget makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from structfly.config.budget import Budget
from structfly.errors import ArgumentError
from structfly.layer_times.corrections import LayerTime
from structfly.patterns.linear.candidates import Candidate
from structfly.records.layer import LayerStatistics, Shape
from structfly.restructure.allocation import STRATEGIES, check_strategy
from structfly.restructure.measuring import Loss
from structfly.restructure.plan import Measured, Plan, PlannedLayer
from structfly.rewriter.layer_budget import dense_totals, without_slower


@dataclass(frozen=True, eq=False)
class Survey:
    """What :func:`~structfly.restructure.surveying.survey` found out about a model.

    Attributes:
        shapes: of each layer that may be restructured, by name.
        menus: what each of them may become, the dense weight first.
        statistics: of each of them, for :func:`~structfly.restructure.apply.apply_`.
        left: the other linear layers, and why.
        tokens: of a forward pass that costs are of.
        loss: measures the loss on the calibration data; None without them.
        dense_loss: that of the model as it was; None without data.
        times: what was measured of layers' times.
        untimed: how many measurements of them were left out, for the time allowed for them was up.
    """

    shapes: Mapping[str, Shape]
    menus: Mapping[str, Sequence[Candidate]] = field(repr=False)
    statistics: Mapping[str, LayerStatistics] = field(repr=False)
    left: Mapping[str, str]
    tokens: int
    loss: Loss | None = field(default=None, repr=False)
    dense_loss: float | None = None
    times: Sequence[LayerTime] = field(default=(), repr=False)
    untimed: int = 0

    def plan(self, budget: Budget, strategy: str = "solver") -> Plan:
        """What the layers become within ``budget``.  The model is neither needed nor changed.

        Where the budget counts time, no layer becomes what was measured to be slower than the dense one.

        Args:
            budget: what the layers may cost together.
            strategy: see :func:`~structfly.restructure.restructuring.restructure_`.

        Raises:
            PlanError: the budget cannot be kept; the message says what can.
            ArgumentError: there is no such strategy, or it cannot seek the least time.
        """
        check_strategy(strategy, budget)
        totals = dense_totals(list(self.menus.values()), list(budget.limits))
        limits = {resource: limit.of(totals[resource]) for resource, limit in budget.limits.items()}
        menus = self.menus
        if budget.counts_time:
            menus = {name: without_slower(menu) for name, menu in self.menus.items()}
        allocation = STRATEGIES[strategy](menus, budget, limits)
        planned = {
            name: PlannedLayer(
                in_features=shape.sizes.in_features,
                out_features=shape.sizes.out_features,
                structure=allocation.chosen[name].structure,
                predicted_loss=allocation.chosen[name].loss,
                costs=dict(allocation.chosen[name].costs),
                dense_costs=dict(self.menus[name][0].costs),
                time_from=allocation.chosen[name].time_from,
            )
            for name, shape in self.shapes.items()
        }
        return Plan(
            layers=planned,
            left=dict(self.left),
            strategy=strategy,
            budget=budget.model_dump(exclude_none=True),
            limits=limits if budget.loss is None else {**limits, "loss": budget.loss},
            tokens=self.tokens,
            predicted_loss=sum(each.predicted_loss for each in planned.values()),
            bound=allocation.bound,
            gap=allocation.gap,
            untimed=self.untimed,
        )

    def measured(self, plan: Plan, model: nn.Module) -> Plan:
        """``plan`` with the loss on the calibration data of ``model``, to which it was applied, and of the dense model.

        Raises:
            ArgumentError: the survey was made without calibration data.
        """
        if self.loss is None or self.dense_loss is None:
            raise ArgumentError("the survey has no data to measure a loss on; give it calibration and loss_fn")
        measured = Measured(dense=self.dense_loss, structured=self.loss.of(model))
        return plan.model_copy(update={"measured": measured})
