"""``python -m src``: see the sub-commands with ``--help``."""

import sys

from src.cli import main

if __name__ == "__main__":
    sys.exit(main())
