"""Compile the recurrence that makes its gates for Hopper, without a GPU: run by test_projected.py in a process of its
own."""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from structfly.lowering.linear_recurrence.projected import CUTS, Cut, kernels
from structfly.lowering.tuning.limits import shared_memory

_KINDS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def compiled(cut: Cut, order: str, kind: str, **options: bool) -> Any:
    """A compiled kernel; ``options`` are bias, begun, reverse and linked."""
    function = kernels(order=order, dtype=_KINDS[kind], interpreted=False, **options).run
    values = {"STEPS": cut.steps, "ROWS": cut.rows, "BLOCK": cut.block, "GROUP": cut.group, "INNER": cut.inner}
    known = {
        "inputs": f"tensordesc<{kind}[1, {cut.steps}, {cut.rows}, {cut.inner}]>",
        "weight": f"tensordesc<{kind}[1, {cut.block}, {cut.inner}]>",
        "output": f"tensordesc<{kind}[1, {cut.steps}, {cut.rows}, {cut.block}]>",
        "bias": f"*{kind}",
        "final": "*fp32",
        "initial": "*fp32",
        "links": "*i64",
        **dict.fromkeys([*values, "initial_d"], "constexpr"),
    }
    types = {name: known.get(name, "i32") for name in function.arg_names}
    constants = {(at,): values.get(name, 1) for at, name in enumerate(types) if types[name] == "constexpr"}
    whole = ("width", "K", "initial_b")
    multiples = [at for at, name in enumerate(types) if name in whole or types[name].startswith("*")]
    aligned = {(at,): [["tt.divisibility", 16]] for at in multiples}
    source = ASTSource(function, types, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": cut.warps, "num_stages": cut.stages})


def check_products(made: Any, cut: Cut, order: str) -> None:
    """Operands go from the device's memory to the tensor cores through shared memory alone, in the time of products."""
    assert made.metadata.shared <= shared_memory((9, 0)), f"{made.metadata.shared} bytes of shared memory"
    ptx = str(made.asm["ptx"])
    shapes = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+)", ptx))
    assert shapes == {f"m64n{cut.chunk}"}, f"tensor cores' tiles are {shapes}"
    dots = re.findall(r"warp_group_dot .*isAsync = true", made.asm["ttgir"])
    assert len(dots) == len(order), f"{len(dots)} products run beside loads"


def barriers(made: Any) -> int:
    return str(made.asm["ptx"]).count("bar.sync")


def main() -> None:
    plain = {"bias": True, "begun": False, "reverse": False, "linked": True}
    few = Cut(4, 8, 64, 64, 4, 2)
    for number, order in enumerate(("zf", "zfo", "zfoi")):
        kind = list(_KINDS)[number]
        cut = few._replace(inner=32) if kind == "fp32" else few
        for turned in (False, True):
            options = {"bias": turned, "begun": turned, "reverse": turned, "linked": True}
            check_products(compiled(cut, order, kind, **options), cut, order)
    check_products(compiled(few, "zfo", "bf16", **{**plain, "linked": False}), few, "zfo")
    for order, cut in CUTS.items():
        less, more = (compiled(cut._replace(steps=steps), order, "bf16", **plain) for steps in (4, cut.steps))
        check_products(more, cut, order)
        counts = barriers(less), barriers(more)
        assert counts[0] == counts[1], f"barriers with 4 and {cut.steps} steps: {counts}: a step is exchanged"
    print("compiled")


if __name__ == "__main__":
    main()
