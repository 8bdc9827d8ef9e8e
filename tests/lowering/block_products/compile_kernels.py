"""Compile the products of blocks for Hopper, without a GPU: run by test_kernels.py in a process of its own."""

from __future__ import annotations

import itertools
import math
import re
from typing import cast

from structfly.lowering.activations import ACTIVATIONS
from structfly.lowering.blast import mixing
from structfly.lowering.blast.generated import FEATURES, SUMS
from structfly.lowering.block_products.matrices import Cut as MatrixCut
from structfly.lowering.block_products.matrix_tiles import (
    AXIS,
    AXIS_GRADIENTS,
    BATCH,
    FEW_TOKENS,
    GRADIENTS,
    PRODUCTS,
)
from structfly.lowering.block_products.tiles import GRADIENTS as BLOCK_GRADIENTS
from structfly.lowering.block_products.tiles import SHORT_SUMS, Summing
from structfly.lowering.block_products.tiles import SUMS as BLOCK_SUMS
from structfly.lowering.gemm import Tiles
from structfly.lowering.template import Parameter, load, render
from tests.lowering.linear_cross_entropy.compile_kernels import compile_one

TILES = Tiles(m=128, n=128, k=64, group=4, parts=2, warps=4, stages=3)
SUMMING = Summing(TILES)
THREE_ABREAST = Tiles(m=64, n=64, k=64, group=8, parts=1, warps=4, stages=3, resident=2)
KINDS = ("bf16", "fp16")
TF32 = "fp32"


def box(kind: str, *sides: int) -> str:
    """The type of a tensor descriptor."""
    return f"tensordesc<{kind}[{','.join(map(str, sides))}]>"


def compile_template(template: str, types: dict[str, str], kind: str, tiles: Tiles, **own: Parameter) -> None:
    split = bool(own.get("split", False))
    shared: dict[str, Parameter] = {"name": template, "split": False, "parts": tiles.parts, "interpreted": False}
    shared |= {"waits": True, "bfloat16": kind == "bf16" and not split}
    kernel = getattr(load(render(template, **{**shared, **own})), template)
    constants = {"BM": tiles.m, "BN": tiles.n, "BK": tiles.k, "GROUP": 4, "SPLIT": 1 + 2 * split, "PROGRAMS": 132}
    made = compile_one(kernel, {**types, **dict.fromkeys("MNK", "i32")}, constants, tiles.warps, tiles.stages)
    assert kind != TF32 or re.search(r"mma.*\.tf32\.tf32", made.asm["ptx"])
    if not template.startswith("axis"):
        abreast = own.get("abreast", 1)
        assert isinstance(abreast, int)
        check_buffers(made.asm["ttgir"], tiles, abreast, turned=operands_turned(template, own) if kind == TF32 else 0)
        assert "wgmma.mma_async" in made.asm["ptx"]


def operands_turned(template: str, options: dict[str, Parameter]) -> int:
    """How many operands a product has whose inner side is not last; tensor cores take none such in TF32."""
    if template == "block_gradients":
        return 1 + cast(int, options["abreast"]) * (not options["b_turned"])
    if template == "chunk_gradients":
        return 1
    return int(bool(options.get("a_turned")))


def turned_features(kind: str, sides: tuple[int, int]) -> None:
    kernel = load(render("turned_features")).turned_features
    types = {"source": f"*{kind}", "target": f"*{kind}", "rows": "i32", "A": "i32", "B": "i32"}
    rows = 8192 // (sides[0] * sides[1])
    compile_one(kernel, types, {"ROWS": rows, "TILE_A": sides[0], "TILE_B": sides[1]}, 4)


def check_buffers(code: str, tiles: Tiles, abreast: int, turned: int) -> None:
    """All operands have a buffer a stage, and products take them from there: no load within a step keeps them waiting,
    and no reshaping takes them through registers, but those that are ``turned``, whose last buffer is for what comes of
    it.  Of several products none waits until others' sums are cleared."""
    buffers = re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x([\dx]+)x[bf]", code)
    fewest = tiles.stages - bool(turned)
    deep = [math.prod(map(int, sides.split("x"))) for count, sides in buffers if int(count) >= fewest]
    assert sorted(deep) == sorted((tiles.m * tiles.k, *[tiles.n * tiles.k] * abreast)), buffers
    assert sum(int(count) == tiles.stages for count, _ in buffers) == 1 + abreast - turned, buffers
    assert code.count("ttg.local_load") == turned
    assert abreast == 1 or not re.search(r"arith.select .*tensor<\d+x\d+xf32", code)


def sums(
    kind: str,
    turned: bool,
    each: int,
    listed: bool,
    bias: bool,
    rank: int = 0,
    components: str = "",
    activation: str = "",
    cut: Summing = SUMMING,
) -> None:
    """``components``: "read" or "written" with the tokens along each."""
    tiles = cut.tiles
    b = (1, tiles.k, tiles.n) if turned else (1, tiles.n, tiles.k)
    a = (1, tiles.k, tiles.m) if components == "read" else (1, tiles.m, tiles.k)
    types = {"a": box(kind, *a), "b": box(kind, *b)}
    types |= {"a2": types["a"], "b2": types["b"]} if rank else {}
    types |= {"sources": "*i32"}
    types |= {"blocks": "*i32"} if listed else {}
    types |= {} if each else {"starts": "*i32", "turns": "*i32"}
    types |= {"bias": f"*{kind}"} if bias else {}
    written = {"rows": "*i32", "width": "i32", "c": f"*{kind}"}
    part = (tiles.m // tiles.parts, tiles.n) if cut.swapped else (tiles.m, tiles.part)
    types |= written if components == "written" else {"c": box(kind, 1, *part)}
    options: dict[str, Parameter] = {
        "turned": turned,
        "a_turned": components == "read",
        "scattered": components == "written",
        "swapped": cut.swapped,
        "each": each,
        "blocks_listed": listed,
        "rank": rank,
        "bias": bias,
        "activation": activation,
    }
    compile_template("block_sums", types, kind, tiles, side_n=96, side_k=384, **options)


def gradients(
    kind: str,
    split: bool,
    turned: bool,
    rank: int = 0,
    abreast: int = 1,
    tiles: Tiles = TILES,
    spans: bool = False,
) -> None:
    tiles = tiles.with_parts(2 * tiles.parts) if split and kind != TF32 else tiles
    b = (1, tiles.n, tiles.k) if turned else (1, tiles.k, tiles.n)
    types = {"a": box(kind, 1, tiles.k, tiles.m), "b": box(kind, *b)}
    types |= {"dz": types["a"], "z": types["b"]} if rank else {}
    written = box("fp32" if split else kind, 1, 1, tiles.m, tiles.part)
    types |= {"places": "*i32", "c": written}
    types |= {"of_left": written, "of_right": written} if rank else {}
    options: dict[str, Parameter] = {"split": split, "b_turned": turned, "rank": rank, "abreast": abreast}
    options["spans"] = spans
    compile_template("block_gradients", types, kind, tiles, side_m=96, side_n=384, **options)


def matrix_products(
    kind: str,
    n_side: tuple[int, int],
    k_side: tuple[int, int],
    turned: bool,
    bias: bool,
    tiles: Tiles = TILES,
    activation: str = "",
) -> None:
    n, k = MatrixCut.of(*n_side, tiles.n), MatrixCut.of(*k_side, tiles.k)
    part = max(n.box[0] // tiles.parts, 1), min(n.box[1], tiles.part)
    types = {"a": box(kind, 1, tiles.m, tiles.k) if k.in_one_run else box(kind, 1, 1, tiles.m, tiles.k)}
    types |= {"b": box(kind, 1, *k.box, tiles.n) if turned else box(kind, 1, *n.box, tiles.k)}
    types |= {"bias": f"*{kind}"} if bias else {}
    types |= {"c": box(kind, 1, tiles.m, *part)}
    of_n: dict[str, Parameter] = {"n_side": n.side, "n_box": n.box, "n_tiles": n.tiles, "part_box": part}
    of_k: dict[str, Parameter] = {"k_side": k.side, "k_box": k.box, "k_tiles": k.tiles, "k_apart": not k.in_one_run}
    options: dict[str, Parameter] = {"turned": turned, "bias": bias, "activation": activation}
    compile_template("matrix_products", types, kind, tiles, **options, **of_n, **of_k)


def matrix_gradients(kind: str, m_side: tuple[int, int], tiles: Tiles = TILES) -> None:
    m = MatrixCut.of(*m_side, tiles.m)
    types = {"a": box(kind, 1, tiles.k, tiles.m), "b": box(kind, 1, tiles.k, tiles.n)}
    types |= {"c": box(kind, 1, *m.box, tiles.part)}
    compile_template("matrix_gradients", types, kind, tiles, m_side=m.side, m_box=m.box, m_tiles=m.tiles)


def chunk_products(
    kind: str, rows: str, a_turned: bool, b_turned: bool, bias: bool, tiles: Tiles, activation: str = ""
) -> None:
    a = (1, tiles.k, tiles.m) if a_turned else (1, tiles.m, tiles.k)
    b = (1, tiles.k, tiles.n) if b_turned else (1, tiles.n, tiles.k)
    types = {"a": box(kind, *a), "b": box(kind, *b)}
    types |= {"bias": f"*{kind}"} if bias else {}
    types |= {"c": box(kind, 1, tiles.m, tiles.part), "start": "i32", "matrices": "i32"}
    turned: dict[str, Parameter] = {"a_turned": a_turned, "b_turned": b_turned}
    compile_template("chunk_products", types, kind, tiles, rows=rows, bias=bias, activation=activation, **turned)


def chunk_gradients(kind: str, rows: str, tiles: Tiles) -> None:
    a = (1, tiles.k, tiles.m) if rows == "a" else (1, tiles.m, tiles.k)
    b = (1, tiles.k, tiles.n) if rows == "b" else (1, tiles.n, tiles.k)
    types = {"a": box(kind, *a), "b": box(kind, *b), "c": box("fp32", 1, tiles.m, tiles.part)}
    types |= {"start": "i32", "matrices": "i32"}
    compile_template("chunk_gradients", types, kind, tiles, rows=rows)


def blast_mixing(kind: str, blocks: tuple[int, int], gradients: bool, ragged: bool) -> None:
    rows, columns = blocks
    types = {"z_from": f"*{kind}", "w_to": f"*{kind}"}
    types |= {"above": f"*{kind}", "sums": "*fp32"} if gradients else {}
    types |= {"scale": f"*{kind}", "eighths": "i32", "components": "i32"}
    options: dict[str, Parameter] = {"rows": rows, "columns": columns, "gradients": gradients, "ragged": ragged}
    sides: dict[str, Parameter] = {"side_rows": mixing.side(rows), "side_columns": mixing.side(columns)}
    source = render("blast_mixing", **options, **sides, bfloat16=kind == "bf16", interpreted=False)
    tokens = mixing.tile([rows, columns], 16384, 4 if kind == TF32 else 2)
    constants = {"BT": tokens, "TILES": 8, "RANGES": 1}
    made = compile_one(load(source).blast_mixing, types, constants, mixing.WARPS, mixing.STAGES, aligned=True)
    # Tiles are loaded while others are multiplied, but not where z and z^T are, which share no layout in TF32.
    assert ("async_copy_global_to_local" in made.asm["ttgir"]) == (kind != TF32 or not gradients)
    assert "st.global.v4" in made.asm["ptx"]  # in as few pieces as can be


def axis_products(kind: str, inner: bool, turned: bool, bias: bool, activation: str = "") -> None:
    tiles, batch = AXIS, BATCH // (2 if kind == TF32 else 1)
    b = (tiles.k, tiles.n) if turned else (tiles.n, tiles.k)
    types = {"a": box(kind, tiles.m, 1, tiles.k, batch) if inner else box(kind, tiles.m, batch, tiles.k)}
    types |= {"b": box(kind, batch, 1, *b) if inner else box(kind, batch, *b)}
    types |= {"bias": f"*{kind}"} if bias else {}
    types |= {"c": box(kind, tiles.m, 1, tiles.n, batch) if inner else box(kind, tiles.m, batch, tiles.n)}
    sides: dict[str, Parameter] = {"side_n": 48, "side_k": 96, "count": 24, "runs": 2, "batch": batch}
    options: dict[str, Parameter] = {"inner": inner, "turned": turned, "bias": bias, "activation": activation}
    compile_template("axis_products", types, kind, tiles, **options, **sides)


def axis_gradients(kind: str, inner: bool) -> None:
    tiles, batch = AXIS_GRADIENTS, BATCH // (2 if kind == TF32 else 1)

    def lattice(side: int) -> str:
        return box(kind, tiles.k, 1, side, batch) if inner else box(kind, tiles.k, batch, side)

    types = {"a": lattice(tiles.m), "b": lattice(tiles.n)}
    types |= {"c": box("fp32", 1, batch, 1, tiles.m, tiles.n) if inner else box("fp32", 1, batch, tiles.m, tiles.n)}
    compile_template("axis_gradients", types, kind, tiles, inner=inner, side_m=48, side_n=96, runs=2, batch=batch)


def range_sums(kind: str, results: int) -> None:
    types = {"sums": "*fp32"}
    for i in range(results):
        types |= {f"c_{i}": f"*{kind}", f"first_{i}": "i32", f"size_{i}": "i32"}
    types |= {"ranges": "i32", "total": "i32"}
    kernel = load(render("range_sums", results=results, interpreted=False, bfloat16=kind == "bf16")).range_sums
    compile_one(kernel, types, {"BLOCK": 1024}, warps=4)


def products_in_tf32() -> None:
    """All tiles that products take in TF32, with operands stored as launches have them there."""
    for number, cut in enumerate((*BLOCK_SUMS, *SHORT_SUMS)):
        wide, rank = Summing(cut.tiles.for_itemsize(4)), 72 * (number % 2)
        components = ("", "read", "written")[number % 3]
        sums(TF32, turned=False, each=4, listed=True, bias=True, rank=rank, components=components, cut=wide)
    for number, cut in enumerate(BLOCK_GRADIENTS):
        tiles, split, b_turned = cut.tiles.for_itemsize(4), number % 2 == 0, number % 3 == 2
        if not cut.spans:
            gradients(TF32, split, b_turned, rank=128 * (not b_turned), abreast=cut.abreast, tiles=tiles)
    for tiles in (PRODUCTS.for_itemsize(4), FEW_TOKENS.for_itemsize(4)):
        matrix_products(TF32, (4, 256), (1, 1024), turned=False, bias=False, tiles=tiles)
        matrix_products(TF32, (1, 1024), (1, 256), turned=False, bias=True, tiles=tiles, activation="gelu")
        chunk_products(TF32, "b", a_turned=False, b_turned=False, bias=False, tiles=tiles)
    for tiles in (FEATURES.for_itemsize(4), FEW_TOKENS.for_itemsize(4)):
        chunk_products(TF32, "c", a_turned=True, b_turned=False, bias=True, tiles=tiles)
    for number, choice in enumerate(SUMS):
        chunk_gradients(TF32, "ab"[number % 2], choice.for_itemsize(4))
    for inner, turned in itertools.product((False, True), (False, True)):
        axis_products(TF32, inner, turned, bias=inner != turned)
        axis_gradients(TF32, inner)
    for number, counts in enumerate(((16, 16), (3, 40), (mixing.MOST_BLOCKS, mixing.MOST_BLOCKS))):
        blast_mixing(TF32, counts, gradients=number != 1, ragged=number == 1)
    range_sums(TF32, 2)


if __name__ == "__main__":
    for number, kind in enumerate(KINDS):
        range_sums(kind, 1 + 2 * number)
    for number, (kind, split, turned) in enumerate(itertools.product(KINDS, (False, True), (False, True))):
        gradients(kind, split, turned)
        gradients(kind, split, turned, rank=72, abreast=1 + number % 2)
    gradients("bf16", split=True, turned=False, rank=128, abreast=3, tiles=THREE_ABREAST)
    for number, (cut, split) in enumerate(itertools.product([c for c in BLOCK_GRADIENTS if c.spans], (False, True))):
        kind, turned, rank = KINDS[number % 2], number % 2 == 1, 64 * (number % 2 == 0)
        gradients(kind, split, turned, rank, cut.abreast, cut.tiles, spans=True)
    for kind in KINDS:
        sums(kind, turned=True, each=0, listed=True, bias=False, components="written")
        sums(kind, turned=False, each=0, listed=True, bias=False, components="read")
    for number, (turned, each, listed, bias) in enumerate(
        itertools.product((False, True), (0, 4), (False, True), (False, True))
    ):
        sums(KINDS[number % 2], turned, each, listed, bias, rank=72 * (number % 2))
    for number, (cut, components) in enumerate(
        itertools.product([c for c in (*BLOCK_SUMS, *SHORT_SUMS) if c.swapped], ("", "read", "written"))
    ):
        kind, turned, rank = KINDS[number % 2], number % 4 < 2, 72 * (not components)
        sums(kind, turned, 4 * (number % 2), listed=True, bias=True, rank=rank, components=components, cut=cut.summing)
    for number, (side, run) in enumerate(itertools.product(((16, 16), (4, 256), (3, 40)), ((1, 256), (1, 40)))):
        kind = KINDS[number % 2]
        matrix_products(kind, side, run, turned=False, bias=False)
        matrix_products(kind, run, side, turned=True, bias=False)
        matrix_products(kind, side, run, turned=True, bias=False)
        matrix_products(kind, run, run, turned=False, bias=True)
        matrix_gradients(kind, side)
        matrix_gradients(kind, run)
    for number, (inner, turned) in enumerate(itertools.product((False, True), (False, True))):
        axis_products(KINDS[number % 2], inner, turned, bias=inner != turned)
        axis_gradients(KINDS[number % 2], inner)
    for number, activation in enumerate(ACTIVATIONS):
        kind, other = KINDS[number % 2], KINDS[1 - number % 2]
        sums(kind, turned=False, each=4, listed=False, bias=True, activation=activation)
        matrix_products(other, (1, 256), (1, 1024), turned=False, bias=True, tiles=PRODUCTS, activation=activation)
        axis_products(kind, number % 2 == 0, turned=False, bias=True, activation=activation)
        chunk_products(other, "c", a_turned=True, b_turned=False, bias=True, tiles=FEATURES, activation=activation)
    for few in (PRODUCTS, FEW_TOKENS):
        matrix_products("bf16", (4, 256), (1, 1024), turned=False, bias=False, tiles=few)
        matrix_products("bf16", (1, 1024), (16, 16), turned=True, bias=False, tiles=few)
    for choice in GRADIENTS:
        matrix_gradients("bf16", (16, 16), choice)
    for number, (rows, few) in enumerate(itertools.product("bc", (PRODUCTS, FEW_TOKENS))):
        for turned in (False, True):
            a_turned, b_turned = (turned, False) if rows == "b" else (True, turned)
            bias = rows == "c" and not turned
            chunk_products(KINDS[number % 2], rows, a_turned, b_turned, bias, few)
    for number, choice in enumerate(SUMS):
        for rows in "ab":
            chunk_gradients(KINDS[number % 2], rows, choice)
    chunk_products("bf16", "c", a_turned=True, b_turned=True, bias=False, tiles=FEATURES)
    chunk_products("bf16", "c", a_turned=True, b_turned=False, bias=True, tiles=FEATURES)
    most = mixing.MOST_BLOCKS
    for number, (counts, with_gradients) in enumerate(
        itertools.product(((16, 16), (3, 40), (most, most)), (False, True))
    ):
        blast_mixing(KINDS[number % 2], counts, with_gradients, ragged=number % 3 == 1)
    for kind, sides in itertools.product((*KINDS, TF32), ((2, 64), (64, 16), (64, 64))):
        turned_features(kind, sides)
    products_in_tf32()
    print("compiled")
