"""Compile every kind of generated kernel for Hopper, without a GPU: run by test_kernels.py in a process of its own.

The interpreter accepts code that the compiler refuses, and the compiler needs functions that are not interpreted.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from structfly.lowering.direct_launch import arguments_of
from structfly.lowering.gemm import Tiles
from structfly.lowering.head.epilogue import Epilogue, parse_epilogue
from structfly.lowering.linear_cross_entropy.chain_operands import ChainOperands
from structfly.lowering.linear_cross_entropy.rows import ClassTerms
from structfly.lowering.linear_cross_entropy.tiles import PRODUCTS, HeadTiles, head_class, shipped_head_tiles
from structfly.lowering.template import Parameter, load, render
from structfly.lowering.tuning.choice import SAFE
from structfly.lowering.tuning.limits import shared_bytes, why_not
from structfly.records import DeviceModel

SHARED_MEMORY = 227 * 1024  # of a multiprocessor, for one program
HOPPER = (9, 0)
HEAD = head_class(DeviceModel("", HOPPER), hidden=2048, classes=131072, weight_row=2048, nonlinear=False)
SHIPPED = shipped_head_tiles(HEAD)
CAPPED = parse_epilogue("div:3.0,tanh,mul:3.0")
# Every operation, with operands of every kind.
LONG = parse_epilogue(
    "add:class0,sub:row1,rsub:0.5,mul:scalar2,div:scalar3,neg,exp,tanh,sigmoid,clamp_min:row4,clamp_max:class5,rdiv:1.5,"
    "where:class6:class7,masked_fill:row8:scalar9,where:scalar10:-inf"
)
# Steps before which classes may have numbers with gradients, one whose slope differs between them, and some after.
LEARNED = parse_epilogue(
    "div:scalar0,add:class1,rsub:row2,where:class3:scalar4,mul:class5,tanh,mul:row6,masked_fill:row7:0.5"
)


def chain_of(epilogue: Epilogue) -> ChainOperands:
    """The chain with all gradients of operands that exponentials make."""
    operands = [torch.zeros(2, dtype=torch.bool if o.index in epilogue.conditions else None) for o in epilogue.operands]
    late = epilogue.of_classes_after_leading([True] * len(operands))
    wanted = tuple(not (o in late or o.index in epilogue.conditions) for o in epilogue.operands)
    terms = ClassTerms(epilogue, tuple(operands), wanted, None, None, None, 0.0, None, 1.0)
    return ChainOperands(terms, bias_gradient=bool(epilogue.steps), classes=50257)


def compile_one(
    function: Any,
    types: dict[str, str],
    constants: dict[str, int],
    warps: int,
    stages: int = 3,
    shared: int = SHARED_MEMORY,
    aligned: bool = False,
) -> Any:
    """The kernel, compiled, for pointers that are multiples of 16 bytes if ``aligned``; it takes no more than
    ``shared`` bytes of a multiprocessor's memory, and the parameters that a direct launch gives it."""
    pointers = [number for number, kind in enumerate(types.values()) if aligned and kind.startswith("*")]
    source = ASTSource(function, types, constants, {(number,): [["tt.divisibility", 16]] for number in pointers})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    assert made.metadata.shared <= shared, f"{function}: {made.metadata.shared} bytes of shared memory, not {shared}"
    check_parameters(made)
    check_wait(made.asm["ptx"])
    return made


def check_wait(ptx: str) -> None:
    """A kernel that waits for those before it does so ahead of all that it reads and writes, and only then lets the
    next one be launched."""
    before, wait, after = ptx.partition("griddepcontrol.wait")
    assert not wait or not re.search(r"(ld|st|red)\.(global|relaxed|acquire|volatile)|atom\.|cp\.async", before)
    assert "griddepcontrol.launch_dependents" not in before
    assert bool(wait) == ("griddepcontrol.launch_dependents" in after)


def check_parameters(made: Any) -> None:
    """The code declares what launches by the driver expect: the arguments', and two scratch spaces' addresses."""
    declared = re.findall(r"\.param ([^,)]*)", made.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0])
    sizes = []
    for each in declared:
        bits, count = re.search(r"\.[bufs](\d+)", each), re.search(r"\[(\d+)\]", each)
        assert bits is not None, each
        sizes.append(int(bits[1]) // 8 * int(count[1] if count else 1))
    arguments = arguments_of(list(made.src.signature.values()), made.metadata.tensordesc_meta)
    assert arguments is not None
    assert sizes == [size for argument in arguments for size in argument.sizes] + [8, 8], declared


def rows_of_logits() -> None:
    """Every combination of options, with several epilogues and gradients of their operands, and each way of asking for
    statistics."""
    flags = itertools.product((False, True), repeat=4)
    for number, (bias, class_weight, coefficient, gradient) in enumerate(flags):
        epilogue = (parse_epilogue(""), CAPPED, LONG, LONG)[number % 4]
        sums = wanted_sums(epilogue, classes=number % 8 > 3) if number % 4 == 3 else ((), ())
        loss_coefficient = "rows" if coefficient else "ones"
        options: dict[str, Any] = {"bias": bias, "class_weight": class_weight, "loss_coefficient": loss_coefficient}
        loss_rows(number, epilogue, *sums, gradient=gradient, **options)
    names = ("loss", "lse", "entropy", "argmax", "chosen")
    flagged = ("lse_coefficient", "entropy_coefficient", "chosen_coefficient", "gradient")
    everything: dict[str, Any] = {**dict.fromkeys(flagged, True), "choices": 2, "loss_coefficient": "rows"}
    loss_rows(0, CAPPED, asked=names, choices=2)
    loss_rows(1, CAPPED, asked=names, **everything)
    loss_rows(2, LONG, asked=(), known=True, **everything)
    loss_rows(3, LONG, *wanted_sums(LONG, classes=True), asked=names, **everything)
    loss_rows(6, LONG, *wanted_sums(LONG, classes=True), asked=(), known=True, **everything)
    loss_rows(4, CAPPED, asked=("lse", "argmax"), target=False)
    loss_rows(5, CAPPED, asked=(), target=False, lse_coefficient=True, gradient=True)


def loss_rows(
    number: int, epilogue: Epilogue, by_row: tuple[int, ...] = (), by_class: tuple[int, ...] = (), **options: Any
) -> None:
    """One row step; ``number`` varies what has few values."""
    flags = [f"{name}_coefficient" for name in ("lse", "entropy", "chosen")]
    parameters: dict[str, Any] = {
        "steps": epilogue.source([operand in by_row + by_class for operand in range(len(epilogue.operands))]),
        "operands": tuple((operand.kind, operand.index in epilogue.conditions) for operand in epilogue.operands),
        "by_row": by_row,
        "by_class": by_class,
        **dict.fromkeys((*flags, "bias", "class_weight", "gradient", "known"), False),
        "smoothing": 0.1 if number % 3 == 0 else 0.0,
        "ignore_index": -100 if number % 5 else None,
        "gradient_scale": 2048.0 if number % 7 == 0 else 1.0,
        "asked": ("loss",),
        "target": True,
        "choices": 0,
        "loss_coefficient": "",
        **options,
    }
    operands = {
        f"o{operand.index}_ptr": "*u8" if operand.index in epilogue.conditions else "*fp32"
        for operand in epilogue.operands
    }
    types = {"z_ptr": ("*bf16", "*fp16", "*fp32")[number % 3], "t_ptr": "*i64", "j_ptr": "*i64"}
    types |= {**pointers(*"cghkbws"), **operands, **pointers(*"len"), "a_ptr": "*i64", **pointers("u")}
    types |= {**floats("row_sums", "class_sums"), "z_stride": "i32", "count": "i32"}
    module = load(render("linear_cross_entropy_rows", **parameters))
    if not (parameters["known"] and by_class):
        compile_one(module.rows, types, {"CLASSES": 50257, "BLOCK": 4096}, warps=16)
    if by_class and parameters["gradient"]:
        compile_one(module.tiles, types, {"CLASSES": 50257, "BLOCK": 512, "ROWS": 128}, warps=4)


def wanted_sums(epilogue: Epilogue, *, classes: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All operands that can have a gradient: those with sums along rows, and where asked those with sums over rows."""
    numbers = [operand for operand in epilogue.operands if operand.index not in epilogue.conditions]
    by_class = tuple(operand.index for operand in numbers if operand.kind == "class")
    return tuple(o.index for o in numbers if o.index not in by_class), by_class if classes else ()


def pointers(*names: str) -> dict[str, str]:
    """Arguments of the row step that are pointers to float32."""
    return {f"{name}_ptr": "*fp32" for name in names}


def product(
    template: str,
    a_transposed: bool,
    b_transposed: bool,
    own: dict[str, str],
    tiles: Tiles,
    *,
    split: bool = False,
    **own_parameters: Any,
) -> None:
    """One product, within what is said of its tiles; ``own`` are the types of the template's arguments."""
    assert not why_not(template, tiles, HOPPER)
    layout: dict[str, Parameter] = {
        "name": template,
        "a_transposed": a_transposed,
        "b_transposed": b_transposed,
        "split": split,
        "parts": tiles.parts,
        "interpreted": False,
        "waits": True,
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
    compile_one(kernel, types, constants, tiles.warps, tiles.stages, shared_bytes(template, tiles))


def blocks(kind: str, rows: int, columns: int) -> str:
    """The type of a tensor descriptor."""
    return f"tensordesc<{kind}[{rows},{columns}]>"


def operand_types(chain: ChainOperands) -> dict[str, str]:
    """The types of a chain's operands as kernels of generated products have them."""
    operands: Any = chain.parameters["operands"]
    return {f"o{index}_ptr": "*u8" if condition else "*fp32" for index, _, condition in operands}


def products(cut: HeadTiles, *, all_variants: bool) -> None:
    """Each product, where asked in each layout that a head can have and with all that it can be asked for."""
    both = (False, True) if all_variants else (True,)
    window = {"live": "*i32", "start": "i32"}
    chains = [chain_of(epilogue) for epilogue in (parse_epilogue(""), CAPPED)]
    variants = list(itertools.product(both, both, (False, True)[: 1 + all_variants], chains[1 - all_variants :]))
    learned = chain_of(LEARNED)
    variants += [(True, True, False, learned), (True, False, False, learned), (True, False, True, learned)]
    for b_transposed, stored, largest, operands in variants if all_variants else variants[:1]:
        steps, by_row = operands.parameters["steps"], operands.by_row
        tiles = cut.exponentials if stored else cut.losses
        own = {
            **window,
            "overflowed": "*i32",
            "reference": "*fp32",
            "tile_sums": "*fp32",
            "tiles_stride": "i32",
            "exps": blocks("bf16", tiles.m, tiles.n) if stored else "*fp32",
            "bias": "*bf16",
            "mask": "*u8",
            **operand_types(operands),
            **({"label": "*i32", **floats("at_target", "tile_moments"), "length": "i32"} if by_row else {}),
        }
        chain: dict[str, Any] = {**operands.parameters, "has_bias": bool(steps), "has_mask": not steps}
        flags = {"largest": largest, "stored": stored, "guarded": bool(by_row)}
        product("linear_cross_entropy_exponentials", False, b_transposed, own, tiles, **flags, **chain)
    for b_transposed, full, operands in itertools.product(both, both, chains[1 - all_variants :]):
        steps = operands.parameters["steps"]
        own = {
            **window,
            "x_start": "i32",
            "rows": "i32",
            "dz": blocks("bf16", cut.block.m, cut.block.n),
            **floats("lse", "factor", "entry", "uniform"),
        }
        own |= {"label": "*i32", "bias": "*bf16", "mask": "*u8", "class_weight": "*fp32", "first_class": "i32"}
        chain = {**operands.parameters, "has_bias": full, "has_mask": full}
        flags = {"smoothing": full and not steps, "class_weight": full}
        product("linear_cross_entropy_block", False, b_transposed, own, cut.block, **flags, **chain)
    for b_transposed, split in itertools.product(both, repeat=2):
        assert isinstance(cut.hidden_product, Tiles)
        tiles = cut.hidden_product
        own = {**window, "c": blocks("fp32", tiles.m, tiles.part)}
        product("linear_cross_entropy_hidden", False, b_transposed, own, tiles, split=split)
    sums = (
        ("K", "sums", "rows or second", False),
        ("M", "sums", "never", False),
        ("K", "zero", "never", True),
        ("K", "zero", "never", False),
        ("K", "rounded", "rows", False),
        ("K", "sums", "rows", False),
        ("M", "rounded", "never", False),
        ("M", "rounded", "always", False),
        ("M", "sums", "always", False),
    )
    for rows, begins, ends, uniform in sums if all_variants else sums[:2]:
        tiles = cut.weight_sum if rows == "K" else cut.block_hidden_sum
        own = {**window, **({"x_start": "i32"} if rows == "K" else {})}
        own |= {"high": blocks("u16", tiles.m, tiles.part), "low": blocks("u8", tiles.m, tiles.part)}
        own |= dict.fromkeys(("beside_rows", "beside_across", "beside_steps"), "i32") if rows == "K" else {}
        own |= {"along_m": "*fp32", "along_n": "*fp32"} if uniform else {}
        for b_transposed in {False, rows == "M"}:
            parameters: dict[str, Any] = {"rows": rows, "begins": begins, "ends": ends, "uniform": uniform}
            product("linear_cross_entropy_sum", rows == "K", b_transposed, own, tiles, **parameters)


def rows_of_exponentials() -> None:
    """The row kernels, with all options and with none."""
    window = {"live": "*i32", "start": "i32", "index": "*i32", "target": "*i64"}
    hidden = {"HIDDEN": 2048, "BLOCK": 1024}
    weight = {"weight": "*bf16", "class_stride": "i32", "hidden_stride": "i32"}
    plain, capped, learned = (chain_of(epilogue) for epilogue in (parse_epilogue(""), CAPPED, LEARNED))
    kinds = [(keeps, chain) for keeps in ("", "exponentials", "rows") for chain in (plain, capped)]
    for (keeps, chain), smoothed in [
        *zip(kinds, itertools.repeat(False)),
        *zip(kinds[::2], itertools.repeat(True)),
        (("", learned), False),
        (("exponentials", learned), False),
    ]:
        options: dict[str, Parameter] = dict.fromkeys(("has_bias", "has_mask", "class_weight"), chain is not plain)
        module = load(
            render(
                "linear_cross_entropy_exponential_rows",
                keeps=keeps,
                **chain.parameters,
                **chain.row_parameters,
                constant_slope=1.0,
                smoothing=0.1 * smoothed,
                share=1e-6 * smoothed,
                interpreted=False,
                **options,
            )
        )
        types = {**window, "x": "*bf16", "x_stride": "i32", **weight, "sampled": "*bf16"}
        types |= {"sampled_stride": "i32", "bias": "*bf16", "mask": "*u8"}
        types |= {**floats("weighted_classes", "weighted_bias"), **operand_types(chain), "x_chunk": "*bf16"}
        types |= floats("u_target", "slope_target", "u_sum", "reference", "row_values", "at_target")
        types |= {"chunk_label": "*i32"}
        compile_one(module.gather, types, {"SAMPLES": 8, "APART": 6282, **hidden}, warps=4)
        types = {**window, **floats("coefficient", "class_weight", "weight_sum", "tile_sums", "reference")}
        types |= {**floats("u_target", "slope_target", "u_sum", "losses"), **operand_types(chain)}
        types |= {**floats("tile_moments", "row_sums"), "rows": "i32", "exps": "*bf16", "exps_stride": "i32"}
        types |= {"x_chunk": "*bf16", **floats("factor", "entry", "weights", "lse_out", "uniform"), "label_out": "*i32"}
        compile_one(module.finish, types, {"TILES": 197, "TILE_BLOCK": 256, **hidden}, warps=4)
    types = {"live": "*i32", "start": "i32", **dict.fromkeys(("length", "width", "first_class"), "i32")}
    types |= {"terms": "*bf16", "stride": "i32", "label": "*i32", **floats("entry", "weights", "totals")}
    for sums, weighted in ((1, False), (3, True)):
        module = load(render("linear_cross_entropy_column_sums", sums=sums, weighted=weighted, all_rows=not weighted))
        compile_one(module.column_sums, types, {"CLASSES": 50257, "ROWS": 32, "COLUMNS": 128}, warps=4)
    for uniform in (0.0, 1e-6):
        module = load(render("linear_cross_entropy_scatter", uniform=uniform, interpreted=False))
        types = {**window, **weight, **floats("coefficient", "weighted_classes", "factor", "entry", "c")}
        types |= {"out": "*bf16", "out_stride": "i32", "out_hidden_stride": "i32"}
        compile_one(module.scatter, types, hidden, warps=4)


def rows_of_blocks() -> None:
    """What is done row by row around the blocks."""
    module = load(render("linear_cross_entropy_block_rows", interpreted=False))
    hidden = {"HIDDEN": 2048, "BLOCK": 1024}
    x = {"x": "*bf16", "x_stride": "i32"}
    weight = {"weight": "*bf16", "class_stride": "i32", "hidden_stride": "i32"}
    window = {"live": "*i32", "start": "i32", "index": "*i32"}
    compile_one(module.take, {**window, **x, "x_chunk": "*bf16"}, hidden, warps=4)
    compile_one(module.spread, {**window, "rows": "*bf16", "out": "*bf16", "out_stride": "i32"}, hidden, warps=4)
    types = {"live": "*i32", "label": "*i32", "entry": "*fp32", **weight, "dx": "*bf16", "dx_stride": "i32"}
    compile_one(module.begin_hidden, types, hidden, warps=4)
    types = {"live": "*i32", "first_class": "i32", "end_class": "i32", "keys": "*i32", "order": "*i64"}
    types |= {"index": "*i32", "entry": "*fp32", **x}
    types |= {"dw": "*bf16", "class_stride": "i32", "hidden_stride": "i32"}
    compile_one(module.begin_weight, types, {"HIDDEN": 768, "COLUMNS": 1024, "ROWS": 4}, warps=4)


def live_rows() -> None:
    """The rows that count."""
    for number, kind in enumerate(("*i32", "*i64")):
        module = load(
            render("linear_cross_entropy_live_rows", ignore_index=-100 if number else None, chosen=bool(number))
        )
        types = {"target": "*i64", "chosen": "*fp32", "rows": "i32", "length": "i32"}
        types |= {"index": "*i32", "keys": kind, "count": "*i32", "wrong": "*i32"}
        types |= {"zeros": "*i32", "chunks": "i32"}
        constants = {"LARGEST": 2**31 - 1 if number == 0 else 2**63 - 1, "CLASSES": 50257, "BLOCK": 4096}
        compile_one(module.live_rows, types, constants, warps=16)


def targets_of_exponentials() -> None:
    """What the weight's gradient gets at the targets."""
    module = load(render("linear_cross_entropy_targets", interpreted=False))
    types = {"live": "*i32", "start": "i32", "keys": "*i32", "order": "*i64", "index": "*i32", "x": "*bf16"}
    types |= {"x_stride": "i32", "factor_x": "*bf16", **floats("factor", "entry")}
    types |= {"high": "*u16", "high_stride": "i32", "low": "*u8", "low_stride": "i32"}
    constants = {"CLASSES": 50257, "HIDDEN": 768, "WIDTH": SHIPPED.weight_sum.part}
    compile_one(module.add_targets, types, {**constants, "BYTES": 128, "ROWS": 4}, warps=2)


def floats(*names: str) -> dict[str, str]:
    """Arguments that are pointers to float32."""
    return dict.fromkeys(names, "*fp32")


if __name__ == "__main__":
    rows_of_logits()
    products(SHIPPED, all_variants=True)
    for tiles in (SAFE, Tiles(m=64, n=256, k=64, group=8, parts=4, warps=4, stages=3)):
        products(HeadTiles(False, *[tiles] * len(PRODUCTS)), all_variants=False)
    rows_of_exponentials()
    rows_of_blocks()
    live_rows()
    targets_of_exponentials()
    print("compiled")
