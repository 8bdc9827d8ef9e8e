"""The fused ops as functions, for programs that write their own step.

They work eagerly, under autograd, autocast and ``torch.vmap``, and in what any backend of torch.compile compiles.
``cross_entropy`` and ``divergence`` hold the heads, which are what the backend writes into a graph, chosen by the same
menus and cost model: ``plan`` chooses schedule, scheme and chunk length.  ``recurrence`` holds gated recurrences.
``checks`` refuses arguments.
"""

from structfly.ops.cross_entropy import linear_cross_entropy
from structfly.ops.divergence import linear_divergence
from structfly.ops.recurrence import linear_recurrence

__all__ = ["linear_cross_entropy", "linear_divergence", "linear_recurrence"]
