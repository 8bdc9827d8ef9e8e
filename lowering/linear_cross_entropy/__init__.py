"""Fused linear -> cross-entropy, and statistics of its rows: the op, its reference, its lowering for CPUs and CUDA.

Read ``reference`` (what it computes), ``arguments`` (how it is called), ``op`` (how torch sees it), ``checks``,
``kernels`` and ``chunked`` (what runs), ``rows`` (the step between two matrix products) with its lowerings
``rows_aten`` and ``rows_triton``, and ``row_program`` (losses of single rows that the user wrote); then
``exponentials``, the other scheme.  What it shares with other heads is in ``lowering.head``.
"""
