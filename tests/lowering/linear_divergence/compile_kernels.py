"""Compile the generated kernel for Hopper, without a GPU: run by test_kernels.py in a process of its own.

The interpreter accepts code that the compiler refuses, and the compiler needs functions that are not interpreted.
"""

from __future__ import annotations

import itertools

from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.linear_divergence.rows import KINDS, TEACHER_FORMS
from structfly.lowering.linear_divergence.rows_triton import kernel_parameters
from structfly.lowering.template import load, render
from tests.lowering.linear_cross_entropy.compile_kernels import compile_one

CHAINS = ("clamp_max:3.0,add:0.5,sigmoid,mul:5.0", "div:3.0,tanh,mul:3.0", "")


def rows() -> None:
    """Every kind with every form of teacher; the other options take turns."""
    for number, (kind, form) in enumerate(itertools.product(KINDS, TEACHER_FORMS)):
        parameters = kernel_parameters(
            parse_epilogue(CHAINS[number % 3]),
            parse_epilogue(CHAINS[number // 2 % 3] if form == "logits" else ""),
            kind=kind,
            beta=0.3,
            smoothing=0.1 if kind == "cross_entropy" and number % 2 else 0.0,
            teacher_form=form,
            bias=bool(number % 2),
            teacher_bias=form == "logits" and bool(number % 2),
            coefficient=bool(number // 2 % 2),
            gradient=number % 5 > 0,
            gradient_scale=64.0 if number % 3 == 0 else 1.0,
        )
        pointers = {"c_ptr": "*fp32", "b_ptr": "*bf16", "a_ptr": "*bf16", "l_ptr": "*fp32"}
        types = {
            "z_ptr": ("*bf16", "*fp16", "*fp32")[number % 3],
            "t_ptr": ("*fp32", "*bf16")[number % 2],
            **pointers,
            "z_stride": "i32",
            "t_stride": "i32",
        }
        function = load(render("linear_divergence_rows", **parameters)).rows
        compile_one(function, types, {"CLASSES": 50257, "BLOCK": 4096}, warps=16)


if __name__ == "__main__":
    rows()
    print("compiled")
