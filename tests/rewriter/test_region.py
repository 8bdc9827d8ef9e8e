"""Names and places in the user's program."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from structfly.rewriter.region import qualified_name, source_line


def node_in(path: str, kind: type) -> fx.Node:
    node = fx.Graph().create_node("call_function", torch.sin)
    node.meta["nn_module_stack"] = {"0": ("L['self']", torch.nn.Module), "1": (path, kind)}
    return node


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].model.lm_head", "model.lm_head"),
        ("G['model'].head", "head"),
        ("L['self']._modules['model']._modules['blocks']._modules['0']", "model.blocks.0"),
        ("L['step'].__closure__[2].cell_contents.head", "head"),
        ("L['head']", "head"),
        ("getattr(G['m'], '1')", "1"),
        ("getattr(getattr(L['self'].blocks, '3').mlp, '0')", "blocks.3.mlp.0"),
        ("L['fn'].__self__.lm_head", "lm_head"),
    ],
)
def test_names_are_those_of_named_modules(path: str, name: str) -> None:
    assert qualified_name(node_in(path, torch.nn.Linear)) == name


def test_the_innermost_line_is_the_users() -> None:
    node = fx.Graph().placeholder("x")
    outer = '  File "train.py", line 3, in step\n    loss = model(x)\n'
    node.meta["stack_trace"] = outer + '  File "model.py", line 7, in forward\n    return f(x)\n'
    assert source_line(node) == "model.py:7: return f(x)"
    assert source_line(fx.Graph().placeholder("y")) == ""
