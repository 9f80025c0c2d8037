"""A run that trains, as its user meets it in four terminals: fit, watch, steer and predict --live."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.live import shared_memory
from src.live.journal import Journal
from src.live.weights import LiveWeights
from tests.conftest import REPOSITORY, TINY, help_of, run_src

RUN = Path("lightning_logs/version_0")
ABSENT = "mps" if torch.cuda.is_available() else "cuda"
ENDLESS = [*TINY, "--trainer.max_epochs=100000", "--publish_every_n_steps=1", "--model.network.norm=batch"]


@contextlib.contextmanager
def running(*args: str | Path, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Run ``python -m src`` beside the test."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "src", *map(str, args)]
    with subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def wait_for_step(run: Path, step: int) -> None:
    """Wait until a run has published the weights of a step."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(Exception), LiveWeights.open(run) as reader:
            if reader.alive:
                reader.wait(step, timeout=max(0.0, deadline - time.monotonic()))
                return
        assert time.monotonic() < deadline, "the run does not begin to train"
        time.sleep(0.05)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def steer(folder: Path, *words: str, status: int = 0) -> str:
    done = run_src("steer", RUN, *words, cwd=folder, status=status)
    return done.stderr if status else done.stdout


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_four_terminals(tmp_path: Path) -> None:
    run = tmp_path / RUN
    Image.new("RGB", (50, 40), (200, 30, 60)).save(tmp_path / "red.png")
    with running("fit", *ENDLESS, cwd=tmp_path) as fit:
        wait_for_step(run, 5)
        with running("watch", RUN, cwd=tmp_path) as watch:
            said = steer(tmp_path, "lr=.01", "momentum=0.8", "batch_size=40")
            found = re.fullmatch(
                r"step ([\d,]+): lr 0\.02 -> 0\.01, momentum 0\.9 -> 0\.8, batch_size 50 -> 40\n", said
            )
            assert found, said
            status = steer(tmp_path, "status")
            assert re.match(r"training: step [\d,]+, epoch \d+\n", status), status
            for line in ("batch_size         40", "momentum           0.8", "lr                 0.01", "val/acc "):
                assert f"\n  {line}" in status

            assert re.fullmatch(r"step [\d,]+: pause\n", steer(tmp_path, "pause"))
            evaluated = steer(tmp_path, "evaluate")
            wait_for(lambda: any((run / "live").glob("events.*")), "the first watch writes no curves")
            once = run_src("watch", RUN, "--once", cwd=tmp_path).stdout
            acc = re.search(r"val/acc ([\d.]+)", evaluated)
            seen = re.search(r"live/val_acc ([\d.]+)  live/val_loss [\d.]+  step ([\d,]+), 0 steps \(", once)
            assert acc and seen, (evaluated, once)
            assert float(acc[1]) == pytest.approx(float(seen[1]), abs=1e-4), "the very weights of this step"
            assert "│ circle   │     10 │" in once

            predicted = run_src("predict", "--live", RUN, "--data.images", "red.png", cwd=tmp_path).stdout
            assert re.search(rf"weights: {RUN}, step {seen[2]}, 0 steps \([\d.]+ s\) old\n", predicted), predicted
            assert re.search(r"^red\.png  \w+  [\d.]+$", predicted, re.MULTILINE)
            assert steer(tmp_path, "checkpoint").endswith(f": saved {RUN}/checkpoints/last.ckpt\n")
            assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == int(
                seen[2].replace(",", "")
            )
            assert re.fullmatch(r"step [\d,]+: resume\n", steer(tmp_path, "resume"))

            assert steer(tmp_path, "lr=-1", status=2).startswith("error: lr: -1 is out of range: above 0, up to 100 (")
            assert steer(tmp_path, "batchsize=4", status=2).startswith(
                "error: batchsize: this run has no such value to steer; did you mean batch_size? ("
            )
            assert steer(tmp_path, "--id", "twice", "weight_decay=0.001").startswith("step ")
            assert steer(tmp_path, "--id", "twice", "weight_decay=0.001").endswith("(done before)\n")
            assert steer(tmp_path, "--no-wait", "log_every_n_steps=3").startswith("sent: --id ")
            assert re.fullmatch(r"step [\d,]+: saved .*last\.ckpt\n", steer(tmp_path, "stop"))
            out, err = fit.communicate(timeout=60)
            assert fit.returncode == 0, err
            command = f"python -m src fit --ckpt_path {RUN}/checkpoints/last.ckpt"
            assert re.fullmatch(rf"stopped by steer at step [\d,]+; go on with: {command}\n", err)
            watched, err = watch.communicate(timeout=60)
            assert (watch.returncode, err) == (0, "")
    assert watched.endswith("the run has ended\n") or "the run has ended\n" in watched
    lines = [line for line in watched.splitlines() if line.startswith("live/val_acc ")]
    assert lines
    assert "│ circle   │" in watched
    assert re.search(
        r"^step [\d,]+: lr 0\.02 -> 0\.01, momentum 0\.9 -> 0\.8, batch_size 50 -> 40 \(\S+@\S+\)$", out, re.M
    )

    assert [step for step, _ in scalars(run / "live")["live/val_acc"]], "beside the run's own curves"
    assert len(list((run / "live").glob("events.*"))) == 1, "TensorBoard would not go back to the older one"
    curves = scalars(run)
    assert [step for step, _ in curves["steer/lr"]] == [int(found[1].replace(",", ""))]
    assert curves["steer/lr"][0][1] == pytest.approx(0.01)
    history = run_src("steer", RUN, "history", cwd=tmp_path).stdout
    for what in (
        "set lr 0.02 -> 0.01",
        "pause",
        "evaluate",
        "checkpoint saved",
        "resume",
        "refused {",
        "stop",
    ):
        assert f"  {what}" in history, what
    kinds = [line["kind"] for line in Journal(run / "live/journal.jsonl").read()]
    assert kinds.count("refused") == 2
    assert not (run / "live/weights.json").exists()
    assert steer(tmp_path, "status", status=1) == f"error: {RUN}: the run is not training now, or takes no commands\n"
    gone = run_src("watch", RUN, "--once", cwd=tmp_path, status=1).stderr
    assert gone == f"error: {RUN}: the run publishes no weights: it has ended, or has not begun to train\n"


def test_a_killed_run_is_noticed_goes_on_and_is_replayed(tmp_path: Path) -> None:
    run = tmp_path / RUN
    args = [*ENDLESS, "--checkpoint.every_n_steps=7", "--model.lr_scheduler=torch.optim.lr_scheduler.ExponentialLR",
            "--model.lr_scheduler.gamma=0.99"]  # fmt: skip
    with running("fit", *args, cwd=tmp_path) as fit:
        wait_for_step(run, 3)
        steer(tmp_path, "lr=0.015", "label_smoothing=0.1")
        steer(tmp_path, "batch_size=30")
        with LiveWeights.open(run) as reader, running("watch", RUN, cwd=tmp_path) as watch:
            assert watch.stdout is not None
            while not watch.stdout.readline().startswith("live/val_acc"):
                assert watch.poll() is None
            steer(tmp_path, "momentum=0.7")
            fit.send_signal(signal.SIGKILL)
            fit.wait()
            assert not reader.alive
            segment = reader.segment
            watch.communicate(timeout=30)
            assert watch.returncode == 0
    assert steer(tmp_path, "status", status=1).startswith(f"error: {RUN}: the run is not training now")
    with running("fit", "--ckpt_path", "last", cwd=tmp_path) as fit:
        wait_for_step(run, 3)
        assert not segment.exists(), "what the killed one left is gone"
        time.sleep(1)
        steer(tmp_path, "weight_decay=0.01")
        steer(tmp_path, "stop")
        assert fit.wait(timeout=60) == 0
    stopped = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    step = stopped["global_step"]
    run_src("fit", "--config", RUN / "config.yaml", "--replay", RUN, "--trainer.max_steps", str(step), cwd=tmp_path)
    again = torch.load(tmp_path / "lightning_logs/version_1/checkpoints/last.ckpt", weights_only=True)
    assert again["global_step"] == step
    for name, tensor in stopped["state_dict"].items():
        assert torch.equal(tensor, again["state_dict"][name]), name
    shared_memory.reclaim()


def test_processes_that_train_together_are_steered_together(tmp_path: Path) -> None:
    run = tmp_path / RUN
    together = ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp"]
    with running("fit", *ENDLESS, *together, cwd=tmp_path) as fit:
        wait_for_step(run, 3)
        assert "batch_size 50 -> 31" in steer(tmp_path, "lr=0.01", "batch_size=31")
        assert steer(tmp_path, "batch_size=1", status=2).startswith("error: batch_size: 1 is out of range: at least 2")
        steer(tmp_path, "pause")
        assert "val/acc" in steer(tmp_path, "evaluate")
        steer(tmp_path, "resume")
        steer(tmp_path, "stop")
        _, err = fit.communicate(timeout=60)
        assert fit.returncode == 0, err
    stopped = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    step = str(stopped["global_step"])
    run_src("fit", "--config", RUN / "config.yaml", "--replay", RUN, "--trainer.max_steps", step, cwd=tmp_path)
    again = torch.load(tmp_path / "lightning_logs/version_1/checkpoints/last.ckpt", weights_only=True)
    for name, tensor in stopped["state_dict"].items():
        assert torch.equal(tensor, again["state_dict"][name]), name


def test_a_run_without_a_val_split_cannot_be_watched_and_says_so(tmp_path: Path) -> None:
    run_src("fit", *TINY, "--data.val_size=0", cwd=tmp_path)
    done = run_src("watch", RUN, "--once", cwd=tmp_path, status=2)
    assert done.stderr == (
        f"error: {RUN}: this run trains on all of its images (data.val_size 0): none is left to score\n"
    )


def test_the_history_shows_what_a_stranger_wrote_and_does_not_obey_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "live/journal.jsonl")
    for name in ("\ud800", "\x1b[2J", "a\nstep 7  set lr 1 -> 2"):
        journal.append(3, "refused", requested={name: 1}, effective=f"{name}: this run has no such value to steer")
    shown = run_src("steer", ".", "history", cwd=tmp_path).stdout
    assert shown.count("\n") == 3
    assert shown.replace("\n", "").isprintable()


def test_steering_and_publishing_can_be_turned_off(tmp_path: Path) -> None:
    run_src("fit", *TINY, "--publish_every_n_steps=null", "--steering=false", cwd=tmp_path)
    assert not (tmp_path / RUN / "live").exists()


UNUSABLE = [
    (["fit", "--publish_every_n_steps=0"], "publish_every_n_steps: 0 is out of range: at least 1 step, or null"),
    (["validate", "--live=x", "--ckpt_path=best"], "ckpt_path and live exclude each other: give one of them"),
    (["steer", "x", "frobnicate"], "'frobnicate': give new values (lr=0.02 batch_size=128), or one of checkpoint, "
     "evaluate, pause, resume, stop, status, history"),
    (["steer", "x", "lr=fast"], "lr: 'fast' is not a number"),
    (["steer", "x", "lr=NaN"], "lr: 'NaN' is not a number"),
    (["steer", "x", "lr=1e999"], "lr: '1e999' is not a number"),
    (["steer", "x", "betas=0.9,0.99"], "betas: '0.9,0.99' is not a number; several are given as "
     "'betas=[0.9,0.99]'"),
    (["steer", "x", "lr=1", "lr=2"], "lr is given twice"),
    (["steer", "x", "=3"], "'=3': the name of a value is missing, as in lr=0.02"),
    (["steer", "x"], "the following arguments are required: WHAT; see python -m src steer --help"),
    (["watch"], "the following arguments are required: RUN; see python -m src watch --help"),
    (["watch", "x", "--device=tpu"], "device: 'tpu' is none of cpu, cuda, cuda:1, mps"),
]  # fmt: skip
NOT_THERE = [
    (["steer", "x", "lr=1"], "x: there is no such folder; give that of a run"),
    (["steer", ".", "history"], ". is not the folder of a run"),
    (["steer", ".", "status"], ". is not the folder of a run"),
    (["steer", "x", "status"], "x: there is no such folder; give that of a run"),
    (["watch", "x"], "x: there is no such folder; give that of a run"),
    (["watch", "."], ". is not the folder of a run: it has no config.yaml"),
    (["watch", ".", f"--device={ABSENT}"], f"device: {ABSENT}: torch finds none on this machine; use cpu"),
    (["predict", "--live", "x", "--data.images=y"], "live: x is not the folder of a run: it has no config.yaml"),
    (["fit", "--replay", "x"], "replay: x is not the folder of a run: it has no config.yaml"),
]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [*((words, 2, said) for words, said in UNUSABLE), *((words, 1, said) for words, said in NOT_THERE)],
)
def test_a_command_that_cannot_be_or_a_run_that_is_not_there_is_one_line(
    words: list[str],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status_of(words) == status
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not list(tmp_path.iterdir())


def status_of(words: list[str]) -> int:
    """Run a command in this process, where it need not start, and return its exit status."""
    name, *rest = words
    try:
        run: Callable[[list[str]], int] = import_module(f"src.{name}" if name in ("steer", "watch") else "src.cli").main
        return run(rest if name in ("steer", "watch") else words)
    except SystemExit as exit_:
        return int(str(exit_.code))


def test_the_help_tells_what_there_is() -> None:
    assert "steer RUN lr=0.02" in help_of()
    told = help_of("steer")
    assert all(word in told for word in ("label_smoothing=0.1", "'betas=[0.9,0.99]'", "eps=1e-8"))
    assert "--once" in help_of("watch")
    of_fit = help_of("fit")
    assert all(name in of_fit for name in ("--publish_every_n_steps", "--steering", "--replay"))
    assert "--live" in help_of("predict")


def test_commands_are_plain_files_that_any_program_can_write(tmp_path: Path) -> None:
    with running("fit", *ENDLESS, cwd=tmp_path):
        wait_for_step(tmp_path / RUN, 1)
        live = tmp_path / RUN / "live"
        (live / "inbox/.tmp").write_text(json.dumps({"id": "by-hand", "set": {"lr": 0.005}}))
        (live / "inbox/.tmp").rename(live / "inbox/1.json")
        deadline = time.monotonic() + 20
        while not (live / "answers/by-hand.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer: dict[str, Any] = json.loads((live / "answers/by-hand.json").read_text())
    assert answer["changes"] == {"lr": [0.02, 0.005]}
