"""FLOP formulas for :class:`torch.utils.flop_counter.FlopCounterMode`.

A module of its own, imported when something is compiled: torch's flop counter imports triton, which importing
structfly must not do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from structfly.lowering.head.flops import products
from structfly.lowering.head.linear import Wanted
from structfly.lowering.linear_cross_entropy import op as _op  # noqa: F401  defines the ops
from structfly.lowering.linear_cross_entropy.arguments import Arguments


@register_flop_formula(torch.ops.structfly.linear_cross_entropy_v3)
def _forward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    call = Arguments(*shapes)
    return _operations(call, call.wanted_in_forward)


@register_flop_formula(torch.ops.structfly.linear_cross_entropy_backward_v3)
def _backward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    call = Arguments(*shapes[-len(Arguments._fields) :])
    return _operations(call, call.wanted)


def _operations(call: Arguments, wanted: Wanted | None) -> int:
    """Operations of a pass; tensors among the arguments are shapes."""
    logits_again = call.scheme == "blocks" and wanted is not None
    again = products(call.x, call.adapter_x, call.num_classes, None) if logits_again else 0
    return products(call.x, call.adapter_x, call.num_classes, wanted) + again
