"""The fit's handle on the process that takes what is put into a folder: see `src.live.intake`.

    feeder = Feeder(folder, store, classes, 32, first=0, room=10**6, taken=(), corrections=(), digests=b"")
    feeder.open()
    while feeder.wait(1.0):
        print(feeder.ready.popleft())

To its stdin go a JSON line with what it has to know, ``digests`` times 16 bytes of the images that are known, and a
line ``{"joined": n}`` whenever images have joined the data; any other line, or the end of the file, ends the process.
From its stdout come JSON lines of a ``kind``: ``segment``, ``refused``, ``correction``, ``waiting``, ``error`` (it goes
on) or ``ended``.
"""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import src
from src.errors import Failure
from src.live.segments import DIGEST, Segment, Source, read_segment

RESTARTS = 10
"""Times that the process is started again in a run."""

_MOST_READY = 10_000  # reports; with more, the process has to wait


class Correction(NamedTuple):
    """What someone says an image really shows.

    Attributes:
        id: Of the correction.
        sample: The id of the image, or its name as it was fed.
        label: The number of its class; none to drop it.
        actor: Who says so.
    """

    id: str
    sample: int | str
    label: int | None
    actor: str


class Refused(NamedTuple):
    """What is not taken.

    Attributes:
        name: Of the file in the folder, or of the image in a shard.
        reason: Why, in a few words.
        source: To be passed to the next `Feeder` of this run as ``taken``.
    """

    name: str
    reason: str
    source: Source


class Feeder:
    """Takes what is put into a folder, in a process of its own.

    Args:
        folder: The folder; it need not be there yet.
        store: Where segments are stored; those with the number ``first`` and later ones are deleted.
        classes: Names of the classes, in order of their numbers.
        size: Side of the images in pixels.
        first: Number of the next segment.
        room: Images that may still come; more are refused.
        taken: Sources that have been dealt with: those of the segments that have joined, and of what was refused.
        corrections: Ids of those that have been dealt with.
        digests: Of the images that are known: see `src.live.segments.digests`.
        told: Called by another thread when something has been reported.

    Attributes:
        ready: What has come, oldest first; another thread appends to it.
        waiting: Images that have been noticed and not joined; a shard that is not read counts as one.
        refused: Files and images that were refused.
    """

    def __init__(
        self,
        folder: Path,
        store: Path,
        classes: Sequence[str],
        size: int,
        *,
        first: int,
        room: int,
        taken: Collection[Source],
        corrections: Collection[str],
        digests: bytes,
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self.ready: deque[Segment | Correction | Refused] = deque()
        self.refused = 0
        self._folder, self._store = Path(folder).absolute(), Path(store).absolute()
        self._classes, self._size = list(classes), size
        self._first, self._room = first, room
        self._taken = {(name, size, changed) for name, size, changed in taken}
        self._corrections = set(corrections)
        self._digests, self._names = bytearray(digests), list[str]()
        self._told = told
        self._unjoined = 0
        self._unsaid = 0  # images that have joined, and the process does not know
        self._noticed = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._reason = ""
        self._ending = threading.Event()
        self._came = threading.Condition()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="feeder", daemon=True)

    @property
    def waiting(self) -> int:
        """Images that have been noticed and not joined."""
        return self._noticed + self._unjoined

    def open(self) -> None:
        """Begin to take what comes."""
        self._thread.start()

    def joined(self, segment: Segment) -> None:
        """Note that a segment has joined the data: as many others may follow. Never blocks."""
        with self._lock:
            self._unjoined -= len(segment.names)
            self._unsaid += len(segment.names)
            self._say()

    def wait(self, seconds: float) -> bool:
        """Wait until something is ready, at most so long, and return whether it is."""
        with self._came:
            return self._came.wait_for(lambda: bool(self.ready), seconds)

    def close(self) -> None:
        """End the process; what is ready can still be taken."""
        self._ending.set()
        with self._lock:
            process = self._process
            if process and process.stdin:
                with contextlib.suppress(OSError, ValueError):
                    # To close it may not be enough: a process that was forked from this one has it open too.
                    os.write(process.stdin.fileno(), b'{"end": true}\n')
                    process.stdin.close()
        if process:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._thread.is_alive():
            self._thread.join(5)

    def _say(self) -> None:
        process = self._process
        if process and process.stdin and not process.stdin.closed and self._unsaid:
            line = json.dumps({"joined": self._unsaid}).encode() + b"\n"
            with contextlib.suppress(OSError, ValueError):  # full or broken: said with the next, or to the next process
                if os.write(process.stdin.fileno(), line) == len(line):
                    self._unsaid = 0

    def _work(self) -> None:
        for attempt in range(RESTARTS + 1):
            if self._ending.wait(min(5.0, 0.1 * 2**attempt) if attempt else 0.0):
                return
            try:
                self._serve()
            except (OSError, Failure) as error:
                self._reason = str(error)
            if self._ending.is_set():
                return
        line = f"{self._folder} is fed from no more: the process that reads it ended {RESTARTS + 1} times"
        sys.stderr.write(f"warning: {line} (the last time: {self._reason}); training goes on\n")

    def _serve(self) -> None:
        """Start the process, and take its reports until it ends."""
        command = [sys.executable, "-P", "-m", "src.live.intake"]  # -P: no other src that lies where the fit runs
        paths = [str(Path(src.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        with self._lock:
            config, known = self._config()
            self._unsaid = 0
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            bufsize=-1,
        ) as process:
            assert process.stdin and process.stdout
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(config).encode() + b"\n" + known)
                    process.stdin.flush()
                with self._lock:
                    self._process = process
                    if hasattr(os, "set_blocking"):
                        os.set_blocking(process.stdin.fileno(), False)
                    if self._ending.is_set():
                        process.kill()
                    self._say()
                self._reason = ""
                for line in process.stdout:
                    if line.endswith(b"\n"):  # else it was killed in the middle of it
                        self._take(json.loads(line))
                        self._told()
            finally:
                if not self._ending.is_set():
                    process.kill()
                with self._lock:
                    self._process = None
                    with contextlib.suppress(OSError):
                        process.stdin.close()
                process.stdout.close()
                status = process.wait()
                self._noticed = 0
        if not self._reason:
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            self._reason = name

    def _config(self) -> tuple[dict[str, Any], bytes]:
        config = {
            "folder": str(self._folder),
            "store": str(self._store),
            "classes": self._classes,
            "size": self._size,
            "first": self._first,
            "room": self._room,
            "unjoined": self._unjoined,
            "taken": sorted(self._taken),
            "corrections": sorted(self._corrections),
            "names": self._names,
            "digests": len(self._digests) // DIGEST,
        }
        return config, bytes(self._digests)

    def _take(self, report: dict[str, Any]) -> None:
        """Take a report of the process."""
        kind = report["kind"]
        item: Segment | Correction | Refused
        if kind == "segment":
            item = read_segment(Path(report["path"]), report["sha256"])
            with self._lock:
                self._first = item.number + 1
                self._room -= len(item.names)
                self._unjoined += len(item.names)
                self._noticed = max(0, self._noticed - len(item.names))
                self._taken.update(item.sources)
                self._digests += base64.b64decode(report["digests"])
                self._names += item.names
        elif kind == "refused":
            name, size, changed = report["source"]
            item = Refused(report["name"], report["reason"], (name, size, changed))
            self._taken.add(item.source)
            self.refused += 1
        elif kind == "correction":
            item = Correction(report["id"], report["sample"], report["label"], report["actor"])
            self._corrections.add(item.id)
        elif kind == "waiting":
            self._noticed = report["images"] + report["files"]
            return
        elif kind == "ended":
            self._reason = report["reason"]
            return
        else:
            sys.stderr.write(f"warning: feed: {report['reason']}\n")
            return
        while len(self.ready) >= _MOST_READY and not self._ending.wait(0.05):
            pass
        with self._came:
            self.ready.append(item)
            self._came.notify_all()
