"""Commands for a run while it trains: files that appear in the ``live/inbox`` of its folder, each answered by a file.

    from src.live.commands import new_command, send

    send("lightning_logs/version_0", new_command(lr=0.02))

Who may write to the folder may steer the run: nothing listens, nothing is unpickled. See `src.live.inbox` for the run's
side.
"""

import contextlib
import getpass
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from src.errors import Failure, UsageError
from src.live.files import read_bounded, write_whole
from src.live.liveness import lives

VERBS = ("checkpoint", "evaluate", "pause", "resume", "stop", "status")
"""What a command can ask for besides new values."""

LARGEST = 65536
"""Bytes of a command at most."""

LOCK = ".lock"
"""The file of the ``live`` folder whose lock a run that takes commands holds."""

ID = re.compile(r"[\w.-]{1,100}", re.ASCII)
"""What names a command."""

_LARGEST_ANSWER = 10 * LARGEST


class Command(NamedTuple):
    """What someone asks of a run.

    Attributes:
        id: Names it; a command is done once, however often it is sent.
        actor: Who asks.
        set: New values by name.
        do: One of `VERBS`, or empty.
    """

    id: str
    actor: str = ""
    set: Mapping[str, Any] = {}
    do: str = ""


class Refusal(Exception):  # noqa: N818 (a refusal is an answer)
    """Why a command is not done; nothing has been changed."""


def send(run: str | Path, command: Command, timeout: float | None = 30.0) -> dict[str, Any]:
    """Send a command to a run that trains, and wait for the answer.

    Args:
        run: Its folder.
        command: See `Command`; `new_command` makes one.
        timeout: Seconds to wait at most; none does not wait, and returns no answer.

    Returns:
        ``step``, at which it took effect, and what came of it: ``changes`` holds the values before and since by name.

    Raises:
        UsageError: If it is no command, or the run refuses it.
        Failure: If there is no such run, or it has ended.
        TimeoutError: If no answer comes in time. It may still be done: ask again with the same id.
    """
    folder = Path(run) / "live"
    if not Path(run).is_dir():
        raise Failure(f"{run}: there is no such folder; give that of a run")
    try:
        content = json.dumps(
            {"id": command.id, "actor": command.actor, "set": dict(command.set), "do": command.do}
        ).encode()
        parse(content, command.id)
    except (Refusal, TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    if not lives(folder / LOCK):
        raise Failure(f"{run}: the run is not training now, or takes no commands")
    answer = folder / "answers" / f"{command.id}.json"
    try:
        write_whole(folder / "inbox" / f"{time.time_ns():020}-{command.id}.json", content)
    except OSError as error:
        raise Failure(f"{folder / 'inbox'} cannot be written to ({error.strerror})") from error
    if timeout is None:
        return {}
    deadline = time.monotonic() + timeout
    while True:
        alive = lives(folder / LOCK)
        for _ in range(25):
            with contextlib.suppress(FileNotFoundError):
                found: dict[str, Any] = json.loads(read_bounded(answer, _LARGEST_ANSWER))
                with contextlib.suppress(OSError):
                    answer.unlink()
                if "error" in found:
                    raise UsageError(f"{found['error']} (step {found['step']:,})")
                return found
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{run}: no answer within {timeout:g} s; a step or a validation may take longer: "
                    f"ask again with --id {command.id}"
                )
            time.sleep(0.01)
        if not alive:
            raise Failure(f"{run}: the run ended before it answered")


def new_command(do: str = "", **values: Any) -> Command:
    """Return a command of this user with an id of its own.

    Args:
        do: One of `VERBS`.
        values: Or new values by name.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may not know its user by name
        user = str(os.geteuid())
    return Command(secrets.token_hex(8), f"{user}@{socket.gethostname()}", values, do)


def parse(content: bytes, id: str) -> Command:
    """Read a command.

    Args:
        content: Its file.
        id: Its id if it does not bring one.

    Raises:
        Refusal: If it is none.
    """
    try:
        found = json.loads(content, parse_constant=_no_constant)
        command = Command(found.get("id", id), found.get("actor", ""), found.get("set", {}), found.get("do", ""))
    except (ValueError, RecursionError, AttributeError) as error:
        raise Refusal(f"this is no command: {error}") from error
    if not isinstance(command.id, str) or not ID.fullmatch(command.id):
        raise Refusal("id: must be 1 to 100 letters, digits, dots or dashes")
    if not isinstance(command.actor, str) or len(command.actor) > 200 or not command.actor.isprintable():
        raise Refusal("actor: must be a text of at most 200 letters that can be printed")
    if not isinstance(command.set, dict) or not isinstance(command.do, str):
        raise Refusal("a command has values by name in set, and a word in do")
    if extra := found.keys() - set(Command._fields):
        raise Refusal(f"{min(extra)}: a command has {', '.join(Command._fields)}, and nothing else")
    if command.do and command.do not in VERBS:
        raise Refusal(f"do: {command.do!r} is none of {', '.join(VERBS)}")
    if bool(command.do) == bool(command.set):
        raise Refusal("a command has either values to set or something to do")
    return command


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
