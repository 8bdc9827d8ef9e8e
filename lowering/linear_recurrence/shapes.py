"""How the generated kernels of a recurrence are cut, for Hopper GPUs.

Forward, where nothing is activated, a thread has 32 steps of two channels.  In float32 f and b take 128 of its
registers, and with at most 168 three programs of 8 rows of 32 channels fit a multiprocessor.  They have up to 192 KiB
in flight, several times the 23 KiB that 3 TB/s for 1 us come to.  In 16 bits f and b take 64, and four programs of 8
rows, or two of 16, have up to 128 KiB in flight.  A word of 8 bytes a chunk is 1/128 of the states or less.  Threads
have two channels because then a tile of words, of which a thread reads two, lies in the registers as the other tiles
do, and no step has to be exchanged between threads.  For that a step's rows and channels are as many as threads have.

A hop from group to group takes about a microsecond, a store and a load between two multiprocessors, however many
channels there are.  With many, groups are small, for of what a chunk reads of its group the next one reads most again;
with few, hops must be few as well, or they take longer than the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from structfly.lowering.linear_recurrence.arguments import Arguments


class Shape(NamedTuple):
    """How a kernel is cut; sizes are powers of 2.

    Attributes:
        steps: of a row, at most 32.
        rows: of a chunk.
        block: channels of a program.
        warps: of a program.
        group: chunks of which one passes a state on.
        prefetch: load what is needed only when the chunk is gone through again before the wait for its state.
        registers: a thread has no more, so that more programs fit a multiprocessor; None for what the compiler takes.
    """

    steps: int
    rows: int
    block: int
    warps: int
    group: int = 16
    prefetch: bool = True
    registers: int | None = None

    @property
    def chunk(self) -> int:
        """Steps of a chunk."""
        return self.steps * self.rows

    def fitted(self, width: int) -> Shape:
        """For so few channels."""
        block = min(self.block, 1 << max(0, width - 1).bit_length())
        return self._replace(block=block, warps=max(1, min(self.warps, self.rows * block // 64)))


_MANY = 1024
"""Channels of all sequences with which hops of 2048 steps, 1 us each, take a quarter of the time of the bytes of three
numbers of 16 bits, at 3 TB/s."""


def forward_shape(call: Arguments) -> Shape:
    """Numbers of 16 bits lie two to a register, so that more threads fit.  More arrays, and activations, whose results
    a thread keeps in float32, leave room for fewer steps.  Limits are registers that suffice, with which another
    program fits a multiprocessor."""
    return _filled(_forward_shape(call), call)


def backward_shape(call: Arguments) -> Shape:
    """As :func:`forward_shape`; with an output gate, chunks are those of the forward, and without one they are no
    shorter, for a word of 8 bytes would be 1/32 of 128 states of 16 bits."""
    return _filled(_backward_shape(call), call)


def _forward_shape(call: Arguments) -> Shape:
    if not _plain(call):
        few = 128 if call.input_gate is None else 168
        return Shape(16, 16, 16, 4, registers=few if _short(call) else None)
    if not _short(call):
        return Shape(32, 8, 32, 4, registers=168)
    if _has_many(call):
        return Shape(32, 8, 32, 4, group=8, registers=128)
    return Shape(32, 16, 32, 8, registers=128)


def _backward_shape(call: Arguments) -> Shape:
    if not (_plain(call) and _short(call)):
        return Shape(16, 16, 16, 4)
    if _has_many(call):
        return Shape(16, 16, 16, 4, group=4, registers=96 if call.reset is None else None)
    return Shape(16, 16, 32, 8, registers=80)


def _filled(shape: Shape, call: Arguments) -> Shape:
    """As many steps, in more rows where there are so few channels that threads would else be without any."""
    rows = max(shape.rows, 64 // shape.fitted(call.input.shape[2]).block)
    return shape._replace(steps=shape.chunk // rows, rows=rows)


def _plain(call: Arguments) -> bool:
    return call.input_gate is None and call.output_gate is None and not (call.sigmoid or call.tanh)


def _short(call: Arguments) -> bool:
    return call.input.element_size() == 2


def _has_many(call: Arguments) -> bool:
    batch, _, width = call.input.shape
    return batch * width >= _MANY
