"""The candidates: a product, which is written, and the recurrence that reads it, or the op that makes both."""

from __future__ import annotations

import math

import sympy

from structfly.patterns.projected_recurrence.site import ProjectedSite
from structfly.records import Candidate, Cost, Menu, Stage
from structfly.records.cost import Expression


def projected_menu(site: ProjectedSite, *, always: bool) -> Menu:
    """Both, or the graph as it is where one kernel is not faster, unless ``always``."""
    rows, inner, outer = site.steps, site.inner, site.outer
    made, output = rows * outer, rows * outer / len(site.projection.order)
    windows = (_stage(site, moved=site.seen + rows * inner),) if site.seen else ()
    product = _stage(site, product=True, moved=rows * inner + outer * inner + made)
    as_it_is = Candidate(
        "a product and the recurrence",
        Cost((*windows, product, _stage(site, moved=made + output)), opaque_calls=1),
        rewrites=False,
    )
    if site.slower and not always:
        settled = f"{site.slower}; rewrite='always' overrides this"
        return Menu((as_it_is,), peak_limit=math.inf, settled=settled)
    read = site.seen or rows * inner
    op = Cost((_stage(site, product=True, moved=read + outer * inner + output),), opaque_calls=1)
    return Menu((as_it_is, Candidate("both in one", op)), peak_limit=math.inf)


def _stage(site: ProjectedSite, *, moved: Expression, product: bool = False) -> Stage:
    """A kernel that moves so many numbers, and makes the product."""
    bytes = moved * site.dtype.itemsize
    if not product:
        return Stage(0, bytes)
    short = sympy.Min(site.steps, site.inner, site.outer)
    return Stage(2 * site.steps * site.inner * site.outer, bytes, dtype=site.dtype, rows=short)
