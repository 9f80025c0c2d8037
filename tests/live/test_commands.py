"""The inbox of a run: what a stranger drops into it is answered, bounded and harmless."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import Failure, UsageError
from src.live.commands import LARGEST, Command, Refusal, new_command, parse, send
from src.live.inbox import Inbox
from src.live.journal import Journal
from src.live.liveness import hold
from src.live.transaction import Control, check, transact
from tests.conftest import REPOSITORY


class Run:
    """A run that takes commands, and has an lr."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = {"lr": 0.1, "size": 4}
        self.controls = {
            "lr": Control(lambda: self.values["lr"], self.writer("lr"), self.positive),
            "size": Control(lambda: self.values["size"], self.writer("size"), self.positive),
        }
        self.inbox = Inbox(folder / "live", lambda wanted: check(self.controls, wanted), lambda: {"step": 3})
        self.journal = Journal(folder / "live/journal.jsonl")

    def writer(self, name: str) -> Callable[[Any], None]:
        return lambda value: self.values.__setitem__(name, value)

    def positive(self, value: Any) -> str | None:
        return None if isinstance(value, (int, float)) and 0 < value < 100 else "is out of range"

    def snapshot(self) -> Callable[[], None]:
        kept = dict(self.values)
        return lambda: self.values.update(kept)

    def drop(self, name: str, content: str | bytes) -> Path:
        path = self.folder / "live/inbox" / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def answer(self, id: str, seconds: float = 10.0) -> dict[str, Any]:
        path = self.folder / f"live/answers/{id}.json"
        deadline = time.monotonic() + seconds
        while not path.is_file():
            assert time.monotonic() < deadline, f"no answer to {id}"
            time.sleep(0.005)
        found: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        return found

    def serve(self) -> None:
        """Do what has been accepted, as a trainer would between two steps."""
        while self.inbox.waiting:
            command = self.inbox.waiting.popleft()

            def commit(changes: Mapping[str, tuple[Any, Any]], command: Command = command) -> None:
                lines = [
                    {"name": n, "before": b, "requested": command.set[n], "effective": e}
                    for n, (b, e) in changes.items()
                ]
                self.journal.extend(3, "set", lines, actor=command.actor, id=command.id)

            changes = transact(self.controls, command.set, self.snapshot, commit)
            self.inbox.done(command, {"changes": changes})


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    run.inbox.open()
    yield run
    run.inbox.close()


def test_a_command_is_accepted_done_answered_and_journaled(run: Run) -> None:
    run.drop("1.json", json.dumps({"id": "a", "actor": "me", "set": {"lr": 0.5, "size": 8}}))
    run.inbox.wait(10)
    run.serve()
    assert run.answer("a") == {"id": "a", "step": 3, "changes": {"lr": [0.1, 0.5], "size": [4, 8]}}
    assert [(line["name"], line["before"], line["effective"], line["actor"]) for line in run.journal.read()] == [
        ("lr", 0.1, 0.5, "me"),
        ("size", 4, 8, "me"),
    ]
    assert not list((run.folder / "live/inbox").iterdir())


def test_a_command_that_is_sent_again_is_answered_again_and_not_done_again(run: Run) -> None:
    for content in ({"set": {"lr": 0.5}}, {"set": {"lr": 0.7}}):
        run.drop("1.json", json.dumps({"id": "a", **content}))
        if not run.journal.read():
            run.inbox.wait(10)
            run.serve()
        assert run.answer("a")["changes"] == {"lr": [0.1, 0.5]}
    assert run.values["lr"] == 0.5
    assert len(run.journal.read()) == 1


def test_so_it_is_when_the_run_was_stopped_in_between(run: Run) -> None:
    run.drop("1.json", json.dumps({"id": "a", "set": {"lr": 0.5}}))
    run.inbox.wait(10)
    run.serve()
    run.answer("a")
    run.inbox.close()
    run.__init__(run.folder)  # type: ignore[misc]
    run.inbox.open()
    run.drop("1.json", json.dumps({"id": "a", "set": {"lr": 0.5}}))
    assert run.answer("a") == {"id": "a", "step": 3, "changes": {"lr": [0.1, 0.5]}, "repeated": True}
    assert run.values["lr"] == 0.1
    assert len(run.journal.read()) == 1


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "garbage": b"\xff\xfe\x00}",
    "no JSON": b"lr=0.02}",
    "a list": b"[1, 2]",
    "a number": b"3",
    "deep": b"[" * 50_000 + b"}",
    "nan": b'{"set": {"lr": NaN}}',
    "infinite": b'{"set": {"lr": -Infinity}}',
    "beyond": b'{"set": {"lr": 1e999}}',
    "digits": b'{"set": {"lr": ' + b"9" * 5000 + b"}}",
    "negative": b'{"set": {"lr": -1}}',
    "unknown": b'{"set": {"os.system": 1}}',
    "half right": b'{"set": {"lr": 0.5, "size": -1}}',
    "both": b'{"set": {"lr": 0.5}, "do": "stop"}',
    "verb": b'{"do": "format"}',
    "path as id": b'{"id": "../../x", "set": {"lr": 0.5}}',
    "id is a list": b'{"id": [1], "set": {"lr": 0.5}}',
    "actor": b'{"actor": {"a": 1}, "set": {"lr": 0.5}}',
    "extra": b'{"set": {"lr": 0.5}, "class_path": "os.system"}',
    "large": b'{"set": {"lr": 0.5' + b" " * LARGEST + b"}}",
    "text": b'{"set": "lr"}',
    "half a letter": b'{"actor": "\\ud800", "set": {"lr": 0.5}}',
    "escape": b'{"actor": "\\u001b[2J", "set": {"lr": 0.5}}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_command_is_refused_once_and_changes_nothing(content: bytes, run: Run) -> None:
    run.drop("x1.json", content)
    assert set(run.answer("x1")) == {"id", "step", "error"}
    (line,) = run.journal.read()
    assert (line["kind"], line["id"], line["step"]) == ("refused", "x1", 3)
    assert run.values == {"lr": 0.1, "size": 4}
    assert not run.inbox.waiting
    assert not list((run.folder / "live/inbox").iterdir())


def test_links_pipes_folders_and_huge_files_are_refused_unread(run: Run) -> None:
    inbox = run.folder / "live/inbox"
    secret = run.folder / "secret"
    secret.write_text('{"set": {"lr": 0.5}}')
    (inbox / "link.json").symlink_to(secret)
    os.mkfifo(inbox / "pipe.json")
    (inbox / "folder.json").mkdir()
    with (inbox / ".big").open("wb") as file:
        file.truncate(2**30)
    (inbox / ".big").rename(inbox / "big.json")
    for name, said in (("link", "symbolic"), ("pipe", "is not a file"), ("big", "1,073,741,824 bytes")):
        assert said in run.answer(name)["error"]
    time.sleep(0.2)
    assert [path.name for path in inbox.iterdir()] == ["folder.json"], "it cannot be deleted, and is left alone"
    assert len(run.journal.read()) <= 4
    assert secret.is_file()
    run.drop("z.json", json.dumps({"id": "z", "set": {"lr": 0.5}}))
    run.inbox.wait(10)
    assert run.inbox.waiting, "commands are taken all the same"
    run.serve()


def test_a_command_that_is_still_being_written_is_waited_for(run: Run) -> None:
    path = run.drop("1.json", '{"id": "a", "set": {"lr"')
    time.sleep(0.15)
    assert path.is_file()
    assert not run.journal.read()
    path.write_text('{"id": "a", "set": {"lr": 0.5}}')
    run.inbox.wait(10)
    run.serve()
    assert run.answer("a")["changes"] == {"lr": [0.1, 0.5]}


def test_a_command_that_is_sent_again_while_it_is_done_is_answered_once_it_is(run: Run) -> None:
    run.drop("1.json", json.dumps({"id": "a", "set": {"lr": 0.5}}))
    run.inbox.wait(10)
    command = run.inbox.waiting.popleft()
    run.drop("2.json", json.dumps({"id": "a", "set": {"lr": 0.5}}))
    time.sleep(0.3)
    assert not list((run.folder / "live/answers").iterdir()), "it is under way: nobody knows yet"
    run.inbox.done(command, {"changes": {"lr": [0.1, 0.5]}})
    assert run.answer("a")["changes"] == {"lr": [0.1, 0.5]}


def test_a_command_that_was_refused_is_looked_at_anew_when_it_is_sent_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.dumps({"id": "a", "set": {"lr": 0.5}})
    with monkeypatch.context() as patch:
        patch.setattr("src.live.inbox._WAITING", 0)
        run.drop("1.json", content)
        assert run.answer("a")["error"] == "0 commands wait already"
    run.drop("2.json", content)
    run.inbox.wait(10)
    run.inbox.close()
    assert run.answer("a")["error"] == "the run has ended"
    run.drop("a.json", content)
    run.__init__(run.folder)  # type: ignore[misc]
    run.inbox.open()
    assert run.answer("a")["error"] == "the run was stopped before it could be done"
    for times in range(2):
        run.drop("3.json", content)
        if not times:
            run.inbox.wait(10)
            run.serve()
        assert run.answer("a")["changes"] == {"lr": [0.1, 0.5]}
    assert [line["kind"] for line in run.journal.read()] == ["refused"] * 3 + ["set"]


def test_one_that_was_done_and_sent_again_before_the_run_was_killed_is_not_done_again(run: Run) -> None:
    content = json.dumps({"id": "a", "set": {"lr": 0.5}})
    run.drop("1.json", content)
    run.inbox.wait(10)
    run.serve()
    run.answer("a")
    run.inbox.close()
    run.drop("a.json", content)
    run.__init__(run.folder)  # type: ignore[misc]
    run.inbox.open()
    assert run.answer("a") == {"id": "a", "step": 3, "changes": {"lr": [0.1, 0.5]}, "repeated": True}
    run.drop("2.json", content)
    assert run.answer("a")["repeated"]
    assert [line["kind"] for line in run.journal.read()] == ["set"]


def test_what_was_sent_to_a_run_that_was_killed_is_not_done_when_it_goes_on(run: Run) -> None:
    run.inbox.close()
    run.drop("00000000000000000001-late.json", json.dumps({"id": "late", "set": {"lr": 0.5}}))
    run.__init__(run.folder)  # type: ignore[misc]
    run.inbox.open()
    assert run.answer("late")["error"] == "the run was stopped before it could be done"
    assert not run.inbox.waiting
    (line,) = run.journal.read()
    assert (line["kind"], line["id"]) == ("refused", "late")


def test_a_folder_that_is_a_link_is_refused_and_what_it_leads_to_is_left(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.json").write_text("mine")
    live = tmp_path / "run/live"
    live.mkdir(parents=True)
    (live / "inbox").symlink_to(elsewhere)
    with pytest.raises(Failure, match="inbox is a link"):
        Run(tmp_path / "run")
    assert (elsewhere / "mine.json").read_text() == "mine"


def test_an_answer_does_not_follow_a_link(run: Run) -> None:
    victim = run.folder / "victim"
    victim.write_text("mine")
    (run.folder / "live/answers/.x1.json.partial").symlink_to(victim)
    run.drop("x1.json", b"garbage}")
    assert "error" in run.answer("x1")
    assert victim.read_text() == "mine"


def test_more_commands_than_can_wait_are_refused_and_none_is_lost(run: Run) -> None:
    for i in range(140):
        run.drop(f"{i:03}.json", json.dumps({"id": f"c{i:03}", "set": {"lr": 0.5}}))
    deadline = time.monotonic() + 30
    while list((run.folder / "live/inbox").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    refused = [line["id"] for line in run.journal.read()]
    assert [command.id for command in run.inbox.waiting] == [f"c{i:03}" for i in range(100)]
    assert refused == [f"c{i:03}" for i in range(100, 140)]
    run.serve()


def test_a_command_that_is_taken_back_is_not_refused(run: Run) -> None:
    paths = [run.drop(f"{i:02}.json", '{"set": {"lr": -1}}') for i in range(40)]
    run.answer("00")
    back = []
    for path in reversed(paths):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            back.append(path.stem)
    run.drop("last.json", '{"set": {"lr": -1}}')
    run.answer("last")
    refused = {line["id"] for line in run.journal.read()}
    assert len(back) > 20
    assert not refused & set(back)


def test_a_flood_of_refusals_is_answered_and_fills_neither_memory_nor_journal(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.live.inbox._MOST_REFUSALS", 3)
    for i in range(6):
        run.drop(f"{i}.json", '{"set": {"lr": -1}}')
    assert all("is out of range" in run.answer(str(i))["error"] for i in range(6))
    assert [line["id"] for line in run.journal.read()] == ["0", "1", "2"]
    assert not any(run.inbox.known(str(i)) for i in range(3, 6))


def test_a_lock_that_a_stranger_holds_is_an_error_and_no_wait_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.live.inbox._LOCKED", 0.1)
    (tmp_path / "live").mkdir()
    with (tmp_path / "live/.lock").open("w") as file:
        hold(file.fileno())
        with pytest.raises(Failure, match=r"\.lock is locked by another process"):
            Run(tmp_path)


def test_a_second_process_that_is_refused_takes_nothing_from_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.live.inbox._LOCKED", 0.1)
    run = Run(tmp_path)
    run.drop("a.json", json.dumps({"id": "a", "set": {"lr": 0.5}}))
    (tmp_path / "live/answers/b.json").write_text("{}")
    with pytest.raises(Failure, match=r"\.lock is locked by another process"):
        Run(tmp_path)
    assert not run.journal.read()
    assert run.answer("b") == {}
    run.inbox.open()
    run.inbox.wait(10)
    run.serve()
    assert run.answer("a")["changes"] == {"lr": [0.1, 0.5]}
    run.inbox.close()


def test_a_full_disk_refuses_and_undoes(run: Run) -> None:
    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(Refusal, match=r"it cannot be journaled \(No space left on device\)"):
        transact(run.controls, {"lr": 0.5}, run.snapshot, full)
    assert run.values == {"lr": 0.1, "size": 4}


def test_a_command_that_a_full_disk_has_no_room_for_leaves_nothing_behind(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, content: bytes) -> None:
        os.write(file, content[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("src.live.files.write_all", full)
        for _ in range(3):
            with pytest.raises(Failure, match=r"inbox cannot be written to \(No space left on device\)"):
                send(run.folder, new_command(lr=0.1), timeout=None)
    assert not list((run.folder / "live/inbox").iterdir())


def test_a_value_that_does_not_take_effect_is_no_success(run: Run) -> None:
    controls = {**run.controls, "size": run.controls["size"]._replace(write=lambda _: None)}
    with pytest.raises(Refusal, match="size: 8 did not take effect: it is 4"):
        transact(controls, {"lr": 0.5, "size": 8}, run.snapshot, lambda _: None)
    assert run.values == {"lr": 0.1, "size": 4}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["id", "set", "do", "actor", "lr"]), inner),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_bytes_are_a_command_or_refused(content: bytes) -> None:
    try:
        command = parse(content, "x")
    except Refusal:
        return
    assert isinstance(command.set, dict)
    assert bool(command.set) != bool(command.do)


def test_sending_to_a_run_that_is_not_there_says_so(tmp_path: Path, run: Run) -> None:
    with pytest.raises(Failure, match="there is no such folder"):
        send(tmp_path / "nothing", new_command(lr=0.1))
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"):
        send(tmp_path, new_command(lr=0.2), timeout=0.2)
    with pytest.raises(UsageError, match=r"lr: -1 is out of range \(step 3\)"):
        send(tmp_path, new_command(lr=-1))
    run.serve()
    run.inbox.close()
    with pytest.raises(Failure, match="the run is not training now"):
        send(tmp_path, new_command(lr=0.1))
    run.__init__(run.folder)  # type: ignore[misc] # for the fixture to close
    run.inbox.open()


def test_steering_needs_neither_torch_nor_lightning() -> None:
    heavy = {"torch", "lightning", "numpy", "yaml", "jsonargparse", "rich"}
    code = f"import sys, src.steer; sys.exit(bool({heavy} & {{*sys.modules}}))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
