"""The two ways in which a command can be refused; `src.cli.main` turns each into one line and an exit status."""


class UsageError(Exception):
    """The command asks for something that cannot be: exit status 2."""


class Failure(Exception):  # noqa: N818 (not every failure is an error of the program)
    """The command is right but the world is not: a file is missing or damaged, a device absent. Exit status 1."""
