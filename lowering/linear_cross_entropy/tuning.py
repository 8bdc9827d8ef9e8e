"""Times of a head's generated products: each as the op launches it, alone, on random operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from structfly import measure
from structfly.errors import UnsupportedError
from structfly.lowering.gemm import processors_of
from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.linear import Wanted, allocate_gradients
from structfly.lowering.launch import on_device
from structfly.lowering.linear_cross_entropy.blocks import BlockRun
from structfly.lowering.linear_cross_entropy.chunked import Head
from structfly.lowering.linear_cross_entropy.exponentials import ExponentialRun
from structfly.lowering.linear_cross_entropy.pass_records import LateCoefficients
from structfly.lowering.linear_cross_entropy.row_pass import RowPass
from structfly.lowering.linear_cross_entropy.schedule import BlockSizes, block_sizes, exponential_rows
from structfly.lowering.linear_cross_entropy.tiles import HeadTiles

# The limit that blocks are cut for: about what they are chosen for.
_BLOCK_BYTES = 64 * 2**20
_LARGEST_SIDE = 256  # of any tile: blocks are whole ones whatever is tried
_REPEATS, _WARMUPS = 20, 3
_BOTH = Wanted(x=True, weight=True)


@dataclass(frozen=True)
class HeadShape:
    """A head to be timed.

    Attributes:
        rows, hidden, classes: N, H and C.
        transposed: whether its weight lies as (H, C).
        chain: its pointwise chain, as the op takes it.
    """

    rows: int
    hidden: int
    classes: int
    transposed: bool = False
    chain: str = ""


class HeadTimer:
    """Times products of a head on ``device``.

    Args:
        workspace: bytes that the exponentials of a chunk may take.
        tiles: what sizes of blocks are chosen for.
    """

    def __init__(self, shape: HeadShape, device: torch.device, workspace: int, tiles: HeadTiles) -> None:
        self.head = _random_head(shape, device)
        self.device, self._coefficients = device, LateCoefficients(None, self._even)
        self.length = exponential_rows(shape.rows, shape.classes, workspace)
        sizes = block_sizes(
            shape.rows,
            shape.hidden,
            shape.classes,
            _BLOCK_BYTES,
            processors=processors_of(device),
            tiles=tiles,
        )
        self.block_sizes = BlockSizes(_whole(sizes.rows), _whole(sizes.classes), _whole(sizes.beside), sizes.bytes)

    def seconds(self, name: str, tiles: HeadTiles) -> float:
        """The median time of one launch of the product that
        :data:`~structfly.lowering.linear_cross_entropy.tiles.PRODUCTS` names.

        Raises:
            UnsupportedError: Triton cannot compile it, or the device cannot run it.
        """
        from triton.errors import TritonError  # not at the top: importing structfly imports no triton

        try:
            with on_device(self.device):
                launch = self.launch(name, tiles)
                return measure.median_time(launch, self.device, repeats=_REPEATS, warmups=_WARMUPS).median
        except (TritonError, RuntimeError) as error:  # of the latter kind are the compiler's passes, and memory
            raise UnsupportedError(f"{type(error).__name__}: {error}") from error

    def launch(self, name: str, tiles: HeadTiles) -> Callable[[], None]:
        """Launches it once; everything it reads is there."""
        if name.startswith("block"):
            return self._launch_of_blocks(name, tiles)
        keeps: Literal["", "exponentials"] = "" if name == "losses" else "exponentials"
        each = RowPass(self.head, self._coefficients, self.length, keeps, tiles, sums_width=self.head.x.shape[1])
        live, overflowed = each.rows.count, each.rows.zeros[0]
        start = each.starts[1] if len(each.starts) > 1 else 0
        if name in ("losses", "exponentials"):
            each.gather(live, 0)
            return lambda: each.exponentials(live, 0, overflowed)
        for chunk in sorted({0, start}):
            each.do(chunk)
        run = ExponentialRun(each, _BOTH)
        if name == "hidden_product":
            return lambda: run.hidden_product(live, start)
        return lambda: run.weight_sum.add_product(start)

    def _launch_of_blocks(self, name: str, tiles: HeadTiles) -> Callable[[], None]:
        sizes, classes = self.block_sizes, self.head.num_classes
        each = RowPass(self.head, self._coefficients, sizes.rows, "rows", tiles)
        each.do_all()
        run = BlockRun(each, _BOTH, allocate_gradients(self.head, _BOTH), sizes)
        live, width = run.rows.count, sizes.beside
        part = slice(width, 2 * width) if classes >= 2 * width else slice(0, min(width, classes))
        start = sizes.rows if len(each.x) > sizes.rows else 0
        rest = run.buffer[run.chunk.numel() :]
        dz = rest[: sizes.rows * width].view(sizes.rows, width)[:, : part.stop - part.start]
        run.take(run.chunk)(live, start)
        block = run.block_product(part, run.chunk, dz)
        block(live, start, 0)
        if name == "block":
            return lambda: block(live, start, 0)
        if name == "block_hidden_sum":
            hidden_sum = run.hidden_sum(part, dz)
            return lambda: hidden_sum(live, start)
        plane = rest[sizes.rows * width :].view(torch.uint8)
        _, later = run.weight_sums(part, run.chunk, dz, plane, None)
        return lambda: later(live, start, 0)

    def _even(self, count: Tensor) -> Tensor:
        return torch.full((len(self.head.x),), 1.0, device=self.device) / count


def _whole(size: int) -> int:
    return -(-size // _LARGEST_SIDE) * _LARGEST_SIDE


def _random_head(shape: HeadShape, device: torch.device) -> Head:
    generator = torch.Generator(device).manual_seed(0)
    stored = (shape.hidden, shape.classes) if shape.transposed else (shape.classes, shape.hidden)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    weight = torch.randn(stored, **options) * shape.hidden**-0.5
    return Head(
        x=torch.randn(shape.rows, shape.hidden, **options),
        weight=weight.t() if shape.transposed else weight,
        bias=None,
        adapter_x=None,
        adapter_weight=None,
        adapter_scale=1.0,
        epilogue=parse_epilogue(shape.chain),
        operands=(),
        num_classes=shape.classes,
        target=torch.randint(0, shape.classes, (shape.rows,), generator=generator, device=device),
        choices=None,
        class_weight=None,
        ignore_index=None,
        label_smoothing=0.0,
        asked=("loss",),
    )
