"""What heads have in common, whatever becomes of their logits: a linear, a pointwise chain, chunks, gradients.

Read ``reference`` (what logits are), ``linear`` (the operands and their gradients), ``epilogue`` and ``operations``
(the chain), ``chunks`` (how long, in which dtypes), ``products`` and ``gradient_sums`` (the matrix products of a
chunk), ``reduction`` (from rows to the loss and back), and how torch sees an op: ``autograd``, ``autocast``, ``vmap``,
``flops``.
"""
