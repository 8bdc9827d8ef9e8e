"""Linears whose weight is a product of two matrices, made first or multiplied by one after the other.

Either way is the same function; which is faster is a matter of sizes, and where constant masks leave zeros in the
matrices, as in generalised block low rank, only the tiles that hold others are multiplied by.  Read in this order:
``reader`` (how such a linear is written), ``zeros`` (which entries are known to be 0), ``cuts`` (their tiles, found
again when a mask changes), ``site``, ``menu``, ``rewrite``, and ``rule``, which puts them together.
"""

from structfly.patterns.factored_linear.rule import FactoredLinear

__all__ = ["FactoredLinear"]
