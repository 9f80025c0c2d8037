"""Files that several processes share: written as a whole, read within bounds, and no links followed.

Who may write to a run's folder may steer it, but must not reach other files with the trainer's rights.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def write_whole(path: Path, content: bytes | memoryview, mode: int = 0o666, *, sync: bool = False) -> None:
    """Write a file beside its place and rename it into it: who looks sees the old one or the new one, whole.

    Args:
        path: The file.
        content: All of it.
        mode: Its permissions, less what the user's mask takes away.
        sync: Bring it to the disk before it is renamed.

    Raises:
        OSError: If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINKS
    try:
        file = os.open(partial, flags, mode)
    except FileExistsError:  # of one that was killed
        partial.unlink()
        file = os.open(partial, flags, mode)
    try:
        try:
            write_all(file, content)
            if sync:
                os.fsync(file)
        finally:
            os.close(file)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        error.filename = str(path)
        raise


def write_all(file: int, content: bytes | memoryview) -> None:
    """Write all bytes to an open file."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]


def read_bounded(path: Path, most: int) -> bytes:
    """Return the bytes of a file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a plain file, or larger; says so.
    """
    file = open_to_read(path)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path.name} is not a file")
        if found.st_size > most:
            raise ValueError(f"{path.name} has {found.st_size:,} bytes; {most:,} are the most")
        return os.read(file, most)
    finally:
        os.close(file)


def open_to_read(path: Path) -> int:
    """Open a file to read it; no link is followed, and a pipe is not waited for.

    Raises:
        OSError: If it cannot be.
    """
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _NO_LINKS)


def open_below(folder: Path, name: str) -> int:
    """Open a file in a folder, or below it, to read it; nothing below the folder that is a link is followed.

    Args:
        folder: The folder; it may be a link itself.
        name: The file: ``cat/1.png``.

    Raises:
        OSError: If it cannot be.
    """
    if os.open not in os.supports_dir_fd:  # Windows
        return open_to_read(folder / name)
    *parts, last = name.split("/")
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            above, at = at, os.open(part, os.O_RDONLY | os.O_DIRECTORY | _NO_LINKS, dir_fd=at)
            os.close(above)
        return os.open(last, os.O_RDONLY | os.O_NONBLOCK | _NO_LINKS, dir_fd=at)
    finally:
        os.close(at)


def being_written(file: int) -> bool | None:
    """Return whether any process has a file, open here to be read alone, open to write; none if that is not known.

    Linux grants a lease of a file only while nobody writes to it. A writer who comes just then has SIGIO sent to this
    process: let it be ignored.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return None
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:  # EINVAL where the file system has none, EACCES for another's file
        return True if error.errno == errno.EAGAIN else None
    return False


def open_lock(path: Path) -> int:
    """Open a file to hold its lock; it is made if it is not there.

    Raises:
        OSError: If it cannot be.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINKS, 0o644)


def open_to_append(path: Path) -> int:
    """Open a file to write at its end; it is made if it is not there.

    Raises:
        OSError: If it cannot be.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_LINKS, 0o666)
