"""Compile the products of blocks for Hopper, without a GPU: run by test_kernels.py in a process of its own."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

from structfly.lowering.gemm import Tiles
from structfly.lowering.template import Parameter, load, render
from tests.lowering.linear_cross_entropy.compile_kernels import compile_one

TILES = Tiles(m=128, n=128, k=64, group=4, parts=2, warps=4, stages=3)
KINDS = {"bf16": True, "fp16": False}


def box(kind: str, *sides: int) -> str:
    """The type of a tensor descriptor."""
    return f"tensordesc<{kind}[{','.join(map(str, sides))}]>"


def compile_template(template: str, types: dict[str, str], kind: str, tiles: Tiles, **own: Parameter) -> None:
    split = bool(own.get("split", False))
    shared: dict[str, Parameter] = {"name": template, "split": False, "parts": tiles.parts, "interpreted": False}
    kernel = getattr(load(render(template, **{**shared, "bfloat16": KINDS[kind] and not split, **own})), template)
    constants = {"BM": tiles.m, "BN": tiles.n, "BK": tiles.k, "GROUP": 4, "SPLIT": 1 + 2 * split, "PROGRAMS": 132}
    made = compile_one(kernel, {**types, **dict.fromkeys("MNK", "i32")}, constants, tiles.warps, tiles.stages)
    check_buffers(made.asm["ttgir"], tiles)


def check_buffers(code: str, tiles: Tiles) -> None:
    """Both operands have a buffer a stage, and products take them from there: no load within a step keeps them waiting,
    and no reshaping takes them through registers."""
    buffers = re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x(\d+)x(\d+)x[bf]", code)
    deep = [tuple(map(int, sides)) for count, *sides in buffers if int(count) == tiles.stages]
    a, b = {(tiles.m, tiles.k), (tiles.k, tiles.m)}, {(tiles.n, tiles.k), (tiles.k, tiles.n)}
    assert any(sides in a for sides in deep), buffers
    assert any(sides in b for sides in deep), buffers
    assert "ttg.local_load" not in code


def sums(kind: str, turned: bool, each: int, listed: bool, bias: bool, rank: int = 0, components: str = "") -> None:
    """``components``: "read" or "written" with the tokens along each."""
    tiles = TILES
    b = (1, tiles.k, tiles.n) if turned else (1, tiles.n, tiles.k)
    a = (1, tiles.k, tiles.m) if components == "read" else (1, tiles.m, tiles.k)
    types = {"a": box(kind, *a), "b": box(kind, *b)}
    types |= {"a2": types["a"], "b2": types["b"]} if rank else {}
    types |= {"sources": "*i32"}
    types |= {"blocks": "*i32"} if listed else {}
    types |= {} if each else {"starts": "*i32"}
    types |= {"bias": f"*{kind}"} if bias else {}
    written = {"rows": "*i32", "width": "i32", "c": f"*{kind}"}
    types |= written if components == "written" else {"c": box(kind, 1, tiles.m, tiles.part)}
    options: dict[str, Parameter] = {
        "turned": turned,
        "a_turned": components == "read",
        "scattered": components == "written",
        "each": each,
        "blocks_listed": listed,
        "rank": rank,
        "bias": bias,
    }
    compile_template("block_sums", types, kind, tiles, side_n=96, side_k=384, **options)


def gradients(kind: str, split: bool, turned: bool) -> None:
    tiles = replace(TILES, parts=4) if split else TILES
    b = (1, tiles.n, tiles.k) if turned else (1, tiles.k, tiles.n)
    types = {"a": box(kind, 1, tiles.k, tiles.m), "b": box(kind, *b)}
    types |= {"rows": "*i32", "columns": "*i32", "c": box("fp32" if split else kind, 1, tiles.m, tiles.part)}
    options: dict[str, Parameter] = {"split": split, "b_turned": turned}
    compile_template("block_gradients", types, kind, tiles, side_m=96, side_n=384, **options)


if __name__ == "__main__":
    for kind, split, turned in itertools.product(KINDS, (False, True), (False, True)):
        gradients(kind, split, turned)
    for kind in KINDS:
        sums(kind, turned=True, each=0, listed=True, bias=False, components="written")
        sums(kind, turned=False, each=0, listed=True, bias=False, components="read")
    for number, (turned, each, listed, bias) in enumerate(
        itertools.product((False, True), (0, 4), (False, True), (False, True))
    ):
        sums(list(KINDS)[number % 2], turned, each, listed, bias, rank=72 * (number % 2))
    print("compiled")
