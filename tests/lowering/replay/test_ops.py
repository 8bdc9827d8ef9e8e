"""Every op gives the same bits replayed as called, forward and backward, from other tensors of the same forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from structfly import StructuredLinear, ops
from structfly.lowering.linear_cross_entropy import kernels
from structfly.lowering.linear_cross_entropy.op import linear_cross_entropy
from structfly.lowering.replay import replayed
from structfly.lowering.replay.recording import Recording
from structfly.patterns import gblr as of_tiles
from structfly.patterns.blast import Blast
from structfly.patterns.gblr_learned import GaudiGBLR
from structfly.patterns.low_rank import LowRank
from structfly.patterns.monarch import Monarch
from structfly.patterns.pixelfly import Pixelfly
from structfly.patterns.structure import Structure
from tests.lowering.linear_cross_entropy.cases import make_call
from tests.oracle import Gradients, value_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32

Case = Callable[[int], tuple[Callable[..., Tensor], list[Tensor]]]


def learned(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = DTYPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) / 4).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def head(scheme: str, schedule: str, **options: Any) -> Case:
    sizes = {"rows": 20, "hidden": 16, "classes": 40, "workspace": 1000, **options}
    dtype = torch.float32 if scheme == "logits" else torch.bfloat16

    def case(seed: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
        rows, hidden, classes = (sizes[each] for each in ("rows", "hidden", "classes"))
        x, weight = learned(seed, (rows, hidden), (classes, hidden), dtype=dtype)
        target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        target[seed] = -100
        call = make_call(**{"scheme": scheme, "schedule": schedule, "dtype": dtype, "device": DEVICE, **sizes})

        def loss(x: Tensor, weight: Tensor) -> Tensor:
            return linear_cross_entropy(*call._replace(x=x, weight=weight, target=target)).loss

        return loss, [x, weight]

    return case


def structured(structure: Structure, side: int = 64, rows: int = 32, *, bias: bool = False) -> Case:
    layers: dict[int, StructuredLinear] = {}

    def case(seed: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
        if seed % 2 not in layers:  # two layers, by turns, of which one may have other blocks
            torch.manual_seed(seed)
            layers[seed % 2] = StructuredLinear(structure, side, 2 * side, bias=bias, device=DEVICE, dtype=DTYPE)
        layer = layers[seed % 2]
        (x,) = learned(seed, (rows, side))
        return lambda x, *_: layer(x), [x, *layer.parameters()]

    return case


def gblr(seed: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Two layers with masks at other places."""
    if seed % 2 not in GBLR:
        torch.manual_seed(seed % 2)
        made = GaudiGBLR(64, 64, 64, bias=False, width=0.4, device=DEVICE, dtype=DTYPE)
        GBLR[seed % 2] = made.finalise()
    layer = GBLR[seed % 2]
    (x,) = learned(seed, (32, 64))
    return lambda x, *_: layer(x), [x, *layer.parameters()]


GBLR: dict[int, Any] = {}


def divergence(seed: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    x, weight, teacher_x, teacher_weight = learned(seed, (40, 32), (56, 32), (40, 16), (56, 16))

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        of_teacher = teacher_x.detach(), teacher_weight.detach()
        return ops.linear_divergence(
            x, weight, kind="forward_kl", teacher_input=of_teacher[0], teacher_weight=of_teacher[1]
        )

    return loss, [x, weight]


def recurrence(seed: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    gate, x = learned(seed, (2, 70, 16), (2, 70, 16))

    def run(gate: Tensor, x: Tensor) -> Tensor:
        made: Any = ops.linear_recurrence(gate.sigmoid(), x)
        return made if isinstance(made, Tensor) else made[0]

    return run, [gate, x]


def same_bits(made: Gradients, expected: Gradients) -> None:
    for mine, theirs in zip(made, expected, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or theirs is None or torch.equal(mine, theirs)


def check(case: Case, monkeypatch: pytest.MonkeyPatch, calls: int = 4) -> None:
    """Each call's results are those without replays."""
    monkeypatch.setattr(kernels, "check", lambda call: None)  # which on a CPU looks at the targets
    for seed in range(calls):
        function, leaves = case(seed)
        made, gradients = value_and_gradients(function, leaves)
        with monkeypatch.context() as plain:
            plain.setattr(replayed, "_replays", lambda device: False)
            expected, exact = value_and_gradients(function, leaves)
        assert torch.equal(made, expected)
        same_bits(gradients, exact)


CASES: dict[str, Case] = {
    "logits, forward": head("logits", "forward"),
    "logits, backward": head("logits", "backward", reduction="none"),
    "exponentials, forward": head("exponentials", "forward", label_smoothing=0.1),
    "exponentials, backward": head("exponentials", "backward", reduction="none"),
    "blocks": head("blocks", "forward"),
    "divergence": divergence,
    "monarch": structured(Monarch(blocks_in=4, blocks_out=4, block_rank=4)),
    "monarch, nothing kept": structured(Monarch(blocks_in=4, blocks_out=4, block_rank=4, rematerialise=True)),
    "pixelfly": structured(Pixelfly(grid=4, n_factors=2, rank=16), bias=True),
    "blast": structured(Blast(rank=16, row_blocks=4, column_blocks=4)),
    "blast, nothing kept": structured(Blast(rank=16, row_blocks=4, column_blocks=4, rematerialise=True), rows=1000),
    "low rank": structured(LowRank(rank=16)),
    "gblr": gblr,
    "gblr, nothing kept": structured(
        of_tiles.GBLR(tile=16, group=16, groups=2, right_tiles=4, left_tiles=8, rematerialise=True)
    ),
    "recurrence": recurrence,
}


@pytest.mark.parametrize("name", CASES)
def test_an_op_gives_the_same_bits_replayed(
    replays: list[Recording], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(CASES[name], monkeypatch)
    assert len(replays) >= 2  # each op's last two calls, or each layer's own of one whose blocks lie elsewhere


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_an_op_gives_the_same_bits_replayed_on_a_gpu(
    replays: list[Recording], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a stream that is not the one it was recorded in."""
    with torch.cuda.stream(torch.cuda.Stream()):
        check(CASES[name], monkeypatch, 3)
    check(CASES[name], monkeypatch, 3)
    assert len(replays) >= 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["exponentials, forward", "blocks", "monarch, nothing kept", "gblr, nothing kept"])
def test_a_replay_takes_no_more_memory_than_the_call(replays: list[Recording], name: str) -> None:
    sizes = {"rows": 4096, "hidden": 512, "classes": 8192, "workspace": 16 * 2**20}
    monarch = Monarch(blocks_in=4, blocks_out=4, block_rank=32, rematerialise=True)
    tiled = of_tiles.GBLR(tile=64, group=64, groups=2, right_tiles=8, left_tiles=16, rematerialise=True)
    cases = {
        "exponentials, forward": head("exponentials", "forward", **sizes),
        "blocks": head("blocks", "forward", **sizes),
        "monarch, nothing kept": structured(monarch, 512, 4096),
        "gblr, nothing kept": structured(tiled, 512, 4096),
    }
    function, leaves = cases[name](0)

    def peak() -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        value_and_gradients(function, leaves)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    called, recorded, replayed_peak = [peak() for _ in range(3)]
    assert replays
    assert recorded <= called
    assert replayed_peak <= called


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["exponentials, forward", "monarch", "recurrence"])
def test_a_replay_may_be_captured_in_a_cuda_graph(replays: list[Recording], name: str) -> None:
    function, leaves = CASES[name](0)
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            value_and_gradients(function, leaves)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        seen = len(replays)
        with torch.cuda.graph(graph):
            made, gradients = value_and_gradients(function, leaves)
        assert len(replays) > seen
        for _ in range(2):
            with torch.no_grad():
                leaves[0] *= 0.5
            graph.replay()
            expected, exact = value_and_gradients(function, leaves)
            assert torch.equal(made, expected)
            same_bits(gradients, exact)
