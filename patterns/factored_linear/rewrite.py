"""Writing a factored linear another way."""

from __future__ import annotations

from torch import Tensor, fx
from torch.nn import functional as F

from structfly.lowering.gblr.op import GBLR
from structfly.patterns.factored_linear.cuts import followed
from structfly.patterns.factored_linear.menu import PRODUCTS, TILES
from structfly.patterns.factored_linear.reader import Matrix, factored
from structfly.patterns.factored_linear.site import FactoredSite
from structfly.patterns.gblr_tiles import Cut
from structfly.patterns.head.operands import cast
from structfly.records import Candidate
from structfly.rewriter.editor import Editor
from structfly.rewriter.inputs import InputLike
from structfly.rewriter.linear import read_linear
from structfly.rewriter.region import example


def rewrite_factored(site: FactoredSite, candidate: Candidate, editor: Editor) -> None:
    """Replace the linear; what made its weight goes where nothing else reads it."""
    linear = read_linear(site.node)  # again, for what it takes may have been rewritten since it was found
    found = None if linear is None else factored(linear)
    assert found is not None
    cut = _given(site, editor) if candidate.name == TILES else None
    editor.before(site.node)
    x, (left, right) = cast(found.x, site.dtype, editor), (_matrix(m, site, editor) for m in (found.left, found.right))
    between, bias = (None if b is None else cast(b, site.dtype, editor) for b in (found.between, found.bias))
    if cut is not None:
        assert site.masks is not None
        y = editor.trace(_of_tiles, site.masks.cut, x, left, right, between, bias, cut)
    else:
        y = editor.trace(_one_by_one if candidate.name == PRODUCTS else _weight_first, x, left, right, between, bias)
    editor.replace(site.node, y)
    editor.erase(found.nodes)


def _given(site: FactoredSite, editor: Editor) -> list[fx.Node]:
    """A cut's tensors as graph inputs; with them come the constants that the graph computed.

    The graph may round such a constant otherwise than it was rounded where its zeros were found, and see zeros
    elsewhere.
    """
    masks = site.masks
    assert masks is not None
    computed = [node for node in masks.constants if node.op != "placeholder" and node.users]
    inputs = {f"{site.node.name}_constant_{n}": _like(node) for n, node in enumerate(computed)}
    inputs |= {
        f"{site.node.name}_{name}": InputLike(tuple(tensor.shape), tensor.dtype, tensor.device)
        for name, tensor in zip(Cut._fields[1:], masks.cut[1:], strict=True)
    }
    editor.before_all(*computed, site.node)
    nodes = list(editor.add_inputs(inputs, followed(masks, computed, site.name).of).values())
    for old, new in zip(computed, nodes, strict=False):
        editor.replace(old, new)
    return nodes[len(computed) :]


def _like(node: fx.Node) -> InputLike:
    value = example(node)
    assert value is not None
    return InputLike(tuple(map(int, value.shape)), value.dtype, value.device)


def _matrix(matrix: Matrix, site: FactoredSite, editor: Editor) -> fx.Node:
    node = editor.method("t", matrix.node) if matrix.transposed else matrix.node
    return cast(node, site.dtype, editor)


def _one_by_one(x: Tensor, left: Tensor, right: Tensor, between: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(F.linear(x, right, between), left, bias)


def _weight_first(x: Tensor, left: Tensor, right: Tensor, between: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, left @ right, _bias(left, between, bias))


def _of_tiles(
    cut: Cut,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    between: Tensor | None,
    bias: Tensor | None,
    given: list[Tensor],
) -> Tensor:
    factors = Cut(cut.structure, *given).factors(left, right)
    return GBLR(x, list(factors.values()), _bias(left, between, bias), [len(left)])


def _bias(left: Tensor, between: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """left between + bias."""
    return bias if between is None else F.linear(between, left, bias)
