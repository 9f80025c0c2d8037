"""``python -m src``: see the sub-commands with ``--help``."""

import sys
from importlib import import_module

# Those that need no Trainer: a light one must not wait for what it does not use.
_LIGHT = {"feed": "src.feed", "steer": "src.steer", "watch": "src.watch"}


def main() -> int:
    """Run the sub-command that the command line names, and return its exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in _LIGHT:
        status: int = import_module(_LIGHT[name]).main(sys.argv[2:])
        return status
    from src.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
