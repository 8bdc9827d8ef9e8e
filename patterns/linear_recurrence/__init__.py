"""Gated recurrences over time, whose state is affine in the state before.

Read in this order: ``slices`` (one step of a tensor), ``loops`` (where tracing unrolled a loop), ``steps`` (proof that
its steps are the same), ``affine`` (a step's state as a function of the one before), ``lifting`` (what a step computes,
for all steps at once), ``collectors`` (where the states go), ``folding`` (what the op makes itself), ``recurrence``
(the op's call), ``site``, ``menu``, ``rewrite``, ``scans`` (torch's own), ``whole`` (of whole tensors), ``doubling``,
and ``rule``, which puts them together; ``cumulative`` is a rule of its own.
"""

from structfly.patterns.linear_recurrence.cumulative import CumulativeRecurrence
from structfly.patterns.linear_recurrence.rule import LinearRecurrence

__all__ = ["CumulativeRecurrence", "LinearRecurrence"]
