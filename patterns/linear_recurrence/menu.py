"""The candidates: the loop as it is, or the op.

Left alone, a loop runs in kernels into which Inductor fuses at most ``max_fusion_size`` operations, one after another.
What moves is counted in numbers: the gate, the input and the output of a step in the forward, and in the backward gate,
state and gradients of output, gate and input.
"""

from __future__ import annotations

import sympy

from structfly.patterns.linear_recurrence.expressions import Operation
from structfly.patterns.linear_recurrence.site import LoopSite
from structfly.records import Candidate, Cost, DeviceProfile, Menu, Stage
from structfly.rewriter.calls import read

_FORWARD, _BACKWARD = 3, 5
_FUSED = 64  # torch._inductor.config.max_fusion_size


def loop_menu(site: LoopSite, profile: DeviceProfile) -> Menu:
    """Costs of leaving the loop alone and of the op."""
    steps = len(site.loop.states)
    item = site.dtype.itemsize
    moved = site.numbers * steps * item
    passes = [_FORWARD, _BACKWARD] if site.gradient else [_FORWARD]
    operations = sum(not _is_view(node) for node in site.loop.nodes)
    kernels = -(-operations // _FUSED)
    kept = [Stage(0, count * moved / kernels, kernels) for count in passes]
    fused = [Stage(0, count * moved) for count in passes]
    made = sum(isinstance(each, Operation) for each in (site.step.gate, site.step.input))
    fused += [Stage(0, 2 * made * moved) for _ in passes if made]
    return Menu(
        (
            Candidate("left alone", Cost(tuple(kept)), rewrites=False),
            Candidate("one op, parallel over time", Cost(tuple(fused), opaque_calls=len(passes))),
        ),
        peak_limit=profile.workspace_cap,
    )


def _is_view(node: object) -> bool:
    call = read(node)
    return call is not None and call.op in ("getitem", "select", "narrow")


def numbers_of(sizes: list[sympy.Expr]) -> sympy.Expr:
    """How many numbers a tensor of these sizes has."""
    return sympy.prod(sizes) if sizes else sympy.Integer(1)
