"""What is made of the constants of a graph for every module that runs it, and made again when they change.

A graph may be run with other modules than it was compiled with, so that constants are those of each call.  What is
compiled holds for what has the same shapes; for another, :meth:`Followed.of` raises
:class:`~structfly.rewriter.inputs.UnfitError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from structfly.patterns.linear.projection import plainly, state_of
from structfly.rewriter.inputs import UnfitError


class _Found(NamedTuple):
    """What was made of the constants of one module.

    Attributes:
        state: of what it was made of, which is held by nobody here.
        tensors: what was made, at the same addresses as long as it fits.
        unfit: why it does not, or "".
    """

    state: tuple[Any, ...]
    tensors: list[Tensor]
    unfit: str


class Followed:
    """Tensors that one place of a graph takes, made of graph inputs.

    Args:
        places: the numbers of these inputs.
        compiled: what was made of them when the graph was compiled.
        make: makes it of their values, or raises :class:`UnfitError` where what is compiled does not hold for them.
    """

    def __init__(
        self, places: Sequence[int], compiled: Sequence[Tensor], make: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    ) -> None:
        self.places, self.make = tuple(places), make
        self._found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by the first of the inputs
        self._constant = None if places else list(compiled)

    def of(self, arguments: Sequence[Any]) -> Sequence[Tensor]:
        """The tensors for a call with these arguments.

        Raises:
            UnfitError: what is compiled does not hold for them.
        """
        if self._constant is not None:
            return self._constant
        leaves = [arguments[place] for place in self.places]
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
                tensors = list(self.make(leaves))
            except UnfitError as error:
                return _Found(state, [], str(error))
            if last is not None and not last.unfit:
                for own, tensor in zip(last.tensors, tensors, strict=True):
                    own.copy_(tensor)
                tensors = last.tensors
        return _Found(state, tensors, "")
