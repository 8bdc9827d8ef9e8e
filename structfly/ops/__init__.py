"""The fused heads as functions, for programs that write their own step.

They are what the backend writes into a graph, chosen by the same menus and cost model, and work eagerly, under
autograd, autocast and ``torch.vmap``, and in what any backend of torch.compile compiles.  ``cross_entropy`` and
``divergence`` hold the functions, ``plan`` chooses schedule, scheme and chunk length, ``checks`` refuses arguments.
"""

from structfly.ops.cross_entropy import linear_cross_entropy
from structfly.ops.divergence import linear_divergence

__all__ = ["linear_cross_entropy", "linear_divergence"]
