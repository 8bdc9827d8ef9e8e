"""The row step as a generated Triton kernel; formulas in :mod:`structfly.lowering.linear_divergence.rows`."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.head.epilogue import Epilogue
from structfly.lowering.head.row_kernels import KERNEL_DTYPES, launch_sizes
from structfly.lowering.launch import Launch, on_device
from structfly.lowering.linear_divergence.rows import RowTerms
from structfly.lowering.template import Parameter, load, render


def row_step_triton(
    logits: Tensor, teacher: Tensor, coefficient: Tensor | None, terms: RowTerms, *, gradient: bool
) -> Tensor:
    """Fulfils :class:`~structfly.lowering.linear_divergence.rows.RowStep`: one program a row.

    Raises:
        UnsupportedError: a dtype is none of float32, float16 and bfloat16.
    """
    for name, tensor in (("logits", logits), ("a teacher", teacher)):
        if tensor.dtype not in KERNEL_DTYPES:
            raise UnsupportedError(
                f"Triton rows of {name} in {tensor.dtype}; supported: {', '.join(map(str, KERNEL_DTYPES))}"
            )
    rows, classes = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return losses
    kernel = _kernel(
        terms.epilogue,
        terms.teacher_epilogue,
        kind=terms.kind,
        beta=terms.beta,
        smoothing=terms.label_smoothing,
        teacher_form=terms.teacher_form,
        bias=terms.bias is not None,
        teacher_bias=terms.teacher_bias is not None,
        coefficient=coefficient is not None,
        gradient=gradient,
        gradient_scale=terms.gradient_scale,
    )
    block, warps = launch_sizes(classes)
    nothing = losses  # a pointer the kernel does not read
    with on_device(logits.device):
        Launch(kernel, (rows,), {"CLASSES": classes, "BLOCK": block}, num_warps=warps)(
            logits,
            teacher,
            nothing if coefficient is None else coefficient.contiguous(),
            nothing if terms.bias is None else terms.bias.contiguous(),
            nothing if terms.teacher_bias is None else terms.teacher_bias.contiguous(),
            losses,
            logits.stride(0),
            teacher.stride(0),
        )
    return losses


@lru_cache(maxsize=256)
def _kernel(epilogue: Epilogue, teacher_epilogue: Epilogue, **parameters: Any) -> Any:
    return load(render("linear_divergence_rows", **kernel_parameters(epilogue, teacher_epilogue, **parameters))).rows


def kernel_parameters(epilogue: Epilogue, teacher_epilogue: Epilogue, **parameters: Any) -> dict[str, Parameter]:
    """The template's parameters."""
    jsd = parameters["kind"] == "jsd"
    return {
        **parameters,
        "steps": epilogue.source(),
        "teacher_steps": teacher_epilogue.source(),
        "log_beta": math.log(parameters["beta"]) if jsd else 0.0,
        "log_rest": math.log1p(-parameters["beta"]) if jsd else 0.0,
    }
