"""Who computes h_t = f_t h_{t-1} + x_t: structfly, plain torch, and peers, each of which needs its own package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from structfly.ops import linear_recurrence

Recurrence = Callable[[Tensor, Tensor], Tensor]
OURS = "structfly"


@dataclass(frozen=True)
class Provider:
    """One of them.

    Attributes:
        build: gives f, x -> h; raises ImportError where its package is not there.
        time_last: it takes (B, D, T), and gets it without a copy that would be timed.
        why_not_trained: why it has no gradient that can be compared, "" where it has.
        most_steps: longer sequences take too long, to compile or to run.
        most_trained: states of which its backward, which keeps arrays of each pass, fits a GPU.
        compiled: its first call takes seconds.
    """

    build: Callable[[], Recurrence]
    time_last: bool = False
    why_not_trained: str = ""
    most_steps: int = 2**22
    most_trained: int = 2**31
    compiled: bool = False

    def why_not(self, steps: int, elements: int, *, training: bool) -> str:
        """Why it does not run such a problem, "" where it does."""
        if training and self.why_not_trained:
            return self.why_not_trained
        if steps > self.most_steps:
            return f"{steps} steps; that takes too long above {self.most_steps}"
        if training and elements > self.most_trained:
            return f"{elements} states; its backward keeps arrays of each pass, of at most {self.most_trained}"
        return ""


def doubling(f: Tensor, x: Tensor) -> Tensor:
    """log2(T) passes, each of which doubles how far a state reaches."""
    reach = 1
    while reach < x.shape[1]:
        x = torch.cat([x[:, :reach], x[:, reach:] + x[:, :-reach] * f[:, reach:]], 1)
        f = torch.cat([f[:, :reach], f[:, reach:] * f[:, :-reach]], 1)
        reach *= 2
    return x


def loop(f: Tensor, x: Tensor) -> Tensor:
    """One step after another."""
    state, states = torch.zeros_like(x[:, 0]), []
    for gate, input in zip(f.unbind(1), x.unbind(1), strict=True):
        state = torch.addcmul(input, gate, state)
        states.append(state)
    return torch.stack(states, 1)


def _structfly(f: Tensor, x: Tensor) -> Tensor:
    return linear_recurrence(f, x)[0]


def _compiled_scan() -> Recurrence:
    module: Any = import_module("torch._higher_order_ops.associative_scan")

    def combine(one: Any, other: Any) -> Any:
        return one[0] * other[0], other[0] * one[1] + other[1]

    def scan(f: Tensor, x: Tensor) -> Tensor:
        states: Tensor = module.associative_scan(combine, (f, x), dim=1, combine_mode="pointwise")[1]
        return states

    return torch.compile(scan, dynamic=False)


def _accelerated_scan() -> Recurrence:
    function: Recurrence = import_module("accelerated_scan.scalar").scan
    return function


def _chunk_hgrn() -> Recurrence:
    function: Any = import_module("fla.ops.hgrn").chunk_hgrn
    return lambda f, x: function(x, f.log())[0]  # it takes the logarithms of gates


PROVIDERS: Mapping[str, Provider] = {
    OURS: Provider(lambda: _structfly),
    "doubling": Provider(lambda: doubling, most_trained=2**26),
    "doubling-inductor": Provider(
        lambda: torch.compile(doubling, dynamic=False), most_steps=2**16, most_trained=2**26, compiled=True
    ),
    "loop": Provider(lambda: loop, most_steps=2**14),
    "associative_scan": Provider(
        _compiled_scan, why_not_trained="torch's gradient of it leaves out the gates (pytorch#172568)", compiled=True
    ),
    "accelerated-scan": Provider(_accelerated_scan, time_last=True, compiled=True),
    "chunk_hgrn": Provider(_chunk_hgrn, compiled=True),
}
