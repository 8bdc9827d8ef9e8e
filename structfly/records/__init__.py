"""Plain records that travel between the layers: costs, device profiles, sites, candidates, choices, reports."""

from structfly.records.cost import Cost, CostValues, Stage
from structfly.records.device import DeviceModel, DeviceProfile
from structfly.records.report import Report, SiteReport, Status
from structfly.records.site import Candidate, LayerCandidate, LayerMenu, LayerTiming, Menu, Miss, Site

__all__ = [
    "Candidate",
    "Cost",
    "CostValues",
    "DeviceModel",
    "DeviceProfile",
    "LayerCandidate",
    "LayerMenu",
    "LayerTiming",
    "Menu",
    "Miss",
    "Report",
    "Site",
    "SiteReport",
    "Stage",
    "Status",
]
