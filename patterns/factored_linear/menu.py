"""A factored linear's candidates: two products, or their weight first, or products with the kept tiles alone."""

from __future__ import annotations

import math

from structfly.patterns.factored_linear.site import FactoredSite
from structfly.records import Candidate, Cost, Menu, Stage
from structfly.records.cost import at_sizes
from structfly.records.layer import TOKENS, product

DENSE, PRODUCTS, TILES = "dense", "low_rank", "gblr"


def factored_menu(site: FactoredSite) -> Menu:
    """All, with the time of the products that the gradients take; no limit but time."""
    (inner, outer), rank, dtype, item = site.layer, site.rank, site.dtype, site.dtype.itemsize
    passes = 1 + site.gradients
    # The weight is made once, and of its gradient one product with the other matrix for each that has one.
    moved = (rank * (inner + outer) + inner * outer) * item
    making = Stage(2 * inner * outer * rank, moved, 1 + site.matrix_gradients, dtype, min(inner, outer, rank))
    weight_first = Cost((making, *(product(inner, outer, dtype),) * passes), transient_bytes=inner * outer * item)
    saved = TOKENS * rank * item if site.matrix_gradients else 0
    one_by_one = Cost(
        (*(product(inner, rank, dtype),) * passes, *(product(rank, outer, dtype),) * passes),
        transient_bytes=TOKENS * rank * item,
        saved_bytes=saved,
    )
    first = site.found.weight_first
    candidates = [
        Candidate(DENSE, weight_first, rewrites=not first),
        Candidate(PRODUCTS, one_by_one, rewrites=first),
    ]
    if not site.others:
        return Menu(
            (candidates[1],),
            peak_limit=math.inf,
            own_bytes=int(at_sizes(saved, site.sizes)),
            settled=f"two products by way of rank {rank}; those of structfly's low rank are the same two",
        )
    if site.masks is not None:
        structure = site.masks.cut.structure
        cost = structure.cost(site.layer, dtype)
        # Tiles are taken by way of the components in order, and the gradients of what they are taken from likewise.
        taking = Stage(0, 4 * rank * (inner + outer) * item)
        tiles = Cost(
            (*(taking,) * (1 + bool(site.matrix_gradients)), *cost.stages * passes),
            transient_bytes=cost.transient_bytes + rank * (inner + outer) * item,
            saved_bytes=cost.saved_bytes if site.gradients else 0,
            opaque_calls=1 + (site.gradients > 0),
        )
        candidates.append(Candidate(TILES, tiles))
    kept = max(at_sizes(each.cost.saved_bytes, site.sizes) for each in candidates)
    return Menu(tuple(candidates), peak_limit=math.inf, own_bytes=int(kept))
