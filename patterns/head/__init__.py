"""What the rules for heads have in common: from the logits down to their linear, and from rows up to a scalar.

Read ``path`` (the way from a linear to what reads its logits), ``logits`` and ``trail`` (how it is found and read),
``chain`` (the pointwise operations on it), ``gradients``, ``weighted_sum`` (from rows to a scalar), ``checks`` (what no
op takes), ``site``, ``menu`` (sizes and costs), and ``operands`` (how a rewrite hands them to an op).
"""
