"""Linear-like producers: every spelling of ``z = x W^T + b``, and of its sum with a low-rank update."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from structfly.compat import expression
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.region import example

_LAST = -1
_CASTS = ("to", "float", "half", "bfloat16", "double", "type_as")


@dataclass(frozen=True)
class LinearLike:
    """``z = x W^T + bias + adapter_scale adapter_x adapter_weight^T``.

    Attributes:
        node: the node whose value is z, of shape (*rows, V), or z^T of shape (V, rows): see :func:`turned`.
        nodes: all nodes that only serve to compute z from its operands, ``node`` first.
        x: (*rows, H), or (H, rows).
        weight: (V, H), or (H, V) if ``transposed``.
        bias: (V,), or None.
        adapter: the low-rank product, itself linear-like without bias, or None.
        adapter_scale: its constant factor.
        class_dim: the dimension of ``node``'s value that the classes are.
        hidden_dim: the dimension of ``x`` that the hidden units are.
    """

    node: fx.Node
    nodes: tuple[fx.Node, ...]
    x: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None = None
    adapter: LinearLike | None = None
    adapter_scale: float = 1.0
    class_dim: int = _LAST
    hidden_dim: int = _LAST


def read_linear(node: fx.Node) -> LinearLike | None:
    """Read ``node`` as linear-like: F.linear, ``@``, matmul, mm, addmm, einsum, either weight layout, or a LoRA sum."""
    call = read(node)
    if call is None:
        return None
    if call.op == "linear":
        bias = call.get("bias")
        return LinearLike(
            node, (node,), call["input"], call["weight"], False, bias if isinstance(bias, fx.Node) else None
        )
    if call.op == "matmul":
        return _product(node, call["input"], call["other"])
    if call.op == "addmm":
        product = _product(node, call["mat1"], call["mat2"])
        bias = example(call["input"])
        plain = call.get("beta", 1) == 1 and call.get("alpha", 1) == 1
        if product is None or bias is None or bias.ndim != 1 or not plain:
            return None
        return replace(product, bias=call["input"])
    if call.op == "einsum":
        return _einsum(call)
    return _low_rank_sum(call) if call.op == "add" else None


def turned(linear: LinearLike) -> LinearLike | None:
    """A product of two matrices read the other way round, its rows as the classes; None for what is more than that.

    Transposed logits are logits, too: of hidden states W and a weight x.
    """
    x = example(linear.x)
    if x is None or x.ndim != 2 or linear.bias is not None or linear.adapter is not None:
        return None
    hidden_dim = 0 if linear.transposed else _LAST
    return LinearLike(linear.node, linear.nodes, linear.weight, linear.x, False, class_dim=0, hidden_dim=hidden_dim)


def is_cast(call: Call) -> bool:
    """True for a change between floating-point dtypes of at least 16 bits and nothing else."""
    tensors = (example(call.node), example(call.get("input")))
    wide = all(each is not None and each.is_floating_point() and each.dtype.itemsize >= 2 for each in tensors)
    return wide and changes_dtype(call)


def changes_dtype(call: Call) -> bool:
    """True for a change of the dtype, to any other, and nothing else."""
    result, source = example(call.node), example(call.get("input"))
    return call.op in _CASTS and result is not None and source is not None and result.device == source.device


def _product(node: fx.Node, x: object, matrix: object) -> LinearLike | None:
    value, hidden = example(matrix), example(x)
    if not isinstance(x, fx.Node) or not isinstance(matrix, fx.Node) or value is None or hidden is None:
        return None
    if value.ndim != 2 or hidden.ndim < 1:
        return None
    source = untransposed(matrix)
    return LinearLike(node, (node,), x, matrix if source is None else source, source is None)


def untransposed(matrix: fx.Node) -> fx.Node | None:
    """W if ``matrix`` is written as W's transpose."""
    call = read(matrix)
    if call is None:
        return None
    swaps = (
        call.op == "t"
        or (call.op == "getattr" and call["name"] in ("T", "mT"))
        or (call.op == "transpose" and {call["dim0"] % 2, call["dim1"] % 2} == {0, 1})
        or (call.op == "permute" and [dim % 2 for dim in flat(call["dims"])] == [1, 0])
    )
    source = call.get("input")
    return source if swaps and isinstance(source, fx.Node) else None


def _einsum(call: Call) -> LinearLike | None:
    operands = flat(call["operands"])
    equation = str(call["equation"]).replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or len(operands) != 2:
        return None
    for (x_term, x), (w_term, w) in (
        (tuple(zip(terms, operands, strict=True))),
        (tuple(zip(terms[::-1], operands[::-1], strict=True))),
    ):
        rows, hidden = x_term[:-1], x_term[-1:]
        classes = out[len(rows) :]
        distinct = len({*rows.replace("...", ""), hidden, classes}) == len(rows.replace("...", "")) + 2
        if len(classes) != 1 or not out.startswith(rows) or not distinct or not isinstance(x, fx.Node):
            continue
        if isinstance(w, fx.Node) and w_term in (classes + hidden, hidden + classes):
            return LinearLike(call.node, (call.node,), x, w, w_term == hidden + classes)
    return None


def _low_rank_sum(call: Call) -> LinearLike | None:
    """``linear(x, W) + s linear(linear(x, A), B)``: the term of smaller inner size is the update."""
    if call.get("alpha", 1) != 1:
        return None
    terms = [_scaled_linear(call["input"]), _scaled_linear(call["other"])]
    if terms[0] is None or terms[1] is None:
        return None
    terms.sort(key=lambda term: _inner_size(term[0]) if term else 0.0)
    (update, scale), (base, base_scale) = terms  # type: ignore[misc]
    simple = base_scale == 1.0 and base.adapter is None and update.adapter is None and update.bias is None
    if not simple or _inner_size(update) >= _inner_size(base):
        return None
    nodes = (call.node, *base.nodes, *update.nodes, *_between(call["input"], base, update))
    nodes += tuple(node for node in _between(call["other"], base, update) if node not in nodes)
    return replace(base, node=call.node, nodes=tuple(dict.fromkeys(nodes)), adapter=update, adapter_scale=scale)


def _scaled_linear(node: object) -> tuple[LinearLike, float] | None:
    scale = 1.0
    while isinstance(node, fx.Node) and len(node.users) == 1:
        linear = read_linear(node)
        if linear is not None:
            return linear, scale
        call = read(node)
        if call is None:
            return None
        if call.op == "mul" and isinstance(call["other"], (int, float)):
            scale *= call["other"]
        elif call.op == "mul" and isinstance(call["input"], (int, float)):
            scale *= call["input"]
            node = call["other"]
            continue
        elif not is_cast(call):
            return None
        node = call["input"]
    return None


def _between(node: fx.Node, *ends: LinearLike) -> tuple[fx.Node, ...]:
    """The scalings and casts from ``node`` down to the linear beneath it."""
    stops = {end.node for end in ends}
    passed = []
    while node not in stops:
        passed.append(node)
        node = next(argument for argument in node.args if isinstance(argument, fx.Node))
    return tuple(passed)


def _inner_size(linear: LinearLike) -> float:
    x = example(linear.x)
    size = expression(x.shape[-1]) if x is not None else None
    return float(size) if size is not None and size.is_number else float("inf")
