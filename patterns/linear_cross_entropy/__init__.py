"""The language-model head: a linear whose logits only feed a cross-entropy.

Read in this order: ``loss`` (which nodes are losses), ``pieces`` (logits split over several losses), ``site``,
``menu``, ``rewrite``, ``directions`` (losses over rows and columns), and ``rule``, which puts them together.  From a
loss back to its linear, and from rows up to a scalar, the reading is that of :mod:`structfly.patterns.head`.
"""

from structfly.patterns.linear_cross_entropy.rule import LinearCrossEntropy

__all__ = ["LinearCrossEntropy"]
