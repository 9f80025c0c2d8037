"""The process beside a fit that takes what is put into a folder: watches, reads, decodes, checks and stores it.

    python -m src.live.intake < config

It takes no time of the training thread, and a picture made to crash its reader crashes this process alone, which
`src.live.feeder` starts again. The config and what has joined the data come on stdin, reports go to stdout: JSON lines,
told in `src.live.feeder`.
"""

import base64
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import queue
import signal
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from src.live.commands import ID
from src.live.decode import Pixels, decode_image, image_suffixes
from src.live.feed import CORRECTIONS, class_of
from src.live.files import being_written, open_below, open_lock, write_all
from src.live.liveness import hold
from src.live.segments import DIGEST, Source, segment_path, write_segment
from src.live.shards import MAX_IMAGE_BYTES, MAX_SHARD_BYTES, SHARD_SUFFIXES, read_shard

MOST_WAITING = 2000
"""Images that may be stored and not have joined the data; with more, nothing is read."""

SEGMENT_IMAGES = 500
"""Images of a segment at most."""

_QUIET, _OLDEST = 0.03, 0.1
"""Seconds without another image after which a segment is stored, and seconds that its first image waits at most."""
_APART = 0.25
"""Seconds from one segment to the next, unless it is full: to let one join takes some milliseconds of the training
thread, however few images are in it."""
_RESCAN, _RESCAN_SHARE = 10.0, 0.005
"""Seconds between two looks at the whole folder, and the share of the time that they may take."""
_SETTLED = 1.0  # seconds that a file is left alone where nobody can tell whether it is being written
_BUSY = (0.02, 1.0)  # seconds until a file that is being written is looked at again: at first, and at most
_IGNORED = (".tmp", ".part", ".partial", "~")
_LONGEST = 500  # letters of a name
_LARGEST_CORRECTION = 65536  # bytes
_LONGEST_READ = 60.0
"""Seconds of the processor that an image, or the look at a shard as a whole, may take; then the process ends."""
_TRIES = 2  # times that the process may end over the same image: once may be by chance


class _Busy(Exception):  # noqa: N818 (nothing is wrong)
    """A file is being written, or was changed while it was read."""


class _Later(NamedTuple):
    due: float
    delay: float
    seen: tuple[int, int]  # size and time of change
    since: float


class Intake:
    """Takes what is put into a folder.

    Args:
        config: See `src.live.feeder`.
        known: 16 bytes of each image that is known already.
        reports: Where reports are written to.
    """

    def __init__(self, config: dict[str, Any], known: bytes, reports: int) -> None:
        self.folder, self.store = Path(config["folder"]), Path(config["store"])
        self.size: int = config["size"]
        self.events: queue.SimpleQueue[set[str] | int | None] = queue.SimpleQueue()
        self._reports = reports
        self._classes = {name: number for number, name in enumerate(config["classes"])}
        self._number: int = config["first"]
        self._room: int = config["room"]
        self._unjoined: int = config["unjoined"]
        self._taken = {(name, size, time) for name, size, time in config["taken"]}
        self._done: set[str] = set(config["corrections"])
        names = config["names"]
        ids = [known[i : i + DIGEST] for i in range(0, len(known), DIGEST)]
        self._known: dict[bytes, str] = dict(zip(ids, [""] * (len(ids) - len(names)) + names, strict=True))
        self._progress: dict[Source, int] = {}  # images of a shard that are dealt with
        for name, size, changed in self._taken:
            shard, found, count = name.rpartition("#:")
            if found and count.isdigit():
                source = (shard, size, changed)
                self._progress[source] = max(int(count), self._progress.get(source, 0))
        self._queue: dict[str, None] = {}
        self._later: dict[str, _Later] = {}
        self._next_later = math.inf
        self._folders: deque[tuple[float, Path]] = deque()  # new ones, to be looked at once more
        self._held: list[dict[str, Any]] = []  # corrections of images that are still to come
        self._reading: str = ""
        self._work: Iterator[None] | None = None
        self._gathered: list[tuple[Pixels, int, str, bytes]] = []
        self._sources: list[Source] = []
        self._so_far: Source | None = None  # the shard that is being read
        self._first_gathered = self._last_gathered = 0.0
        self._stored_at = -math.inf
        self._next_scan = 0.0
        self._told, self._told_at = (0, 0), 0.0
        self._retry = -math.inf  # when to write again what could not be written
        self.store.mkdir(parents=True, exist_ok=True)
        self._lock = open_lock(self.store / ".lock")
        hold(self._lock)  # another that has not noticed yet that its run has ended
        for path in self.store.glob("*.npz"):
            if path.stem.isdigit() and int(path.stem) >= self._number:
                path.unlink()
        for path in self.store.glob(".*.partial"):
            path.unlink()
        self._suspect, self._tries = self._open_mark()

    def _report(self, kind: str, **values: Any) -> None:
        write_all(self._reports, json.dumps({"kind": kind, **values}).encode() + b"\n")

    def _refuse(self, name: str, reason: str, source: Source) -> None:
        if source not in self._taken:
            self._taken.add(source)
            self._report("refused", name=name, reason=" ".join(reason.split())[:300], source=source)

    def _tell_waiting(self) -> None:
        now = time.monotonic()
        if now - self._told_at < 0.5:
            return
        put_off = sum(later.due < math.inf for later in self._later.values())
        waiting = len(self._gathered), len(self._queue) + put_off + bool(self._reading)
        if waiting != self._told:
            self._report("waiting", images=waiting[0], files=waiting[1])
            self._told, self._told_at = waiting, now

    def _open_mark(self) -> tuple[tuple[Source, int] | None, int]:
        self._mark_file = os.open(self.store / ".reading", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            name, size, changed, place, tries = json.loads(os.read(self._mark_file, 65536))
        except (ValueError, TypeError):  # nothing was being read
            return None, 0
        finally:
            self.clear_mark()
        source = (name, size, changed)
        if tries >= _TRIES:
            self._refuse(name, "it ended the process that read it", source)
        return (source, place), tries

    def _mark(self, source: Source, place: int = 0) -> None:
        """Note what is being read, and at which image of it."""
        tries = self._tries + 1 if (source, place) == self._suspect else 1
        os.lseek(self._mark_file, 0, os.SEEK_SET)
        os.write(self._mark_file, json.dumps([*source, place, tries]).encode().ljust(4096))

    def clear_mark(self) -> None:
        """Note that nothing is being read."""
        os.ftruncate(self._mark_file, 0)

    def run(self) -> NoReturn:
        """Take what comes, until the process is ended."""
        parent = os.getppid()
        while os.getppid() == parent:
            self.turn()
        os._exit(0)

    def turn(self) -> None:
        """Take note of what has happened, read the next image or a few of a shard, and store what is due."""
        self._notice(0.0 if self._work or self._queue else self._pause())
        if self._work is None and self._queue and len(self._gathered) < SEGMENT_IMAGES:
            self._reading = next(iter(self._queue))
            del self._queue[self._reading]
            self._work = self._read(self._reading)
        if self._work is not None and len(self._gathered) < SEGMENT_IMAGES:
            _limit_time(_LONGEST_READ)
            try:
                next(self._work)
            except StopIteration:
                self._work, self._reading = None, ""
                if not self._queue:
                    self.clear_mark()
            finally:
                _limit_time(0.0)
        self._store_if_due(idle=self._work is None and not self._queue)
        self._release()
        self._tell_waiting()

    def _pause(self) -> float:
        """Return the seconds for which there is nothing to do."""
        now = time.monotonic()
        due = [self._next_scan, self._next_later, now + 0.5]
        if self._folders:
            due.append(self._folders[0][0])
        if self._gathered and not self._must_wait():
            due.append(max(self._stored_at + _APART, min(self._last_gathered + _QUIET, self._first_gathered + _OLDEST)))
        return max(0.0, min(due) - now)

    def _must_wait(self) -> bool:
        return self._unjoined >= MOST_WAITING or time.monotonic() < self._retry

    def _notice(self, seconds: float) -> None:
        """Take note of what has happened, and wait so long if nothing has."""
        if len(self._gathered) >= SEGMENT_IMAGES and self._must_wait():
            seconds = max(seconds, self._pause(), 0.01)
        try:
            while True:
                event = self.events.get(timeout=seconds) if seconds else self.events.get_nowait()
                seconds = 0.0
                if event is None:
                    self._next_scan = 0.0
                elif isinstance(event, int):
                    self._unjoined -= event
                else:
                    for path in sorted(event, key=_came):
                        self._find(Path(path), again=True)
        except queue.Empty:
            pass
        now = time.monotonic()
        if now >= self._next_later:
            for name, later in self._later.items():
                if later.due <= now:
                    self._queue.setdefault(name)
                    self._later[name] = later._replace(due=math.inf)
            self._next_later = min((later.due for later in self._later.values()), default=math.inf)
        while self._folders and self._folders[0][0] <= now:
            self._find(self._folders.popleft()[1])
        if now >= self._next_scan:
            self._find(self.folder)
            now, begun = time.monotonic(), now
            self._next_scan = now + max(_RESCAN, (now - begun) / _RESCAN_SHARE)

    def _find(self, path: Path, *, again: bool = False) -> None:
        """Queue a file, or those in a folder, if it has not been dealt with.

        Args:
            path: What has appeared or was changed.
            again: Look once more a little later if it is a folder: it may not have been watched at first.
        """
        try:
            parts = path.relative_to(self.folder).parts
        except ValueError:  # the system has told its real path
            self._next_scan = 0.0
            return
        with contextlib.suppress(OSError):  # gone again
            if any(_is_ignored(part) for part in parts if part != CORRECTIONS):
                return
            if any((self.folder / Path(*parts[:depth])).is_symlink() for depth in range(1, len(parts))):
                return  # the link itself is refused where it is found
            found = path.stat() if path == self.folder else path.lstat()
            if not stat.S_ISDIR(found.st_mode):
                self._enqueue("/".join(parts), found)
            else:
                self._find_in(path, "/".join(parts))
                if again:
                    self._folders.append((time.monotonic() + 0.3, path))

    def _find_in(self, top: Path, name: str) -> None:
        files: list[tuple[bool, int, str, os.stat_result]] = []  # in the order in which they came
        folders = [(str(top), f"{name}/" if name else "")]
        while folders:
            folder, prefix = folders.pop()
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    whole = prefix + entry.name
                    with contextlib.suppress(OSError):
                        if _is_ignored(entry.name) and whole != CORRECTIONS:
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            folders.append((entry.path, f"{whole}/"))
                        else:
                            found = entry.stat(follow_symlinks=False)
                            files.append((whole.startswith(CORRECTIONS), found.st_ctime_ns, whole, found))
        for _, _, whole, found in sorted(files, key=lambda file: file[:3]):
            self._enqueue(whole, found)

    def _enqueue(self, name: str, found: os.stat_result) -> None:
        if name in self._queue or name in self._later:
            return
        if (_shown(name), found.st_size, found.st_mtime_ns) not in self._taken:
            self._queue[name] = None

    def _read(self, name: str) -> Iterator[None]:
        """Read a file, image by image, or refuse it."""
        path, shown = self.folder / name, _shown(name)
        try:
            found = path.lstat()
        except OSError:
            self._later.pop(name, None)
            return
        source = (shown, found.st_size, found.st_mtime_ns)
        if source in self._taken:
            self._later.pop(name, None)
            return
        try:
            if stat.S_ISLNK(found.st_mode):
                raise OSError("it is a link: copy or move the file itself")
            if not stat.S_ISREG(found.st_mode):
                raise OSError("it is not a file")
            with open(open_below(self.folder, name), "rb", buffering=0) as file:  # noqa: PTH123
                self._check_whole(name, file.fileno(), source)
                yield from self._take(name, file, source)
        except _Busy:
            self._put_off(name, source)
            return
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever a stranger has found: others are to be read all the same
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                self._put_off(name, source)
                return
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else f"it is damaged: {error!r}"
            self._refuse(shown, reason, source)
        self._later.pop(name, None)

    def _put_off(self, name: str, source: Source) -> None:
        now, before = time.monotonic(), self._later.get(name)
        seen = source[1:]
        delay = min(2 * before.delay, _BUSY[1]) if before and before.seen == seen else _BUSY[0]
        since = before.since if before and before.seen == seen else now
        self._later[name] = _Later(now + delay, delay, seen, since)
        self._next_later = min(self._next_later, now + delay)

    def _check_whole(self, name: str, file: int, source: Source) -> None:
        """Raise if a file may be only half there."""
        written = being_written(file)
        if written is None:
            later = self._later.get(name)
            written = later is None or later.seen != source[1:] or time.monotonic() - later.since < _SETTLED
        if written or _differs(file, source):
            raise _Busy

    def _take(self, name: str, file: BinaryIO, source: Source) -> Iterator[None]:
        shown, length = source[0], source[1]
        parts = name.split("/")
        if shown != name:
            raise OSError("its name cannot be printed")
        if len(name) > _LONGEST:
            raise OSError(f"its name has {len(name):,} letters; {_LONGEST} are the most")
        suffix = Path(name).suffix.lower()
        if parts[0] == CORRECTIONS:
            if len(parts) == 2 and suffix == ".json":
                if length > _LARGEST_CORRECTION:
                    raise OSError(f"it has {length:,} bytes; {_LARGEST_CORRECTION:,} are the most")
                self._correct(_read_all(file, length))
            self._taken.add(source)
        elif suffix in SHARD_SUFFIXES:
            yield from self._take_shard(suffix, file, source)
        elif suffix not in image_suffixes():
            raise OSError(f"{suffix or 'no suffix'}: neither an image file nor a shard (.npz, .tar)")
        elif len(parts) == 1:
            raise OSError("it is in no class's folder: put it into CLASS/")
        else:
            label = self._class_of(parts[0])
            if length > MAX_IMAGE_BYTES:
                raise OSError(f"it has {length:,} bytes; {MAX_IMAGE_BYTES:,} are the most")
            if not length:
                raise OSError("it is empty")
            content = _read_all(file, length)
            self._check_whole(name, file.fileno(), source)
            self._mark(source)
            self._gather(decode_image(io.BytesIO(content), self.size), label, shown)
            self._sources.append(source)
            self._taken.add(source)

    def _take_shard(self, suffix: str, file: BinaryIO, source: Source) -> Iterator[None]:
        name, length, changed = source
        if length > MAX_SHARD_BYTES:
            raise OSError(f"it has {length:,} bytes; {MAX_SHARD_BYTES:,} are the most")
        first = self._progress.get(source, 0)
        self._mark(source, first)
        with io.BufferedReader(file, 1 << 16) as buffered:  # type: ignore[type-var]
            for number, (given, pixels) in enumerate(read_shard(buffered, suffix, self.size, first), first):
                if len(self._gathered) >= SEGMENT_IMAGES or number % 20 == 0:
                    if _differs(file.fileno(), source):
                        raise _Busy
                    self._so_far = (f"{name}#:{number}", length, changed) if number else None
                    yield
                    self._so_far = None
                    self._mark(source, number)
                one = (f"{name}#{number}", length, changed)
                if one not in self._taken:
                    try:
                        if isinstance(pixels, str):
                            raise OSError(pixels)
                        self._gather(pixels, self._class_of(given), one[0])
                    except OSError as error:
                        self._refuse(one[0], str(error), one)
                self._progress[source] = number + 1
                _limit_time(_LONGEST_READ)
        self._sources.append(source)
        self._taken.add(source)

    def _class_of(self, given: str | int | None) -> int:
        try:
            return class_of(given, self._classes)
        except ValueError as error:
            raise OSError(str(error)) from error

    def _gather(self, pixels: Pixels, label: int, name: str) -> None:
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=DIGEST).digest()
        if digest in self._known:
            if (first := self._known[digest]) == name:  # the file was touched
                return
            raise OSError(f"its pixels are those of {first or 'an image that is known already'}")
        if not self._room:
            raise OSError("there is no room left for it")
        self._room -= 1
        self._known[digest] = name
        self._last_gathered = time.monotonic()
        if not self._gathered:
            self._first_gathered = self._last_gathered
        self._gathered.append((pixels, label, name, digest))

    def _store_if_due(self, *, idle: bool) -> None:
        if not self._gathered or self._must_wait():
            return
        now = time.monotonic()
        quiet = idle and now - self._last_gathered >= _QUIET
        due = (quiet or now - self._first_gathered >= _OLDEST) and now - self._stored_at >= _APART
        if not due and len(self._gathered) < SEGMENT_IMAGES:
            return
        pixels, labels, names, ids = zip(*self._gathered, strict=True)
        path = segment_path(self.store, self._number)
        try:
            sources = [*self._sources, self._so_far] if self._so_far else self._sources
            sha256 = write_segment(path, pixels, labels, names, sources)
        except OSError as error:
            if self._retry < 0:
                self._report("error", reason=f"{path} cannot be written ({error.strerror}); trying on")
            self._retry = now + 2.0
            return
        self._retry = -math.inf
        self._report(
            "segment",
            number=self._number,
            path=str(path),
            sha256=sha256,
            count=len(names),
            sources=sources,
            digests=base64.b64encode(b"".join(ids)).decode(),
        )
        self._number += 1
        self._stored_at = now
        self._unjoined += len(names)
        self._gathered, self._sources = [], []

    def _correct(self, text: bytes) -> None:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise OSError("a correction has id, sample, label and actor")
        id, sample, label = content.get("id"), content.get("sample"), content.get("label")
        actor = content.get("actor", "")
        if not isinstance(id, str) or not ID.fullmatch(id):
            raise OSError("id: must be 1 to 100 letters, digits, dots or dashes")
        if not isinstance(actor, str) or len(actor) > 200 or not actor.isprintable():
            raise OSError("actor: must be a text of at most 200 letters that can be printed")
        if isinstance(sample, bool) or not isinstance(sample, int | str) or not _can_be_sample(sample):
            raise OSError("sample: must be the id of an image, or the name of one that was fed")
        if label is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
            raise OSError("label: must be the name of a class, or null to drop the image")
        number = None if label is None else self._class_of(label)
        if id not in self._done:
            self._done.add(id)
            self._held.append({"id": id, "sample": sample, "label": number, "actor": actor})

    def _release(self) -> None:
        """Report the corrections whose images have been reported."""
        for correction in list(self._held):
            if not self._is_coming(correction["sample"]):
                self._held.remove(correction)
                self._report("correction", **correction)

    def _is_coming(self, sample: int | str) -> bool:
        if isinstance(sample, int):
            return False
        files = (sample, sample.rpartition("#")[0])
        return any(
            file in self._queue or file in self._later or (file and file == self._reading) for file in files
        ) or any(name == sample for _, _, name, _ in self._gathered)


def _can_be_sample(sample: int | str) -> bool:
    if isinstance(sample, int):
        return 0 <= sample < 2**62
    return 0 < len(sample) <= _LONGEST + 20 and sample.isprintable()


def _came(path: str) -> tuple[bool, int, str]:
    """Return what files are ordered by: corrections come last, the others as they were put there."""
    try:
        came = os.lstat(path).st_ctime_ns  # a file that is renamed keeps the time of its last change
    except OSError:
        came = 0
    return CORRECTIONS in path, came, path


def _is_ignored(name: str) -> bool:
    """Return whether a file or folder is its producer's own, who has not renamed it into its place."""
    return name.startswith(".") or name.lower().endswith(_IGNORED)


def _shown(name: str) -> str:
    """Return a name as it can be printed."""
    return name if name.isprintable() else name.encode("unicode_escape", "backslashreplace").decode()


def _differs(file: int, source: Source) -> bool:
    found = os.fstat(file)
    return (found.st_size, found.st_mtime_ns) != source[1:]


def _read_all(file: BinaryIO, length: int) -> bytes:
    content = bytearray()
    while len(content) < length and (part := file.read(length - len(content))):
        content += part
    return bytes(content)


def _limit_time(seconds: float) -> None:
    """Have the system end this process once it has taken so much time, whatever a decoder does; 0 for never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor: where others keep it busy, it may take long


def _watch(folder: Path, events: "queue.SimpleQueue[set[str] | int | None]") -> None:
    """Tell of every change in a folder, and have it looked at as a whole whenever something may have been missed."""
    from watchfiles import Change, watch

    while True:
        try:
            watched = folder.stat()
            events.put(None)
            fresh = True
            for changes in watch(
                folder,
                watch_filter=None,
                debounce=50,
                step=20,
                rust_timeout=500,
                yield_on_timeout=True,
                raise_interrupt=False,
                ignore_permission_denied=True,
            ):
                if changes:
                    events.put({path for change, path in changes if change != Change.deleted})
                if fresh:  # what came after the first look and before it was watched
                    events.put(None)
                    fresh = False
                if not os.path.samestat(watched, folder.stat()):
                    break
        except FileNotFoundError:
            time.sleep(0.1)
        except Exception:  # no more watches, say: looking at all of it will do, if less often
            events.put(None)
            time.sleep(1.0)


def _listen(intake: Intake, lines: BinaryIO) -> NoReturn:
    """Take what the fit says, and end with it."""
    with contextlib.suppress(Exception):  # a line that says something else is the end, too
        for line in lines:
            intake.events.put(int(json.loads(line)["joined"]))
    with contextlib.suppress(OSError):
        intake.clear_mark()
    os._exit(0)


def _become_humble() -> None:
    """Let the training, and the system, go first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGIO"):
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # see being_written
    with contextlib.suppress(OSError, AttributeError):
        os.nice(10)
    with contextlib.suppress(OSError):  # when memory runs out, this process ends and not the training
        Path("/proc/self/oom_score_adj").write_text("1000")


def main(_: Sequence[str] = ()) -> NoReturn:
    """Run the process."""
    _become_humble()
    reports = os.dup(1)
    os.dup2(2, 1)  # what a decoder prints is no report
    try:
        config = json.loads(sys.stdin.buffer.readline())
        intake = Intake(config, sys.stdin.buffer.read(config["digests"] * DIGEST), reports)
        threading.Thread(target=_listen, args=(intake, sys.stdin.buffer), daemon=True).start()
        threading.Thread(target=_watch, args=(intake.folder, intake.events), daemon=True).start()
        intake.run()
    except BrokenPipeError:  # the fit has ended
        os._exit(0)
    except BaseException as error:
        with contextlib.suppress(OSError):
            write_all(reports, json.dumps({"kind": "ended", "reason": repr(error)}).encode() + b"\n")
        raise


if __name__ == "__main__":
    main()
