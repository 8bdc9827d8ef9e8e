"""Linears whose weight is multiplied by a constant mask of blocks: products with the blocks that are kept.

Read in this order: ``masks`` (how a masked weight is written), ``site``, ``menu``, ``layouts`` (where the kept blocks
stand, found again when a mask changes), ``rewrite``, and ``rule``, which puts them together.
"""

from structfly.patterns.masked_linear.rule import MaskedLinear

__all__ = ["MaskedLinear"]
