"""Compile every kind of generated row kernel for Hopper, without a GPU: run by test_rows.py in a process of its own.

The interpreter accepts code that the compiler refuses, and the compiler needs functions that are not interpreted.
"""

from __future__ import annotations

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from structfly.lowering.template import load, render

POINTERS = {"t_ptr": "*i64", "m_ptr": "*u8", **{f"{name}_ptr": "*fp32" for name in "cbwsl"}}


def main() -> None:
    """Every combination of options, with both kinds of epilogue."""
    flags = itertools.product((False, True), repeat=5)
    for number, (bias, mask, class_weight, coefficient, gradient) in enumerate(flags):
        generated = render(
            "linear_cross_entropy_rows",
            steps=() if number % 2 else (("div", 3.0), ("tanh", 1.0), ("mul", 3.0)),
            bias=bias,
            mask=mask,
            class_weight=class_weight,
            coefficient=coefficient,
            smoothing=0.1 if number % 3 == 0 else 0.0,
            ignore_index=-100 if number % 5 else None,
            gradient=gradient,
            gradient_scale=2048.0 if number % 7 == 0 else 1.0,
        )
        kind = ("*bf16", "*fp16", "*fp32")[number % 3]
        source = ASTSource(
            load(generated).rows,
            {"z_ptr": kind, **POINTERS, "z_stride": "i32"},
            constexprs={"CLASSES": 50257, "BLOCK": 4096},
        )
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
    print("compiled")


if __name__ == "__main__":
    main()
