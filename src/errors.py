"""The ways in which a command can end early; `src.cli.main` turns each into one line and an exit status."""

import signal


class UsageError(Exception):
    """The command asks for something that cannot be: exit status 2."""


class Failure(Exception):  # noqa: N818 (not every failure is an error of the program)
    """The command is right but the world is not: a file is missing or damaged, a device absent. Exit status 1."""


class Interrupted(Exception):  # noqa: N818 (nothing is wrong)
    """A signal asked for the end, and the run has been saved. Exit status 128 + the signal's number, as in shells."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {message}")
        self.status = 128 + number
