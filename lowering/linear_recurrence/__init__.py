"""Gated linear recurrences ``c_t = f_t c_{t-1} + b_t``: the op, its reference, its lowering for CPUs and CUDA.

Read ``reference`` (what it computes), ``arguments`` (how it is called), ``op`` (how torch sees it, and its gradient),
then ``recurrence_aten`` and ``recurrence_triton`` (what runs).  Then there are recurrences of what a linear map makes:
``projected`` (the kernel that makes both), ``projected_steps`` (what is left to other kernels) and ``projected_op``.
"""
