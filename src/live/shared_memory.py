"""Folders of shared memory that belong to one process, and tell others whether it lives.

    ls -l /dev/shm/live-cifar10-*

A folder's owner holds a lock on it, which the system takes back however that process ends: so readers tell a dead
trainer from a quiet one at once, and whoever comes next deletes what a killed one has left behind.
"""

import contextlib
import mmap
import os
import secrets
import shutil
import stat
import struct
import tempfile
from pathlib import Path

from src.live.liveness import hold, try_hold

_UNPUBLISHED = 2**64 - 1


def place() -> Path:
    """Return where shared memory is; where the system has no such place, the folder of temporary files."""
    path = Path("/dev/shm")
    return path if path.is_dir() else Path(tempfile.gettempdir())


def is_own(path: Path) -> bool:
    """Return whether a path is such a folder, and of this user's."""
    if path.parent != place() or not path.name.startswith(_prefix()):
        return False
    with contextlib.suppress(OSError):
        found = path.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return False


def create() -> tuple[Path, int]:
    """Make a folder that this user alone can enter.

    Returns:
        The folder, and the open file whose lock says that this process lives.

    Raises:
        OSError: If there is no room for it, or no shared memory.
    """
    while True:
        path = place() / f"{_prefix()}{secrets.token_hex(6)}"
        path.mkdir(mode=0o700)
        with contextlib.suppress(FileNotFoundError):  # taken for a leftover before it was locked
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            hold(lock)
            if os.fstat(lock).st_nlink:
                return path, lock
            os.close(lock)


def reclaim() -> None:
    """Delete the folders of this user's processes that have been killed."""
    for path in place().glob(f"{_prefix()}*"):
        if not is_own(path):
            continue
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if try_hold(lock):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _prefix() -> str:
    return f"live-cifar10-{os.geteuid()}-"


class Clock:
    """The trainer's step, and the newest step it has published, in memory that several processes map.

    Args:
        path: The file; it is made if `writes`.
        writes: Whether this is the trainer's side.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT if writes else os.O_RDONLY
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if writes:
                os.write(file, struct.pack("2Q", 0, _UNPUBLISHED))
            access = mmap.ACCESS_WRITE if writes else mmap.ACCESS_READ
            self._memory = mmap.mmap(file, 16, access=access)
        finally:
            os.close(file)
        # One aligned word of eight bytes is never seen by halves.
        self._cells = memoryview(self._memory).cast("Q")

    @property
    def step(self) -> int:
        """Optimizer steps that the trainer has taken."""
        return self._cells[0]

    @step.setter
    def step(self, step: int) -> None:
        self._cells[0] = step

    @property
    def published(self) -> int | None:
        """The step of the newest version, or none."""
        step = self._cells[1]
        return None if step == _UNPUBLISHED else step

    @published.setter
    def published(self, step: int) -> None:
        self._cells[1] = step

    def close(self) -> None:
        """Unmap it."""
        self._cells.release()
        self._memory.close()
