"""structfly: a torch.compile backend for linear-heavy models.

>>> step = torch.compile(step, backend="structfly")   # no import of structfly needed
>>> print(structfly.explain(step)(*batch))            # what was rewritten, what was not, and why
"""

from structfly import nn, ops
from structfly.calibration import TuningReport, tune
from structfly.config import Config
from structfly.config.budget import Budget
from structfly.errors import ArgumentError, ConfigError, PlanError, RewriteError, StructflyError, UnsupportedError
from structfly.explanation import explain
from structfly.layer_times.calibrating import LayerTimesReport, time_layers
from structfly.patterns.linear.projection import refresh
from structfly.patterns.structure import Structure, StructuredLinear
from structfly.records import Report, SiteReport
from structfly.restructure import (
    Distillation,
    Plan,
    Survey,
    apply_,
    from_pretrained,
    restructure_,
    save_pretrained,
    survey,
)
from structfly.version import __version__

__all__ = [
    "ArgumentError",
    "Budget",
    "Config",
    "ConfigError",
    "Distillation",
    "LayerTimesReport",
    "Plan",
    "PlanError",
    "Report",
    "RewriteError",
    "SiteReport",
    "StructflyError",
    "Structure",
    "StructuredLinear",
    "Survey",
    "TuningReport",
    "UnsupportedError",
    "__version__",
    "apply_",
    "explain",
    "from_pretrained",
    "nn",
    "ops",
    "refresh",
    "restructure_",
    "save_pretrained",
    "survey",
    "time_layers",
    "tune",
]
