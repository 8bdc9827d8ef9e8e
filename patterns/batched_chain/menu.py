"""A chain's candidates: as it is, with a copy wherever axes change places, or as one op that needs none between."""

from __future__ import annotations

import math

from structfly.patterns.batched_chain.site import ChainSite
from structfly.patterns.chain import cost_of_chain
from structfly.records import Candidate, Cost, Menu, Stage
from structfly.records.cost import at_sizes
from structfly.records.layer import TOKENS, product


def chain_menu(site: ChainSite) -> Menu:
    """Both, with the time of the products that the gradients take; no limit but time."""
    shapes, passes, row = site.shapes, 1 + site.gradients, TOKENS * site.dtype.itemsize
    products = tuple(product(s.columns, s.rows, site.dtype, batch=s.matrices) for s in shapes)
    # What leaves a product is put in the order that the next takes, or that the program returns, and back in backward.
    copies = tuple(Stage(0, 2 * row * s.features_out) for s in shapes)
    between = sum(shape.features_out for shape in shapes[:-1])
    saved = row * between if site.learns else 0
    as_it_is = Cost(
        (*products * passes, *copies * (2 if site.gradients else 1)), transient_bytes=row * between, saved_bytes=saved
    )
    cost = cost_of_chain(shapes, site.layer, site.dtype)
    fused = Cost(
        cost.stages * passes,
        transient_bytes=cost.transient_bytes,
        saved_bytes=saved,
        opaque_calls=1 + (site.gradients > 0),
    )
    return Menu(
        (Candidate("products", as_it_is, rewrites=False), Candidate("kronecker", fused)),
        peak_limit=math.inf,
        own_bytes=int(at_sizes(saved, site.sizes)),
    )
