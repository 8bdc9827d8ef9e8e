"""Soft targets and distillation: a linear whose logits only feed a divergence from a teacher.

Read in this order: ``readings`` (the algebra that spellings are read into), ``reader`` (every node's reading),
``kinds`` (which divergence a reading is), ``teacher`` (its side), ``site``, ``menu``, ``rewrite``, and ``rule``, which
puts them together.  From the logits down to the linear, and from rows up to a scalar, the reading is that of
:mod:`structfly.patterns.head`.
"""

from structfly.patterns.linear_divergence.rule import LinearDivergence

__all__ = ["LinearDivergence"]
