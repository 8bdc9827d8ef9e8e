"""Nodes that are activations, and whether Inductor makes them in one kernel with what reads their values."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx

from structfly.lowering.activations import ACTIVATIONS
from structfly.rewriter.calls import read
from structfly.rewriter.views import VIEWS

_OTHERS = {
    F.celu,
    F.elu,
    F.hardsigmoid,
    F.hardswish,
    F.hardtanh,
    F.leaky_relu,
    F.logsigmoid,
    F.mish,
    F.prelu,
    F.relu6,
    F.selu,
    F.softplus,
    F.softsign,
}
_PRODUCTS = ("linear", "matmul", "bmm", "addmm", "einsum")
_PRODUCT_FUNCTIONS = {F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention}


def activation_of(node: fx.Node) -> str:
    """The name of the activation that a node is, one of those of ``ACTIVATIONS`` or another, or ""."""
    call = read(node)
    if call is None:
        return str(getattr(node.target, "__name__", node.target)) if node.target in _OTHERS else ""
    if call.op == "gelu" and call.get("approximate", "none") == "tanh":
        return "gelu_tanh"
    return call.op if call.op in ACTIVATIONS or node.target in _OTHERS else ""


def is_written(node: fx.Node) -> bool:
    """Whether a value is written to memory in any case: a product reads it, or an op, or the graph returns it.

    Else Inductor makes it in one kernel with the elementwise work that reads it.
    """
    return any(_reads_memory(user) for user in node.users)


def _reads_memory(user: fx.Node) -> bool:
    if user.op == "output" or _is_product(user):
        return True
    call = read(user)
    leads_on = _does_nothing(user) if call is None else call.op in (*VIEWS, "contiguous")
    return leads_on and is_written(user)


def _is_product(user: fx.Node) -> bool:
    target: Any = user.target
    if getattr(target, "namespace", "") == "structfly":
        return True
    call = read(user)
    return target in _PRODUCT_FUNCTIONS if call is None else call.op in _PRODUCTS


def _does_nothing(user: fx.Node) -> bool:
    """Whether it is dropout that is told not to train."""
    return user.target is F.dropout and (user.kwargs.get("training") is False or user.args[2:3] == (False,))
