"""The head's matrix products over the class dimension.

cuBLAS is several times slower, and sums less exactly, where a leading or inner dimension is no multiple of eight
elements, as with GPT-2's 50257 classes.  On CUDA devices the classes past the last multiple of 64 therefore make a
product of their own; the logits buffer's rows are aligned anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNED = 64
# Rows of the output at a time where a CPU product has to upcast its operands.
_UPCAST_ROWS = 2048


def make_logits(logits: Tensor, x: Tensor, weight: Tensor, *, add: bool = False, alpha: float = 1.0) -> None:
    """``logits (R, C) = alpha x (R, H) weight^T (H, C)``, or ``+=`` with ``add``."""
    for part in _class_parts(logits):
        _multiply(logits[:, part], x, weight[part].t(), float(add), alpha)


def from_classes(out: Tensor, dz: Tensor, weight: Tensor, alpha: float) -> None:
    """``out (R, H) = alpha dz (R, C) weight (C, H)``."""
    for number, part in enumerate(_class_parts(dz)):
        _multiply(out, dz[:, part], weight[part], float(number > 0), alpha)


def to_classes(total: Tensor, dz: Tensor, x: Tensor, alpha: float, *, add: bool) -> None:
    """``total (C, H) = alpha dz^T (C, R) x (R, H)``, or ``+=`` with ``add``; summed in ``total``'s dtype."""
    for part in _class_parts(dz):
        _multiply(total[part], dz[:, part].t(), x, float(add), alpha)


def _class_parts(classes_last: Tensor) -> tuple[slice, ...]:
    """The unaligned rest first: its small contribution to a sum over classes is the one that is rounded twice."""
    classes = classes_last.shape[1]
    aligned = classes - classes % _ALIGNED
    if not classes_last.is_cuda or classes % 8 == 0 or aligned == 0:
        return (slice(0, classes),)
    return (slice(aligned, classes), slice(0, aligned))


def _multiply(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    """``out = beta out + alpha a b``, summed in float32 where ``out`` is float32 and the operands are not."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=beta, alpha=alpha)
    elif out.is_cuda:
        torch.addmm(out, a, b, out.dtype, beta=beta, alpha=alpha, out=out)
    else:  # no mixed product on CPUs
        b = b.to(out.dtype)
        for start in range(0, out.shape[0], _UPCAST_ROWS):
            part = slice(start, start + _UPCAST_ROWS)
            out[part].addmm_(a[part].to(out.dtype), b, beta=beta, alpha=alpha)
