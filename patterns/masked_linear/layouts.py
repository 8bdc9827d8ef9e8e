"""Where the blocks stand that a mask keeps, found when a mask is first seen and again when it has changed.

A graph may be run with other modules than it was compiled with, so that the mask is that of each call.  What is
compiled holds for masks that keep as many blocks of the same size, whichever they are; for another,
:meth:`Layouts.of` raises :class:`~structfly.rewriter.inputs.UnfitError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from structfly.errors import ArgumentError
from structfly.lowering.block_sparse.layout import BlockLayout, Grid, layout_of_mask
from structfly.patterns.linear.projection import plainly, state_of
from structfly.patterns.masked_linear.site import MaskedSite
from structfly.rewriter.inputs import UnfitError


def placed(grid: Grid, layout: BlockLayout) -> list[Tensor]:
    """``layout``'s tensors, and the number of each kept block among all blocks of the grid, from row to row: int32."""
    numbers = layout.rows() * grid.columns + layout.columns.flatten()
    return [numbers, *(tensor for tensor in layout if tensor is not None)]


class _Found(NamedTuple):
    """What was found of the masks of one module.

    Attributes:
        state: of the tensors that the mask is made of, which are held by nobody here.
        tensors: :func:`placed`, at the same addresses as long as they fit.
        unfit: why they do not, or "".
    """

    state: tuple[Any, ...]
    tensors: list[Tensor]
    unfit: str


class Layouts:
    """The layouts of every mask that one site is run with."""

    def __init__(self, site: MaskedSite) -> None:
        self.name, self.masked, self.mask = site.name, site.masked, site.mask
        self.grid, self.layout = site.grid, site.layout
        self.like = [(tensor.shape, tensor.device) for tensor in placed(site.grid, site.layout)]
        self._found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by the first tensor the mask is made of
        self._constant = placed(site.grid, site.layout) if not site.mask.places else None

    def of(self, arguments: Sequence[Any]) -> Sequence[Tensor]:
        """The tensors for a call with these arguments.

        Raises:
            UnfitError: the mask keeps another number of blocks, or blocks of other sizes.
        """
        if self._constant is not None:
            return self._constant
        leaves = [arguments[place] for place in self.mask.places]
        state = (*map(state_of, leaves), *map(ref, leaves[1:]))
        found: _Found | None = self._found.get(leaves[0])
        if found is None or found.state != state:
            found = self._found[leaves[0]] = self._find(leaves, state, found)
        if found.unfit:
            raise UnfitError(found.unfit)
        return found.tensors

    def _find(self, leaves: Sequence[Tensor], state: tuple[Any, ...], last: _Found | None) -> _Found:
        with plainly(leaves[0]):
            try:
                grid, layout = layout_of_mask(self.masked.kept(self.mask.value(leaves)))
            except ArgumentError as error:
                return _Found(state, [], f"{self._whose} has changed: {error}")
            tensors = placed(grid, layout)
            if grid != self.grid or [(tensor.shape, tensor.device) for tensor in tensors] != self.like:
                compiled = _in_words(self.grid, self.layout)
                return _Found(state, [], f"{self._whose} keeps {_in_words(grid, layout)}; compiled were {compiled}")
            if last is not None and not last.unfit:
                for own, tensor in zip(last.tensors, tensors, strict=True):
                    own.copy_(tensor)
                tensors = last.tensors
        return _Found(state, tensors, "")

    @property
    def _whose(self) -> str:
        return f"the mask of {self.name}" if self.name else "the mask of a linear"


def _in_words(grid: Grid, layout: BlockLayout) -> str:
    where = "in all rows" if layout.starts is not None else "as many in each row"
    return f"{layout.columns.numel()} blocks of {grid.block_out} x {grid.block_in}, {where}"
