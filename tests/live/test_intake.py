"""The process that takes what is fed: each file once and whole, or refused by name with a reason, whatever happens."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from src.errors import Failure
from src.live import feeder as feeder_module
from src.live import intake as intake_module
from src.live.feed import correct, offer, offer_shard
from src.live.feeder import Correction, Feeder, Refused
from src.live.intake import MOST_WAITING, SEGMENT_IMAGES, Intake
from src.live.segments import Segment, Source, digests, read_segment, write_segment
from tests.conftest import REPOSITORY
from tests.live.test_shards import claim, mutated, npz, png, tar

CLASSES = ("cat", "dog", "frog")


def noise(seed: int = 0, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def many(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


class Fed:
    """A feeder, and all that has come from it."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder, self.store = tmp_path / "feed", tmp_path / "store"
        self.segments: list[Segment] = []
        self.refused: dict[str, str] = {}
        self.corrections: list[Correction] = []
        self.feeder: Feeder | None = None
        self.told: list[int] = []

    def open(
        self,
        *,
        first: int = 0,
        room: int = 10**6,
        taken: Collection[Source] = (),
        corrections: Collection[str] = (),
        known: bytes = b"",
    ) -> "Fed":
        self.feeder = Feeder(
            self.folder,
            self.store,
            CLASSES,
            32,
            first=first,
            room=room,
            taken=taken,
            corrections=corrections,
            digests=known,
            told=lambda: self.told.append(self.feeder.waiting if self.feeder else 0),
        )
        self.feeder.open()
        return self

    def close(self) -> None:
        if self.feeder:
            self.feeder.close()

    @property
    def pid(self) -> int:
        """Of the process, once it is there."""
        assert self.feeder
        deadline = time.monotonic() + 20
        while (process := self.feeder._process) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process.pid

    @property
    def names(self) -> list[str]:
        return [name for segment in self.segments for name in segment.names]

    @property
    def labels(self) -> dict[str, int]:
        return {n: int(label) for s in self.segments for n, label in zip(s.names, s.labels, strict=True)}

    def pixels(self, name: str) -> np.ndarray:
        return next(s.pixels[s.names.index(name)] for s in self.segments if name in s.names)

    def take(self, *, join: bool = True) -> bool:
        """Take what is ready, and return whether anything was."""
        assert self.feeder
        some = False
        while self.feeder.ready:
            item = self.feeder.ready.popleft()
            some = True
            if isinstance(item, Segment):
                self.segments.append(item)
                if join:
                    self.feeder.joined(item)
            elif isinstance(item, Refused):
                assert item.name not in self.refused, "it is named once"
                self.refused[item.name] = item.reason
            else:
                self.corrections.append(item)
        return some

    def until(self, done: Callable[[], bool], seconds: float = 20.0, *, join: bool = True) -> None:
        assert self.feeder
        deadline = time.monotonic() + seconds
        while not done():
            self.feeder.wait(0.05)
            self.take(join=join)
            assert time.monotonic() < deadline or done(), (
                f"{len(self.names)} images, {self.refused}, {self.corrections}, {self.feeder.waiting} wait"
            )

    def nothing_comes(self, seconds: float = 0.4, *, join: bool = True) -> None:
        assert self.feeder
        before = len(self.names), len(self.refused), len(self.corrections)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.feeder.wait(0.05)
            self.take(join=join)
        assert (len(self.names), len(self.refused), len(self.corrections)) == before, (self.names, self.refused)


@pytest.fixture
def fed(tmp_path: Path) -> Iterator[Fed]:
    fed = Fed(tmp_path)
    yield fed
    fed.close()


def save(path: Path, seed: int) -> None:
    """Put an image into its place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path.with_name(f".{path.name}"), "PNG")
    path.with_name(f".{path.name}").rename(path)


def test_images_are_taken_soon_wherever_in_the_folder_and_however_they_come(fed: Fed, tmp_path: Path) -> None:
    save(fed.folder / "cat/before.png", 0)
    fed.open()
    fed.until(lambda: fed.names == ["cat/before.png"])
    waits = []
    for number in range(1, 9):
        save(fed.folder / f"dog/{number}.png", number)
        renamed = time.monotonic()
        fed.until(lambda number=number: f"dog/{number}.png" in fed.names)  # type: ignore[misc]
        waits.append(time.monotonic() - renamed)
    assert sorted(waits)[4] < 3
    save(fed.folder / "frog/new/deep/1.png", 20)
    save(tmp_path / "made/elsewhere/2.png", 21)
    (tmp_path / "made").rename(fed.folder / "frog/moved")
    Image.fromarray(noise(22)).save(tmp_path / "copied.png")
    shutil.copy(tmp_path / "copied.png", fed.folder / "cat/copied.png")
    (fed.folder / "cat/large.jpg").write_bytes(png(noise(23, 300)))
    fed.until(lambda: len(fed.names) == 13)
    assert not fed.refused
    assert fed.labels["frog/new/deep/1.png"] == fed.labels["frog/moved/elsewhere/2.png"] == 2
    assert np.array_equal(fed.pixels("cat/copied.png"), noise(22))
    assert [segment.number for segment in fed.segments] == list(range(len(fed.segments)))
    for segment in fed.segments:
        assert segment.pixels.dtype == np.uint8
        assert segment.labels.dtype == np.int64
        assert [name for name, _, _ in segment.sources] == segment.names
    assert fed.feeder
    fed.until(lambda: fed.feeder is not None and fed.feeder.waiting == 0, 3)


def test_a_folder_that_is_not_there_yet_is_waited_for_and_may_vanish_for_a_while(fed: Fed) -> None:
    fed.open()
    time.sleep(0.3)
    save(fed.folder / "cat/1.png", 1)
    fed.until(lambda: fed.names == ["cat/1.png"])
    shutil.rmtree(fed.folder)
    time.sleep(0.3)
    save(fed.folder / "cat/2.png", 2)
    fed.until(lambda: fed.names == ["cat/1.png", "cat/2.png"])
    fed.folder.rename(fed.folder.with_name("old"))
    save(fed.folder / "cat/3.png", 3)
    fed.until(lambda: fed.names == ["cat/1.png", "cat/2.png", "cat/3.png"])
    assert not fed.refused


def test_what_cannot_be_taken_is_refused_once_with_a_reason_and_the_rest_is_taken(fed: Fed, tmp_path: Path) -> None:
    good, cat = png(noise(1)), fed.folder / "cat"
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/1.png").write_bytes(png(noise(50)))
    contents = {
        "cat/good.png": good,
        "cta/1.png": png(noise(2)),
        "zebra/1.png": png(noise(2)),
        "1.png": png(noise(2)),
        "cat/cut.png": png(noise(3))[:900],
        "cat/text.png": b"a text",
        "cat/empty.png": b"",
        "cat/notes.txt": b"a text",
        "cat/none": good,
        "cat/a\x1b[2Jb.png": png(noise(4)),
        "dog/zzz.png": good,
        "many.npz": npz(images=many(3, 5), labels=["cat", "owl", "dog"]),
        "bomb.npz": claim((1, 1_000_000, 1_000_000, 3)),
        "paths.tar": tar(("../../up.png", png(noise(6))), ("../../up.cls", b"dog"), ("/lone.png", good)),
        ".corrections/1.json": b"{}",
        ".corrections/2.json": json.dumps({"id": "a", "sample": 1, "label": "owl"}).encode(),
        ".corrections/3.json": b"[" * 30_000,
    }
    for name, content in contents.items():
        (fed.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (fed.folder / name).write_bytes(content)
    Image.new("1", (9000, 9000)).save(cat / "bomb.png")
    (cat / "link.png").symlink_to(tmp_path / "secret/1.png")
    (cat / "folder").symlink_to(tmp_path / "secret")
    os.mkfifo(cat / "pipe.png")
    (cat / "huge.png").touch()
    os.truncate(cat / "huge.png", 1 << 40)
    for name in (".hidden.png", "half.png.tmp", "half.part", "half.png~", "half.PARTIAL"):
        (cat / name).write_bytes(png(noise(60)))
    (cat / "half.tmp").mkdir()
    (cat / "half.tmp/1.png").write_bytes(png(noise(62)))
    (fed.folder / ".trash").mkdir()
    (fed.folder / ".trash/1.png").write_bytes(png(noise(61)))
    fed.open()
    reasons = {
        "cta/1.png": "there is no class 'cta'; did you mean cat?",
        "zebra/1.png": "there is no class 'zebra'; there are cat, dog, frog",
        "1.png": "it is in no class's folder: put it into CLASS/",
        "cat/cut.png": "truncated",
        "cat/text.png": "it is not an image that can be read",
        "cat/empty.png": "it is empty",
        "cat/notes.txt": ".txt: neither an image file nor a shard (.npz, .tar)",
        "cat/none": "no suffix: neither",
        "cat/a\\x1b[2Jb.png": "its name cannot be printed",
        "dog/zzz.png": "its pixels are those of cat/good.png",
        "many.npz#1": "there is no class 'owl'",
        "bomb.npz": "the header claims 3,000,000,000,000 bytes",
        "paths.tar#1": "has no label",
        ".corrections/1.json": "id: must be",
        ".corrections/2.json": "there is no class 'owl'",
        ".corrections/3.json": "it is damaged",
        "cat/bomb.png": "more than 50,000,000",
        "cat/link.png": "it is a link",
        "cat/folder": "it is a link",
        "cat/pipe.png": "it is not a file",
        "cat/huge.png": "1,099,511,627,776 bytes; 67,108,864 are the most",
    }
    fed.until(lambda: len(fed.refused) >= len(reasons) and len(fed.names) >= 4)
    (cat / "link.png").touch()
    (tmp_path / "secret/2.png").write_bytes(png(noise(51)))  # the folder behind a link is not looked into
    fed.nothing_comes()
    assert fed.refused.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in fed.refused[name], f"{name}: {fed.refused[name]}"
        assert "\n" not in fed.refused[name]
    assert sorted(fed.names) == ["cat/good.png", "many.npz#0", "many.npz#2", "paths.tar#0"]
    assert fed.labels == {"cat/good.png": 0, "many.npz#0": 0, "many.npz#2": 1, "paths.tar#0": 1}
    assert not list(tmp_path.rglob("up.png"))
    assert fed.feeder
    assert fed.feeder.refused == len(reasons)


def test_a_file_is_taken_only_when_it_has_been_written(fed: Fed) -> None:
    fed.open()
    content = png(noise(1))
    (fed.folder / "cat").mkdir(parents=True)
    with (fed.folder / "cat/slow.png").open("wb", buffering=0) as file:
        for start in range(0, len(content), 700):
            file.write(content[start : start + 700])
            fed.nothing_comes(0.15)
        save(fed.folder / "cat/other.png", 2)
        fed.until(lambda: fed.names == ["cat/other.png"])
        fed.nothing_comes(0.2)
        assert fed.feeder
        assert fed.feeder.waiting == 1
    fed.until(lambda: fed.names == ["cat/other.png", "cat/slow.png"])
    assert np.array_equal(fed.pixels("cat/slow.png"), noise(1))
    with (fed.folder / "many.tar").open("wb", buffering=0) as file:
        file.write(tar(("a.png", png(noise(3))), ("a.cls", b"0")))
        fed.nothing_comes(0.2)
        file.write(b"")
    fed.until(lambda: "many.tar#0" in fed.names)
    assert not fed.refused


def test_a_file_that_is_replaced_is_a_new_one_and_one_that_is_touched_is_not(fed: Fed) -> None:
    save(fed.folder / "cat/1.png", 1)
    fed.open().until(lambda: len(fed.names) == 1)
    save(fed.folder / "cat/1.png", 2)
    fed.until(lambda: fed.names == ["cat/1.png"] * 2)
    assert np.array_equal(fed.segments[-1].pixels[0], noise(2))
    (fed.folder / "cat/1.png").touch()
    fed.nothing_comes()
    assert not fed.refused


def test_what_was_dealt_with_before_is_not_looked_at_again(fed: Fed) -> None:
    save(fed.folder / "cat/1.png", 1)
    save(fed.folder / "cat/2.png", 2)
    save(fed.folder / "owl/3.png", 3)
    offer_shard(fed.folder, many(6), [0] * 6, "s")
    id = correct(fed.folder, 7, "dog")

    def source(name: str) -> tuple[int, int]:
        found = (fed.folder / name).stat()
        return found.st_size, found.st_mtime_ns

    taken = [(name, *source(name)) for name in ("cat/1.png", "owl/3.png")]
    taken += [(f"s.npz#{mark}", *source("s.npz")) for mark in (":2", ":4", "4")]
    fed.store.mkdir()
    for name in ("000002.npz", "000003.npz", "000007.npz", ".000004.npz.partial"):
        (fed.store / name).write_bytes(b"x")
    fed.open(first=3, taken=taken, corrections=[id], known=digests(noise(2)[None]))
    fed.until(lambda: fed.names == ["s.npz#5"] and bool(fed.refused))
    fed.nothing_comes()
    assert fed.refused == {"cat/2.png": "its pixels are those of an image that is known already"}
    assert not fed.corrections
    assert [segment.number for segment in fed.segments] == [3]
    assert sorted(path.name for path in fed.store.glob("*.npz")) == ["000002.npz", "000003.npz"]
    assert not list(fed.store.glob("*.partial"))


def test_more_than_there_is_room_for_is_refused(fed: Fed) -> None:
    offer_shard(fed.folder, many(5), [0] * 5, "s")
    fed.open(room=3).until(lambda: len(fed.names) == 3 and len(fed.refused) == 2)
    assert set(fed.refused.values()) == {"there is no room left for it"}


def test_no_more_is_read_than_can_join_and_a_shard_comes_in_parts(fed: Fed) -> None:
    offer_shard(fed.folder, many(4000), [0] * 4000, "s")
    fed.open()
    fed.until(lambda: len(fed.names) >= MOST_WAITING, join=False)
    fed.nothing_comes(1.0, join=False)
    assert MOST_WAITING <= len(fed.names) < MOST_WAITING + SEGMENT_IMAGES
    assert fed.feeder
    assert fed.feeder.waiting >= len(fed.names)
    for segment in fed.segments:
        fed.feeder.joined(segment)
    fed.until(lambda: len(fed.names) == 4000)
    assert fed.names == [f"s.npz#{i}" for i in range(4000)]
    assert max(len(segment.names) for segment in fed.segments) <= SEGMENT_IMAGES
    done = 0
    for segment in fed.segments:
        done += len(segment.names)
        assert segment.sources[-1][0] == ("s.npz" if done == 4000 else f"s.npz#:{done}")


def test_corrections_come_after_the_images_that_they_name(fed: Fed) -> None:
    fed.open()
    names = offer(fed.folder, [*many(40)], "cat")
    shard = offer_shard(fed.folder, many(40, 1), [1] * 40)
    ids = [
        correct(fed.folder, sample, label) for sample, label in ((names[39], "dog"), (f"{shard}#39", None), (3, "2"))
    ]
    fed.until(lambda: len(fed.corrections) == 3)
    actor = fed.corrections[0].actor
    assert sorted(fed.corrections) == sorted([
        Correction(ids[0], names[39], 1, actor),
        Correction(ids[1], f"{shard}#39", None, actor),
        Correction(ids[2], 3, 2, actor),
    ])  # fmt: skip
    assert "@" in actor
    assert {names[39], f"{shard}#39"} <= set(fed.names), "they came before their corrections"
    again = json.loads(sorted((fed.folder / ".corrections").iterdir())[0].read_text())
    (fed.folder / ".corrections/again.json").write_text(json.dumps(again))
    fed.nothing_comes()
    assert not fed.refused


def test_the_process_may_be_killed_at_any_time_and_each_image_comes_once(fed: Fed) -> None:
    names = offer(fed.folder, [*many(600)], "cat") + offer(fed.folder, [many(1, 1)[0]], "owl")
    shard = offer_shard(fed.folder, many(3000, 2), [2] * 3000)
    fed.open()
    for images in (1, 900, 2200):
        fed.until(lambda images=images: len(fed.names) >= images)  # type: ignore[misc]
        os.kill(fed.pid, signal.SIGKILL)
        time.sleep(0.05)
    fed.until(lambda: len(fed.names) == 3600)
    save(fed.folder / "dog/last.png", 3)
    fed.until(lambda: "dog/last.png" in fed.names)
    assert sorted(fed.names) == sorted([*names[:-1], "dog/last.png", *(f"{shard}#{i}" for i in range(3000))])
    assert fed.refused.keys() == {names[-1]}
    assert [segment.number for segment in fed.segments] == list(range(len(fed.segments)))
    for segment in fed.segments:
        again = read_segment(fed.store / f"{segment.number:06}.npz", segment.sha256)
        assert np.array_equal(again.pixels, segment.pixels)


def test_a_file_that_ends_the_process_twice_is_refused(
    fed: Fed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_over_the_second_image(
        "import os\nfrom PIL import Image\nreal = Image.open\n"
        "def crash(file, *args, **kwargs):\n"
        "    os.kill(os.getpid(), 11 if b'POISON' in file.getvalue() else 0)\n"
        "    return real(file, *args, **kwargs)\n"
        "Image.open = crash\n",
        fed, tmp_path, monkeypatch,
    )  # fmt: skip


def end_over_the_second_image(code: str, fed: Fed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process that reads begin with some code, by which it ends over a file with POISON in it."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python/sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "python"))
    for number in range(3):
        save(fed.folder / f"cat/{number}.png", number)
    (fed.folder / "cat/1.png").write_bytes(png(noise(1)) + b"POISON")
    fed.open().until(lambda: len(fed.names) == 2 and len(fed.refused) == 1)
    assert sorted(fed.names) == ["cat/0.png", "cat/2.png"]
    assert fed.refused == {"cat/1.png": "it ended the process that read it"}


def test_a_file_that_takes_a_minute_of_the_processor_is_refused(
    fed: Fed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_over_the_second_image(
        "import hashlib, signal\nfrom PIL import Image\nreal, limit = Image.open, signal.setitimer\n"
        "signal.setitimer = lambda which, seconds: limit(which, seconds / 120)\n"
        "def slow(file, *args, **kwargs):\n"
        "    while b'POISON' in file.getvalue():\n"
        "        hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"  # in C, and never back in Python
        "    return real(file, *args, **kwargs)\n"
        "Image.open = slow\n",
        fed, tmp_path, monkeypatch,
    )  # fmt: skip


def test_a_feed_that_ends_again_and_again_is_given_up_in_one_line(
    fed: Fed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(feeder_module, "RESTARTS", 1)
    fed.store.parent.mkdir(exist_ok=True)
    fed.store.write_text("a file where a folder should be")
    fed.open()
    assert fed.feeder
    fed.feeder._thread.join(20)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "is fed from no more: the process that reads it ended 2 times" in said
    assert "FileExistsError" in said


def test_ctrl_c_does_not_reach_it_and_it_has_the_lowest_claim_to_the_processor(fed: Fed) -> None:
    save(fed.folder / "cat/1.png", 1)
    fed.open().until(lambda: len(fed.names) == 1)
    assert os.getsid(fed.pid) != os.getsid(0)
    assert os.getpriority(os.PRIO_PROCESS, fed.pid) >= 10
    pid = fed.pid
    os.kill(pid, signal.SIGINT)
    save(fed.folder / "cat/2.png", 2)
    fed.until(lambda: len(fed.names) == 2)
    assert fed.pid == pid
    fed.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_can_be_ended_while_a_forked_process_has_its_pipe_open_too(fed: Fed) -> None:
    save(fed.folder / "cat/1.png", 1)
    fed.open().until(lambda: len(fed.names) == 1)
    assert fed.feeder
    assert fed.feeder._process
    assert fed.feeder._process.stdin
    held = os.dup(fed.feeder._process.stdin.fileno())
    pid, begun = fed.pid, time.monotonic()
    fed.close()
    os.close(held)
    assert time.monotonic() - begun < 4
    assert not is_alive(pid)


def test_of_two_that_show_the_same_the_first_is_taken(fed: Fed) -> None:
    fed.open()
    save(fed.folder / "dog/before.png", 0)
    fed.until(lambda: len(fed.names) == 1)
    save(fed.folder / "dog/z.png", 1)
    time.sleep(0.02)  # the clock of a file system ticks every few milliseconds
    save(fed.folder / "cat/a.png", 1)
    fed.until(lambda: bool(fed.refused) and len(fed.names) == 2)
    assert fed.names == ["dog/before.png", "dog/z.png"]
    assert fed.refused == {"cat/a.png": "its pixels are those of dog/z.png"}


def test_it_ends_when_the_fit_is_killed(tmp_path: Path) -> None:
    code = """if True:
        import time
        from pathlib import Path
        from src.live.feeder import Feeder
        where = Path("feed"), Path("store"), ["cat"], 32
        feeder = Feeder(*where, first=0, room=9, taken=(), corrections=(), digests=b"")
        feeder.open()
        feeder.wait(20)
        print(feeder._process.pid, flush=True)
        time.sleep(60)
    """
    save(tmp_path / "feed/cat/1.png", 1)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        os.kill(pid, 0)
        process.kill()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Return whether a process that may be nobody's child runs."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_three_producers_at_once_lose_nothing(fed: Fed) -> None:
    fed.open()
    expected: list[set[str]] = [set(), set(), set()]
    bad: list[set[str]] = [set(), set(), set()]

    def produce(which: int) -> None:
        rng = np.random.default_rng(100 + which)
        for number in range(200):
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            if number % 20:
                expected[which].add(offer(fed.folder, [image], CLASSES[which])[0])
            else:
                name = f"{CLASSES[which]}/bad{number}.png"
                (fed.folder / CLASSES[which]).mkdir(parents=True, exist_ok=True)
                (fed.folder / name).write_bytes(png(image)[:-100] if number % 40 else b"a text")
                bad[which].add(name)

    threads = [threading.Thread(target=produce, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fed.until(lambda: len(fed.names) + len(fed.refused) == 600)
    assert set(fed.names) == set.union(*expected)
    assert fed.refused.keys() == set.union(*bad)


def test_a_segment_that_is_missing_or_another_is_named(fed: Fed) -> None:
    save(fed.folder / "cat/1.png", 1)
    fed.open().until(lambda: len(fed.names) == 1)
    (segment,) = fed.segments
    path = fed.store / "000000.npz"
    assert read_segment(path, segment.sha256).sources == segment.sources
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(Failure, match=r"000000\.npz has been changed: its SHA-256 is"):
        read_segment(path, segment.sha256)
    path.unlink()
    with pytest.raises(Failure, match=r"000000\.npz: the images that were fed cannot be read \(No such file"):
        read_segment(path, segment.sha256)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixels": many(2)[:, :16]}, r"pixels: uint8 \[2, 16, 32, 3\] is not"),
        ({"pixels": many(2).astype(float)}, "pixels: float64"),
        ({"pixels": np.array([{}, {}])}, "Object arrays cannot be loaded"),
        ({"labels": np.array([0, -1])}, "labels: they are not"),
        ({"labels": np.array([0])}, "labels: they are not"),
        ({"labels": np.array([0.0, 1.0])}, "labels: they are not"),
        ({"names": np.array(["a"])}, "names: they are not 2 texts"),
        ({"names": np.array([1, 2])}, "names: they are not 2 texts"),
        ({"sources": np.array("[1]")}, "int"),
        ({"sources": np.array("no JSON")}, "Expecting value"),
        ({"labels": None}, "labels"),
    ],
)
def test_a_segment_that_was_changed_together_with_its_hash_is_named(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = tmp_path / "000003.npz"
    write_segment(path, [*many(2)], [0, 1], ["a", "b"], [])
    with np.load(path) as found:
        parts = {name: value for name, value in {**found, **change}.items() if value is not None}
    np.savez(path, **parts)
    with pytest.raises(Failure, match=rf"000003\.npz does not hold images as a run stores them: .*{said}"):
        read_segment(path, hashlib.sha256(path.read_bytes()).hexdigest())


class InProcess:
    """An intake in this process, turn by turn."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "feed"
        (self.folder / "cat").mkdir(parents=True, exist_ok=True)
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        config = {"folder": str(self.folder), "store": str(tmp_path / "store"), "classes": CLASSES, "size": 32}
        config |= {"first": 0, "room": 10**6, "unjoined": 0, "taken": [], "corrections": [], "names": []}
        self.intake = Intake(config, b"", write)
        self.reports: list[dict[str, Any]] = []

    def until(self, done: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        self.intake.events.put(None)
        while not done():
            self.intake.turn()
            with contextlib.suppress(BlockingIOError):
                self.reports += [json.loads(line) for line in os.read(self._read, 1 << 20).splitlines()]
            self.reports = [report for report in self.reports if report["kind"] != "waiting"]
            assert time.monotonic() < deadline, self.reports


def test_where_writers_cannot_be_seen_a_file_is_taken_a_second_after_its_last_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "being_written", lambda _: None)
    fed = InProcess(tmp_path)
    begun = time.monotonic()
    content = png(noise(1))
    with (fed.folder / "cat/slow.png").open("wb", buffering=0) as file:
        for start in range(0, len(content), 1000):
            file.write(content[start : start + 1000])
            changed = time.monotonic()
            fed.until(lambda changed=changed: time.monotonic() - changed > 0.3)  # type: ignore[misc]
            assert not fed.reports
    fed.until(lambda: bool(fed.reports))
    assert time.monotonic() - begun >= 2
    assert [(report["kind"], report["count"]) for report in fed.reports] == [("segment", 1)]


def test_a_folder_that_becomes_a_link_before_it_is_read_is_not_followed(tmp_path: Path) -> None:
    fed = InProcess(tmp_path)
    correction = json.dumps({"id": "a", "sample": 1, "label": "dog"})
    for folder in (fed.folder, tmp_path / "private"):
        save(folder / "cat/deep/1.png", 1)
        (folder / ".corrections").mkdir(parents=True)
        (folder / ".corrections/1.json").write_text(correction)
    fed.intake._find(fed.folder)
    for name in ("cat", ".corrections"):
        (fed.folder / name).rename(tmp_path / f"old{name}")
        (fed.folder / name).symlink_to(tmp_path / "private" / name)
    fed.until(lambda: len(fed.reports) == 4)
    assert {(report["kind"], report["name"], report["reason"]) for report in fed.reports} == {
        ("refused", "cat/deep/1.png", "Not a directory"),
        ("refused", ".corrections/1.json", "Not a directory"),
        ("refused", "cat", "it is a link: copy or move the file itself"),
        ("refused", ".corrections", "it is a link: copy or move the file itself"),
    }


def test_a_full_disk_is_told_once_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = InProcess(tmp_path)
    tries = 0

    def full(*args: Any) -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(28, "No space left on device")
        return write_segment(*args)

    monkeypatch.setattr(intake_module, "write_segment", full)
    offer_shard(fed.folder, many(SEGMENT_IMAGES), [0] * SEGMENT_IMAGES)
    fed.until(lambda: tries == 1)
    begun = time.process_time()
    fed.until(lambda: tries == 3 and len(fed.reports) == 2)
    assert [report["kind"] for report in fed.reports] == ["error", "segment"]
    assert "000000.npz cannot be written (No space left on device)" in fed.reports[0]["reason"]
    assert fed.reports[1]["count"] == SEGMENT_IMAGES
    assert time.process_time() - begun < 2, "it waits, and does not try without a pause"


NPZ = npz(images=many(3), labels=["cat", "dog", "frog"])
CORRECTION = json.dumps({"id": "a", "sample": "cat/a.png", "label": "dog", "actor": "me@here"}).encode()


@settings(max_examples=60, deadline=None)
@given(
    mutated(png(noise(1, 8))),
    mutated(NPZ),
    mutated(tar(("a.png", png(noise(2, 8))), ("a.cls", b"0"))),
    mutated(CORRECTION),
)
def test_whatever_is_put_there_the_process_goes_on(
    image: bytes, shard: bytes, archive: bytes, correction: bytes
) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        tmp_path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        patch.setattr(intake_module, "_QUIET", 0.0)
        fed = InProcess(tmp_path)
        stack.callback(os.close, fed.intake._reports)
        stack.callback(os.close, fed._read)
        stack.callback(os.close, fed.intake._lock)
        stack.callback(os.close, fed.intake._mark_file)
        for name, content in (
            ("cat/a.png", image),
            ("s.npz", shard),
            ("s.tar", archive),
            (".corrections/1.json", correction),
        ):
            (fed.folder / name).parent.mkdir(exist_ok=True)
            (fed.folder / name).write_bytes(content)
        save(fed.folder / "cat/z.png", 9)
        fed.until(lambda: any("cat/z.png" in str(report.get("sources")) for report in fed.reports))
        fed.until(lambda: not fed.intake._queue and fed.intake._work is None)
        assert {report["kind"] for report in fed.reports} <= {"segment", "refused", "correction"}


def test_neither_the_process_nor_its_handle_needs_torch() -> None:
    heavy = {"torch", "lightning", "yaml", "jsonargparse", "rich"}
    code = f"import sys, src.live.intake, src.live.feeder; sys.exit(bool({heavy} & {{*sys.modules}}))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})


def test_images_that_come_one_by_one_join_a_few_at_a_time_and_each_report_is_told_of(fed: Fed) -> None:
    fed.open()
    offer(fed.folder, [noise(1000)], "cat")
    fed.until(lambda: len(fed.names) == 1)
    begun = time.monotonic()
    for seed in range(20):
        offer(fed.folder, [noise(seed)], "cat")
        time.sleep(0.05)
    fed.until(lambda: len(fed.names) == 21)
    assert len(fed.segments) <= 2 + (time.monotonic() - begun) / 0.25
    assert len(fed.told) >= len(fed.segments)
