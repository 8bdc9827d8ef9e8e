"""The language-model head: a linear whose logits only feed cross-entropies and other statistics of their rows.

Read in this order: ``loss`` (which nodes are losses), ``consumers`` with ``class_values`` (which are other statistics),
``pieces`` (logits split over several losses), ``same_rows`` (several consumers of the same rows), ``row_loss`` with
``row_axes`` (statistics that end in a scalar, row by row or group by group) and ``row_reader``, which reads it with
``row_root``, ``row_consumers``, ``row_pointwise``, ``row_sums`` and ``picks``, ``site``, ``menu``, ``rewrite`` with
``row_operands`` and ``mean``, ``directions`` (consumers of rows and of columns), and ``rule``, which puts them
together.  From a consumer back to its linear, and from rows up to a scalar, the reading is that of
:mod:`structfly.patterns.head`.
"""

from structfly.patterns.linear_cross_entropy.rule import LinearCrossEntropy

__all__ = ["LinearCrossEntropy"]
