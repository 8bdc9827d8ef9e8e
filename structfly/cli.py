"""The command line: each command is a thin layer over a function of structfly."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from structfly.calibration import tune
from structfly.errors import StructflyError

_DTYPES = {"bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0, or 2 where it could not be done; the reason is on standard error.
    """
    options = _parser().parse_args(arguments)
    try:
        report = tune(
            options.shapes,
            dtype=_DTYPES[options.dtype],
            device=options.device,
            transposed=options.transposed,
            softcap=options.softcap,
            seconds=options.seconds,
        )
    except StructflyError as error:
        print(f"structfly calibrate: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="structfly", description="Structure and fuse linear algebra.")
    commands = parser.add_subparsers(required=True, metavar="command")
    calibrate = commands.add_parser(
        "calibrate",
        help="time the tiles of generated products on this machine's GPU and keep the fastest",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    calibrate.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        required=True,
        metavar="NxHxC",
        help="tokens, hidden units and classes of loss heads, such as 16384x2048x131072",
    )
    calibrate.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of hidden states and weight")
    calibrate.add_argument("--device", default="cuda", help="a CUDA device")
    calibrate.add_argument("--transposed", action="store_true", help="the weights lie as hidden units x classes")
    calibrate.add_argument("--softcap", type=float, help="of the logits; any number stands for all")
    calibrate.add_argument("--seconds", type=float, default=300.0, help="bounds the time in all")
    return parser


def _shape(text: str) -> tuple[int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; allowed: tokens x hidden units x classes, 4096x512x32000"
        )
    rows, hidden, classes = map(int, sizes)
    return rows, hidden, classes
