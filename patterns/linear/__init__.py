"""Linear layers in graphs without gradients, under a budget or a plan.

Read in this order: ``candidates`` (what one weight may become), ``heads`` (what is left dense by default), ``site``
with ``reads`` (which linears of a graph share a weight, and which weights may be replaced), ``menu``, ``projection``
(the factors of a weight, kept and made again when it changes), ``rewrite``, and ``rule``, which puts them together.
"""

from structfly.patterns.linear.rule import RestructuredLinear

__all__ = ["RestructuredLinear"]
