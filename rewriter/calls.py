"""Canonical reading of one node: every spelling of an operation has one name and named arguments.

``F.log_softmax(z, -1)``, ``torch.log_softmax(z, dim=-1)`` and ``z.log_softmax(-1)`` all read as
``Call("log_softmax", {"input": z, "dim": -1})``.  The table is explicit, so that an operation nobody thought about
is unknown rather than guessed.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from structfly import compat


@dataclass(frozen=True)
class Call:
    """One operation: canonical name, node, and arguments by name; absent ones are absent."""

    op: str
    node: fx.Node
    arguments: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)


# Parameter names; a leading "*" takes all remaining positional arguments.
_BINARY = ("input", "other")
_REDUCE = ("input", "dim", "keepdim")

# name -> (parameters of the function spelling, function spellings, method spellings)
_TABLE: dict[str, tuple[tuple[str, ...], tuple[Callable[..., Any], ...], tuple[str, ...]]] = {
    "linear": (("input", "weight", "bias"), (F.linear,), ()),
    "matmul": (_BINARY, (torch.matmul, operator.matmul, torch.mm), ("matmul", "mm", "__matmul__")),
    "bmm": (("input", "mat2"), (torch.bmm,), ("bmm",)),
    "addmm": (("input", "mat1", "mat2"), (torch.addmm,), ("addmm",)),
    "einsum": (("equation", "*operands"), (torch.einsum, torch.functional.einsum), ()),
    "add": (_BINARY, (torch.add, operator.add, operator.iadd), ("add", "add_")),
    "sub": (
        _BINARY,
        (torch.sub, torch.subtract, operator.sub, operator.isub),
        ("sub", "sub_", "subtract", "subtract_"),
    ),
    "mul": (
        _BINARY,
        (torch.mul, torch.multiply, operator.mul, operator.imul),
        ("mul", "mul_", "multiply", "multiply_"),
    ),
    "div": (
        _BINARY,
        (torch.div, torch.divide, torch.true_divide, operator.truediv, operator.itruediv),
        ("div", "div_", "divide", "divide_", "true_divide", "true_divide_"),
    ),
    "neg": (("input",), (torch.neg, torch.negative, operator.neg), ("neg", "neg_", "negative", "negative_")),
    "exp": (("input",), (torch.exp,), ("exp", "exp_")),
    "tanh": (("input",), (torch.tanh, F.tanh), ("tanh", "tanh_")),
    "sigmoid": (("input",), (torch.sigmoid, F.sigmoid, torch.special.expit), ("sigmoid", "sigmoid_")),
    "clamp": (("input", "min", "max"), (torch.clamp, torch.clip), ("clamp", "clamp_", "clip", "clip_")),
    "clamp_min": (("input", "min"), (torch.clamp_min,), ("clamp_min", "clamp_min_")),
    "clamp_max": (("input", "max"), (torch.clamp_max,), ("clamp_max", "clamp_max_")),
    "expm1": (("input",), (torch.expm1, torch.special.expm1), ("expm1", "expm1_")),
    "log1p": (("input",), (torch.log1p, torch.special.log1p), ("log1p", "log1p_")),
    "sqrt": (("input",), (torch.sqrt,), ("sqrt", "sqrt_")),
    "rsqrt": (("input",), (torch.rsqrt,), ("rsqrt", "rsqrt_")),
    "square": (("input",), (torch.square,), ("square", "square_")),
    "pow": (_BINARY, (torch.pow, operator.pow, operator.ipow), ("pow", "pow_")),
    "reciprocal": (("input",), (torch.reciprocal,), ("reciprocal", "reciprocal_")),
    "abs": (("input",), (torch.abs, operator.abs), ("abs", "abs_")),
    "logsigmoid": (("input",), (F.logsigmoid,), ()),
    "softplus": (("input", "beta", "threshold"), (F.softplus,), ()),
    "relu": (("input", "inplace"), (torch.relu, F.relu), ("relu", "relu_")),
    "minimum": (_BINARY, (torch.minimum,), ("minimum",)),
    "maximum": (_BINARY, (torch.maximum,), ("maximum",)),
    "gt": (_BINARY, (torch.gt, operator.gt), ("gt",)),
    "ge": (_BINARY, (torch.ge, operator.ge), ("ge",)),
    "lt": (_BINARY, (torch.lt, operator.lt), ("lt",)),
    "le": (_BINARY, (torch.le, operator.le), ("le",)),
    "eq": (_BINARY, (torch.eq, operator.eq), ("eq",)),
    "ne": (_BINARY, (torch.ne, operator.ne), ("ne",)),
    "and": (_BINARY, (torch.logical_and, torch.bitwise_and, operator.and_), ("logical_and", "bitwise_and")),
    "or": (_BINARY, (torch.logical_or, torch.bitwise_or, operator.or_), ("logical_or", "bitwise_or")),
    "not": (("input",), (torch.logical_not, torch.bitwise_not, operator.invert), ("logical_not", "bitwise_not")),
    "entr": (("input",), (torch.special.entr,), ()),
    "broadcast_tensors": (("*tensors",), (torch.broadcast_tensors, torch.functional.broadcast_tensors), ()),
    "lerp": (("input", "end", "weight"), (torch.lerp,), ("lerp", "lerp_")),
    "addcmul": (("input", "tensor1", "tensor2"), (torch.addcmul,), ("addcmul", "addcmul_")),
    "silu": (("input", "inplace"), (F.silu,), ()),
    "gelu": (("input", "approximate"), (F.gelu,), ()),
    "where": (("condition", "input", "other"), (torch.where,), ()),
    "masked_fill": (("input", "mask", "value"), (torch.masked_fill,), ("masked_fill", "masked_fill_")),
    "setitem": (("input", "index", "value"), (operator.setitem,), ("__setitem__",)),
    "to": (("input", "*to"), (), ("to", "type")),
    "type_as": (_BINARY, (), ("type_as",)),
    "float": (("input",), (), ("float",)),
    "half": (("input",), (), ("half",)),
    "bfloat16": (("input",), (), ("bfloat16",)),
    "double": (("input",), (), ("double",)),
    "bool": (("input",), (), ("bool",)),
    "log": (("input",), (torch.log,), ("log",)),
    "logaddexp": (_BINARY, (torch.logaddexp,), ("logaddexp",)),
    "contiguous": (("input",), (), ("contiguous",)),
    "detach": (("input",), (torch.detach,), ("detach",)),
    "clone": (("input",), (torch.clone,), ("clone",)),
    "view": (("input", "*shape"), (), ("view",)),
    "reshape": (("input", "*shape"), (torch.reshape,), ("reshape",)),
    "flatten": (("input", "start_dim", "end_dim"), (torch.flatten,), ("flatten",)),
    "unflatten": (("input", "dim", "sizes"), (torch.unflatten,), ("unflatten",)),
    "squeeze": (("input", "dim"), (torch.squeeze,), ("squeeze",)),
    "unsqueeze": (("input", "dim"), (torch.unsqueeze,), ("unsqueeze",)),
    "transpose": (("input", "dim0", "dim1"), (torch.transpose, torch.swapaxes), ("transpose", "swapaxes")),
    "permute": (("input", "*dims"), (torch.permute,), ("permute",)),
    "movedim": (("input", "source", "destination"), (torch.movedim, torch.moveaxis), ("movedim", "moveaxis")),
    "t": (("input",), (torch.t,), ("t",)),
    "getattr": (("input", "name"), (builtins.getattr,), ()),
    "getitem": (("input", "index"), (operator.getitem,), ("__getitem__",)),
    "select": (("input", "dim", "index"), (torch.select,), ("select",)),
    "slice": (("input", "dim", "start", "end", "step"), (torch.ops.aten.slice,), ()),
    "narrow": (("input", "dim", "start", "length"), (torch.narrow,), ("narrow",)),
    "split": (("input", "split_size", "dim"), (torch.split,), ("split",)),
    "chunk": (("input", "chunks", "dim"), (torch.chunk,), ("chunk",)),
    "tensor_split": (("input", "sections", "dim"), (torch.tensor_split,), ("tensor_split",)),
    "unbind": (("input", "dim"), (torch.unbind,), ("unbind",)),
    "tensor": (("data",), (torch.tensor,), ()),
    "size": (("input", "dim"), (), ("size",)),
    "dim": (("input",), (), ("dim", "ndimension")),
    "numel": (("input",), (torch.numel,), ("numel", "nelement")),
    "expand": (("input", "*sizes"), (), ("expand",)),
    "expand_as": (_BINARY, (), ("expand_as",)),
    "repeat": (("input", "*repeats"), (), ("repeat",)),
    "flip": (("input", "*dims"), (torch.flip,), ("flip",)),
    "unfold": (("input", "dimension", "size", "step"), (), ("unfold",)),
    "roll": (("input", "shifts", "dims"), (torch.roll,), ("roll",)),
    "repeat_interleave": (
        ("input", "repeats", "dim"),
        (torch.repeat_interleave,),
        ("repeat_interleave",),
    ),
    "kron": (_BINARY, (torch.kron,), ("kron",)),
    "round": (("input",), (torch.round,), ("round",)),
    "hardshrink": (("input", "lambd"), (F.hardshrink,), ("hardshrink",)),
    "sinc": (("input",), (torch.sinc, torch.special.sinc), ("sinc",)),
    "irfft": (("input", "n", "dim", "norm"), (torch.fft.irfft,), ()),
    "tril": (("input", "diagonal"), (torch.tril,), ("tril",)),
    "triu": (("input", "diagonal"), (torch.triu,), ("triu",)),
    "pad": (("input", "pad", "mode", "value"), (F.pad, compat.PAD), ()),
    "stack": (("tensors", "dim"), (torch.stack,), ()),
    "cat": (("tensors", "dim"), (torch.cat, torch.concat), ()),
    "full": (("size", "fill_value"), (torch.full,), ()),
    "ones": (("*size",), (torch.ones,), ()),
    "zeros": (("*size",), (torch.zeros,), ()),
    "arange": (("*bounds",), (torch.arange,), ()),
    "linspace": (("start", "end", "steps"), (torch.linspace,), ()),
    "zeros_like": (("input",), (torch.zeros_like,), ()),
    "ones_like": (("input",), (torch.ones_like,), ()),
    "full_like": (("input", "fill_value"), (torch.full_like,), ()),
    "sum": (_REDUCE, (torch.sum,), ("sum",)),
    "mean": (_REDUCE, (torch.mean,), ("mean",)),
    "max": (_REDUCE, (torch.max,), ("max",)),
    "min": (_REDUCE, (torch.min,), ("min",)),
    "argmax": (_REDUCE, (torch.argmax,), ("argmax",)),
    "softmax": (("input", "dim"), (torch.softmax, torch.special.softmax), ("softmax",)),
    "log_softmax": (("input", "dim"), (torch.log_softmax, torch.special.log_softmax), ("log_softmax",)),
    "logsumexp": (_REDUCE, (torch.logsumexp, torch.special.logsumexp), ("logsumexp",)),
    "cumsum": (("input", "dim"), (torch.cumsum,), ("cumsum",)),
    "cumprod": (("input", "dim"), (torch.cumprod,), ("cumprod",)),
    "logcumsumexp": (("input", "dim"), (torch.logcumsumexp,), ("logcumsumexp",)),
    "gather": (("input", "dim", "index"), (torch.gather,), ("gather",)),
    "take_along_dim": (("input", "index", "dim"), (torch.take_along_dim,), ("take_along_dim",)),
    "kl_div": (
        ("input", "target", "size_average", "reduce", "reduction", "log_target"),
        (F.kl_div,),
        (),
    ),
    "nll_loss": (
        ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
        (F.nll_loss,),
        (),
    ),
    "cross_entropy": (
        (
            "input",
            "target",
            "weight",
            "size_average",
            "ignore_index",
            "reduce",
            "reduction",
            "label_smoothing",
        ),
        (F.cross_entropy,),
        (),
    ),
}

_FUNCTIONS = {function: (name, row[0]) for name, row in _TABLE.items() for function in row[1]}
for _function in (F.softmax, F.log_softmax):
    _FUNCTIONS[_function] = (_function.__name__, ("input", "dim", "_stacklevel", "dtype"))
_METHODS = {method: (name, row[0]) for name, row in _TABLE.items() for method in row[2]}
_METHODS["where"] = ("where", ("input", "condition", "other"))
# Keyword names that differ between spellings of one operation.
_SYNONYMS = {
    "split_size_or_sections": "split_size",
    "indices": "index",
    "axis0": "dim0",
    "axis1": "dim1",
    "exponent": "other",
}


def read(node: object) -> Call | None:
    """The canonical call of a node, or None for anything the table does not know."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    known: tuple[str, tuple[str, ...]] | None
    if node.op == "call_function":
        known = _FUNCTIONS.get(node.target) if callable(node.target) else None
    else:
        known = _METHODS.get(str(node.target))
    if known is None:
        return None
    name, parameters = known
    arguments: dict[str, Any] = {_SYNONYMS.get(key, key): value for key, value in node.kwargs.items()}
    for index, parameter in enumerate(parameters):
        if parameter.startswith("*"):
            rest = tuple(node.args[index:])
            if rest or parameter[1:] not in arguments:
                arguments[parameter[1:]] = rest
            break
        if index < len(node.args):
            arguments[parameter] = node.args[index]
    else:
        if len(node.args) > len(parameters):
            return None
    return Call(name, node, arguments)


def flat(values: object) -> tuple[Any, ...]:
    """``(2, 3)`` from both ``f(x, 2, 3)`` and ``f(x, (2, 3))``."""
    if isinstance(values, (tuple, list)):
        return tuple(values[0]) if len(values) == 1 and isinstance(values[0], (tuple, list)) else tuple(values)
    return (values,)


def index_entries(index: object, ndim: int) -> list[Any]:
    """What an index says of each dimension of a tensor of so many; None where it makes a new one."""
    entries = list(index) if isinstance(index, tuple) else [index]
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    at = next((at for at, entry in enumerate(entries) if entry is Ellipsis), len(entries))
    entries[at : at + 1] = [slice(None)] * (ndim - used)
    return entries


def both_ways(call: Call) -> list[tuple[fx.Node, fx.Node]]:
    """The operands of a sum or a product in either order; none where one is a number."""
    one, other = call["input"], call["other"]
    return [(one, other), (other, one)] if isinstance(one, fx.Node) and isinstance(other, fx.Node) else []
