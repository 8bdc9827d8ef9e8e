"""Schedule, scheme and workspace of a call: chosen as for a head in a graph, among the fused candidates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

import sympy
import torch
from torch import Tensor

from structfly import compat
from structfly.config import SiteSettings
from structfly.lowering.device_profile import device_profile
from structfly.lowering.head.chunks import wide_dtype
from structfly.lowering.head.epilogue import Epilogue, parse_epilogue
from structfly.lowering.head.linear import Wanted
from structfly.ops.checks import products_dtype
from structfly.patterns.head.menu import FusedCandidate, contiguous_row
from structfly.patterns.linear_cross_entropy.menu import head_menu
from structfly.patterns.linear_divergence.menu import divergence_menu
from structfly.records import DeviceProfile, Menu
from structfly.records.cost import at_sizes
from structfly.rewriter.choosing import Order, choose


@dataclass(frozen=True, kw_only=True)
class CalledHead(ABC):
    """A head whose sizes are numbers: what :class:`~structfly.patterns.head.menu.Head` asks for, and can be hashed.

    Attributes:
        row_number, hidden_number, class_number: N, H and C; of sizes that are symbols their example values.
        chain: the epilogue as the op takes it.
    """

    row_number: int
    hidden_number: int
    class_number: int
    dtype: torch.dtype
    gradients: Wanted
    coefficient_class: str
    recompute: str
    chain: str
    weight_row: int

    @property
    def loss_dtype(self) -> torch.dtype:
        return wide_dtype(self.dtype)

    @property
    def rows(self) -> sympy.Expr:
        return sympy.Integer(self.row_number)

    @property
    def hidden(self) -> sympy.Expr:
        return sympy.Integer(self.hidden_number)

    @property
    def classes(self) -> sympy.Expr:
        return sympy.Integer(self.class_number)

    @property
    def sizes(self) -> Mapping[sympy.Symbol, int]:
        return {}

    @property
    def epilogue(self) -> Epilogue:
        return parse_epilogue(self.chain)

    @property
    def rank(self) -> sympy.Expr:
        return sympy.Integer(0)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("loss",)

    @property
    def adapter(self) -> bool:
        return False

    @property
    def weight_name(self) -> str:
        return "weight"

    @abstractmethod
    def menu(self, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        """What there is to choose from."""


@dataclass(frozen=True, kw_only=True)
class CalledCrossEntropy(CalledHead):
    """What the loss head's menu asks for."""

    label_smoothing: float

    @property
    def consumers(self) -> int:
        return 1

    @property
    def row_program(self) -> str:
        return ""

    @property
    def group_rows(self) -> int:
        return 1

    @property
    def regrouped(self) -> bool:
        return False

    def menu(self, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        return head_menu(self, profile, settings)


@dataclass(frozen=True, kw_only=True)
class CalledDivergence(CalledHead):
    """What the divergence's menu asks for."""

    kind_name: str
    teacher_given: bool
    teacher_dtype: torch.dtype
    teacher_bytes: int
    teacher_hidden_number: int

    @property
    def teacher_hidden(self) -> sympy.Expr:
        return sympy.Integer(self.teacher_hidden_number)

    def menu(self, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        return divergence_menu(self, profile, settings)


class HeadFields(TypedDict):
    """The fields of :class:`CalledHead` that every function has."""

    row_number: int
    hidden_number: int
    class_number: int
    dtype: torch.dtype
    gradients: Wanted
    coefficient_class: str
    recompute: str
    chain: str
    weight_row: int


def head_fields(
    linear: Mapping[str, Tensor | None], learned: Sequence[Tensor], chain: str, reduction: str, *, recompute: bool
) -> HeadFields:
    """Of a call whose ``linear`` has input, weight and bias, and whose chain has ``learned`` operands."""
    input, weight, bias = linear["input"], linear["weight"], linear["bias"]
    assert input is not None
    assert weight is not None
    enabled = torch.is_grad_enabled()
    differentiable = (input, weight, bias, None, None, *learned)
    per_row = "losses of single rows have no common upstream factor" if reduction == "none" else ""
    return HeadFields(
        row_number=number(input, input.shape[:-1]),
        hidden_number=number(weight, weight.shape[1:]),
        class_number=number(weight, weight.shape[:1]),
        dtype=products_dtype(linear),
        gradients=Wanted.of([enabled and tensor is not None and tensor.requires_grad for tensor in differentiable]),
        coefficient_class="D" if reduction == "none" else "A",
        recompute="asked for" if recompute else per_row,
        chain=chain,
        weight_row=number(weight, [contiguous_row(weight)]),
    )


def softcap_steps(softcap: float | None) -> str:
    """A softcap as the ops' chains have it."""
    return "" if softcap is None else f"div:{softcap!r},tanh,mul:{softcap!r}"


def number(tensor: Tensor, sizes: Sequence[int]) -> int:
    """The product of ``sizes``, which are those of ``tensor``, at their example values; adds no guard."""
    result = 1
    for size in sizes:
        plain = isinstance(size, int)
        result *= size if plain else int(at_sizes(compat.expression(size), compat.size_hints(tensor)))
    return result


@lru_cache(maxsize=1024)
def plan(head: CalledHead, device: torch.device, loss_memory: int | None) -> FusedCandidate:
    """The fused candidate predicted to be fastest within the limit."""
    # Not at the top: they import triton.
    import structfly.lowering.linear_cross_entropy.flops
    import structfly.lowering.linear_divergence.flops  # noqa: F401

    profile = device_profile(device)
    menu = head.menu(profile, SiteSettings(loss_memory=loss_memory))
    (choice,) = choose([Order(head.sizes, menu, profile, always=True)])
    assert isinstance(choice.candidate, FusedCandidate)
    return choice.candidate
