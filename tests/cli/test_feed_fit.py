"""A fit that is fed while it trains, as its user meets it: what is put into a folder is learned, once a pass."""

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.checkpoint_io import manifest
from src.cli import main
from src.data import Shapes10
from src.errors import Failure
from src.live.commands import LOCK
from src.live.feed import correct, offer, offer_shard
from src.live.journal import Journal
from src.live.liveness import lives
from src.live.segments import Segment, read_segment, segment_path
from tests.cli.test_live import running
from tests.conftest import TINY, run_src

RUN = Path("lightning_logs/version_0")
LAST = RUN / "checkpoints/last.ckpt"
FED = [
    *TINY,
    "--trainer.max_epochs=100000",
    "--data.feed=feed",
    "--model.network.norm=batch",
    "--model.network.dropout=0.2",
    '--data.augment=[{"class_path": "RandomFlip"}]',
    "--checkpoint.every_n_steps=5",
]
CLASSES = Shapes10.classes
OWN = 400
"""Images of the data set's own: what is fed has ids from here on."""


def until(said: Callable[[], Any], what: str, fit: subprocess.Popen[str] | None = None, seconds: float = 60) -> Any:
    """Wait until something is so, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := said()):
        if fit is not None and fit.poll() is not None:
            raise AssertionError(f"the fit ended before {what}: {fit.communicate()}")
        assert time.monotonic() < deadline, f"{what}: it did not happen"
        time.sleep(0.02)
    return found


def journal(run: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = Journal(run / "live/journal.jsonl").read()
    return [line for line in lines if not kinds or line["kind"] in kinds]


def refused(run: Path, *, files: bool) -> list[dict[str, Any]]:
    """Return what was refused: of the files and images that were fed, or of the corrections."""
    return [line for line in journal(run, "refused") if (line["actor"] == "feed") == files]


def joined(run: Path) -> int:
    return sum(line["effective"]["images"] for line in journal(run, "segment"))


def segments(run: Path) -> list[tuple[int, Segment]]:
    """Return what has joined, with the steps."""
    facts = [(line["step"], line["effective"]) for line in journal(run, "segment")]
    store = run / "live/segments"
    return [(step, read_segment(segment_path(store, of["number"]), of["sha256"])) for step, of in facts]


def names(run: Path) -> list[str]:
    return [name for _, segment in segments(run) for name in segment.names]


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def steer(folder: Path, *words: str) -> str:
    return run_src("steer", RUN, *words, cwd=folder).stdout


def load(run: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint


def saved(run: Path) -> int:
    """Return the step of the last checkpoint, or -1."""
    with contextlib.suppress(Failure, OSError):
        return manifest(run / "checkpoints/last.ckpt").step
    return -1


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def same(one: Any, other: Any) -> bool:
    """Return whether two states are the same, to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def stop(folder: Path, fit: subprocess.Popen[str]) -> int:
    """Let a fit save and end; return its last step."""
    steer(folder, "stop")
    out, err = fit.communicate(timeout=60)
    assert fit.returncode == 0, (out, err)
    return int(load(folder / RUN)["global_step"])


def assert_replays(folder: Path, *words: str) -> Path:
    """Check that a run that was stopped has a replay that equals it."""
    step = load(folder / RUN)["global_step"]
    again = folder / "again"
    root = f"--trainer.default_root_dir={again}"
    run_src("fit", "--config", RUN / "config.yaml", "--replay", RUN, f"--trainer.max_steps={step}", root, *words,
            cwd=folder)  # fmt: skip
    one, other = load(folder / RUN), load(again / RUN)
    for key in ("global_step", "state_dict", "optimizer_states", "prequential", "ImageData"):
        if key in one or key in other:
            assert same(one[key], other[key]), key
    kinds = ("segment", "relabel", "drop")
    facts = [
        [(line["step"], line["kind"], line["effective"]) for line in journal(run, *kinds)]
        for run in (folder / RUN, again / RUN)
    ]
    assert facts[0] == facts[1]
    found, wanted = scalars(again / RUN), scalars(folder / RUN)
    for tag in wanted:
        if tag.startswith("feed/"):
            assert sorted(set(found[tag])) == sorted(set(wanted[tag])), tag
    return again / RUN


BAD = {
    "owl/1.png": "there is no class 'owl'",
    "circle/text.png": "it is not an image that can be read",
    "circle/cut.png": "it is damaged|image file is truncated",
    "circle/huge.png": "60,000,000|pixels",
    "circle/long.png": "67,108,865 bytes; 67,108,864 are the most",
    "circle/notes.txt": ".txt: neither an image file nor a shard",
    "loose.png": "it is in no class's folder",
    "circle/same.png": "its pixels are those of circle/good-",
    "shard.npz#1": "there is no class 'owl'",
}


def put_bad(feed: Path, good: str) -> None:
    """Put one file into a feed for each reason."""
    picture = (feed / good).read_bytes()
    Image.fromarray(noise(1, seed=7)[0]).save(feed / "other.tmp", "PNG")
    other = (feed / "other.tmp").read_bytes()
    contents = {
        "owl/1.png": other,
        "circle/text.png": b"a text",
        "circle/cut.png": other[:-500],
        "circle/notes.txt": b"a text",
        "loose.png": other,
        "circle/same.png": picture,
    }
    for name, content in contents.items():
        (feed / name).parent.mkdir(exist_ok=True)
        (feed / f"{name}.partial").write_bytes(content)
        (feed / f"{name}.partial").rename(feed / name)
    Image.new("1", (10_000, 6_000)).save(feed / "circle/huge.tmp", "PNG")
    (feed / "circle/huge.tmp").rename(feed / "circle/huge.png")
    with (feed / "circle/long.tmp").open("wb") as file:
        file.truncate((64 << 20) + 1)
    (feed / "circle/long.tmp").rename(feed / "circle/long.png")
    offer_shard(feed, noise(2, seed=8), ["circle", "owl"], "shard")


def test_a_fit_is_fed_corrected_killed_resumed_and_replayed(tmp_path: Path) -> None:
    run, feed = tmp_path / RUN, tmp_path / "feed"
    (tmp_path / "good.png").write_bytes(b"")
    Image.fromarray(noise(1, seed=1)[0]).save(tmp_path / "good.png")
    with running("fit", *FED, cwd=tmp_path) as fit:
        until(lambda: lives(run / "live" / LOCK), "training", fit)
        assert run_src("feed", "feed", "good.png", "--label", "circle", cwd=tmp_path).stdout == (
            "fed 1 image to feed/circle\n"
        )
        until(lambda: joined(run) == 1, "the first image joins", fit)
        (good,) = names(run)
        put_bad(feed, good)
        shard = offer_shard(feed, noise(70, seed=2), [i % 10 for i in range(70)])
        (fed,) = offer(feed, [noise(1, seed=3)[0]], CLASSES[1])
        until(lambda: joined(run) == 1 + 1 + 70 + 1, "all join", fit)
        until(lambda: len(refused(run, files=True)) == len(BAD), "all that is bad is refused", fit)

        before = int(journal(run)[-1]["step"])
        relabelled = correct(feed, OWN, CLASSES[2])  # the first that was fed
        run_src("feed", "feed", "--relabel", f"{shard}#3", CLASSES[0], cwd=tmp_path)
        run_src("feed", "feed", "--drop", fed, cwd=tmp_path)
        run_src("feed", "feed", "--drop", "99999", cwd=tmp_path)
        run_src("feed", "feed", "--relabel", "circle/unheard.png", CLASSES[0], cwd=tmp_path)
        until(lambda: len(journal(run, "relabel", "drop")) + len(refused(run, files=False)) == 5, "corrections", fit)
        corrected = {line["requested"]: line for line in journal(run, "relabel", "drop")}
        ids = {name: OWN + i for i, name in enumerate(names(run))}
        assert corrected[OWN]["id"] == relabelled
        assert (corrected[OWN]["before"], corrected[OWN]["effective"]) == (
            "circle",
            {"id": OWN, "label": 2, "class": CLASSES[2]},
        )
        assert corrected[f"{shard}#3"]["effective"] == {"id": ids[f"{shard}#3"], "label": 0, "class": CLASSES[0]}
        assert corrected[fed]["kind"] == "drop"
        assert corrected[fed]["effective"] == {"id": ids[fed], "label": None, "class": None}
        assert {line["name"] for line in refused(run, files=False)} == {"99999", "circle/unheard.png"}
        assert all(line["step"] >= before for line in corrected.values())

        history = steer(tmp_path, "history")
        for text in (f"relabel {OWN}: circle -> {CLASSES[2]}", f"drop {ids[fed]}: ", "refused 99999: no image"):
            assert f"  {text}" in history, history
        assert history.count("  refused ") == len(BAD) + 2, "as many as status says"
        assert re.search(rf"  segment 000000\.npz: \d+ images, ids from {OWN}  feed$", history, re.M), history
        status = steer(tmp_path, "status")
        for text in ("feed/images       73", "feed/waiting      0", f"feed/refused      {len(BAD) + 2}"):
            assert re.search(rf"^  {text}$".replace("  ", " +"), status, re.M), status
        assert re.search(r"feed/prequential_acc +[\d.]+", status), status
        until(lambda: saved(run) > corrected[fed]["step"], "a checkpoint", fit)
        offer_shard(feed, noise(40, seed=4), [i % 10 for i in range(40)])
        until(lambda: joined(run) == 73 + 40, "the second shard joins", fit)
        fit.kill()  # most likely before a checkpoint holds what has just joined
        assert fit.wait() == -signal.SIGKILL
    (offline,) = offer(feed, [noise(1, seed=5)[0]], "circle")  # while no fit runs
    with running("fit", "--ckpt_path", LAST, cwd=tmp_path) as fit:
        until(lambda: joined(run) == 73 + 40 + 1, "what came meanwhile joins", fit)
        again = offer_shard(feed, noise(10, seed=6), [i % 10 for i in range(10)])
        until(lambda: joined(run) == 73 + 40 + 1 + 10, "what comes after it joins", fit)
        step = stop(tmp_path, fit)
    assert step > 10
    bad = refused(run, files=True)
    assert sorted(line["name"] for line in bad) == sorted(BAD), "once, also after a resume"
    for line in bad:
        assert re.search(BAD[line["name"]], line["effective"]), line
    assert sorted(names(run)) == sorted({*names(run)}), "each once"
    assert {offline, fed, f"{again}#9", f"{shard}#0", good} <= {*names(run)}
    steps = [line["step"] for line in journal(run, "segment")]
    assert steps == sorted(steps)
    curves = scalars(run)
    assert {tag for tag in curves if tag.startswith("feed/")} == {
        "feed/images", "feed/prequential_acc", "feed/prequential_loss", "feed/prequential_acc_window",
        "feed/prequential_loss_window",
    }  # fmt: skip
    assert dict(curves["feed/images"])[steps[-1]] == 124
    assert len(refused(run, files=False)) == 2, "once, also after a resume"
    assert_replays(tmp_path)


EMPTY = [*FED, "--data.train_fraction=0"]


def test_a_run_that_starts_with_nothing_waits_and_learns_from_the_stream_alone(tmp_path: Path) -> None:
    run, feed = tmp_path / RUN, tmp_path / "feed"
    with running("fit", *EMPTY, "--data.replay_only=60", cwd=tmp_path) as fit:
        until(lambda: lives(run / "live" / LOCK), "waiting", fit)
        assert "step 0" in steer(tmp_path, "status")
        offer_shard(feed, noise(100), [i % 10 for i in range(100)])
        until(lambda: joined(run) == 100, "the first images join", fit)
        offer_shard(feed, noise(30, seed=1), [i % 10 for i in range(30)])
        until(lambda: joined(run) == 130, "others join", fit)
        step = stop(tmp_path, fit)
    assert step > 0
    assert journal(run, "segment")[0]["step"] == 0
    assert len(load(run)["Shapes10"]["fed"]) == len(journal(run, "segment"))
    assert_replays(tmp_path)


def test_ctrl_c_ends_a_fit_that_waits(tmp_path: Path) -> None:
    with running("fit", *EMPTY, cwd=tmp_path) as fit:
        until(lambda: lives(tmp_path / RUN / "live" / LOCK), "waiting", fit)
        fit.send_signal(signal.SIGINT)
        _, err = fit.communicate(timeout=60)
        assert fit.returncode == 130, err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.feed=feed", "--data.feed_room=0"], "data.feed_room: 0 is out of range: 1 to 100,000,000 images"),
        (["--data.feed=feed", "--data.replay_only=0"], "data.replay_only: 0 is out of range: 1 to 100,000,000 images"),
        (["--data.feed=feed", "--data.feed_weight=0"], "data.feed_weight: 0.0 is out of range: above 0"),
        (
            ["--data.train_fraction=0"],
            "data.train_fraction: 0.0 is out of range: above 0, up to 1; or 0 with",
        ),
        (["--data.feed=a_file"], "data.feed: a_file is not a folder"),
        (["--data.feed=a_file/feed"], "data.feed: a_file is not a folder"),
        (["--data.feed=feed", "--trainer.logger=false"], "data.feed: a run that is fed needs a folder of its own"),
    ],
)
def test_a_feed_that_cannot_be_is_refused_in_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("a text")
    assert main(["fit", *TINY, *words]) == (1 if "logger" in words[-1] else 2)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}"), error
    assert error.count("\n") == 1
    assert not Path("lightning_logs").exists()


def test_processes_that_train_together_are_fed_together_and_stop_without_hanging(tmp_path: Path) -> None:
    run, feed = tmp_path / RUN, tmp_path / "feed"
    together = ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp"]
    with running("fit", *EMPTY, *together, cwd=tmp_path) as fit:
        until(lambda: lives(run / "live" / LOCK), "waiting", fit)
        (first,) = offer(feed, [noise(1, seed=2)[0]], "circle")  # too few for two
        until(lambda: joined(run) == 1, "the first image joins", fit)
        offer_shard(feed, noise(70), [i % 10 for i in range(70)])
        until(lambda: joined(run) == 71, "others join", fit)
        correct(feed, first, None)
        until(lambda: journal(run, "drop"), "one leaves", fit)
        offer_shard(feed, noise(30, seed=1), [i % 10 for i in range(30)])
        until(lambda: joined(run) == 101, "others join later", fit)
        stop(tmp_path, fit)
    assert journal(run, "segment")[1]["step"] == 0, "nothing could be learned from one image"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load(run)["state_dict"].values())
    assert_replays(tmp_path)
