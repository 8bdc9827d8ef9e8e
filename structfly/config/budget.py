"""What structured layers may cost: a limit, a ratio of the dense layers' cost or an amount, for each resource."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError, model_validator

from structfly.config.fields import parse_bytes, wrong_value
from structfly.errors import ConfigError


class Limit(NamedTuple):
    """At most ``ratio`` of what the dense layers cost, or at most ``amount``; the other is None."""

    ratio: float | None = None
    amount: float | None = None

    def of(self, dense: float) -> float:
        """The limit in the resource's own unit, where the dense layers cost ``dense``."""
        return self.ratio * dense if self.ratio is not None else float(self.amount or 0.0)

    def __str__(self) -> str:
        return f"{self.ratio:.4g} of dense" if self.ratio is not None else f"{self.amount:.6g}"


_SECONDS = {"s": Fraction(1), "ms": Fraction(1, 1000), "us": Fraction(1, 10**6)}
_DURATION = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?) ?(s|ms|us)", re.ASCII)
_RATIO = "a ratio of the dense layers' as a float above 0"


def _limit(value: object, amount: Callable[[object], float | None]) -> Limit | None:
    """None, a ratio, or what ``amount`` reads the value as."""
    if value is None or isinstance(value, Limit):
        return value
    if isinstance(value, float) and 0.0 < value < math.inf:
        return Limit(ratio=value)
    return Limit(amount=amount(value))


def _count(value: object) -> float:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise wrong_value(f"{_RATIO}, such as 0.5, a whole number above 0, or None")


def _duration(value: object) -> float:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is not None and (count := Fraction(match[1])) > 0:
        return float(count * _SECONDS[match[2]])
    raise wrong_value(f"{_RATIO}, a string such as '2.5ms' (s, ms, us), or None")


def _parse_loss(value: object) -> float | None:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf):
        return None if value is None else float(value)
    raise wrong_value("a number of at least 0, or None")


def _plain(limit: Limit | None) -> Any:
    return None if limit is None else (limit.ratio if limit.ratio is not None else limit.amount)


def _plain_duration(limit: Limit | None) -> Any:
    return _plain(limit) if limit is None or limit.amount is None else f"{limit.amount * 1e6:.3f}us"


Count = Annotated[Limit | None, PlainValidator(partial(_limit, amount=_count)), PlainSerializer(_plain)]
Size = Annotated[Limit | None, PlainValidator(partial(_limit, amount=parse_bytes)), PlainSerializer(_plain)]
Duration = Annotated[Limit | None, PlainValidator(partial(_limit, amount=_duration)), PlainSerializer(_plain_duration)]
Loss = Annotated[float | None, PlainValidator(_parse_loss)]


def _problem(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return f"Budget: {error['loc'][0]} is unknown; allowed: {', '.join(Budget.model_fields)}"
    where = f"{error['loc'][0]} is {error['input']!r}; " if error["loc"] else ""
    return f"Budget: {where}{error['msg']}"


class Limits(BaseModel):
    """What layers may cost together; a resource that is left out has no limit.

    A float is a ratio of what they cost while they are dense, any other value an amount.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    params: Count = None
    """Learned numbers, biases left out: 0.5, or 12_000_000."""

    flops: Count = None
    """Floating-point operations; a multiply-add counts two."""

    weight_bytes: Size = None
    """Bytes of the weights: 0.5, or "16MiB"."""

    activation_bytes: Size = None
    """Peak of activation memory: what all layers keep for backward, and the most that one takes besides."""

    time: Duration = None
    """Time, predicted and corrected by measured layers: 0.5, or "2.5ms"."""

    loss: Loss = None
    """How much the predicted loss may rise; then the least time within the other limits is sought."""

    @property
    def limits(self) -> dict[str, Limit]:
        """The limits that are set, by resource, but for ``loss``."""
        return {name: value for name, value in self if isinstance(value, Limit)}

    @property
    def limits_layers(self) -> bool:
        """Whether there is any limit."""
        return bool(self.limits) or self.loss is not None

    @property
    def counts_time(self) -> bool:
        """Whether the layers' time decides what they become: it has a limit, or the least is sought."""
        return self.time is not None or self.loss is not None


class Budget(Limits):
    """What the layers that may be restructured may cost together, with one limit at least.

    Time, FLOPs and memory are those of a forward pass over as many tokens as a calibration batch has.  With ``loss``
    the least time is sought, otherwise the least loss.

    Raises:
        ConfigError: a limit is unknown, of the wrong type or out of range, or there is none.
    """

    def __init__(self, **limits: Any) -> None:
        try:
            super().__init__(**limits)
        except ValidationError as error:
            raise ConfigError("; ".join(map(_problem, error.errors()))) from None

    @model_validator(mode="after")
    def _has_a_limit(self) -> Budget:
        if not self.limits_layers:
            raise wrong_value(f"at least one limit of {', '.join(type(self).model_fields)}")
        return self
