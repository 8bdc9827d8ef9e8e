"""Every exception structfly raises on purpose.

A message says what was wrong, the value seen, what is allowed, and the remedy.
"""


class StructflyError(Exception):
    """Base class of all errors raised by structfly."""


class ConfigError(StructflyError, ValueError):
    """A configuration value is unknown, of the wrong type, or out of range; raised before anything is compiled."""


class RewriteError(StructflyError, RuntimeError):
    """A rule failed inside while ``strict`` was set; without ``strict`` the failure is a line of the report."""


class UnsupportedError(StructflyError, RuntimeError):
    """An operation that structfly refuses rather than answer wrongly (differentiating twice, a missing device)."""


class ArgumentError(StructflyError, ValueError):
    """An argument of a function of structfly.ops has a wrong shape, dtype, device or value."""


class PlanError(StructflyError, ValueError):
    """A plan cannot be read or does not fit the model, or no plan keeps the budget."""
