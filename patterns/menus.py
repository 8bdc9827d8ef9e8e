"""What a menu of settings leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch

from structfly.patterns.structure import Structure
from structfly.records.layer import LayerSizes

_Choice = TypeVar("_Choice", bound=Structure)


def worth_offering(choices: Iterable[_Choice], sizes: LayerSizes) -> list[_Choice]:
    """Those that fit a layer of these sizes with fewer parameters than its dense weight has, in order, each once."""
    return [
        each
        for each in dict.fromkeys(choices)
        if not each.why_not(sizes) and each.cost(sizes, torch.float32).parameters < sizes.parameters
    ]
