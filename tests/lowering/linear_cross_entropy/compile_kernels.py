"""Compile every kind of generated kernel for Hopper, without a GPU: run by test_kernels.py in a process of its own.

The interpreter accepts code that the compiler refuses, and the compiler needs functions that are not interpreted.
"""

from __future__ import annotations

import itertools
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from structfly.lowering.gemm import HOPPER
from structfly.lowering.template import Parameter, load, render

SHARED_MEMORY = 227 * 1024  # of a multiprocessor, for one program
STEPS = (("div", 3.0), ("tanh", 1.0), ("mul", 3.0))


def compile_one(function: Any, types: dict[str, str], constants: dict[str, int], warps: int, stages: int = 3) -> None:
    """Compile one kernel and check that it fits a multiprocessor."""
    source = ASTSource(function, types, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    assert made.metadata.shared <= SHARED_MEMORY, f"{function}: {made.metadata.shared} bytes of shared memory"


def rows_of_logits() -> None:
    """Every combination of options, with both kinds of epilogue."""
    pointers = {"t_ptr": "*i64", "m_ptr": "*u8", **{f"{name}_ptr": "*fp32" for name in "cbwsl"}}
    flags = itertools.product((False, True), repeat=5)
    for number, (bias, mask, class_weight, coefficient, gradient) in enumerate(flags):
        generated = render(
            "linear_cross_entropy_rows",
            steps=() if number % 2 else STEPS,
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
        types = {"z_ptr": kind, **pointers, "z_stride": "i32"}
        compile_one(load(generated).rows, types, {"CLASSES": 50257, "BLOCK": 4096}, warps=16)


def product(template: str, a_transposed: bool, b_transposed: bool, own: dict[str, str], **own_parameters: Any) -> None:
    """One product of the shipped tiles; ``own`` are the types of the template's arguments."""
    tiles, split = HOPPER, bool(own_parameters.pop("split", False))
    layout: dict[str, Parameter] = {
        "name": template,
        "a_transposed": a_transposed,
        "b_transposed": b_transposed,
        "split": split,
        "parts": tiles.parts,
        "interpreted": False,
    }
    a, b = (tiles.m, tiles.k), (tiles.k, tiles.n)
    types = {
        "a": blocks("bf16", *(a[::-1] if a_transposed else a)),
        "b": blocks("bf16", *(b[::-1] if b_transposed else b)),
        **own,
        **dict.fromkeys("MNK", "i32"),
    }
    constants = {"BM": tiles.m, "BN": tiles.n, "BK": tiles.k, "GROUP": tiles.group, "SPLIT": 1 + split, "PROGRAMS": 132}
    kernel = getattr(load(render(template, **layout, **own_parameters)), template)
    compile_one(kernel, types, constants, tiles.warps, tiles.stages)


def blocks(kind: str, rows: int, columns: int) -> str:
    """The type of a tensor descriptor."""
    return f"tensordesc<{kind}[{rows},{columns}]>"


def products() -> None:
    """Each product in each layout that a head can have."""
    window = {"live": "*i32", "start": "i32"}
    part = (HOPPER.m, HOPPER.n // HOPPER.parts)
    for b_transposed, largest, gradient, steps in itertools.product(
        (False, True), (False, True), (False, True), ((), STEPS)
    ):
        own = {
            **window,
            "overflowed": "*i32",
            "reference": "*fp32",
            "tile_values": "*fp32",
            "tiles_stride": "i32",
            "exps": blocks("bf16", HOPPER.m, HOPPER.n) if gradient else "*fp32",
            "bias": "*bf16",
            "mask": "*u8",
        }
        chain = {"steps": steps, "nonlinear": bool(steps), "has_bias": bool(steps), "has_mask": not steps}
        flags = {"largest": largest, "gradient": gradient}
        product("linear_cross_entropy_exponentials", False, b_transposed, own, **flags, **chain)
    for b_transposed, split in itertools.product((False, True), repeat=2):
        own = {**window, "c": blocks("fp32", *part)}
        product("linear_cross_entropy_hidden", False, b_transposed, own, split=split)
    for first, single, uniform in (
        (True, True, True),
        (True, False, True),
        (True, False, False),
        (False, False, False),
    ):
        own = {**window, "high": blocks("u16", *part), "low": blocks("u16" if single else "u8", *part)}
        own |= {"along_m": "*fp32", "along_n": "*fp32"} if uniform else {}
        product("linear_cross_entropy_weight", True, False, own, first=first, single=single, uniform=uniform)


def rows_of_exponentials() -> None:
    """The row kernels, with all options and with none."""
    window = {"index": "*i64", "live": "*i32", "start": "i32"}
    hidden = {"HIDDEN": 2048, "BLOCK": 1024}
    for capped, smoothed in ((False, False), (True, False), (False, True)):
        options: dict[str, Parameter] = dict.fromkeys(
            ("has_bias", "has_mask", "gradient", "class_weight", "coefficient", "clear"), capped or smoothed
        )
        module = load(
            render(
                "linear_cross_entropy_exponential_rows",
                steps=STEPS if capped else (),
                nonlinear=capped,
                constant_slope=1.0,
                smoothing=0.1 * smoothed,
                share=1e-6 * smoothed,
                interpreted=False,
                **options,
            )
        )
        types = {"x": "*bf16", "x_stride": "i32", "weight": "*bf16", "class_stride": "i32", "hidden_stride": "i32"}
        types |= {"bias": "*bf16", "mask": "*u8", **floats("weighted_classes", "weighted_bias"), "target": "*i64"}
        types |= {**window, "x_chunk": "*bf16", **floats("u_target", "slope_target", "u_sum", "reference")}
        compile_one(module.gather, types, {"CLASSES": 50257, "SAMPLES": 8, **hidden}, warps=4)
        types = {"overflowed": "*i32", "start": "i32", **floats("tile_values", "reference")}
        compile_one(module.raise_reference, types, {"TILES": 197, "BLOCK": 256}, warps=4)
        types = {**window, "target": "*i64", **floats("coefficient", "class_weight", "weight_sum", "tile_sums")}
        types |= {**floats("reference", "u_target", "slope_target", "u_sum", "losses"), "exps": "*bf16"}
        types |= {"exps_stride": "i32", "x_chunk": "*bf16", **floats("factor", "hidden_sums")}
        compile_one(module.finish, types, {"TILES": 197, "TILE_BLOCK": 256, **hidden}, warps=4)
        types = {**window, **floats("c", "factor", "coefficient", "weighted_classes"), "out": "*bf16"}
        compile_one(module.scatter, {**types, "out_stride": "i32"}, hidden, warps=4)


def floats(*names: str) -> dict[str, str]:
    """Arguments that are pointers to float32."""
    return dict.fromkeys(names, "*fp32")


if __name__ == "__main__":
    rows_of_logits()
    products()
    rows_of_exponentials()
    print("compiled")
