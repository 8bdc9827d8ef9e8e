"""Activations in the epilogues of structured layers: what is computed, where they are folded, and why elsewhere not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structfly import StructuredLinear
from structfly.errors import UnsupportedError
from structfly.lowering.activations import ACTIVATIONS, activated
from structfly.lowering.blast import generated as blast
from structfly.lowering.block_products.support import why_no_products
from structfly.lowering.block_sparse import generated as block_sparse
from structfly.lowering.gblr import generated as gblr
from structfly.lowering.kronecker import lattice, monarch
from structfly.lowering.kronecker.op import KRONECKER
from structfly.lowering.kronecker.reference import kronecker_reference
from structfly.lowering.layer_op import FORWARD_OPS
from structfly.patterns.blast import Blast
from structfly.patterns.block_sparse import BlockSparse
from structfly.patterns.gblr import GBLR
from structfly.patterns.kronecker import KroneckerSparse
from structfly.patterns.low_rank import LowRank
from structfly.patterns.monarch import Monarch
from structfly.patterns.pivoted_low_rank import PivotedLowRank
from structfly.patterns.pixelfly import Pixelfly
from structfly.patterns.structure import Structure
from tests.compiling import Rewritten
from tests.oracle import assert_as_accurate

STRICT: Mapping[str, object] = {"strict": True}
MONARCH = Monarch(blocks_in=2, blocks_out=2, block_rank=8)


@pytest.fixture
def _generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in 16 bits are generated, and interpreted, on CPUs."""

    def why(values: Tensor, sides: Iterable[int], tf32: bool) -> str:
        on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=values.dtype, element_size=values.element_size)
        return why_no_products(on_gpu, sides, tf32)

    modules: tuple[ModuleType, ...] = (blast, block_sparse, gblr, lattice, monarch)
    for module in modules:
        monkeypatch.setattr(module, "why_no_products", why)


generated = pytest.mark.usefixtures("_generated")


def layer_of(structure: Structure, dtype: torch.dtype = torch.bfloat16, *, bias: bool = True) -> StructuredLinear:
    torch.manual_seed(0)
    return StructuredLinear(structure, 32, 32, bias=bias, dtype=dtype)


def run(function: Callable[..., Any], *arguments: Any, options: Mapping[str, object] = STRICT) -> tuple[Any, Rewritten]:
    fast = Rewritten(function, options)
    with torch.no_grad():
        return fast(*arguments), fast


def activations_of(fast: Rewritten) -> list[str]:
    """Those that the calls of layers' ops were given."""
    return [str(call.args[-2]) for op in FORWARD_OPS for call in fast.calls_of(op)]


STRUCTURES: tuple[Structure, ...] = (
    MONARCH,
    KroneckerSparse(patterns=((4, 8, 8, 1),)),
    KroneckerSparse(patterns=((1, 8, 8, 8), (8, 8, 8, 1))),
    KroneckerSparse(patterns=((1, 64, 64, 1),)),
    BlockSparse(block_in=16, block_out=16, density=0.5),
    Pixelfly(grid=4, n_factors=1, rank=8),
    Blast(row_blocks=2, column_blocks=2, rank=8),
    GBLR(tile=8, group=8, groups=2, right_tiles=6, left_tiles=6),
)


@generated
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("activation", "dtype", "bias"), [("gelu", torch.bfloat16, True), ("sigmoid", torch.float16, False)]
)
def test_layers_are_as_accurate_as_eager(structure: Structure, activation: str, dtype: torch.dtype, bias: bool) -> None:
    layer, x = layer_of(structure, dtype, bias=bias), torch.randn(19, 32).to(dtype)
    value, fast = run(lambda x: activated(layer(x), activation), x)
    assert activations_of(fast) == [activation]
    assert ("layer_epilogue", "rewritten") in [(site.rule, site.status) for site in fast.sites]
    wide = copy.deepcopy(layer).double()
    with torch.no_grad():
        assert_as_accurate(value, activated(layer(x), activation), activated(wide(x.double()), activation), dtype, "y")


SPELLINGS: Mapping[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nn.ReLU": (nn.ReLU(), "relu"),
    "in place": (nn.ReLU(inplace=True), "relu"),
    "F.silu in place": (lambda y: F.silu(y, inplace=True), "silu"),
    "method": (lambda y: y.tanh(), "tanh"),
    "method in place": (lambda y: y.sigmoid_(), "sigmoid"),
    "nn.GELU": (nn.GELU(), "gelu"),
    "nn.GELU of tanh": (nn.GELU("tanh"), "gelu_tanh"),
    "by position": (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
}


@generated
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str) -> None:
    function, name = SPELLINGS[spelling]
    layer = layer_of(MONARCH)
    _, fast = run(lambda x: function(layer(x)), torch.randn(3, 32).bfloat16())
    assert activations_of(fast) == [name]
    (site,) = fast.sites
    assert (site.candidate, site.status) == ("epilogue of kronecker_v3", "rewritten")
    assert site.seconds is not None
    assert site.seconds_kept is not None
    assert site.seconds < site.seconds_kept


@generated
def test_layers_one_after_another() -> None:
    model = nn.Sequential(layer_of(MONARCH), nn.GELU(), nn.Dropout(0.5), layer_of(MONARCH), nn.ReLU()).eval()
    x = torch.randn(3, 32).bfloat16()
    value, fast = run(model, x)
    assert activations_of(fast) == ["gelu", "relu"]
    assert [site.name for site in fast.sites] == ["0", "3"]
    with torch.no_grad():
        assert_as_accurate(value, model(x), copy.deepcopy(model).double()(x.double()), torch.bfloat16, "y")


@generated
def test_factors_may_have_sizes_that_are_not_known() -> None:
    x, *factors = (torch.randn(shape).bfloat16() for shape in ((5, 16), (1, 2, 16, 1, 8, 1), (2, 1, 8, 1, 16, 1)))
    torch._dynamo.mark_dynamic(factors[0], 2)
    value, fast = run(lambda x, *factors: torch.relu(KRONECKER(x, factors, None, [16])), x, *factors)
    assert activations_of(fast) == ["relu"]
    torch.testing.assert_close(value, kronecker_reference(x, factors, 16).relu())


@generated
def test_autocast_casts_before_the_epilogue() -> None:
    layer, x = layer_of(MONARCH, torch.float32), torch.randn(3, 32)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return torch.relu(y)

    value, fast = run(call, x)
    assert activations_of(fast) == ["relu"]
    with torch.no_grad():
        assert_as_accurate(value, call(x), copy.deepcopy(layer).double()(x.double()).relu(), torch.bfloat16, "y")


READ_ELSEWHERE: Mapping[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "y is returned": (lambda y, x: (torch.relu(y), y), "not only relu reads what the layer gives, but output too"),
    "y is added": (lambda y, x: torch.relu(y) @ (x + y).t(), "not only relu reads what the layer gives, but add too"),
    "y was overwritten": (lambda y, x: torch.relu(y.mul_(2)), ""),
    "another activation": (lambda y, x: F.leaky_relu(y), "the layer's activation is leaky_relu; those that epilogues"),
    "softplus": (lambda y, x: F.softplus(y), "the layer's activation is softplus; those that epilogues apply are relu"),
    "none": (lambda y, x: y + 1, ""),
}


@generated
@pytest.mark.parametrize("case", READ_ELSEWHERE)
def test_what_is_left_has_a_reason(case: str) -> None:
    function, reason = READ_ELSEWHERE[case]
    layer = layer_of(MONARCH)
    _, fast = run(lambda x: function(layer(x), x), torch.randn(3, 32).bfloat16())
    assert activations_of(fast) == [""]
    assert [site.status for site in fast.sites] == ["missed"] * bool(reason)
    assert all(site.reason.startswith(reason) for site in fast.sites)


@generated
@pytest.mark.parametrize("of", ["factors", "x"])
def test_what_is_differentiated_is_left(of: str) -> None:
    layer = layer_of(MONARCH).requires_grad_(of == "factors")
    x = torch.randn(3, 32).bfloat16().requires_grad_(of == "x")
    fast = Rewritten(lambda x: torch.tanh(layer(x)), STRICT, then="aot_eager")
    fast(x).sum().backward()
    assert activations_of(fast) == [""]
    (site,) = fast.sites
    assert (site.status, site.reason) == (
        "missed",
        "this graph trains, and the gradient of tanh takes what it is applied to",
    )


@generated
def test_elementwise_work_that_follows_keeps_its_activation() -> None:
    gate, up = layer_of(MONARCH), layer_of(MONARCH)

    def swiglu(x: Tensor) -> Any:
        return F.silu(gate(x)) * up(x)

    x = torch.randn(3, 32).bfloat16()
    _, fast = run(swiglu, x)
    assert activations_of(fast) == ["", ""]
    (site,) = fast.sites
    assert site.status == "kept"
    assert site.reason == "Inductor makes silu in one kernel with the elementwise work that reads it"
    _, fast = run(swiglu, x, options={**STRICT, "rewrite": "always"})
    assert sorted(activations_of(fast)) == ["", "silu"]


@generated
@pytest.mark.parametrize(
    "read",
    [
        lambda a: a @ a.t(),
        lambda a: F.linear(a.view(-1, 16), a[:, :16]),
        lambda a: a.transpose(0, 1),
        lambda a: (a + 1, a.flatten()),
        lambda a: F.scaled_dot_product_attention(a[None], a[None], a[None]),
    ],
)
def test_what_is_written_in_any_case_is_written_once(read: Callable[[Tensor], Any]) -> None:
    layer = layer_of(MONARCH)
    _, fast = run(lambda x: read(torch.relu(layer(x))), torch.randn(4, 32).bfloat16())
    assert activations_of(fast) == ["relu"]


@generated
def test_the_rule_can_be_switched_off() -> None:
    layer = layer_of(MONARCH)
    options = {**STRICT, "rules": {"layer_epilogue": False}}
    _, fast = run(lambda x: torch.relu(layer(x)), torch.randn(3, 32).bfloat16(), options=options)
    assert activations_of(fast) == [""]
    assert [site.status for site in fast.sites] == ["kept"]


@pytest.mark.parametrize("structure", [MONARCH, LowRank(rank=8), BlockSparse(block_in=16, block_out=16, density=0.5)])
def test_products_by_torch_have_no_epilogue(structure: Structure) -> None:
    layer = layer_of(structure)
    _, fast = run(lambda x: torch.relu(layer(x)), torch.randn(3, 32).bfloat16())
    assert activations_of(fast) == [""]
    assert fast.sites == []


@pytest.mark.parametrize("structure", [MONARCH, LowRank(rank=8), PivotedLowRank(rank=8)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ops_apply_it_to_products_by_torch(structure: Structure, activation: str) -> None:
    layer, x = layer_of(structure, torch.float32), torch.randn(2, 3, 32)
    with torch.no_grad():
        with _Told(activation) as told:
            value = layer(x)
            by_batch = torch.vmap(layer)(x)
        assert told.ops
        assert torch.equal(value, activated(layer(x), activation))
        assert torch.allclose(by_batch, value, rtol=1e-4, atol=1e-5)


def test_gradients_of_an_activation_are_refused() -> None:
    layer, x = layer_of(MONARCH, torch.float32), torch.randn(3, 32)
    with _Told("tanh"), pytest.raises(UnsupportedError, match=r"of structfly::kronecker_v3 with activation='tanh'"):
        layer(x)


class _Told(torch.overrides.TorchFunctionMode):
    """Calls of layers' ops are given an activation."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation, self.ops = activation, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FORWARD_OPS:
            self.ops += 1
            args = (*args[:-2], self.activation, args[-1])
        return func(*args, **(kwargs or {}))
