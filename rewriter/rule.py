"""The rule protocol: what a pattern has to offer the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from structfly.config import SiteSettings
from structfly.records import DeviceProfile, LayerMenu, Menu, Miss, Site
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region

SiteT = TypeVar("SiteT", bound=Site)


class Rule(Protocol[SiteT]):
    """Finds sites, offers candidates for them, and writes the chosen one into the graph.

    Reading never changes the graph, and all state lives in the site.  A condition that fails is a
    :class:`~structfly.records.Miss` with the reason and the node, never an exception and never silence.
    """

    @property
    def name(self) -> str:
        """Stands in the configuration's ``rules`` and in reports."""
        ...

    def find(self, region: Region) -> Sequence[SiteT | Miss]:
        """All sites of one region, and for every anchor that is no site the attempts that failed."""
        ...

    def menu(self, site: SiteT, profile: DeviceProfile, settings: SiteSettings) -> Menu | LayerMenu:
        """The ways of running ``site``, with their costs, and the limits they are chosen under."""
        ...

    def rewrite(self, site: SiteT, candidate: Any, editor: Editor) -> None:
        """Write ``candidate``, one of the menu's, into the graph through ``editor``; an exception undoes all of it."""
        ...
