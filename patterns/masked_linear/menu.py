"""A masked linear's candidates: as it is, which makes the dense weight anew at every call, or block-sparse."""

from __future__ import annotations

import math

from structfly.lowering.block_products.support import DTYPES
from structfly.patterns.blocks import cost_of_blocks
from structfly.patterns.masked_linear.site import MaskedSite
from structfly.records import Candidate, Cost, Menu, Stage
from structfly.records.layer import TOKENS, product


def masked_menu(site: MaskedSite) -> Menu:
    """Both, with the time of the products that the gradients take; no limit but time."""
    layer, dtype = site.layer, site.dtype
    dense, item = layer.parameters, dtype.itemsize
    kept = site.blocks * site.grid.block_out * site.grid.block_in
    indices = sum(tensor.numel() for tensor in site.layout if tensor is not None)
    blocks = cost_of_blocks(site.grid, site.blocks, indices, layer, dtype)
    products = 1 + site.gradients
    # What is elementwise: the mask of the weight against the choice of its blocks; of the gradient, likewise.
    masking, choosing = [Stage(0, 3 * dense * item)], [Stage(0, 2 * kept * item)]
    if site.weight_gradient:
        masking.append(Stage(0, 3 * dense * item))
        choosing.append(Stage(0, (kept + dense) * item))
    # Products that are not generated gather a part of x, or of a gradient, for every block on a GPU; a CPU's do so in
    # its caches.
    gathered = site.device.type == "cuda" and dtype not in DTYPES
    gathering = [Stage(0, 2 * TOKENS * site.blocks * site.grid.block_in * item)] if gathered else []
    as_it_is = Cost(
        (*masking, *(product(layer.in_features, layer.out_features, dtype),) * products),
        transient_bytes=dense * item,
    )
    sparse = Cost(
        (*choosing, *gathering * products, *blocks.stages * products),
        transient_bytes=blocks.transient_bytes + kept * item,
        opaque_calls=1 + (site.gradients > 0),
    )
    return Menu(
        (Candidate("dense", as_it_is, rewrites=False), Candidate("block_sparse", sparse)),
        peak_limit=math.inf,
    )
