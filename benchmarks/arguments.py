"""What benchmarks' command lines share: shapes, and defaults that depend on the device."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any


def sizes(names: str) -> Callable[[str], tuple[int, ...]]:
    """A type of argparse arguments: one positive integer for each of ``names``, such as "rows x features"."""
    count = len(names.split(" x "))

    def parse(text: str) -> tuple[int, ...]:
        try:
            found = tuple(map(int, text.split("x")))
        except ValueError:
            found = ()
        if len(found) != count or min(found) < 1:
            example = "x".join(["512"] * count)
            raise argparse.ArgumentTypeError(f"{text!r} is not {names}: positive integers, as in {example}")
        return found

    return parse


def fill_in(chosen: argparse.Namespace, defaults: Mapping[str, Any]) -> argparse.Namespace:
    """Give what was not chosen, or cannot be, the value that ``defaults`` has."""
    for name, value in defaults.items():
        if getattr(chosen, name, None) is None:
            setattr(chosen, name, value)
    return chosen
