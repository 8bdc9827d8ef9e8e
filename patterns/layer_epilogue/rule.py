"""The rule: the activation of a structured layer is applied by the layer's op, in graphs without gradients.

It comes after all other rules, for it knows layers by their ops, which the others write.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from structfly import compat
from structfly.config import SiteSettings
from structfly.lowering.activations import ACTIVATIONS
from structfly.lowering.layer_op import FORWARD_OPS
from structfly.lowering.layer_products import Applied
from structfly.patterns.layer_epilogue.activations import activation_of, is_written
from structfly.patterns.layer_epilogue.menu import epilogue_menu
from structfly.patterns.layer_epilogue.site import EpilogueSite
from structfly.records import Candidate, DeviceProfile, Menu, Miss
from structfly.records.cost import at_sizes
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region, example_of, needs_gradient, qualified_name


class LayerEpilogue:
    """Exact: the activation of the float32 sums, rounded once where eager rounds before it, too.

    See docs/restructure.md.
    """

    name = "layer_epilogue"

    def find(self, region: Region) -> Sequence[EpilogueSite | Miss]:
        found: list[EpilogueSite | Miss] = []
        for node in region.graph.nodes:
            if node.op != "call_function" or node.target not in FORWARD_OPS:
                continue
            y = next((user for user in node.users if user.args[1] == 0), None)
            activation = None if y is None else next(filter(activation_of, y.users), None)
            if y is None or activation is None or _why_no_epilogue(node, y):  # torch's products have none to miss
                continue
            result, name = self._site(node, y, activation), qualified_name(node)
            found.append(
                Miss(self.name, activation, result, 0, activation, name) if isinstance(result, str) else result
            )
        return found

    def menu(self, site: EpilogueSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        return epilogue_menu(site, always=settings.rewrite == "always")

    def rewrite(self, site: EpilogueSite, candidate: Candidate, editor: Editor) -> None:
        *arguments, _, tf32 = site.call.args
        editor.before(site.call)
        applied = editor.call(site.call.target, *arguments, site.activation, tf32)  # type: ignore[arg-type]
        made = editor.getitem(applied, 0)
        editor.replace(site.node, made)
        editor.erase(site.dead_nodes)

    def _site(self, call: fx.Node, y: fx.Node, node: fx.Node) -> EpilogueSite | str:
        """The site, or why there is none."""
        op, name = FORWARD_OPS[call.target], activation_of(node)
        others = [user.name for user in (*y.users, *call.users) if user not in (y, node)]
        if name not in ACTIVATIONS:
            return f"the layer's activation is {name}; those that epilogues apply are {', '.join(ACTIVATIONS)}"
        if others:
            return f"not only {name} reads what the layer gives, but {', '.join(others)} too"
        if needs_gradient(y):
            return f"this graph trains, and the gradient of {name} takes what it is applied to"
        example = example_of(y)
        hints = compat.size_hints(example)
        elements = math.prod(int(at_sizes(compat.expression(size), hints)) for size in example.shape)
        return EpilogueSite(
            rule=self.name,
            name=qualified_name(call),
            node=node,
            device=example.device,
            sizes={},
            call=call,
            y=y,
            op=op,
            activation=name,
            read_bytes=elements * example.element_size(),
            stands_alone=is_written(node),
        )


def _why_no_epilogue(call: fx.Node, y: fx.Node) -> str:
    """Why an activation is not applied within the products, or ""; in the dtype of y, to which autocast casts them."""
    arguments: Any = call.args
    x, factors, _, static, _, _, tf32 = arguments
    dtype, given = example_of(y).dtype, [example_of(each) for each in (x, *factors)]
    with compat.example_mode(compat.fake_mode_of(given)):
        x, *factors = (each.to(dtype) if each.is_floating_point() else each for each in given)
        factors = [each.new_empty([int(size) for size in each.shape]) for each in factors]  # of symbolic sizes, too
        return FORWARD_OPS[call.target].why_no_epilogue(Applied(x, factors, static, tf32=tf32))
