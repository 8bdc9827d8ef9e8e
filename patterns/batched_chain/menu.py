"""A chain's candidates: as it is, with a copy wherever axes change places, or as one op that needs none between.

The op may have fewer factors, larger ones, each the product of neighbours: a butterfly's stages are many and thin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from structfly.lowering.kronecker.reference import FactorShape
from structfly.patterns.batched_chain.merging import grouped_shapes, widened
from structfly.patterns.batched_chain.site import ChainSite
from structfly.patterns.chain import cost_of_chain
from structfly.records import Candidate, Cost, DeviceProfile, Menu, Stage
from structfly.records.cost import at_sizes
from structfly.records.layer import TOKENS

_LINE = 64  # bytes that a CPU reads at a time


def chain_menu(site: ChainSite, profile: DeviceProfile) -> Menu:
    """All, with the time of the products that the gradients take; no limit but time."""
    shapes, row = site.shapes, TOKENS * site.dtype.itemsize
    ways = 2 if site.gradients else 1  # features are put in order forward, and back in backward
    # What leaves a product is put in the order that the next takes, or that the program returns; sums of elementwise
    # products are made in that order.
    copied = [shape for shape, each in zip(shapes, site.chain.products, strict=True) if not each.inner]
    copies = [Stage(0, 2 * row * shape.features_out) for shape in copied]
    between = row * sum(shape.features_out for shape in shapes[:-1])
    saved = between if site.learns else 0
    *products, _ = cost_of_chain(shapes, site.layer, site.dtype).stages
    as_it_is = Cost((*products * (1 + site.gradients), *copies * ways), transient_bytes=between, saved_bytes=saved)
    candidates = [Candidate("products", as_it_is, rewrites=False)]
    for name, groups in grouped(shapes).items():
        candidates.append(Candidate(name, _as_op(site, groups, ways, profile)))
    return Menu(tuple(candidates), peak_limit=math.inf, own_bytes=int(at_sizes(saved, site.sizes)))


def grouped(shapes: Sequence[FactorShape]) -> dict[str, list[FactorShape]]:
    """The factors as they are, and neighbours merged to fewer, two or more, by the candidate's name."""
    ways = {"kronecker": list(shapes)}
    for groups in range(len(shapes) - 1, 1, -1):
        made = grouped_shapes(shapes, groups)
        if made is not None:
            ways[f"kronecker of {groups}"] = made
    return ways


def _as_op(site: ChainSite, shapes: list[FactorShape], ways: int, profile: DeviceProfile) -> Cost:
    cost = cost_of_chain(tuple(shapes), site.layer, site.dtype)
    *products, in_order = cost.stages
    if profile.kind == "cpu":  # rows become columns number by number, for each of which a whole line may be read
        in_order = Stage(0, TOKENS * (_LINE + site.dtype.itemsize) * shapes[-1].features_out)
    merging = []
    if len(shapes) < len(site.shapes):  # each merge reads two factors and writes one, no larger than that of its group
        moved = 3 * len(site.shapes) * max(shape.parameters for shape in shapes) * widened(site.dtype).itemsize
        merging = [Stage(0, moved)] * ways
    return Cost(
        (*products * (1 + site.gradients), *[in_order] * ways, *merging),
        transient_bytes=cost.transient_bytes,
        saved_bytes=cost.saved_bytes if site.learns else 0,
        opaque_calls=ways,
    )
