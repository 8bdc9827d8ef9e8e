"""Launches of products of blocks that are made ready once for all tensors of some forms.

A call's own work is then to look up what its tensors' forms are known by, and to say where each of them begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structfly.lowering.descriptor import Boxes
from structfly.lowering.gemm import Tiles, launch_of
from structfly.lowering.launch import Launch, on_device
from structfly.lowering.template import Parameter

REMEMBERED = 1024
"""Products of a template that are kept ready, of some KiB each; those used longest ago are let go."""


class Ready:
    """A launch for tensors of some forms.

    Args:
        launch: its own arguments are what a call takes.
        takes: of each of those how a descriptor takes it, None if it is given as it is.
        device: of the tensors.
    """

    def __init__(self, launch: Launch, takes: Sequence[Boxes | None], device: torch.device) -> None:
        self._launch, self._takes, self._device = launch, takes, device

    def __call__(self, *given: Tensor | int) -> None:
        """Launch it on what begins where these tensors of those forms do, and numbers that are the same in each call.

        Raises:
            UnsupportedError: a tensor does not begin at a multiple of 16 bytes.
        """
        arguments = [
            each if boxes is None or isinstance(each, int) else boxes.of(each)
            for boxes, each in zip(self._takes, given, strict=True)
        ]
        with on_device(self._device):
            self._launch(*arguments)


def ready(
    template: str,
    takes: Sequence[Boxes | None],
    sizes: tuple[int, int, int],
    count: int,
    parameters: dict[str, Parameter],
    tiles: Tiles,
    dtype: torch.dtype,
    device: torch.device,
    split: int = 1,
) -> Ready:
    """A template's launch.

    Args:
        takes: of each argument, as :class:`Ready` has it: descriptors of a and b, and the template's own.
        sizes: M, N and K.
        count: tiles, whatever they are split in.
        parameters: the template's own.
        dtype: of the operands.
        split: programs that share the inner dimension of a tile.
    """
    return Ready(product_launch(template, count, parameters, tiles, dtype, device, sizes, split), takes, device)


def product_launch(
    template: str,
    count: int,
    parameters: dict[str, Parameter],
    tiles: Tiles,
    dtype: torch.dtype,
    device: torch.device,
    arguments: Sequence[int],
    split: int = 1,
) -> Launch:
    """The launch of a template; arguments as in :func:`ready`, and those that stand last and stay the same."""
    shared: dict[str, Parameter] = {
        "interpreted": device.type != "cuda",
        "bfloat16": dtype == torch.bfloat16 and split == 1,
    }
    return launch_of(template, {**shared, **parameters}, tiles, count, split, device, arguments=arguments)
