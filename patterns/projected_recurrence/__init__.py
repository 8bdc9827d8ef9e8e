"""Gated recurrences of what a linear makes, in graphs without gradients: linear and recurrence become one op.

Read in this order: ``recurrences`` (the calls of the recurrence's ops), ``projections`` (the linear that makes all that
one of them takes), ``windows`` (of several steps, which that takes), ``site``, ``menu``, and ``rule``.
"""

from structfly.patterns.projected_recurrence.rule import ProjectedRecurrence

__all__ = ["ProjectedRecurrence"]
