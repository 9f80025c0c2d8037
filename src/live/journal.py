"""The journal of a run: what happened to it from outside, each line stamped with the step at which it took effect.

    tail -f lightning_logs/version_0/live/journal.jsonl

A run is a function of its config, its seed and this file. A line of kind ``resume`` at step k makes void the lines
before it with a step beyond k: what they tell of was lost with the process, and has happened again or not at all.
"""

import json
import os
import time
import zlib
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of JSON lines, each with the CRC-32 of the rest of it.

    Args:
        path: The file; it and its folder are made at the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seq: int | None = None

    def append(
        self, step: int, kind: str, name: str = "", *, before: Any = None, requested: Any = None, effective: Any = None
    ) -> None:
        """Write one line and bring it to the disk.

        Args:
            step: Optimizer steps taken when it took effect.
            kind: What happened, e.g. ``resume`` or ``rollback``.
            name: What was changed, e.g. ``lr``.
            before: Its value until then; a plain JSON value, as are the next two.
            requested: The value that was asked for.
            effective: The value since then.
        """
        if self._seq is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines, torn = _split(self.path)
            self._seq = lines[-1]["seq"] + 1 if lines else 0
        else:
            torn = False
        line = {"seq": self._seq, "step": step, "time": time.time(), "kind": kind, "name": name,
                "before": before, "requested": requested, "effective": effective}  # fmt: skip
        with self.path.open("ab") as file:
            file.write(b"\n" * torn + _encode(line))
            file.flush()
            os.fsync(file.fileno())
        self._seq += 1

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines, oldest first; one that is damaged or half-written is left out."""
        return _split(self.path)[0]


def _encode(line: dict[str, Any]) -> bytes:
    text = json.dumps(line, allow_nan=True)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}\n'.encode()


def _split(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the whole lines, and whether the file ends in the middle of one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], False
    lines = []
    for raw in content.splitlines():
        try:
            line = json.loads(raw)
            crc = line.pop("crc")
            if zlib.crc32(json.dumps(line).encode()) == crc:
                lines.append(line)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            continue
    return lines, bool(content) and not content.endswith(b"\n")
