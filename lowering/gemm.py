"""Matrix products generated from the skeleton ``templates/gemm.jinja``, and their launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, cast

import torch
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor

from structfly.lowering.descriptor import descriptor, has_descriptor
from structfly.lowering.device_profile import device_model
from structfly.lowering.launch import Launch
from structfly.lowering.template import Parameter, load, render

_EARLY_STARTS = (9, 0)  # the compute capability from which on there are programmatic dependent launches


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("allowed: a power of two")
    return value


Side = Annotated[int, Field(ge=16, le=256), AfterValidator(_power_of_two)]
"""A side of a tile: what tensor cores take at least and a descriptor at most."""
Parts = Literal[1, 2, 4, 8, 16]
Warps = Literal[1, 2, 4, 8, 16]


@pydantic_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Tiles:
    """How a product is cut up.

    Attributes:
        m, n, k: a tile of the result, and the step along the inner dimension.
        group: rows of tiles that are taken together, so that they share operands in the cache.
        parts: blocks of columns that an epilogue with operands of its own handles one after another.
        warps, stages: Triton's warps per program and depth of software pipelining.
        resident: programs that share a multiprocessor, so that one stores while another multiplies.

    Raises:
        ValidationError: a field is no such number.
    """

    m: Side
    n: Side
    k: Side
    group: Annotated[int, Field(ge=1, le=1024)]
    parts: Parts
    warps: Warps
    stages: Annotated[int, Field(ge=1, le=8)]
    resident: Annotated[int, Field(ge=1, le=4)] = 1

    @property
    def part(self) -> int:
        """Columns of a part."""
        return self.n // self.parts

    def with_parts(self, parts: int) -> Tiles:
        """The same in so many parts, or as many as leave a part what a descriptor moves at least."""
        return replace(self, parts=cast(Parts, min(parts, self.n // 16)))

    def for_itemsize(self, itemsize: int) -> Tiles:
        """For operands of so many bytes a number what these are for those of 2.

        With 4, in TF32, a step of half the length takes as many bytes, and tensor cores as long; the result's parts are
        as many bytes when they are half as wide.  So both take as much shared memory, and as long for each step, as far
        as operands have their inner side last: others go through registers in TF32.
        """
        times = itemsize // 2
        return replace(self, k=max(16, self.k // times)).with_parts(self.parts * times)

    @property
    def step_work(self) -> int:
        """Multiplications of a tile's step, which its time is in proportion to."""
        return self.m * self.n * self.k


Library = Literal["torch.mm"]
TORCH_MM: Library = "torch.mm"
"""In the place of tiles: the product is left to torch."""

Cut: TypeAlias = Tiles | Library


@dataclass(frozen=True)
class Blocks:
    """An argument that an epilogue reads or writes by descriptor: a tile at a time, or, if ``cut``, a part of one."""

    tensor: Tensor
    cut: bool = True


class Rounds(NamedTuple):
    """A product's share in how long the processors are busy, whatever its number of rows.

    Attributes:
        height: rows of a tile.
        across: programs that make a row of tiles.
        work: multiplications of one of those.
    """

    height: int
    across: int
    work: int


IDLE = Rounds(1, 0, 0)
"""Those of no product."""


class Product:
    """A product of ``a`` (M, K) and ``b`` (K, N) as ``template`` describes it, ready to be launched many times.

    Descriptors are made once and serve every launch.

    Args:
        template: a template that extends the skeleton; its hooks' arguments begin with those of each launch.
        a, b: bfloat16 matrices, rows or columns contiguous.
        arguments: the template's other arguments, in its order.
        parameters: the template's own.
        tiles: how it is cut up.
        split: programs that share the inner dimension of a tile.

    Raises:
        UnsupportedError: an operand's layout has no descriptor.
    """

    def __init__(
        self,
        template: str,
        a: Tensor,
        b: Tensor,
        arguments: Sequence[Tensor | Blocks | int],
        parameters: Mapping[str, Parameter] | None = None,
        *,
        tiles: Tiles,
        split: int = 1,
    ) -> None:
        self._tiles, self._split = tiles, split
        (rows, inner), columns = a.shape, b.shape[1]
        (a_stored, a_transposed), (b_stored, b_transposed) = _stored(a), _stored(b)
        layout: dict[str, Parameter] = {
            "a_transposed": a_transposed,
            "b_transposed": b_transposed,
            "interpreted": not a.is_cuda,
        }
        operands = (
            descriptor(a_stored, *((tiles.k, tiles.m) if a_transposed else (tiles.m, tiles.k))),
            descriptor(b_stored, *((tiles.n, tiles.k) if b_transposed else (tiles.k, tiles.n))),
        )
        given = [
            descriptor(each.tensor, tiles.m, tiles.part if each.cut else tiles.n) if isinstance(each, Blocks) else each
            for each in arguments
        ]
        self._sizes = (rows, columns, inner)
        count = -(-rows // tiles.m) * -(-columns // tiles.n)
        own, last = {**layout, **(parameters or {})}, (*given, *self._sizes)
        self._launch = launch_of(template, own, tiles, count, split, a.device, first=operands, arguments=last)

    @property
    def rounds(self) -> Rounds:
        """What says how long the processors are busy with it."""
        tiles, split = self._tiles, self._split
        steps = -(-self._sizes[2] // (tiles.k * split))
        return Rounds(tiles.m, -(-self._sizes[1] // tiles.n) * split, steps * tiles.step_work)

    def __call__(self, *arguments: Tensor | int) -> None:
        """Launch it on the current device and stream with the launch's own arguments."""
        self._launch(*arguments)


class LibraryProduct:
    """``c`` = ``a`` ``b`` by torch, launched as a :class:`Product` is, of all rows whatever a launch says of them.

    Args:
        a, b: (M, K) and (K, N) bfloat16.
        c: (M, N) float32.
    """

    rounds = IDLE
    """How torch cuts it is not known."""

    def __init__(self, a: Tensor, b: Tensor, c: Tensor) -> None:
        self._a, self._b, self._c = a, b, c

    def __call__(self, *_: Tensor | int) -> None:
        """Launch it on the current device and stream."""
        float32_product(self._a, self._b, out=self._c)


def float32_product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a b by torch, in float32 however narrow the operands are, and written to ``out`` where that is given."""
    target = {} if out is None else {"out": out}
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, **target)
    return torch.mm(a.float(), b.float(), **target)  # where torch has no such product


def busy(rows: int, columns: int, split: int, processors: int, tiles: Tiles) -> float:
    """The share of the processors' time that a product of many equal tiles keeps them busy."""
    programs = -(-rows // tiles.m) * -(-columns // tiles.n) * split
    return programs / (-(-programs // processors) * processors)


def best_split(rows: int, columns: int, processors: int, tiles: Tiles) -> int:
    """1, or 2 where that keeps clearly more of the processors busy, or where none has a second tile.

    A sum of two does not depend on their order.
    """
    one, two = (busy(rows, columns, split, processors, tiles) for split in (1, 2))
    single = -(-rows // tiles.m) * -(-columns // tiles.n) <= processors
    return 2 if single or two > 1.1 * one else 1


def full_row_counts(columns: int, processors: int, most: int, tiles: Tiles) -> list[int]:
    """Row counts up to ``most`` at which a product of ``columns`` just fills the processors, once or several times."""
    across = -(-columns // tiles.n)
    counts = {waves * processors // (across * split) * tiles.m for split in (1, 2) for waves in range(1, 9)}
    return sorted(count for count in counts if 0 < count <= most)


@lru_cache(maxsize=16)
def processors_of(device: torch.device) -> int:
    """Multiprocessors; where the interpreter runs, as many as let small problems have several rounds."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def programs_on(device: torch.device, tiles: Tiles) -> int:
    """Programs that run at once."""
    return processors_of(device) * tiles.resident


def launched(device: torch.device, tiles: Tiles, count: int, split: int = 1) -> int:
    """Programs of a launch: as many as run at once, and no more than it has tiles."""
    return min(programs_on(device, tiles), count * split)


def is_operand(matrix: Tensor) -> bool:
    """Whether rows or columns are contiguous and begin at multiples of 16 bytes, as tensor descriptors need it."""
    return has_descriptor(_stored(matrix)[0])


def _stored(matrix: Tensor) -> tuple[Tensor, bool]:
    """The matrix as it lies in memory, rows contiguous, and whether that is its transpose."""
    return (matrix.t(), True) if matrix.stride(1) != 1 and matrix.stride(0) == 1 else (matrix, False)


def launch_of(
    template: str,
    parameters: Mapping[str, Parameter],
    tiles: Tiles,
    count: int,
    split: int,
    device: torch.device,
    *,
    first: Sequence[Any] = (),
    arguments: Sequence[Any] = (),
) -> Launch:
    """A product's kernel, by as many programs as :func:`launched` says.

    Args:
        template: extends the skeleton.
        parameters: its own, and "waits" where programs may start before the kernels ahead of theirs end, and wait.
        tiles: how it is cut up.
        count: tiles of the result.
        split: programs that share the inner dimension of a tile.
        first, arguments: those that stay the same and stand before and after a launch's own.
    """
    programs = launched(device, tiles, count, split)
    constants = {
        "BM": tiles.m,
        "BN": tiles.n,
        "BK": tiles.k,
        "GROUP": tiles.group,
        "SPLIT": split,
        "PROGRAMS": programs,
    }
    shared: dict[str, Parameter] = {"name": template, "split": split > 1, "parts": tiles.parts, "waits": False}
    kernel = kernel_of(template, tuple({**shared, **parameters}.items()))
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return Launch(kernel, (programs,), constants, arguments, first, **options)


@lru_cache(maxsize=256)
def kernel_of(template: str, parameters: tuple[tuple[str, Parameter], ...]) -> Any:
    return getattr(load(render(template, **dict(parameters))), template)


def can_start_early(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one ahead of it ends, and wait for it itself."""
    capability = device_model(device).capability
    return capability is not None and capability >= _EARLY_STARTS
