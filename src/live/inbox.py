"""The run's side of `src.live.commands`: takes what comes, refuses what cannot be, and keeps the rest for a boundary.

What comes is bounded in size and in rate, and looked at off the training thread.
"""

import contextlib
import json
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from src.errors import Failure
from src.live.commands import ID, LARGEST, LOCK, Command, Refusal, parse
from src.live.files import open_lock, read_bounded, write_whole
from src.live.journal import Journal
from src.live.liveness import try_hold

_POLL = 0.04
"""Seconds between two looks at the inbox. One command is taken at each, twenty-five a second: more would be felt in the
time of a step, as each file that is read or written hands the interpreter over from the training thread and back."""
_SHARE = 0.02
"""Share of a processor that looking for commands may take, however many files there are."""
_SEEN_AT_ONCE = 256  # commands that are put in order of their times
_WAITING = 100  # accepted commands; more are refused
_UNFINISHED = 0.5  # seconds in which a file that is cut short may be completed
_LOCKED = 5.0  # seconds in which another process may let go of the lock
_KEPT_ANSWERS = 1000
_MOST_REFUSALS = 100_000  # that are journaled
_LONGEST = 500  # letters of a value in the journal


class Inbox:
    """Takes the commands for a run.

    Args:
        folder: The ``live`` folder of the run.
        check: Called off the training thread with the values of a command; raises `Refusal`.
        status: Called off the training thread; returns what `status` is answered with, ``step`` among it.

    Attributes:
        waiting: Commands that have been accepted and not been done.

    Raises:
        Failure: If the folder cannot be used.
    """

    def __init__(
        self, folder: Path, check: Callable[[Mapping[str, Any]], None], status: Callable[[], dict[str, Any]]
    ) -> None:
        self.folder = folder
        self.journal = Journal(folder / "journal.jsonl")
        self.waiting: deque[Command] = deque()
        self._check, self._status = check, status
        self._inbox, self._answers = folder / "inbox", folder / "answers"
        self._known: dict[str, dict[str, Any] | None] = _answers_of(self.journal)
        self._answers_written = self._refusals = 0
        self._skipped: set[str] = set()
        self._seen: deque[str] = deque()
        self._unfinished: dict[str, float] = {}
        self._ending = threading.Event()
        self._came = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="inbox", daemon=True)
        try:
            for path in (folder, self._inbox, self._answers):
                path.mkdir(parents=True, exist_ok=True)
                if path.is_symlink():
                    raise Failure(f"{path} is a link; a run's folder holds folders of its own")
            self._lock = open_lock(folder / LOCK)
            self._wait_for_lock()
            self._empty()  # once it is held: not what was sent to a process that lives
        except OSError as error:
            raise Failure(f"{error.filename or folder} cannot be used ({error.strerror})") from error

    def open(self) -> None:
        """Begin to take commands."""
        self._thread.start()

    def close(self) -> None:
        """Take no more; what waits is answered with a refusal."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        while self.waiting:
            self.refuse(self.waiting.popleft(), "the run has ended")
        os.close(self._lock)

    def wait(self, seconds: float) -> None:
        """Wait until a command is there, at most so long."""
        with self._came:
            self._came.wait_for(lambda: bool(self.waiting), seconds)

    def known(self, id: str) -> bool:
        """Return whether a command has been accepted or done."""
        return id in self._known

    def done(self, command: Command, answer: Mapping[str, Any]) -> None:
        """Answer a command that has been done, and is in the journal."""
        whole = {"step": self._status()["step"], **answer}
        self._known[command.id] = whole
        self._write_answer(command.id, whole)

    def refuse(self, command: Command, reason: str) -> None:
        """Answer a command with a reason why it is not done, and journal that."""
        step = self._status()["step"]
        self._refusals += 1
        if self._refusals <= _MOST_REFUSALS:
            requested = {**command.set, **({"do": command.do} if command.do else {})}
            line = {"requested": _short(requested), "effective": _short(reason)}
            with contextlib.suppress(OSError):  # a full disk must not end a run over a refusal
                self.journal.extend(step, "refused", [line], actor=command.actor, id=command.id, sync=False)
        self._known.pop(command.id, None)  # who asks again may do so when the reason has passed
        self._write_answer(command.id, {"step": step, "error": reason})

    def _wait_for_lock(self) -> None:
        deadline = time.monotonic() + _LOCKED
        while not try_hold(self._lock):  # who asks whether this run lives holds it for a moment
            if time.monotonic() > deadline:
                os.close(self._lock)
                raise Failure(f"{self.folder / LOCK} is locked by another process; end that, or give --steering false")
            time.sleep(_POLL)

    def _empty(self) -> None:
        """Refuse what was sent to a process that is no more, and take away its answers."""
        for path in self._answers.glob("*.json"):
            path.unlink()
        for number, path in enumerate(self._inbox.glob("*.json")):
            self._remove(path)
            if number < _WAITING and path.name not in self._skipped:
                command = Command(_id_of(path))
                if command.id in self._known:
                    self._answer_again(command.id)
                else:
                    self.refuse(command, "the run was stopped before it could be done")

    def _work(self) -> None:
        pause = _POLL
        while not self._ending.wait(pause):
            begun = time.monotonic()
            with contextlib.suppress(OSError):  # the folder was deleted, or cannot be read for now
                path = self._next()
                pause = max(_POLL, (time.monotonic() - begun) / _SHARE)
                if path is not None:
                    self._take(path)

    def _next(self) -> Path | None:
        """Return the oldest command of the inbox, by the time in its name.

        To look at many names takes time: it is not done again before those that have been seen are taken.
        """
        if not self._seen:
            found: list[str] = []
            now = time.monotonic()
            with os.scandir(self._inbox) as entries:
                for entry in entries:
                    name = entry.name
                    if name.endswith(".json") and not name.startswith(".") and name not in self._skipped:
                        if now < self._unfinished.get(name, now):
                            continue
                        found.append(name)
                        if len(found) == _SEEN_AT_ONCE:
                            break
            self._seen.extend(sorted(found))
        return self._inbox / self._seen.popleft() if self._seen else None

    def _take(self, path: Path) -> None:
        command = Command(_id_of(path))
        try:
            content = self._read(path)
            if content is None:
                return
            command = parse(content, command.id)
            if command.id not in self._known:
                self._check(command.set)
        except Exception as error:  # whatever a stranger has found: others are to be answered all the same
            reason = str(error) if isinstance(error, Refusal) else f"this is no command: {type(error).__name__}"
            self._remove(path)
            self.refuse(Command(secrets.token_hex(8)) if command.id in self._known else command, reason)
            return
        self._remove(path)
        if command.do == "status":
            self._write_answer(command.id, self._status())
        elif command.id in self._known:
            self._answer_again(command.id)
        elif len(self.waiting) >= _WAITING:
            self.refuse(command, f"{_WAITING} commands wait already")
        else:
            self._known[command.id] = None
            with self._came:
                self.waiting.append(command)
                self._came.notify_all()

    def _read(self, path: Path) -> bytes | None:
        """Return the bytes of a command; none if it may still be being written, or has been taken back.

        Raises:
            Refusal: If it is too large, or no file.
        """
        try:
            content = read_bounded(path, LARGEST)
        except ValueError as error:
            raise Refusal(str(error)) from error
        except FileNotFoundError:
            self._unfinished.pop(path.name, None)
            return None
        except OSError as error:
            raise Refusal(f"{path.name} is not a file that can be read ({error.strerror})") from error
        waited = self._unfinished.pop(path.name, None) is not None
        if waited or content.rstrip().endswith(b"}"):
            return content
        if len(self._unfinished) >= _SEEN_AT_ONCE:
            return content
        self._unfinished[path.name] = time.monotonic() + _UNFINISHED
        return None

    def _remove(self, path: Path) -> None:
        try:
            path.unlink()
        except OSError:  # a folder, say: it is left where it is, and not looked at again
            self._skipped.add(path.name)

    def _answer_again(self, id: str) -> None:
        if (answer := self._known[id]) is not None:  # else it will be answered when it is done
            self._write_answer(id, {**answer, "repeated": True})

    def _write_answer(self, id: str, answer: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            write_whole(self._answers / f"{id}.json", json.dumps({"id": id, **answer}).encode())
            self._answers_written += 1
            if self._answers_written % 100 == 0:  # who asked takes the answer away, unless he was killed
                paths = sorted(self._answers.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
                for path in paths[:-_KEPT_ANSWERS]:
                    path.unlink()


def _id_of(path: Path) -> str:
    """Return the id of a command by the name of its file, which may begin with a time."""
    time_, dash, id = path.name.removesuffix(".json").partition("-")
    name = id if dash and time_.isdigit() else path.name.removesuffix(".json")
    return name if ID.fullmatch(name) else secrets.token_hex(8)


def _answers_of(journal: Journal) -> dict[str, dict[str, Any] | None]:
    """Return the answers to all commands that a journal says were done, by id."""
    answers: dict[str, dict[str, Any] | None] = {}
    for line in journal.read():
        if not line["id"] or line["kind"] == "refused":
            continue
        answer = answers.setdefault(line["id"], {"step": line["step"]})
        if answer is not None and line["kind"] == "set":
            answer.setdefault("changes", {})[line["name"]] = [line["before"], line["effective"]]
    return answers


def _short(value: Any) -> Any:
    """Return a value for the journal, as a text where a stranger made it long or it is no plain JSON."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        text = json.dumps(value)
    else:
        if len(text) <= _LONGEST:
            return value
    return text[:_LONGEST]
