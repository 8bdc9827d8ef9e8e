"""An activation's candidates: a pass over the layer's output, or the epilogue of the layer's products."""

from __future__ import annotations

import math

from structfly.patterns.layer_epilogue.site import EpilogueSite
from structfly.records import Candidate, Cost, Menu, Stage


def epilogue_menu(site: EpilogueSite, *, always: bool) -> Menu:
    """Both where the pass is one of its own, or if ``always``; else the activation as it is."""
    passes = (Stage(0, 2 * site.read_bytes),) if site.stands_alone else ()
    as_it_is = Candidate("as it is", Cost(passes), rewrites=False)
    if not site.stands_alone and not always:
        settled = f"Inductor makes {site.activation} in one kernel with the elementwise work that reads it"
        return Menu((as_it_is,), peak_limit=math.inf, settled=settled)
    return Menu((as_it_is, Candidate(f"epilogue of {site.op.name}", Cost(()))), peak_limit=math.inf)
