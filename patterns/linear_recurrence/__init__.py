"""Gated recurrences over time, whose state is affine in the state before.

Read in this order: ``slices`` (one step of a tensor), ``loops`` (where tracing unrolled a loop), ``operations`` (what a
node computes), ``step_pattern`` (what a step computes), ``steps`` (proof that all compute the same), ``affine`` (its
state as a function of the one before), ``lifting`` (what it computes, for all steps at once), ``collectors`` (where the
states go), ``folding`` (what the op makes itself), ``output_gates`` (and of the states), ``joint`` (whether it takes a
tensor of all gates), ``recurrence`` (the op's call), ``site``, ``menu``, ``rewrite``,
``combining``, ``scans`` and ``scan_rewrite`` (torch's own), ``whole`` (of whole tensors), ``spans``, ``places``,
``contents``, ``tree_reader``, ``unread_trees`` and ``trees`` (scans that are written out), ``gates``, ``masks``,
``step_matrices`` and ``segment_sums`` (products with the matrix of all gates' products), and ``rule``, which puts them
together; ``cumulative`` is a rule of its own.
"""

from structfly.patterns.linear_recurrence.cumulative import CumulativeRecurrence
from structfly.patterns.linear_recurrence.rule import LinearRecurrence

__all__ = ["CumulativeRecurrence", "LinearRecurrence"]
