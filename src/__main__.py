"""``python -m src``: see the sub-commands with ``--help``."""

import gc
import sys
from collections.abc import Callable
from importlib import import_module

# Those that need no Trainer: a light one must not wait for what it does not use.
_LIGHT = {"feed": "src.feed", "steer": "src.steer", "watch": "src.watch"}


def main() -> int:
    """Run the sub-command that the command line names, and return its exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    # To look for garbage while modules are loaded takes a fifth of the time, and finds next to none; to look through
    # them later on stops training for a fifth of a second.
    gc.disable()
    run: Callable[[list[str]], int] = import_module(_LIGHT.get(name, "src.cli")).main
    gc.freeze()
    gc.enable()
    return run(sys.argv[2:] if name in _LIGHT else sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
