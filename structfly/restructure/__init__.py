"""Replace a model's linear layers by the best mix of structured ones under a budget."""

from structfly.restructure.apply import apply_
from structfly.restructure.distillation import Distillation
from structfly.restructure.plan import Measured, Plan, PlannedLayer
from structfly.restructure.restructuring import restructure_
from structfly.restructure.saving import from_pretrained, save_pretrained
from structfly.restructure.surveyed import Survey
from structfly.restructure.surveying import survey

__all__ = [
    "Distillation",
    "Measured",
    "Plan",
    "PlannedLayer",
    "Survey",
    "apply_",
    "from_pretrained",
    "restructure_",
    "save_pretrained",
    "survey",
]
