"""The language-model head: a linear whose logits only feed a cross-entropy.

Read in this order: ``loss`` (which nodes are losses), ``logits`` (from a loss back to its linear), ``chain`` (pointwise
operations on the way), ``pieces`` (logits split over several losses), ``weighted_sum`` (per-token losses summed with
weights), ``site``, ``menu``, ``rewrite``, and ``rule``, which puts them together.
"""

from structfly.patterns.linear_cross_entropy.rule import LinearCrossEntropy

__all__ = ["LinearCrossEntropy"]
