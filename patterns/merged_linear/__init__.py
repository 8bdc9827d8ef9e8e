"""Structured layers of graphs without gradients, multiplied by as one dense weight where that was measured faster.

Few tokens, as in decoding, leave a product nothing to do but read its weight; a layer of several factors then waits for
several kernels.  Read in this order: ``site``, ``weights`` (the dense weight of a layer's factors, kept and made again
when they change), and ``rule``.
"""

from structfly.patterns.merged_linear.rule import MergedLinear

__all__ = ["MergedLinear"]
