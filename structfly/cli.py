"""The command line: each command is a thin layer over a function of structfly."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

import torch

from structfly.calibration import TuningReport, tune
from structfly.errors import StructflyError
from structfly.layer_times.calibrating import LayerTimesReport, time_layers
from structfly.patterns.structures import OFFERED, STRUCTURES
from structfly.records.layer import Passes

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0, or 2 where it could not be done; the reason is on standard error.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.shapes and not options.layers:
        parser.error("calibrate needs --shapes or --layers")
    if options.layers and not options.tokens:
        parser.error("--layers needs --tokens")
    try:
        if options.shapes:
            print(_tuned(options))
        if options.layers:
            print(_timed(options))
    except StructflyError as error:
        print(f"structfly calibrate: {error}", file=sys.stderr)
        return 2
    return 0


def _tuned(options: argparse.Namespace) -> TuningReport:
    return tune(
        options.shapes,
        dtype=_DTYPES[options.dtype],
        device=options.device,
        transposed=options.transposed,
        softcap=options.softcap,
        seconds=options.seconds,
    )


def _timed(options: argparse.Namespace) -> LayerTimesReport:
    return time_layers(
        options.layers,
        options.tokens,
        dtype=_DTYPES[options.dtype],
        device=options.device,
        structures=options.structures,
        passes=options.passes,
        seconds=options.seconds,
        path=options.output,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="structfly", description="Structure and fuse linear algebra.")
    commands = parser.add_subparsers(required=True, metavar="command")
    calibrate = commands.add_parser(
        "calibrate",
        help="time the tiles of generated products, or layers, on this machine and keep what was measured",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    calibrate.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of inputs and weights")
    calibrate.add_argument("--device", default="cuda", help="a CUDA device; for layers also cpu")
    calibrate.add_argument("--seconds", type=float, default=300.0, help="bounds the time of tiles, and that of layers")
    heads = calibrate.add_argument_group("tiles of generated products")
    heads.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        metavar="NxHxC",
        help="tokens, hidden units and classes of loss heads, such as 16384x2048x131072",
    )
    heads.add_argument("--transposed", action="store_true", help="the weights lie as hidden units x classes")
    heads.add_argument("--softcap", type=float, help="of the logits; any number stands for all")
    layers = calibrate.add_argument_group("layers, for budgets of time")
    layers.add_argument(
        "--layers",
        type=_layer,
        nargs="+",
        metavar="IxO",
        help="inputs and outputs of layers, such as 4096x11008",
    )
    layers.add_argument("--tokens", type=int, nargs="+", metavar="N", help="rows of their inputs, such as 1 2 4096")
    layers.add_argument("--structures", choices=STRUCTURES, nargs="+", default=OFFERED, help="to time beside dense")
    layers.add_argument(
        "--passes", choices=get_args(Passes), nargs="+", default=["forward"], help="without gradients, or with all"
    )
    layers.add_argument("--output", metavar="FILE", help="keep the times there instead of in the user's cache folder")
    return parser


def _layer(text: str) -> tuple[int, int]:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no layer; allowed: inputs x outputs, 4096x11008")
    inputs, outputs = map(int, sizes)
    return inputs, outputs


def _shape(text: str) -> tuple[int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; allowed: tokens x hidden units x classes, 4096x512x32000"
        )
    rows, hidden, classes = map(int, sizes)
    return rows, hidden, classes
