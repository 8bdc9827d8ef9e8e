"""A chain's candidates: as it is, with a copy wherever axes change places, or as one op that needs none between."""

from __future__ import annotations

import math

from structfly.patterns.batched_chain.site import ChainSite
from structfly.patterns.chain import cost_of_chain
from structfly.records import Candidate, Cost, DeviceProfile, Menu, Stage
from structfly.records.cost import at_sizes
from structfly.records.layer import TOKENS

_LINE = 64  # bytes that a CPU reads at a time


def chain_menu(site: ChainSite, profile: DeviceProfile) -> Menu:
    """Both, with the time of the products that the gradients take; no limit but time."""
    shapes, row = site.shapes, TOKENS * site.dtype.itemsize
    cost = cost_of_chain(shapes, site.layer, site.dtype)
    *products, in_order = cost.stages
    products *= 1 + site.gradients
    if profile.kind == "cpu":  # rows become columns number by number, for each of which a whole line may be read
        in_order = Stage(0, TOKENS * (_LINE + site.dtype.itemsize) * shapes[-1].features_out)
    ways = 2 if site.gradients else 1  # features are put in order forward, and back in backward
    # What leaves a product is put in the order that the next takes, or that the program returns.
    copies = [Stage(0, 2 * row * shape.features_out) for shape in shapes]
    between = row * sum(shape.features_out for shape in shapes[:-1])
    saved = between if site.learns else 0
    as_it_is = Cost((*products, *copies * ways), transient_bytes=between, saved_bytes=saved)
    fused = Cost(
        (*products, *[in_order] * ways),
        transient_bytes=cost.transient_bytes,
        saved_bytes=saved,
        opaque_calls=ways,
    )
    return Menu(
        (Candidate("products", as_it_is, rewrites=False), Candidate("kronecker", fused)),
        peak_limit=math.inf,
        own_bytes=int(at_sizes(saved, site.sizes)),
    )
