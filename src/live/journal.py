"""The journal of a run: what happened to it from outside, each line stamped with the step at which it took effect.

    tail -f lightning_logs/version_0/live/journal.jsonl

A run is a function of its config, its seed and this file. Lines of kind ``set``, ``evaluate``, ``segment`` (images
joined), ``relabel`` and ``drop`` are what was done to it, in the order of (step, seq): a fit that goes on from a
checkpoint does those anew that came after the checkpoint, and a replay does all of them. The others tell what was
noted: ``resume`` (a fit goes on from a checkpoint), ``rollback``, ``checkpoint``, ``pause``, ``unpause`` (the command
resume), ``stop``, ``refused`` (a command, or what was fed; the journals of earlier runs call a file that was fed
``quarantined``).
"""

import contextlib
import json
import os
import threading
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from src.live.files import open_to_append, write_all

FED = ("segment", "relabel", "drop")
"""The kinds of lines that tell what happened to the data."""

DONE = ("set", "evaluate", *FED)
"""The kinds of lines that a replay does again."""

REFUSED = ("refused", "quarantined")
"""The kinds of lines that tell what was not done or taken."""

SHOWN = {"unpause": "resume", "resume": "gone on with", "quarantined": "refused"}
"""What a person is shown for a kind whose name here is not the word that was typed, or that is said elsewhere."""

_TYPES = {"seq": int, "step": int, "time": float, "kind": str, "name": str, "actor": str, "id": str}
_LOCK = threading.Lock()
_MOST = 2**62  # lines, and steps
_LAST = (4096, 65536, 2**62)  # bytes in which the last whole line is sought, one after the other


class Journal:
    """An append-only file of JSON lines, each with the CRC-32 of the rest of it; several threads may write.

    Args:
        path: The file; it and its folder are made at the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end: tuple[int, int] | None = None  # bytes up to which this object knows it, and the next line's number

    @property
    def seq(self) -> int:
        """The number of the next line."""
        return _end(self.path)[0]

    def append(
        self,
        step: int,
        kind: str,
        name: str = "",
        *,
        before: Any = None,
        requested: Any = None,
        effective: Any = None,
        actor: str = "",
        id: str = "",
    ) -> None:
        """Write one line and bring it to the disk.

        Args:
            step: Optimizer steps taken when it took effect.
            kind: What happened, e.g. ``set`` or ``rollback``.
            name: What was changed, e.g. ``lr``.
            before: Its value until then; a plain JSON value, as are the next two.
            requested: The value that was asked for.
            effective: The value since then.
            actor: Who asked for it.
            id: The command that asked for it.
        """
        line = {"name": name, "before": before, "requested": requested, "effective": effective}
        self.extend(step, kind, [line], actor=actor, id=id)

    def extend(
        self, step: int, kind: str, lines: Iterable[dict[str, Any]], *, actor: str = "", id: str = "", sync: bool = True
    ) -> list[int]:
        """Write several lines at once.

        Args:
            step: Optimizer steps taken when they took effect.
            kind: What happened.
            lines: The rest of each line: ``name``, ``before``, ``requested``, ``effective``.
            actor: Who asked for it.
            id: The command that asked for it.
            sync: Wait until they are on the disk.

        Returns:
            The number of each line.

        Raises:
            OSError: If they cannot be written. None of them is then in the journal.
        """
        with _LOCK:
            try:
                file = open_to_append(self.path)
            except FileNotFoundError:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = open_to_append(self.path)
            try:
                end = os.fstat(file).st_size
                # To read its end again each time would let a flood of refusals cost a training step.
                known = self._end
                seq, torn = (known[1], False) if known is not None and known[0] == end else _end(self.path)
                whole = [
                    {"seq": seq + i, "step": step, "time": time.time(), "kind": kind, "actor": actor, "id": id, **line}
                    for i, line in enumerate(lines)
                ]
                content = b"\n" * torn + b"".join(_encode(line) for line in whole)
                try:
                    write_all(file, content)
                    if sync:
                        os.fsync(file)
                except OSError as error:
                    os.ftruncate(file, end)
                    error.filename = str(self.path)
                    raise
                self._end = end + len(content), seq + len(whole)
            finally:
                os.close(file)
        return [line["seq"] for line in whole]

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines, oldest first; one that is damaged or half-written is left out."""
        try:
            return _lines(self.path.read_bytes())
        except FileNotFoundError:
            return []


def _encode(line: dict[str, Any]) -> bytes:
    text = json.dumps(line)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}\n'.encode()


def _lines(content: bytes) -> list[dict[str, Any]]:
    lines = []
    for raw in content.splitlines():
        try:
            line = json.loads(raw)
            crc = line.pop("crc")
            whole = zlib.crc32(json.dumps(line).encode()) == crc
            line = {"name": "", "actor": "", "id": "", "before": None, "requested": None, "effective": None, **line}
            typed = all(type(line[name]) is kind for name, kind in _TYPES.items())
            if whole and typed and 0 <= line["seq"] < _MOST and 0 <= line["step"] < _MOST:
                lines.append(line)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            continue
    return lines


def _end(path: Path) -> tuple[int, bool]:
    """Return the number of the next line, and whether the file ends in the middle of one."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for length in _LAST:
                file.seek(max(0, size - length))
                content = file.read()
                for raw in reversed(content.splitlines()):
                    if lines := _lines(raw):
                        return lines[0]["seq"] + 1, not content.endswith(b"\n")
                if length >= size:
                    break
            return 0, bool(content) and not content.endswith(b"\n")
    except FileNotFoundError:
        return 0, False
