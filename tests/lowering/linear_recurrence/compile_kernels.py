"""Compile every kind of generated kernel for Hopper, without a GPU: run by test_kernels.py in a process of its own.

The interpreter accepts code that the compiler refuses, and the compiler needs functions that are not interpreted.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from structfly.lowering.linear_recurrence.arguments import Arguments
from structfly.lowering.linear_recurrence.recurrence_triton import kernels
from structfly.lowering.linear_recurrence.shapes import Shape, backward_shape, forward_shape

SEQUENCES = ("gate", "input", "input_gate", "output_gate")
SHORT = Shape(4, 8, 32, 4)  # as many rows, channels and warps as the kernels that run, and fewer steps
PLAIN = {"complement": False, "sigmoid": False, "tanh": False, "reverse": False, "packed": False, "ragged": False}
_WORDS = ("links", "table")
_STATES = ("final", "kept", "grad_initial", "initial", "ending")
_CONSTANTS = ("STEPS", "ROWS", "BLOCK", "GROUP")


class Code(NamedTuple):
    """What a kernel is as Triton begins with it, laid out among threads, and as it leaves it.

    Attributes:
        shared: bytes of shared memory of a program.
        spilt: bytes of a thread that have no register.
    """

    ttir: str
    ttgir: str
    ptx: str
    shared: int
    spilt: int


def compiled(function: Any, kind: str, shape: Shape, apart: tuple[str, ...] = ()) -> Code:
    """A kernel whose tensors have rows of channels, but for those ``apart``, begin at 16 bytes and are of ``kind``."""
    values = dict(zip(_CONSTANTS, (shape.steps, shape.rows, shape.block, shape.group), strict=True))
    types, constants, aligned = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        types[name] = "i32"
        if name in values or name == "reset_t" or (name.endswith("_d") and name[:-2] not in apart):
            types[name], constants[index,] = "constexpr", values.get(name, 1)
        elif name in _WORDS or name in _STATES or name == "reset":
            types[name] = "*i64" if name in _WORDS else "*fp32" if name in _STATES else "*u8"
        elif not name.endswith(("_b", "_t", "_d")) and name not in ("chunks", "batch", "length", "width"):
            types[name] = kind
        if types[name] != "constexpr" and name not in ("chunks", "batch", "length"):
            aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(function, types, constexprs=constants, attrs=aligned)
    limit = {} if shape.registers is None else {"maxnreg": shape.registers}
    options = {"num_warps": shape.warps, **limit}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = made.asm
    return Code(str(code["ttir"]), str(code["ttgir"]), str(code["ptx"]), made.metadata.shared, spilt(code["cubin"]))


def spilt(binary: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", used)[0])


def both(
    shapes: Shape | tuple[Shape, Shape], given: tuple[str, ...], kind: str, apart: tuple[str, ...], **options: bool
) -> tuple[Code, Code]:
    """The forward and the backward of a call that ``given`` tensors are of."""
    shape, shape_backward = (shapes, shapes) if isinstance(shapes, Shape) else shapes
    common: dict[str, Any] = {
        "rounded": (),
        "interpreted": False,
        "linked": True,
        "prefetch": shape.prefetch,
        **options,
    }
    forward = tuple(name for name in given if name not in ("upstream", "ending"))
    own = {"keep": "output_gate" in given, "compensated": kind == "*fp32"}
    run = kernels("linear_recurrence", given=forward, gradients=(), **own, **common).run
    gradients = tuple(f"grad_{name}" for name in (*SEQUENCES, "initial") if name in given)
    source = "kept" if "output_gate" in given else "output"
    adjoint = kernels("linear_recurrence_adjoint", given=given, gradients=gradients, states=source, **common)
    return compiled(run, kind, shape, apart), compiled(adjoint.differentiate, kind, shape_backward, apart)


def check_words(ptx: str) -> None:
    """A word is written and read by one access, at the device's own coherence: no fence is needed."""
    assert re.findall(r"atom\S*\.exch\S*", ptx) == ["atom.global.gpu.relaxed.exch.b64"] * 2, "words written otherwise"
    loads = set(re.findall(r"ld\.volatile\S*", ptx))
    assert loads <= {"ld.volatile.global.b64", "ld.volatile.global.v2.b64"}, f"words read by {loads}"
    assert loads, "words read otherwise"
    assert len(re.findall(r"ld\.relaxed\.gpu\.global\.b64", ptx)) >= 2, "a wait for words that does not read them again"


def check_quotients(ptx: str) -> None:
    """No activation is a GPU's quotient, which is off to one side: the loop over time would add that up."""
    assert "rcp.approx.ftz.f32" in ptx, "sigmoids made otherwise"
    assert not re.findall(r"div\.(?:full|approx)", ptx), "a quotient"


def check_halves(ptx: str, kind: str) -> None:
    """Numbers of 16 bits are split by an instruction that stays at each use, not when they arrive."""
    assert ("and.b32" in ptx and "0xffff0000" in ptx) == (kind == "*bf16"), "bfloat16 widened otherwise"
    assert ("{low, high}" in ptx) == (kind == "*fp16"), "float16 widened otherwise"


def barriers(code: Code) -> int:
    return code.ptx.count("bar.sync")


def accesses(code: Code) -> int:
    return len(re.findall(r"\btt\.(?:load|store)\b", code.ttir))


def operations(code: Code) -> int:
    return code.ttir.count(" = ")


def shuffles(code: Code) -> int:
    return code.ptx.count("shfl.sync")


def check_layouts(code: Code, shape: Shape, of: str) -> None:
    """Threads have all steps of what they have, whatever version of Triton lays them out."""
    whole = rf"tensor<{shape.steps}x{shape.rows}x{shape.block}x[^>]*#(\w+)>"
    layouts = set(re.findall(whole, code.ttgir))
    assert layouts, f"no tensors of all steps, {of}"
    for layout in layouts:
        of_layout = re.findall(rf"^#{layout} = .*threadsPerWarp = \[1, .*warpsPerCTA = \[1, ", code.ttgir, re.MULTILINE)
        assert of_layout, f"{layout}, {of}: steps are shared out among threads"
    pointers = re.findall(r"\btt\.(?:load|store)\b.* : tensor<([\dx]+)x!tt\.ptr", code.ttir)
    sizes = [[int(size) for size in each.split("x")] for each in pointers]
    of_all = [each for each in sizes if math.prod(each) == shape.chunk * shape.block]
    assert of_all, f"no accesses of all steps, {of}"
    others = [each for each in of_all if len(each) > 1]
    assert not others, f"accesses, {of}: which axis of {others} is shared out first depends on Triton's version"


def check_steps(given: tuple[str, ...], apart: tuple[str, ...], **options: bool) -> None:
    """Steps are operations of whole tensors: the time that Triton takes grows with the square of the operations."""
    few, many = (both(SHORT._replace(steps=steps), given, "*bf16", apart, **options) for steps in (4, 16))
    for name, less, more in zip(("forward", "backward"), few, many, strict=True):
        of = f"{name} of {given} with 4 and with 16 steps"
        check_layouts(more, SHORT._replace(steps=16), of)
        assert less.shared == more.shared, f"shared memory, {of}: {less.shared}, {more.shared}"
        assert shuffles(less) == shuffles(more), f"shuffles, {of}: {shuffles(less)}, {shuffles(more)}"
        assert barriers(less) == barriers(more), f"barriers, {of}: a step is exchanged between threads"
        assert accesses(less) == accesses(more), f"loads and stores, {of}: {accesses(less)}, {accesses(more)}"
        assert operations(more) <= 1.25 * operations(less), f"operations, {of}: {operations(less)}, {operations(more)}"


def check_registers() -> None:
    """Kernels as they run have registers for what they keep of all steps."""
    for dtype, kind, most in ((torch.float32, "*fp32", 64), (torch.bfloat16, "*bf16", 0)):
        data = torch.empty(8, 2048, 1024, dtype=dtype, device="meta")
        call = Arguments(data, data, *(None,) * 5, *(False,) * 4, keep=True)
        shapes = forward_shape(call), backward_shape(call)
        for code in both(shapes, ("gate", "input", "upstream"), kind, (), **PLAIN):
            assert code.spilt <= most, f"{code.spilt} bytes of a thread of {shapes} have no register"


def main() -> None:
    for number, (sigmoid, tanh) in enumerate(itertools.product((False, True), repeat=2)):
        kind = ("*fp32", "*bf16", "*fp16", "*bf16")[number]
        for weight, more in (("none", False), ("complement", True), ("gate", True)):
            given = ["gate", "input"]
            given += ["input_gate"] if weight == "gate" else []
            given += ["output_gate"] if more else []
            given += ["upstream"] if not (sigmoid and not more) else []
            given += ["reset", "initial", "ending"] if more == tanh else []
            options = {"complement": weight == "complement", "sigmoid": sigmoid, "tanh": tanh, "reverse": tanh}
            for code in both(SHORT, tuple(given), kind, (), packed=more, ragged=more or tanh, **options):
                check_words(code.ptx)
                check_halves(code.ptx, kind)
                if sigmoid:
                    check_quotients(code.ptx)
    ends = ("upstream", "reset", "initial", "ending")
    check_steps(("gate", "input", "upstream"), (), **PLAIN)
    check_steps(("gate", "input", *ends), (), **PLAIN)
    check_steps(("gate", "input", "upstream"), ("gate", "input", "output", "upstream"), **PLAIN)
    check_steps((*SEQUENCES, *ends), (), **{**PLAIN, "sigmoid": True, "tanh": True, "packed": True, "ragged": True})
    check_registers()
    print("compiled")


if __name__ == "__main__":
    main()
