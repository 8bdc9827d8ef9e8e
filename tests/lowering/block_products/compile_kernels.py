"""Compile the products of blocks for Hopper, without a GPU: run by test_kernels.py in a process of its own."""

from __future__ import annotations

import itertools

from structfly.lowering.gemm import Tiles
from structfly.lowering.template import Parameter, load, render
from tests.lowering.linear_cross_entropy.compile_kernels import compile_one

TILES = Tiles(m=128, n=128, k=64, group=4, parts=2, warps=4, stages=3)
KINDS = {"bf16": True, "fp16": False, "fp32": False}


def box(kind: str, *sides: int) -> str:
    """The type of a tensor descriptor."""
    return f"tensordesc<{kind}[{','.join(map(str, sides))}]>"


def compile_template(template: str, types: dict[str, str], kind: str, tiles: Tiles, **own: Parameter) -> None:
    shared: dict[str, Parameter] = {"name": template, "split": False, "parts": tiles.parts, "interpreted": False}
    kernel = getattr(load(render(template, **shared, bfloat16=KINDS[kind], **own)), template)
    constants = {"BM": tiles.m, "BN": tiles.n, "BK": tiles.k, "GROUP": 4, "SPLIT": 1, "PROGRAMS": 132}
    compile_one(kernel, {**types, **dict.fromkeys("MNK", "i32")}, constants, tiles.warps, tiles.stages)


def sums(kind: str, turned: bool, each: int, listed: bool, bias: bool, rank: int = 0, components: str = "") -> None:
    """``components``: "read" or "written" with the tokens along each."""
    tiles = Tiles(128, 64, 32, 4, 2, 4, 3) if kind == "fp32" else TILES
    b = (1, tiles.k, tiles.n) if turned else (1, tiles.n, tiles.k)
    a = (1, tiles.k, tiles.m) if components == "read" else (tiles.m, 1, tiles.k)
    types = {"a": box(kind, *a), "b": box(kind, *b)}
    thin = (tiles.k, 1, tiles.n) if turned else (1, tiles.n, tiles.k)
    types |= {"a2": box(kind, tiles.m, tiles.k), "b2": box(kind, *thin)} if rank else {}
    types |= {"sources": "*i32"}
    types |= {"blocks": "*i32"} if listed else {}
    types |= {} if each else {"starts": "*i32"}
    types |= {"bias": f"*{kind}"} if bias else {}
    written = {"rows": "*i32", "width": "i32", "c": f"*{kind}"}
    types |= written if components == "written" else {"c": box(kind, tiles.m, 1, tiles.part)}
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


def gradients(kind: str, turned: bool = False) -> None:
    tiles = Tiles(64, 64, 32, 4, 1, 4, 3) if kind == "fp32" else TILES
    types = {
        "a": box(kind, tiles.k, 1, tiles.m),
        "b": box(kind, *((1, tiles.n, tiles.k) if turned else (tiles.k, 1, tiles.n))),
    }
    types |= {"rows": "*i32", "columns": "*i32", "c": box(kind, 1, tiles.m, tiles.part)}
    compile_template("block_gradients", types, kind, tiles, side_m=96, side_n=384, b_turned=turned)


if __name__ == "__main__":
    for kind in KINDS:
        gradients(kind)
        gradients(kind, turned=True)
        sums(kind, turned=True, each=0, listed=True, bias=False, components="written")
        sums(kind, turned=False, each=0, listed=True, bias=False, components="read")
    for number, (turned, each, listed, bias) in enumerate(
        itertools.product((False, True), (0, 4), (False, True), (False, True))
    ):
        sums(list(KINDS)[number % 3], turned, each, listed, bias, rank=72 * (number % 2))
    print("compiled")
