"""Fused linear -> cross-entropy: the op, its reference, and its chunked lowering for CPUs and CUDA devices.

Read ``reference`` (what it computes), ``arguments`` (how it is called), ``op`` (how torch sees it), ``kernels`` and
``chunked`` (what runs), ``rows`` (the step between two matrix products) and its lowerings ``rows_aten`` and
``rows_triton``; then ``exponentials``, the other scheme.  What it shares with other heads is in ``lowering.head``.
"""
