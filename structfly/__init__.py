"""structfly: a torch.compile backend for linear-heavy models.

>>> step = torch.compile(step, backend="structfly")   # no import of structfly needed
>>> print(structfly.explain(step)(*batch))            # what was rewritten, what was not, and why
"""

from structfly import ops
from structfly.config import Config
from structfly.errors import ArgumentError, ConfigError, RewriteError, StructflyError, UnsupportedError
from structfly.explanation import explain
from structfly.records import Report, SiteReport
from structfly.version import __version__

__all__ = [
    "ArgumentError",
    "Config",
    "ConfigError",
    "Report",
    "RewriteError",
    "SiteReport",
    "StructflyError",
    "UnsupportedError",
    "__version__",
    "explain",
    "ops",
]
