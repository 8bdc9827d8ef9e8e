"""The fused ops as functions, for programs that write their own step.

They work eagerly, under autograd, autocast and ``torch.vmap``, and in what any backend of torch.compile compiles.
``cross_entropy`` and ``divergence`` hold the heads, which are what the backend writes into a graph, chosen by the same
menus and cost model: ``plan`` chooses schedule, scheme and chunk length.  ``recurrence`` and
``joint_recurrence`` hold gated recurrences.
``checks`` refuses arguments.
"""

from structfly.ops.cross_entropy import linear_cross_entropy
from structfly.ops.divergence import linear_divergence
from structfly.ops.joint_recurrence import joint_linear_recurrence
from structfly.ops.recurrence import linear_recurrence

__all__ = ["joint_linear_recurrence", "linear_cross_entropy", "linear_divergence", "linear_recurrence"]
