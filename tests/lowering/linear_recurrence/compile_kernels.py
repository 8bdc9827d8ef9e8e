"""Compile every kind of generated kernel for Hopper, without a GPU: run by test_kernels.py in a process of its own.

The interpreter accepts code that the compiler refuses, and the compiler needs functions that are not interpreted.
"""

from __future__ import annotations

import itertools
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from structfly.lowering.linear_recurrence.recurrence_triton import SHAPE, kernels

SEQUENCES = ("gate", "input", "input_gate", "output_gate", "upstream")


def strided(names: tuple[str, ...], kind: str) -> dict[str, str]:
    """The types of tensors with their three strides."""
    types = {}
    for name in names:
        types[name] = "*u8" if name == "reset" else kind
        types.update({f"{name}_{axis}": "i32" for axis in "btd"})
    return types


def end(name: str, given: tuple[str, ...]) -> dict[str, str]:
    """The types of a state at an end of the sequences."""
    return {name: "*fp32", f"{name}_b": "i32", f"{name}_d": "i32"} if name in given else {}


def compile_one(function: Any, types: dict[str, str]) -> None:
    source = ASTSource(function, {**types, "BLOCK": "constexpr"}, constexprs={"BLOCK": SHAPE.block})
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": SHAPE.warps})


def compile_all(given: tuple[str, ...], kind: str, *, packed: bool, **options: bool) -> None:
    """The four kernels of a call."""
    gradients = tuple(f"grad_{name}" for name in SEQUENCES[:4] if name in given)
    module = kernels(given=given, gradients=gradients, adjoint=True, packed=packed, rounded=(), shape=SHAPE, **options)

    def chosen(*names: str) -> dict[str, str]:
        return strided(tuple(name for name in names if name in given), kind)

    inputs = ("gate", "input", "input_gate", "reset")
    sizes = {**({"table": "*i64"} if packed else {}), "chunks": "i32", "length": "i32", "width": "i32"}
    summary = {"product": "*fp32", "local": "*fp32", "broken": "*u8", **sizes}
    compile_one(module.summarize, {**chosen(*inputs), **summary})
    compile_one(module.summarize_adjoint, {**chosen("gate", "output_gate", "upstream", "reset"), **summary})
    states, initial = {"states": "*fp32"}, end("initial", given)
    output = strided(("output",), kind)
    compile_one(module.replay, {**chosen(*inputs, "output_gate"), **output, **states, **initial, **sizes})
    ends = {**states, **initial, "adjoints": "*fp32", **end("ending", given)}
    made = strided(gradients, kind)
    compile_one(module.differentiate, {**chosen(*SEQUENCES, "reset"), **made, **ends, **sizes})


if __name__ == "__main__":
    for number, (sigmoid, tanh) in enumerate(itertools.product((False, True), repeat=2)):
        kind = ("*fp32", "*bf16", "*fp16", "*bf16")[number]
        for weight, more in (("none", False), ("complement", True), ("gate", True)):
            given = ["gate", "input"]
            given += ["input_gate"] if weight == "gate" else []
            given += ["output_gate"] if more else []
            given += ["upstream"] if not (sigmoid and not more) else []
            given += ["reset", "initial", "ending"] if more == tanh else []
            options = {"complement": weight == "complement", "sigmoid": sigmoid, "tanh": tanh, "reverse": tanh}
            compile_all(tuple(given), kind, packed=more, **options)
    print("compiled")
