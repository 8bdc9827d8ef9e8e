"""Which tiles the kernels support on which devices."""

from __future__ import annotations

from structfly.lowering.gemm import TORCH_MM, Cut, Tiles
from structfly.lowering.tuning.products import KINDS, Kind

_KIB = 1024
# Shared memory of one program by compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability", maximum amount per thread block; and what every device has.
_SHARED_MEMORY = {
    (7, 0): 96 * _KIB,
    (7, 5): 64 * _KIB,
    (8, 0): 163 * _KIB,
    (8, 6): 99 * _KIB,
    (8, 7): 163 * _KIB,
    (8, 9): 99 * _KIB,
    (9, 0): 227 * _KIB,
    (10, 0): 227 * _KIB,
    (12, 0): 99 * _KIB,
}
_SHARED_MEMORY_ANYWHERE = 48 * _KIB
# Barriers, and what else Triton keeps there that does not grow with the tiles; tests compare with the compiler.
_BARRIERS = 2 * _KIB
_OPERAND_BYTES = 2  # bfloat16
_FEWEST_COLUMNS = 16  # of a part: what a descriptor moves is at least 16 bytes wide, and a sum's lower plane has bytes
_MOST = 2**15  # entries of a tile: more do not fit the registers of 8 warps


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a program may have."""
    return _SHARED_MEMORY.get(capability, _SHARED_MEMORY_ANYWHERE)


def shared_bytes(template: str, tiles: Tiles) -> int:
    """Bytes of shared memory that a product of these tiles takes at most."""
    kind = KINDS[template]
    operands = tiles.stages * (tiles.m + tiles.n) * tiles.k * _OPERAND_BYTES
    epilogue = tiles.m * max(tiles.n * kind.whole_bytes, tiles.part * kind.part_bytes)
    return operands + epilogue + _BARRIERS


def why_not(template: str, cut: Cut, capability: tuple[int, int]) -> str:
    """Why the products of ``template`` cannot be cut so on such a device, or ""."""
    kind = KINDS[template]
    if cut == TORCH_MM:
        able = ", ".join(name for name, each in KINDS.items() if each.torch_mm)
        return "" if kind.torch_mm else f"{TORCH_MM} cannot make {template}; it can make {able}"
    return _why_no_tiles(template, kind, cut, capability)


def _why_no_tiles(template: str, kind: Kind, tiles: Tiles, capability: tuple[int, int]) -> str:
    if tiles.part < _FEWEST_COLUMNS:
        return f"parts is {tiles.parts}, which leaves {tiles.part} of n's {tiles.n} columns; at least {_FEWEST_COLUMNS}"
    if tiles.parts < kind.fewest_parts:
        return f"parts is {tiles.parts}; allowed for {template}: {kind.fewest_parts} or more"
    if tiles.m < kind.rows_at_least:
        return f"m is {tiles.m}; allowed for {template}: {kind.rows_at_least} or more"
    if tiles.k > kind.step_at_most:
        return f"k is {tiles.k}; allowed for {template}: up to {kind.step_at_most}"
    if tiles.m * tiles.n > _MOST:
        return f"m n is {tiles.m * tiles.n}; allowed: up to {_MOST}"
    needed, there = tiles.resident * shared_bytes(template, tiles), shared_memory(capability)
    if needed > there:
        major, minor = capability
        return (
            f"they take {needed} bytes of shared memory and capability {major}.{minor} has {there}; "
            "smaller m, n, k, stages or resident, or more parts, take less"
        )
    return ""
