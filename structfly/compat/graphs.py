"""The vocabulary of Dynamo's graphs, and of the tensors that they were traced with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

PAD: Callable[..., Tensor] = torch._C._nn.pad
"""What ``F.pad`` is in a Dynamo graph."""


def functorch_nesting(node: fx.Node) -> int:
    """+1 where a torch.func transform (grad, vmap, jvp) opens in the graph, -1 where one closes, else 0."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if not name.endswith("_nesting"):
        return 0
    if name.endswith("_increment_nesting"):
        return 1
    return -1 if name.endswith("_decrement_nesting") else 0


def batched(node: fx.Node) -> tuple[fx.Node, int, bool] | None:
    """Of a node that gives a tensor to a vmap, or takes one back: the tensor, the dimension that is mapped over, and
    whether it gives."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name not in ("_add_batch_dim", "_remove_batch_dim"):
        return None
    gives = name == "_add_batch_dim"
    tensor, dim = node.args[0], node.args[1 if gives else 3]
    return (tensor, dim, gives) if isinstance(tensor, fx.Node) and isinstance(dim, int) else None


_CHECKPOINT_BODIES = ("tag_activation_checkpoint", "wrap_activation_checkpoint")
_PLAIN_BODIES = ("invoke_subgraph",)


def sets_grad_mode(node: fx.Node) -> bool | None:
    """What a node switches the recording of gradients to, or None if it does not."""
    if node.op != "call_function" or node.target is not torch._C._set_grad_enabled:
        return None
    return bool(node.args[0])


def autocast_change(node: fx.Node) -> int:
    """+1 where an autocast region opens in the graph, -1 where one closes, else 0."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return {"_enter_autocast": 1, "_exit_autocast": -1}.get(name, 0)


def subgraph_kind(node: fx.Node) -> str | None:
    """What a node that carries graph bodies is: "checkpoint", "plain", its operator's name, or None without bodies."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    name = node.target.name()
    if name in _CHECKPOINT_BODIES:
        return "checkpoint"
    return "plain" if name in _PLAIN_BODIES else name


def written_arguments(node: fx.Node) -> list[Any] | None:
    """The arguments that an overload's schema declares as written, all of them for a kernel launch that mutates; None
    where there is no schema to read."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return [node.args, node.kwargs] if node.target.name().endswith("_mutation") else []
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    arguments = node.target._schema.arguments
    values = {**{argument.name: value for argument, value in zip(arguments, node.args, strict=False)}, **node.kwargs}
    return [values.get(argument.name) for argument in arguments if argument.is_write]


def size_checks(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that do nothing but check the sizes of ``node``, as Dynamo writes them for a size that data decides."""
    checks: list[fx.Node] = []
    for user in node.users:
        if user.target is torch.ops.aten.sym_size.int:
            compared = list(user.users)
            asserted = [other for each in compared for other in each.users]
            if all(each.target is torch.ops.aten._assert_scalar.default for each in asserted) and all(
                each.users for each in compared
            ):
                checks.extend((user, *compared, *asserted))
    return tuple(checks)


def source_of_input(node: fx.Node) -> str:
    """Where the user's program keeps an input, e.g. ``L['self']._modules['head']._parameters['weight']``, or ""."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def is_state(node: fx.Node) -> bool:
    """Whether an input is kept by a module or a global of the user's program: an argument of the compiled function, or
    an element of one, and a variable of an enclosing function, which looks the same, are not."""
    source = source_of_input(node)
    return bool(source) and re.fullmatch(r"L\['\w+'\](\[[^\]]*\])*", source) is None


def value_of_input(node: fx.Node) -> Tensor | None:
    """The tensor that an input was traced with, or None where there is none or it has no data."""
    value = getattr(node.meta.get("grapharg"), "example", None)
    return value if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta else None


def keep_sources(old: fx.GraphModule, new: fx.GraphModule, added: Iterable[fx.Node]) -> None:
    """Let ``new``, a copy of Dynamo's ``old``, say where its inputs come from, as AOTAutograd asks a graph of Dynamo's.

    That is how CUDA graphs tell parameters, whose addresses stay, from other inputs.  The addresses of ``added`` inputs
    stay, too; where one does not, a CUDA graph is recorded anew.
    """
    if not hasattr(old, "_param_name_to_source"):
        return
    new._param_name_to_source = old._param_name_to_source
    sources = {node.name: getattr(node, "_dynamo_source", None) for node in old.graph.find_nodes(op="placeholder")}
    for node in new.graph.find_nodes(op="placeholder"):
        node._dynamo_source = sources.get(node.name)
    for node in added:
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def graph_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A graph module like Dynamo's own: its Python code is generated when it is first called, if it ever is."""
    from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph)
