"""Where statistics of rows that are differentiated end: one scalar, and the nodes on the way to it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from structfly.patterns.head.gradients import carries_gradient, may_ask_for_gradients
from structfly.rewriter.region import Region, example


def common_scalar(ends: Sequence[fx.Node], region: Region) -> fx.Node | None:
    """The first scalar that all gradients of ``ends`` come through."""
    order = region.order
    reached, pending = set(ends), list(ends)
    while pending:
        for user in pending.pop().users:
            if user not in reached and carries_gradient(user, region):
                reached.add(user)
                pending.append(user)
    last_user = -1
    for node in sorted(reached, key=order.__getitem__):
        if last_user <= order[node] and order[node] >= max(map(order.__getitem__, ends)):
            value = example(node)
            if value is not None and value.ndim == 0 and value.is_floating_point():
                return node
        for user in node.users:
            if may_ask_for_gradients(user, region):
                return None
            if user in reached:
                last_user = max(last_user, order[user])
    return None


def nodes_between(ends: Collection[fx.Node], root: fx.Node, region: Region) -> list[fx.Node]:
    """The nodes that ``root`` needs and that depend on one of ``ends``, both included, in the order of the graph."""
    needed, pending = {root}, [root]
    while pending:
        node = pending.pop()
        if node in ends:
            continue
        fresh = [operand for operand in node.all_input_nodes if operand not in needed]
        needed.update(fresh)
        pending.extend(fresh)
    depends: dict[fx.Node, None] = {}
    for node in sorted(needed, key=region.order.__getitem__):
        if node in ends or any(operand in depends for operand in node.all_input_nodes):
            depends[node] = None
    return list(depends)
