"""Fused linear -> divergence from a teacher: the op, its reference, and its chunked lowering for CPUs and CUDA devices.

Read ``reference`` (what it computes), ``rows`` (the formulas, derived), ``arguments`` (how it is called), ``op`` (how
torch sees it), ``kernels`` and ``chunked`` (what runs), and the row step's lowerings ``rows_aten`` and ``rows_triton``.
"""
