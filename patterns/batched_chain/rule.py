"""The rule: chains of batched products with views between them become one op with Kronecker-sparse factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from structfly.config import SiteSettings
from structfly.lowering.layer_op import DEVICES
from structfly.patterns.batched_chain.axes import sizes_of
from structfly.patterns.batched_chain.menu import chain_menu
from structfly.patterns.batched_chain.products import read_products
from structfly.patterns.batched_chain.reader import Chain, read_chain
from structfly.patterns.batched_chain.rewrite import rewrite_chain
from structfly.patterns.batched_chain.site import ChainSite
from structfly.patterns.linear.reads import rows_of
from structfly.records import Candidate, DeviceProfile, Menu, Miss
from structfly.records.layer import TOKENS
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region, example_of, needs_gradient, qualified_name


class BatchedChain:
    """Exact: the same function, gradients included.  See docs/structured_code.md."""

    name = "batched_chain"

    def find(self, region: Region) -> Sequence[ChainSite | Miss]:
        results: list[ChainSite | Miss] = []
        within: set[fx.Node] = set()  # products of the chains found
        for call in reversed(region.calls):
            if call.node in within or next(read_products(call.node), None) is None:
                continue
            chain = read_chain(call.node)
            if isinstance(chain, Chain):
                within.update(chain.nodes)
                results.append(self._site(chain, region))
            elif chain is not None:
                results.append(Miss(self.name, call.node, chain, 0, call.node, qualified_name(call.node)))
        return results

    def menu(self, site: ChainSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
        return chain_menu(site, profile)

    def rewrite(self, site: ChainSite, candidate: Candidate, editor: Editor) -> None:
        rewrite_chain(site, candidate, editor)

    def _site(self, chain: Chain, region: Region) -> ChainSite | Miss:
        last, x = chain.products[-1].node, example_of(chain.x)
        name = qualified_name(last)
        dtypes = {example_of(product.node).dtype for product in chain.products}
        reason = ""
        if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
            reason = f"the products run in {', '.join(sorted(map(str, dtypes)))}; one floating-point dtype is allowed"
        if len({region.modes[node] for node in chain.nodes}) > 1:
            reason = "the products and views stand under different modes of autocast or of recording gradients"
        if any(product.inner for product in chain.products):
            reason = reason or _why_elementwise(region, last)
        if x.device.type not in DEVICES:
            reason = f"the products run on {x.device.type}; supported devices: {', '.join(DEVICES)}"
        shape = _shape(chain)
        if shape == ():
            reason = "the rows that the products give have several sizes that vary, and are not those that they take"
        if reason:
            return Miss(self.name, last, reason, 1, last, name)
        learns = needs_gradient(chain.result)
        of_factors = any(needs_gradient(factor) for product in chain.products for factor in product.given)
        return ChainSite(
            rule=self.name,
            name=name,
            node=chain.result,
            device=x.device,
            sizes={TOKENS: max(rows_of(chain.x, chain.rows), 1)},
            chain=chain,
            shape=shape,
            dtype=dtypes.pop(),
            learns=learns,
            gradients=(learns and needs_gradient(chain.x)) + (learns and of_factors),
        )


def _why_elementwise(region: Region, node: fx.Node) -> str:
    """Why products that are made elementwise are not made by products of matrices, which would round more, or ""."""
    value = example_of(node)
    if value.dtype == torch.float32 and value.is_cuda:
        return "the products are elementwise, in float32, which products of matrices on this device round more"
    backend: Any = torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    if value.dtype == torch.float32 and precision not in ("ieee", "none"):
        return f"the products are elementwise, in float32, and torch may make products of matrices in {precision}"
    if len(region.modes[node]) > 1 or torch.is_autocast_enabled(value.device.type):
        return "the products are elementwise, which autocast leaves alone, and products of matrices would be cast"
    return ""


def _shape(chain: Chain) -> tuple[int | str, ...] | None:
    """The result's shape as :class:`ChainSite` has it; None if it is the op's own, (*rows, out), and () if it cannot be
    told."""
    rows = sizes_of(example_of(chain.x))[: chain.rows]
    sizes = sizes_of(example_of(chain.result))
    if sizes == (*rows, chain.out_features):
        return None
    shape: list[int | str] = []
    for size in sizes:
        if size.is_Integer:
            shape.append(int(size))
        else:
            shape.append(str(rows.index(size)) if size in rows else -1)
    return tuple(shape) if shape.count(-1) < 2 else ()
