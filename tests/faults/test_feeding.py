"""What feeding promises: a run that is fed, killed and resumed equals one that is not killed, and so does its replay.

And what is scored before it is learned is what an independent look at the journal, the segments and the weights finds.
"""

import hashlib
import json
import math
import re
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.callbacks.feeding import WINDOW
from src.data import Shapes10
from src.live.feed import CLASSES, announce, announced
from src.live.journal import Journal
from src.live.segments import segment_path
from src.steer import main as steer
from tests.faults.eater import FEED, OWN, PLAN, Oracle, feed_now
from tests.faults.probe import (
    SMALL,
    CrashError,
    Done,
    assert_equal,
    assert_same_run,
    batches,
    curves,
    fit,
    fit_through,
    load,
)
from tests.faults.test_resume import AUGMENT, CALLBACKS, LAST, ONE_CYCLE, RECIPES, RUN

pytestmark = pytest.mark.usefixtures("fast_and_in_order", "here")

Plan = dict[int, list[Any]]
"""By the step after which it is fed: a number of images, or a correction ``[sample, label]``."""


def with_callbacks(*callbacks: dict[str, Any] | str) -> list[str]:
    named = [{"class_path": f"tests.faults.eater.{c}"} if isinstance(c, str) else c for c in callbacks]
    return ["--trainer.callbacks", json.dumps(named)]


def fed(*args: str, plan: Plan, crashes: list[int], callbacks: list[dict[str, Any]] | None = None) -> Done:
    """Run a fit that is fed, and go on with it after each crash."""
    FEED.mkdir(exist_ok=True)
    PLAN.write_text(json.dumps({"fed": plan, "crashes": crashes, "left": False}))
    named = with_callbacks(*(callbacks or []), "Eater")
    command = [*SMALL, "--data.feed=feed", "--checkpoint.every_n_steps=2", *named, *args]
    return fit_through(len(crashes), command, ["--ckpt_path", str(LAST), *named])


def replayed(*args: str) -> Path:
    done = fit("--config", RUN / "config.yaml", "--replay", RUN, *args)
    assert (done.status, done.err) == (0, ""), done
    return RUN.with_name("version_1")


MIXED: Plan = {
    1: [12],
    3: [5, [OWN, "circle"], ["003-0.npz#2", None]],
    4: [1],
    6: [[OWN + 1, None], 7],
    9: [20, [3, "star"]],
}
ALONE = ["--data.train_fraction=0"]

RUNS: list[Any] = [
    ("one_cycle", MIXED, [5, 7]),
    ("window", MIXED, [5, 10]),
    pytest.param("one_cycle", MIXED, [5, 8, 11], marks=pytest.mark.slow),
    pytest.param("averaged", MIXED, [5, 10], marks=pytest.mark.slow),
    pytest.param("cutmix", MIXED, [5], marks=pytest.mark.slow),
    pytest.param("accumulate_and_validate", MIXED, [5], marks=pytest.mark.slow),
    pytest.param("lookahead", MIXED, [7], marks=pytest.mark.slow),
    pytest.param("plateau", MIXED, [5, 8], marks=pytest.mark.slow),
    pytest.param("max_steps", MIXED, [7], marks=pytest.mark.slow),
    pytest.param("weighted", MIXED, [5], marks=pytest.mark.slow),
    pytest.param("chunks", {1: [12], 5: [[OWN, "circle"], 5], 10: [3]}, [9], marks=pytest.mark.slow),
]
"""A run is killed where nothing has come that has not joined: that would join at another step when it goes on."""
MORE = {
    "window": [AUGMENT, ONE_CYCLE, "--data.replay_only=8"],
    "weighted": [AUGMENT, ONE_CYCLE, "--data.feed_weight=2.5"],
    "chunks": [ONE_CYCLE, "--chunk_size=4"],
}


@pytest.mark.parametrize(("recipe", "plan", "crashes"), RUNS)
def test_a_fed_run_that_is_killed_and_resumed_equals_one_that_is_not_and_so_does_its_replay(
    recipe: str, plan: Plan, crashes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    args, callbacks = {**RECIPES, **MORE}[recipe], CALLBACKS.get(recipe, [])
    for folder in ("quiet", "killed"):
        Path(folder).mkdir()
    with monkeypatch.context() as patch:
        patch.chdir("quiet")
        fed(*args, plan=plan, crashes=[], callbacks=callbacks)
    monkeypatch.chdir("killed")
    fed(*args, plan=plan, crashes=crashes, callbacks=callbacks)
    assert_same_run(RUN, Path("../quiet") / RUN, distinct=True)
    PLAN.unlink()
    assert_same_run(replayed(), RUN, distinct=True)


def test_what_had_come_when_a_run_died_waits_until_what_had_joined_has_joined_again() -> None:
    fed("--checkpoint.every_n_steps=3", plan={1: [3], 5: [4], 6: [6]}, crashes=[6])
    lines = [line for line in Journal(RUN / "live/journal.jsonl").read() if line["kind"] == "segment"]
    steps = [line["step"] for line in lines]
    assert steps[:2] == [1, 5]
    assert steps == sorted(steps)
    assert [line["effective"]["first_id"] for line in lines] == [OWN, OWN + 3, OWN + 7]
    PLAN.unlink()
    assert_same_run(replayed(), RUN, distinct=True)


def test_a_run_that_starts_empty_learns_from_the_stream_alone_and_is_replayed() -> None:
    FEED.mkdir()
    feed_now("000-0", 15)
    done = fed(*ALONE, *RECIPES["one_cycle"], "--trainer.max_epochs=4", plan={1: [20], 5: [30]}, crashes=[4, 8])
    assert re.search(r"\n +fed 65, 0 waiting, 0 refused  feed/prequential_acc 0\.\d{4}\n", done.out)
    lines = [line for line in Journal(RUN / "live/journal.jsonl").read() if line["kind"] == "segment"]
    assert [(line["step"], line["effective"]["images"]) for line in lines] == [(0, 15), (1, 20), (5, 30)]
    PLAN.unlink()
    again = replayed()
    assert_same_run(again, RUN, distinct=True)


def test_a_replay_on_other_data_is_refused_as_ids_would_name_other_images() -> None:
    fed(plan={1: [12]}, crashes=[])
    PLAN.unlink()
    done = fit("--config", RUN / "config.yaml", "--replay", RUN, "--data.train_images=200")
    assert done.status == 1
    assert "error: journal: what was fed at step 1 joined other images than there are now" in done.err


def test_a_fit_leaves_its_classes_in_the_folder_but_makes_no_folder_for_a_checkpoint() -> None:
    quick = [*SMALL, "--data.feed=deeper/feed", "--trainer.max_epochs=1"]
    assert fit(*quick).status == 0
    feed = Path("deeper/feed")
    assert announced(feed) == list(Shapes10.classes)
    announce(feed, ["another", "run's"])
    assert fit("--ckpt_path", LAST, "--trainer.max_epochs=2").status == 0
    assert announced(feed) == list(Shapes10.classes)
    assert [path.name for path in feed.iterdir()] == [CLASSES]
    (feed / CLASSES).unlink()
    feed.rmdir()
    assert fit("--ckpt_path", LAST, "--trainer.max_epochs=3").status == 0
    assert not feed.exists()


def test_the_images_of_a_replay_are_each_drawn_once_an_epoch() -> None:
    fed(plan=MIXED, crashes=[], callbacks=[{"class_path": "tests.faults.probe.Probe", "init_args": {"log": "log"}}])
    lines = [line for line in Journal(RUN / "live/journal.jsonl").read() if line["kind"] in ("segment", "drop")]
    log = batches(Path("log"))
    for epoch in (0, 1):
        ids = [id for line in log if line[1] == epoch for id in line[3]]
        assert len(ids) == len(set(ids))
        first, last = (f(line[0] for line in log if line[1] == epoch) for f in (min, max))
        due = set(range(OWN, OWN + sum(n["effective"].get("images", 0) for n in lines if n["step"] < last)))
        gone = {line["effective"]["id"] for line in lines if line["kind"] == "drop" and line["step"] < first}
        assert due - gone <= {*ids} | {line["effective"]["id"] for line in lines if line["kind"] == "drop"}
        assert not gone & {*ids}
        assert len({id for id in ids if id < OWN}) == 55


@pytest.mark.parametrize("recipe", ["one_cycle", "window"])
def test_the_prequential_curves_are_those_of_an_oracle_to_the_last_digit(recipe: str) -> None:
    plan: Plan = {1: [12], 3: [5], 6: [40], 7: [[OWN, "star"]], 9: [3]}
    fed(*{**RECIPES, **MORE}[recipe], plan=plan, crashes=[5])
    PLAN.unlink()
    again = replayed(*with_callbacks("Oracle"))
    assert_equal(load(again)["state_dict"], load(RUN)["state_dict"], "the oracle changes nothing")
    assert [step for step, *_ in Oracle.scored] == [1, 3, 6, 9]
    images, hits, loss = 0, 0, 0.0
    last: deque[tuple[float, bool]] = deque(maxlen=WINDOW)
    found = {tag: dict(points) for tag, points in curves(again).items()}
    of_run = {tag: dict(points) for tag, points in curves(RUN).items()}
    for step, losses, right in Oracle.scored:
        images, hits, loss = images + len(losses), hits + int(right.sum()), loss + float(losses.sum())
        last.extend(zip(losses.tolist(), right.tolist(), strict=True))
        wanted = {
            "feed/prequential_acc": hits / images,
            "feed/prequential_loss": loss / images,
            "feed/prequential_acc_window": sum(hit for _, hit in last) / len(last),
            "feed/prequential_loss_window": math.fsum(loss for loss, _ in last) / len(last),
        }
        for tag, value in wanted.items():
            assert found[tag][step] == of_run[tag][step] == float(np.float32(value)), (tag, step)
    kept = load(again)["prequential"]
    assert (kept["images"], kept["hits"]) == (60, hits)
    assert kept["loss"] == loss


def test_a_segment_that_was_damaged_is_refused_by_name() -> None:
    fed(plan={1: [4]}, crashes=[])
    path = segment_path(RUN / "live/segments", 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    PLAN.unlink()
    for args in (
        ["--ckpt_path", str(LAST), "--trainer.max_epochs=3"],
        ["--config", str(RUN / "config.yaml"), "--replay", str(RUN)],
    ):
        done = fit(*args, *with_callbacks("Eater"))
        assert done.status == 1, done
        assert done.err.startswith("error: "), done
        assert "segments/000000.npz has been changed: its SHA-256 is" in done.err
        assert done.err.count("\n") == 1


@pytest.mark.parametrize("part", ["pixels", "labels"])
def test_a_segment_of_other_data_is_refused_though_the_journal_has_its_hash(part: str) -> None:
    fed(plan={1: [4]}, crashes=[])
    path, live = segment_path(RUN / "live/segments", 0), RUN / "live"
    with np.load(path) as arrays:
        parts = dict(arrays)
    parts[part] = parts[part][:, :16, :16] if part == "pixels" else parts[part] + 10
    with path.open("wb") as file:
        np.savez(file, **parts)
    before, after = Journal(live / "journal.jsonl").read(), hashlib.sha256(path.read_bytes()).hexdigest()
    (live / "journal.jsonl").unlink()
    for line in before:
        effective = line["effective"] | {"sha256": after} if line["kind"] == "segment" else line["effective"]
        Journal(live / "journal.jsonl").append(
            line["step"], line["kind"], line["name"], requested=line["requested"], effective=effective, id=line["id"]
        )
    PLAN.unlink()
    done = fit("--config", RUN / "config.yaml", "--replay", RUN, *with_callbacks("Eater"))
    assert done.status == 1, done
    assert done.err.startswith("error: segment 0: images of "), done
    assert done.err.count("\n") == 1


def test_a_run_that_goes_on_in_a_folder_of_its_own_takes_what_it_was_fed_with_it() -> None:
    fed(plan={1: [4], 3: [5]}, crashes=[])
    PLAN.write_text(json.dumps({"fed": {16: [6]}, "crashes": [], "left": False}))
    done = fit("--ckpt_path", LAST, "--new_run=true", "--trainer.max_epochs=3", *with_callbacks("Eater"))
    assert (done.status, done.err) == (0, ""), done
    run = RUN.with_name("version_1")
    assert [event[:2] for event in load(run)["Shapes10"]["fed"]] == [["segment", 0], ["segment", 1], ["segment", 2]]
    stores = [sorted(path.name for path in (of / "live/segments").glob("*.npz")) for of in (RUN, run)]
    assert stores == [["000000.npz", "000001.npz"], ["000000.npz", "000001.npz", "000002.npz"]]
    assert not [line for line in Journal(run / "live/journal.jsonl").read() if line["kind"] == "refused"]


def test_what_an_older_journal_calls_quarantined_stays_refused(capsys: pytest.CaptureFixture[str]) -> None:
    fed(plan={1: [4]}, crashes=[])
    bad = FEED / "bad.png"
    bad.write_text("a text")
    journal, found = Journal(RUN / "live/journal.jsonl"), bad.stat()
    source = [bad.name, found.st_size, found.st_mtime_ns]
    journal.append(2, "quarantined", bad.name, requested=source, effective="it is in no class's folder", actor="feed")
    PLAN.write_text(json.dumps({"fed": {16: [6, [99999, None]]}, "crashes": [], "left": False}))
    done = fit("--ckpt_path", LAST, "--trainer.max_epochs=3", *with_callbacks("Eater"))
    assert "fed 10, 0 waiting, 2 refused" in done.out, done
    assert [line["name"] for line in journal.read() if line["kind"] == "refused"] == ["99999"], "once"
    capsys.readouterr()
    assert steer([str(RUN), "history"]) == 0
    shown = capsys.readouterr().out
    assert "  refused bad.png: it is in no class's folder  feed\n" in shown
    assert "  refused 99999: no image that is trained on is called 99999 or has this id  " in shown


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "--data.feed=null",
            "data.feed: the checkpoint's run was fed, which this one would do without; name the",
        ),
        ("--data.replay_only=3", "ckpt_path: data.replay_only differs from the checkpoint's, which is from the middle"),
    ],
)
def test_a_run_does_not_go_on_without_what_it_was_fed(word: str, said: str) -> None:
    FEED.mkdir()
    PLAN.write_text(json.dumps({"fed": {1: [4]}, "crashes": [5], "left": False}))
    with pytest.raises(CrashError):
        fit(
            *SMALL, "--data.feed=feed", "--data.replay_only=8", "--checkpoint.every_n_steps=2", *with_callbacks("Eater")
        )
    done = fit("--ckpt_path", LAST, word, *with_callbacks("Eater"))
    assert done.status == 1, done
    assert done.err.startswith(f"error: {said}"), done.err
    assert done.err.count("\n") == 1
