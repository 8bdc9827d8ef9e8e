"""Writing the op in the place of one of torch's scans, and what goes to the users of what it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from structfly.patterns.linear_recurrence.lifting import Lifted, Lifting
from structfly.patterns.linear_recurrence.recurrence import last_state, write
from structfly.patterns.linear_recurrence.rewrite import laid_out
from structfly.patterns.linear_recurrence.scans import ScanSite, turned_round
from structfly.rewriter.editor import Editor


def rewrite_scan(site: ScanSite, editor: Editor) -> None:
    """Write the op where the scan stands."""

    def part(number: int) -> fx.Node:
        return editor.current(site.parts[number])

    own = {site.node, *site.node.users, *site.unseen}
    made = {place: write(each, Lifting(editor, part), editor, own) for place, each in site.by_place.items()}
    first = next(iter(made.values()))
    lift = Lifting(editor, part, first.states)
    for user in [each for each in site.node.users if each not in site.unseen]:
        place: Any = user.args[1]
        if place in site.outputs:
            whole = _all_steps(lift(site.outputs[place]), part(0), editor)
        elif site.associative:
            whole = made[place].states
        else:
            editor.replace(user, last_state(site.recurrence, first, editor))
            continue
        _give(user, whole, site.recurrence.backward, editor)
    editor.erase(list(own))


def _all_steps(value: Lifted, like: fx.Node, editor: Editor) -> fx.Node:
    """A lifted value; one that no step changes is repeated."""
    if value.timed:
        node: fx.Node = value.value
        return node

    def repeated(tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.expand(like.shape[0], *tensor.shape)

    return editor.trace(repeated, value.value, like)


def _give(old: fx.Node, whole: fx.Node, backward: bool, editor: Editor) -> None:
    """All steps to the users of ``old``; those that would turn them round get them as they are."""
    straight = [user for user in old.users if backward and turned_round(user) is old]
    for user in straight:
        editor.replace(user, laid_out(whole, user, editor))
        editor.erase([user])
    others = [user for user in old.users if user not in straight]
    if others:
        whole = editor.call(torch.flip, whole, (0,)) if backward else whole
        editor.replace(old, laid_out(whole, old, editor), others)
