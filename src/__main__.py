"""``python -m src``: see the sub-commands with ``--help``."""

import atexit
import gc
import os
import select
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

# Those that need no Trainer: a light one must not wait for what it does not use.
_LIGHT = {"feed": "src.feed", "steer": "src.steer", "watch": "src.watch"}

# Ways to treat signs that an output cannot show which may raise, where it cannot show all, and where it is UTF-8.
_FAIL = ("strict", "surrogateescape"), ("strict",)


def main() -> int:
    """Run the sub-command that the command line names, and return its exit status."""
    _make_writable()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # in the middle of an import it would tell of that import's insides
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # To look for garbage while modules are loaded takes a fifth of the time, and finds next to none; to look through
    # them later on stops training for a fifth of a second.
    gc.disable()
    atexit.register(_end_in_silence)  # the first to be registered is the last to be called
    run: Callable[[list[str]], int] = import_module(_LIGHT.get(name, "src.cli")).main
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, before)
    try:
        status = run(sys.argv[2:] if name in _LIGHT else sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        if not _is_abandoned(1):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    return status


def _end_in_silence() -> None:
    """Close the error output where Triton is loaded, now that everything has been said.

    Triton from 3.9 on, which torchvision from 0.29.2 on loads, prints 31 lines of what nothing frees before a process
    ends, and that is all that ``main`` has frozen. To free it would take a third of a run's start once more. Triton's
    own processes close this output, too.
    """
    if "triton" in sys.modules:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _make_writable() -> None:
    """Let output that is closed go nowhere, and signs that a terminal does not know become question marks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # It stays open for as long as this process lasts.
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8", errors="replace"))  # noqa: SIM115
        elif isinstance(stream, TextIOWrapper) and stream.errors in _FAIL[stream.encoding.lower() == "utf-8"]:
            stream.reconfigure(errors="replace")


def _is_abandoned(output: int) -> bool:
    """Return whether nobody reads a pipe any more: head, say, has seen enough."""
    poll = select.poll()
    poll.register(output, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
