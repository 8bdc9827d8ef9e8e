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


@register_flop_formula(torch.ops.structfly.linear_cross_entropy_v4, get_raw=True)
def _forward_flops(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    call = Arguments(*arguments)
    return _operations(call, call.wanted_in_forward)


@register_flop_formula(torch.ops.structfly.linear_cross_entropy_backward_v4, get_raw=True)
def _backward_flops(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    call = Arguments(*arguments[-len(Arguments._fields) :])
    return _operations(call, call.wanted)


def _operations(call: Arguments, wanted: Wanted | None) -> int:
    """Operations of a pass."""
    x, adapter = call.x.shape, None if call.adapter_x is None else call.adapter_x.shape
    logits_again = wanted is not None and (call.scheme == "blocks" or call.statistics_first)
    again = products(x, adapter, call.num_classes, None) if logits_again else 0
    return products(x, adapter, call.num_classes, wanted) + again
