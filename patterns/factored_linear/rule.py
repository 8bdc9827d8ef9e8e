"""The rule: a linear whose weight is a product of two matrices is multiplied by in the order that is fastest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from structfly.config import SiteSettings
from structfly.lowering.layer_op import DEVICES
from structfly.patterns.factored_linear.cuts import masks_of
from structfly.patterns.factored_linear.menu import factored_menu
from structfly.patterns.factored_linear.reader import Factored, factored, made_of_state
from structfly.patterns.factored_linear.rewrite import rewrite_factored
from structfly.patterns.factored_linear.site import FactoredSite
from structfly.patterns.linear.reads import rows_of
from structfly.records import Candidate, DeviceProfile, Menu, Miss
from structfly.records.layer import TOKENS, LayerSizes
from structfly.rewriter.editor import Editor
from structfly.rewriter.linear import read_linear
from structfly.rewriter.region import Region, example_of, needs_gradient, qualified_name


class FactoredLinear:
    """Exact: the same function, gradients included.  See docs/structured_code.md."""

    name = "factored_linear"

    def find(self, region: Region) -> Sequence[FactoredSite | Miss]:
        results: list[FactoredSite | Miss] = []
        state, within = made_of_state(region), set[fx.Node]()
        for call in reversed(region.calls):  # of three linears in a row the last two are a pair
            linear = None if call.node in within else read_linear(call.node)
            found = None if linear is None else factored(linear)
            if found is not None and state.issuperset((found.left.node, found.right.node)):
                within.update(found.products)
                results.extend(self._site(found, region))
        return results

    def menu(self, site: FactoredSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        return factored_menu(site)

    def rewrite(self, site: FactoredSite, candidate: Candidate, editor: Editor) -> None:
        rewrite_factored(site, candidate, editor)

    def _site(self, found: Factored, region: Region) -> list[FactoredSite | Miss]:
        product, name = example_of(found.node), qualified_name(found.node)
        reason = ""
        if product.device.type not in DEVICES:
            reason = f"the products run on {product.device.type}; supported devices: {', '.join(DEVICES)}"
        if not product.is_floating_point():
            reason = f"the products run in {product.dtype}; a floating-point dtype is allowed"
        if len({region.modes[node] for node in found.nodes}) > 1:
            reason = "its products stand under different modes of autocast or of recording gradients"
        if reason:
            return [Miss(self.name, found.node, reason, 0, found.node, name)]
        masks = masks_of(found, region)
        learns = needs_gradient(found.node)
        matrices = sum(learns and needs_gradient(each.node) for each in (found.left, found.right))
        site = FactoredSite(
            rule=self.name,
            name=name,
            node=found.node,
            device=product.device,
            sizes={TOKENS: max(rows_of(found.x), 1)},
            found=found,
            masks=None if isinstance(masks, str) else masks,
            layer=LayerSizes(found.right.shape[1], found.left.shape[0]),
            rank=found.left.shape[1],
            dtype=product.dtype,
            gradients=(learns and needs_gradient(found.x)) + bool(matrices),
            matrix_gradients=matrices,
        )
        if not site.others and not site.thin:
            return []
        if not isinstance(masks, str) or not masks:
            return [site]
        at = found.left.node
        reason = f"its matrices are multiplied by what would be masks, of which one cannot be used: {masks}"
        return [site, Miss(self.name, at, reason, 1, at, name)]
