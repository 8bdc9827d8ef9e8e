"""The tiles of a product: the user's table, else a shipped one, else what runs anywhere."""

from __future__ import annotations

from functools import cache

from structfly.lowering.gemm import Cut, Tiles
from structfly.lowering.tuning.products import ProductClass
from structfly.lowering.tuning.table import Table, read_user_table, shipped_tables

# For the interpreter, which runs a program at a time: small, so that small problems have several tiles.
INTERPRETED = Tiles(m=16, n=32, k=16, group=2, parts=2, warps=1, stages=1)
# What every template takes within the shared memory that a program has on any device.
SAFE = Tiles(m=64, n=128, k=32, group=8, parts=2, warps=4, stages=2)


@cache
def tiles_for(product: ProductClass) -> Cut:
    """How the products of this class are cut.

    The user's table is read once a process, so that a choice stays what it was.

    Raises:
        ConfigError: the user's table has something wrong in it.
    """
    tables = [_user_table(), *_shipped_tables()] if product.device.capability else []
    return _first(product, tables)


def shipped_tiles_for(product: ProductClass) -> Cut:
    """The same without the user's table."""
    return _first(product, _shipped_tables() if product.device.capability else [])


def choices_are_made() -> bool:
    """Whether the user's table has been read: what is written into it later counts in later processes."""
    return _user_table.cache_info().currsize > 0


@cache
def _user_table() -> Table:
    return read_user_table()


@cache
def _shipped_tables() -> list[Table]:
    return shipped_tables()


def _first(product: ProductClass, tables: list[Table]) -> Cut:
    if product.device.capability is None:
        return INTERPRETED
    found = (table.find(product) for table in tables)
    return next((cut for cut in found if cut is not None), SAFE)
