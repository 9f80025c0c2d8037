"""Whether a process lives: it holds a lock for as long as it does, and the system takes that back however it ends."""

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def hold(file: int) -> None:
    """Hold the lock of an open file or folder until this process ends or closes it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)


def try_hold(file: int) -> bool:
    """Hold the lock of an open file or folder if no other does, and return whether it is held now."""
    with contextlib.suppress(BlockingIOError):
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def is_held(file: int) -> bool:
    """Return whether another holds the lock of an open file or folder; where there are no such locks, true."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def lives(path: Path) -> bool:
    """Return whether the process that holds the lock of a file lives; false if there is no such file."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return False
    try:
        return is_held(file)
    finally:
        os.close(file)
