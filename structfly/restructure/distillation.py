"""A model as its own teacher: what calibration differentiates and measures where there are no labels.

A divergence D(outputs, reference) is least, and its gradient 0, at the dense model's own outputs; what a change of a
weight costs is in its second derivative H.  So the gradients of sampled terms are taken, whose second moments are H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structfly.errors import ArgumentError

_KINDS = ("logits", "embeddings", "values")


@dataclass(frozen=True)
class Distillation:
    """The distance of a restructured model from the dense one, as ``loss_fn`` of ``restructure_``.

    Attributes:
        outputs: (model, batch) -> (terms, features): a row for each independent term.
        kind: "logits": the Kullback-Leibler divergence of their softmax; "embeddings": 1 - cosine; "values": half the
            squared distance.

    Raises:
        ArgumentError: ``kind`` is none of these.
    """

    outputs: Callable[[nn.Module, Any], Tensor]
    kind: Literal["logits", "embeddings", "values"]

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ArgumentError(f"kind is {self.kind!r}; allowed: {', '.join(_KINDS)}")

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Sampled terms (n,), of whose gradients g the second moments E[g g^T] are the divergence's second derivative.

        Of logits: the loss of a label drawn from their own softmax (Fisher's identity).  Of values, and of embeddings
        on the unit sphere, where 1 - cosine is half the squared distance: the product with standard normal numbers.
        """
        outputs = self._outputs(model, batch)
        if self.kind == "logits":
            labels = torch.multinomial(outputs.detach().float().softmax(-1), 1)[:, 0]
            return F.cross_entropy(outputs.float(), labels, reduction="none")
        outputs = F.normalize(outputs.float(), dim=-1) if self.kind == "embeddings" else outputs.float()
        return (outputs * torch.randn_like(outputs)).sum(-1)

    @torch.no_grad()
    def reference(self, model: nn.Module, batch: Any) -> Tensor:
        """What :meth:`distance` compares with: the dense model's outputs, on the CPU."""
        return self._outputs(model, batch).float().cpu()

    @torch.no_grad()
    def distance(self, model: nn.Module, batch: Any, reference: Tensor) -> Tensor:
        """The divergence (n,) of the outputs from ``reference``."""
        outputs = self._outputs(model, batch).float()
        reference = reference.to(outputs.device)
        if self.kind == "logits":
            given, found = reference.log_softmax(-1), outputs.log_softmax(-1)
            return (given.exp() * (given - found)).sum(-1)
        if self.kind == "embeddings":
            return 1 - F.cosine_similarity(outputs, reference, dim=-1)
        return 0.5 * (outputs - reference).square().sum(-1)

    def _outputs(self, model: nn.Module, batch: Any) -> Tensor:
        outputs = self.outputs(model, batch)
        return outputs.reshape(-1, outputs.shape[-1])
