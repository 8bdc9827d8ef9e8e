"""``options`` of torch.compile and TOML files, read into one validated, frozen ``Config``."""

from structfly.config.fields import LayerPlan
from structfly.config.loading import load_config
from structfly.config.model import Budget, Config, Override, SiteSettings

__all__ = ["Budget", "Config", "LayerPlan", "Override", "SiteSettings", "load_config"]
