"""Random calls of the op, for every test that needs one."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.linear import DIFFERENTIABLE, Gradients
from structfly.lowering.head.operations import OPERATIONS
from structfly.lowering.linear_cross_entropy.arguments import Arguments, Outputs
from structfly.lowering.linear_cross_entropy.op import linear_cross_entropy
from structfly.lowering.linear_cross_entropy.reference import linear_cross_entropy_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPILOGUES = (
    *("", "mul:0.5", "div:3.0,tanh,mul:3.0", "mul:-1.25", "tanh,mul:4.0,tanh"),
    *("add:1.0,div:2.0,sigmoid,mul:5.0", "neg,rsub:0.5,mul:1.5"),
)


@st.composite
def epilogues(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> str:
    """Random chains; values stay of the order of 1, where every step has a slope to be seen.

    What has no bound is bounded before it is exponentiated, and what is divided by is kept from 0: operands that are
    numbers lie between 0.5 and 2 (see :func:`operands_of`).  A clamp's slope jumps, and in 16 bits values round across
    the jump in one computation and not in the other.
    """
    names = [name for name in sorted(OPERATIONS) if dtype.itemsize > 2 or not name.startswith("clamp")]
    names = [name for name in names if dtype != torch.float16 or OPERATIONS[name].steepest is not None]
    steps: list[str] = []
    kinds: list[str] = []

    def operand(*constants: float) -> str:
        kind = draw(st.sampled_from(("constant", "constant", "scalar", "row", "class")))
        if kind == "constant":
            return repr(draw(st.sampled_from(constants)))
        kinds.append(kind)
        return f"{kind}{len(kinds) - 1}"

    def condition() -> str:
        kinds.append(draw(st.sampled_from(("row", "class"))))
        return f"{kinds[-1]}{len(kinds) - 1}"

    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(names))
        if name in ("where", "masked_fill"):
            steps.append(f"{name}:{condition()}:{operand(0.5, -2.0)}")
        elif name in ("clamp_min", "clamp_max"):
            steps.append(f"{name}:{operand(-1.7, 1.3)}")
        elif name == "rdiv":
            steps.extend(("sigmoid", "add:0.5", f"rdiv:{operand(1.5, -0.5)}"))
        elif name == "exp":
            steps.extend(("tanh", "exp"))
        elif OPERATIONS[name].operands:
            steps.append(f"{name}:{operand(1.5, -0.75)}")
        else:
            steps.append(name)
    return ",".join(steps)


def operands_of(epilogue: str, rows: int, classes: int, generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """Random tensors for an epilogue; numbers lie between 0.5 and 2."""
    chain = parse_epilogue(epilogue)
    shapes: dict[str, tuple[int, ...]] = {"scalar": (), "row": (rows,), "class": (classes,)}
    made = [torch.rand(shapes[operand.kind], generator=generator) * 1.5 + 0.5 for operand in chain.operands]
    return [value < 1.5 if index in chain.conditions else value.to(dtype) for index, value in enumerate(made)]


def make_call(
    *,
    rows: int = 13,
    hidden: int = 8,
    classes: int = 37,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    bias: bool = False,
    class_weight: bool = False,
    row_weight: bool = False,
    class_mask: bool = False,
    rank: int = 0,
    ignored: float = 0.2,
    cut: int = 0,
    statistics: str = "",
    frozen: frozenset[str] = frozenset(),
    transposed: bool = False,
    device: str = "cpu",
    operand_dtype: torch.dtype | None = None,
    **options: Any,
) -> Arguments:
    """One call of the op on random tensors; ``options`` replaces any other argument."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str, *shape: int) -> Tensor:
        value = torch.randn(*shape, generator=generator).to(dtype)
        return value.requires_grad_(name not in frozen)

    num_classes = classes - cut
    target = torch.randint(0, num_classes, (rows,), generator=generator)
    ignore_index = options.get("ignore_index", -100)
    if ignore_index is not None:
        target.masked_fill_(torch.rand(rows, generator=generator) < ignored, ignore_index)
    weight = tensor("weight", hidden, classes) if transposed else tensor("weight", classes, hidden)
    if transposed:
        weight = weight.detach().t().requires_grad_("weight" not in frozen)
    epilogue = options.pop("epilogue", "")
    operands = operands_of(epilogue, rows, num_classes, generator, operand_dtype or dtype)
    for operand in operands:
        operand.requires_grad_(operand.is_floating_point() and "operands" not in frozen)
    if class_mask:  # a masked class is no target
        epilogue = ",".join(filter(None, (epilogue, f"where:class{len(operands)}:-inf")))
        operands.append(torch.rand(num_classes, generator=generator) < 0.8)
        operands[-1][target.clamp_min(0)] = True
    call = Arguments(
        x=tensor("x", rows, hidden),
        weight=weight,
        bias=tensor("bias", classes) if bias else None,
        target=target,
        choices=torch.randint(0, num_classes, (rows, 2), generator=generator) if "chosen" in statistics else None,
        class_weight=torch.rand(num_classes, generator=generator) + 0.1 if class_weight else None,
        row_weight=torch.randn(rows, generator=generator) if row_weight else None,
        adapter_x=tensor("adapter_x", rows, rank) if rank else None,
        adapter_weight=tensor("adapter_weight", classes, rank) if rank else None,
        adapter_scale=0.5,
        epilogue=epilogue,
        operands=operands,
        num_classes=num_classes,
        ignore_index=-100,
        label_smoothing=0.0,
        reduction="sum" if row_weight else "mean",
        statistics=statistics,
        row_loss="",
        row_operands=[],
        row_group=[],
        loss_dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        gradients=(),
        schedule="forward",
        scheme="logits",
        workspace=2**20,
        autocast=True,
    )
    call = call._replace(**options)

    def move(value: Tensor) -> Tensor:
        return value.detach().to(device).requires_grad_(value.requires_grad)

    moved: dict[str, Any] = {name: move(value) for name, value in call._asdict().items() if isinstance(value, Tensor)}
    call = call._replace(**moved, operands=[move(operand) for operand in call.operands])
    if call.reduction == "none":
        call = call._replace(schedule="backward")
    return call._replace(gradients=[tensor is not None and tensor.requires_grad for tensor in call.differentiable])


@st.composite
def calls(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, statistics: tuple[str, ...] = ()) -> Arguments:
    """Random shapes, dtypes, options and chunk lengths; some of the ``statistics``.

    Row weights have one sign: of a handful of terms of both, the sum may be as small as its rounding.
    """
    dtype = draw(st.sampled_from(dtypes))
    classes = draw(st.integers(2, 70))
    reduction = draw(st.sampled_from(("mean", "sum", "none")))
    bytes_per_row = 80 * dtype.itemsize
    asked = draw(st.sets(st.sampled_from(statistics), min_size=1)) if statistics else set()
    asked -= {"losses"} if reduction == "none" else set()
    call = make_call(
        rows=draw(st.integers(0, 40)),
        hidden=draw(st.integers(1, 9)),
        classes=classes,
        cut=draw(st.integers(0, min(3, classes - 2))),
        dtype=dtype,
        seed=draw(st.integers(0, 2**16)),
        bias=draw(st.booleans()),
        class_weight=draw(st.booleans()),
        row_weight=reduction == "sum" and draw(st.booleans()),
        class_mask=draw(st.booleans()),
        rank=draw(st.sampled_from((0, 0, 2))),
        ignored=draw(st.sampled_from((0.0, 0.3, 1.0))),
        frozen=frozenset(draw(st.sets(st.sampled_from((*DIFFERENTIABLE, "operands")), max_size=2))),
        transposed=draw(st.booleans()),
        epilogue=draw(st.sampled_from(EPILOGUES) | epilogues(dtype)),
        label_smoothing=draw(st.sampled_from((0.0, 0.0, 0.1))),
        reduction=reduction,
        statistics=",".join(sorted(asked)),
        ignore_index=draw(st.sampled_from((-100, 0, None))),
        schedule=draw(st.sampled_from(("forward", "backward"))),
        workspace=draw(st.integers(1, 50)) * bytes_per_row,
    )
    sign = draw(st.sampled_from((1.0, -1.0)))
    return call if call.row_weight is None else call._replace(row_weight=sign * call.row_weight.abs())


def run(call: Arguments, *leaves: Tensor) -> Tensor:
    """The op's loss, its differentiable tensors replaced by ``leaves`` (those that are not None, in order)."""
    return linear_cross_entropy(*with_leaves(call, leaves)).loss


def run_all(call: Arguments, *leaves: Tensor) -> dict[str, Tensor]:
    """The same call's loss and statistics."""
    made = linear_cross_entropy(*with_leaves(call, leaves))
    return {name: getattr(made, name) for name in names_of(call)}


def run_reference(call: Arguments, *leaves: Tensor) -> Tensor:
    """The reference's loss in the leaves' dtype, as float32 at least."""
    return run_reference_all(call, *leaves)["loss"]


def run_reference_all(call: Arguments, *leaves: Tensor) -> dict[str, Tensor]:
    """The reference's loss and statistics, floating-point ones as float32 at least."""
    call = with_leaves(call, leaves)
    names = ("choices", "bias", "class_weight", "adapter_x", "adapter_weight", "adapter_scale", "epilogue", "operands")
    options: dict[str, Any] = {
        name: getattr(call, name) for name in (*names, "num_classes", "ignore_index", "label_smoothing", "reduction")
    }
    made = linear_cross_entropy_reference(
        call.x,
        call.weight,
        call.target,
        row_weight=None if call.row_weight is None else call.row_weight.to(call.x.dtype),
        **options,
        statistics=call.named_statistics,
        row_loss=call.row_loss,
        row_operands=[each if each.dtype == torch.bool else each.to(call.x.dtype) for each in call.row_operands],
        row_group=call.row_group,
    )
    values: dict[str, Tensor] = {name: getattr(made, name) for name in names_of(call)}
    narrow = (torch.float16, torch.bfloat16)
    return {name: value.float() if value.dtype in narrow else value for name, value in values.items()}


def joined(values: dict[str, Tensor]) -> Tensor:
    """All values that may have a gradient, one after another."""
    return torch.cat([value.flatten() for name, value in values.items() if name not in ("losses", "argmax")])


def names_of(call: Arguments) -> tuple[str, ...]:
    """What a call returns beside gradients."""
    return call.named_statistics if call.target is None else ("loss", *call.named_statistics)


def gradients_of(made: Outputs) -> Gradients:
    """The gradients that a call made in the forward pass."""
    return Gradients._make(made[-len(Gradients._fields) :])


def leaves_of(call: Arguments) -> list[Tensor]:
    """The differentiable tensors that are there, in order."""
    return [tensor for tensor in call.differentiable if tensor is not None and tensor.is_floating_point()]


def with_leaves(call: Arguments, leaves: tuple[Tensor, ...]) -> Arguments:
    """The call with its differentiable tensors replaced."""
    rest = iter(leaves)
    replaced: dict[str, Any] = {name: next(rest) for name in DIFFERENTIABLE if getattr(call, name) is not None}
    operands = [next(rest) if operand.is_floating_point() else operand for operand in call.operands]
    return call._replace(**replaced, operands=operands)
