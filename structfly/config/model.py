"""The configuration: pydantic models, strict and frozen, and the settings that hold at one site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetPydanticSchema, model_validator
from pydantic_core import CoreSchema, core_schema

from structfly import compat
from structfly.config.budget import Limits
from structfly.config.fields import (
    ByteCount,
    InductorTable,
    Mode,
    PlanOrPath,
    Rewrite,
    RuleSwitches,
    Seconds,
    Structures,
    as_dict,
    copied,
    read_only,
)

OFF_UNLESS_NAMED = ("cumulative_recurrence",)
"""Rules whose rewrites may have other values than eager where those are inf or nan."""


@dataclass(frozen=True)
class SiteSettings:
    """What holds at one site, after overrides.

    Attributes:
        rewrite: "auto" or "always".
        loss_memory: the limit in bytes, or None where the site's rule chooses.
        structures: names of the structures that a layer may take, or None for those offered by default.
        overridden: names of the above that an override sets here.
        disabled_rules: names of the rules that are switched off.
    """

    rewrite: Rewrite = "auto"
    loss_memory: int | None = None
    structures: tuple[str, ...] | None = None
    overridden: frozenset[str] = frozenset()
    disabled_rules: frozenset[str] = frozenset()

    def rule_enabled(self, rule: str) -> bool:
        """Whether the rule may act at this site."""
        return rule not in self.disabled_rules


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _from_any_mapping(cls, value: object) -> object:
        return as_dict(value)


class Budget(Limits, _Table):
    """What the rewrites may use; the limits other than ``loss_memory`` are of a graph's linear layers, which are
    restructured only where one is set."""

    loss_memory: ByteCount = None
    """Bytes a loss head may take for logits at a time, an int or as in "512MiB"; None: chosen per site."""


class Override(_Table):
    """Settings of the modules that match one pattern; a key that is left out changes nothing."""

    loss_memory: ByteCount = None
    """Replaces ``budget.loss_memory``."""

    rewrite: Rewrite = "auto"
    """Replaces ``rewrite``."""

    rules: RuleSwitches = Field(default_factory=lambda: read_only({}))
    """Replaces the switches it names in ``rules``."""

    structures: Structures = None
    """Replaces ``structures``; an empty list leaves the layer dense."""

    def __eq__(self, other: object) -> bool:
        # A key that repeats a default is not the same as a key left out.
        return isinstance(other, Override) and self.model_fields_set == other.model_fields_set and super().__eq__(other)


def _pairs_schema(_: object, handler: GetCoreSchemaHandler) -> CoreSchema:
    # A tuple of pairs, because the order of overrides counts and dicts that differ in order are equal.
    return core_schema.no_info_before_validator_function(
        as_dict,
        core_schema.no_info_after_validator_function(
            lambda table: tuple(table.items()), handler.generate_schema(dict[str, Override])
        ),
        serialization=core_schema.plain_serializer_function_ser_schema(
            lambda pairs: [(pattern, override.model_dump(exclude_unset=True)) for pattern, override in pairs]
        ),
    )


class Config(_Table):
    """structfly's configuration, as ``load_config`` makes it."""

    budget: Budget = Budget()
    """What the rewrites may use."""

    plan: PlanOrPath = None
    """A plan, or the path of one: its layers become what it says, instead of what a budget of layers would choose."""

    structures: Structures = None
    """Names of the structures that layers may take under a budget; None: those that are offered by default."""

    timing_seconds: Seconds = 10.0
    """How long layers may be timed on their device, for each graph, where a budget counts time."""

    rules: RuleSwitches = Field(default_factory=lambda: read_only({}))
    """Switches rules on or off by name; a rule that is not named is on, but for those in ``OFF_UNLESS_NAMED``."""

    rewrite: Rewrite = "auto"
    """Where a rewrite is predicted to be slower, "auto" leaves the site as it is, "always" rewrites."""

    strict: bool = False
    """Whether a rule's internal failure is raised; otherwise it is reported and the site stays as it is."""

    mode: Mode = None
    """A mode of torch.compile, e.g. "max-autotune": stands for the Inductor options that torch gives it."""

    inductor: InductorTable = Field(default_factory=lambda: read_only({}))
    """Inductor's own options by full name, as in ``torch.compile(options=...)``; they win over ``mode``."""

    overrides: Annotated[tuple[tuple[str, Override], ...], GetPydanticSchema(_pairs_schema)] = ()
    """Pairs of a glob pattern of qualified module names and the settings there, in order of application."""

    def for_site(self, name: str) -> SiteSettings:
        """The settings at the module of this name; of the overrides that match, the last wins per key."""
        settings: dict[str, Any] = {
            "rewrite": self.rewrite,
            "loss_memory": self.budget.loss_memory,
            "structures": self.structures,
        }
        rules, overridden = {**dict.fromkeys(OFF_UNLESS_NAMED, False), **self.rules}, set()
        for pattern, override in self.overrides:
            if fnmatchcase(name, pattern):
                here = settings.keys() & override.model_fields_set
                settings |= {key: getattr(override, key) for key in here}
                overridden |= here
                rules |= override.rules
        return SiteSettings(
            **settings,
            overridden=frozenset(overridden),
            disabled_rules=frozenset(rule for rule, on in rules.items() if not on),
        )

    @property
    def restructures(self) -> bool:
        """Whether layers are to be restructured: there is a budget of layers, or a plan."""
        return self.budget.limits_layers or self.plan is not None

    def unmatched_overrides(self, names: Iterable[str]) -> list[str]:
        """The patterns that match none of the names: probably misspelt."""
        names = list(names)
        return [pattern for pattern, _ in self.overrides if not any(fnmatchcase(name, pattern) for name in names)]

    def inductor_options(self) -> dict[str, object]:
        """The options for ``torch._inductor.compile``: ``mode`` spelt out, with ``inductor`` over it."""
        of_mode: Mapping[str, object] = compat.inductor_modes()[self.mode] if self.mode else {}
        return {**of_mode, **{name: copied(value) for name, value in self.inductor.items()}}


def merged(below: Config, above: Config) -> Config:
    """One configuration from two: ``above`` wins, table by table, and its overrides are applied last."""
    update: dict[str, object] = {name: getattr(above, name) for name in above.model_fields_set}
    if "budget" in update:
        budget = {name: getattr(above.budget, name) for name in above.budget.model_fields_set}
        update["budget"] = below.budget.model_copy(update=budget)
    update["rules"] = read_only({**below.rules, **above.rules})
    update["inductor"] = read_only({**below.inductor, **above.inductor})
    update["overrides"] = below.overrides + above.overrides
    return below.model_copy(update=update)
