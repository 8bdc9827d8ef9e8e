"""``python -m structfly``."""

import sys

from structfly.cli import main

if __name__ == "__main__":
    sys.exit(main())
