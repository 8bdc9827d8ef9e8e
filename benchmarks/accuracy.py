"""How far a result is from its reference."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The relative Frobenius error, in the reference's dtype."""
    difference = torch.linalg.vector_norm(value.detach().to(reference.dtype) - reference)
    return float(difference / torch.linalg.vector_norm(reference))
