"""The ways in which a command can end early; each is told in one line and has an exit status."""

import argparse
import os
import signal
import sys
import traceback
from typing import NoReturn


class UsageError(Exception):
    """The command asks for something that cannot be: exit status 2."""


class Failure(Exception):  # noqa: N818 (not every failure is an error of the program)
    """The command is right but the world is not: a file is missing or damaged, a device absent. Exit status 1."""


class Interrupted(Exception):  # noqa: N818 (nothing is wrong)
    """A signal or a command asked for the end, and the run has been saved.

    The exit status is 128 + the signal's number, as in shells; for a command (number 0) it is 0.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name if number else 'steer'} {message}")
        self.status = 128 + number if number else 0


class OneLineParser(argparse.ArgumentParser):
    """A parser of a small command line that raises `UsageError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong."""
        raise UsageError(f"{message}; see {self.prog} --help")


def visible(text: str) -> str:
    r"""Return a text with what a stranger may have put into it, to move the cursor or to begin a line, made visible.

    >>> visible("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def refuse(error: UsageError | Failure) -> int:
    """Tell an error in one line, and return the exit status. ``LIVE_CIFAR10_TRACEBACK=1`` shows where it comes from."""
    if os.environ.get("LIVE_CIFAR10_TRACEBACK"):
        traceback.print_exception(sys.exception() or error)
    line = visible(" ".join(str(error).split()))
    sys.stderr.write(f"error: {line if len(line) < 1000 else f'{line[:700]} … {line[-300:]}'}\n")
    return 2 if isinstance(error, UsageError) else 1
