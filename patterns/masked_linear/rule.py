"""The rule: a linear whose weight is masked by constant blocks becomes a product with the blocks that are kept."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from structfly.config import SiteSettings
from structfly.errors import ArgumentError
from structfly.lowering.block_sparse.layout import layout_of_mask
from structfly.lowering.layer_op import DEVICES
from structfly.patterns.head.chain import describe
from structfly.patterns.linear.projection import plainly
from structfly.patterns.linear.reads import rows_of
from structfly.patterns.masked_linear.masks import Masked, masked_weights
from structfly.patterns.masked_linear.menu import masked_menu
from structfly.patterns.masked_linear.rewrite import rewrite_masked
from structfly.patterns.masked_linear.site import MaskedSite
from structfly.records import Candidate, DeviceProfile, Menu, Miss
from structfly.records.layer import TOKENS, LayerSizes
from structfly.rewriter.constants import Constant, read_constant
from structfly.rewriter.editor import Editor
from structfly.rewriter.linear import LinearLike, read_linear
from structfly.rewriter.region import Region, example_of, needs_gradient, qualified_name

_CONSTANT, _MASK = 1, 2  # how far a reading got: its mask is a constant, and has no values but 0 and 1


class MaskedLinear:
    """Exact: the same function, gradients included.  See docs/structured_code.md."""

    name = "masked_linear"

    def find(self, region: Region) -> Sequence[MaskedSite | Miss]:
        results: list[MaskedSite | Miss] = []
        for call in region.calls:
            linear = read_linear(call.node)
            if linear is not None and linear.adapter is None:
                found = [self._site(linear, masked, region) for masked in masked_weights(linear)]
                sites = [each for each in found if isinstance(each, MaskedSite)]
                results.extend(sites[:1] or found)  # where both factors are masks, either will do
        return results

    def menu(self, site: MaskedSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        return masked_menu(site)

    def rewrite(self, site: MaskedSite, candidate: Candidate, editor: Editor) -> None:
        rewrite_masked(site, editor)

    def _site(self, linear: LinearLike, masked: Masked, region: Region) -> MaskedSite | Miss:
        parameter = masked.weight if masked.weight.op == "placeholder" else None
        name = qualified_name(linear.node, parameter)

        def miss(node: fx.Node, reason: str, progress: int) -> Miss:
            return Miss(self.name, node, reason, progress, linear.node, name)

        mask = read_constant(masked.mask, region)
        if not isinstance(mask, Constant):
            reason = f"the weight is {describe(masked.nodes[-1])}, and what would be its mask is no constant: {mask}"
            return miss(masked.nodes[-1], reason, 0)
        if any((node in region.undifferentiated) != (linear.node in region.undifferentiated) for node in masked.nodes):
            reason = "the weight is masked under no_grad, and the linear is not; mask it where gradients are recorded"
            return miss(masked.nodes[-1], reason, _CONSTANT)
        product = example_of(linear.node)
        if product.device.type not in DEVICES:
            reason = f"the weight is on {product.device.type}; supported devices: {', '.join(DEVICES)}"
            return miss(linear.node, reason, _CONSTANT)
        with plainly(product):
            value = masked.kept(mask.value(mask.leaves))
        try:
            grid, layout = layout_of_mask(value)
        except ArgumentError as error:
            is_mask = bool(((value == 0) | (value == 1)).all())
            return miss(masked.mask, str(error), _MASK if is_mask else _CONSTANT)
        out_features, in_features = value.shape
        learns = needs_gradient(linear.node)
        weight_gradient = learns and needs_gradient(masked.weight)
        return MaskedSite(
            rule=self.name,
            name=name,
            node=linear.node,
            device=product.device,
            sizes={TOKENS: max(rows_of(linear.x), 1)},
            linear=linear,
            masked=masked,
            mask=mask,
            grid=grid,
            layout=layout,
            layer=LayerSizes(in_features, out_features),
            dtype=product.dtype,
            gradients=(learns and needs_gradient(linear.x)) + weight_gradient,
            weight_gradient=weight_gradient,
        )
