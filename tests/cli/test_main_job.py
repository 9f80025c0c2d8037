"""The main job as a user meets it: fit, look, validate, test, predict."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.arguments import newer_run
from src.callbacks.record import RunLogger
from src.checkpoint_io import manifest
from src.cli import main
from src.live.journal import Journal
from tests.conftest import REPOSITORY, TINY, run_src

CURVES = ("train/loss", "train/acc", "val/loss", "val/acc", "lr", "images/s")
STATUSES = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the curves of a run: (step, value) by tag."""
    events = EventAccumulator(str(run)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("loaded", [True, False])
def test_what_is_said_after_the_end_is_not_shown_where_triton_is_loaded(loaded: bool, tmp_path: Path) -> None:
    late = "import atexit, os, sys, types\natexit.register(os.write, 2, b'leaked')\n"
    late += "sys.modules['triton'] = types.ModuleType('triton')\n" if loaded else ""
    (tmp_path / "sitecustomize.py").write_text(late)
    done = run_src("steer", "x", "lr=1", cwd=tmp_path, status=1, PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}")
    said = "error: x: there is no such folder; give that of a run\n"
    assert done.stderr == (said if loaded else f"{said}leaked")


@pytest.fixture
def run(trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run of the tiny fit; the test works in the folder that it ran in."""
    monkeypatch.chdir(trained[0])
    return Path("lightning_logs/version_0")


def test_a_fit_tells_the_device_each_epoch_in_two_lines_and_how_to_go_on(trained: tuple[Path, str]) -> None:
    lines = trained[1].splitlines()
    assert lines[0].startswith("device: ")
    assert "precision: " in lines[0]
    assert "chosen for this device" in lines[0]
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [line.split("  ")[:2] for line in epochs] == [["epoch 1/2", "step 6"], ["epoch 2/2", "step 12"]]
    assert all(name in epochs[0] for name in ("train/loss", "train/acc", "images/s", "lr"))
    assert "val/acc" in lines[lines.index(epochs[0]) + 1]
    assert lines[-3:] == [
        "run:         lightning_logs/version_0",
        "TensorBoard: tensorboard --logdir lightning_logs/version_0",
        "test:        python -m src test --ckpt_path lightning_logs/version_0/checkpoints/best.ckpt",
    ]
    assert lines[1] == "run: lightning_logs/version_0", "who wants to steer it need not wait for its end"
    assert len(lines) == 2 + 2 * 2 + 3, "something else is printed"


def test_a_device_that_is_always_late_changes_nothing_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for folder in (tmp_path / "punctual", tmp_path / "late"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert main(["fit", *TINY, "--data.val_size=0"]) == 0  # a validation would wait
        lines = [re.sub(r"images/s \S+|\d+\.\d s$", "", line) for line in capsys.readouterr().out.splitlines()]
        curves = scalars(folder / "lightning_logs/version_0")
        del curves["images/s"]
        found.append((lines, curves))
        monkeypatch.setattr("src.callbacks.curves.Point.arrived", lambda _: False)
    assert found[0] == found[1]


def test_while_it_starts_nothing_looks_for_garbage_and_what_it_has_loaded_is_none(tmp_path: Path) -> None:
    code = """if True:
        import gc, sys
        import src.__main__ as entry
        sys.argv = ["src", "--help"]
        before = gc.get_stats()[2]["collections"]
        try:
            entry.main()
        except SystemExit:
            pass
        print(gc.isenabled(), gc.get_stats()[2]["collections"] - before <= 1, gc.get_freeze_count() > 100_000)
    """
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "True True True"


def test_the_run_folder_holds_config_checkpoints_and_curves(run: Path) -> None:
    names = {".lock", "config.yaml", "checkpoints", "live", "test.json", "test_confusion.png", "predictions.csv"}
    assert {p.name for p in run.iterdir() if not p.name.startswith("events.")} <= names
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["init_args"]["batch_size"] == 50
    assert config["trainer"]["precision"] in ("bf16-mixed", "32-true")
    curves = scalars(run)
    assert [step for step, _ in curves["train/loss"]] == list(range(1, 13))
    assert [step for step, _ in curves["val/acc"]] == [6, 12]
    assert set(CURVES) <= curves.keys()


def test_a_checkpoint_holds_plain_values_and_loads_as_lightning_documents_it(run: Path) -> None:
    from src.classifier import ImageClassifier

    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    model = ImageClassifier.load_from_checkpoint(run / "checkpoints/last.ckpt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint["state_dict"][name])


def test_validate_gives_what_fit_logged_to_the_last_digit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from src.cli import CLI

    metrics = CLI(["validate", "--ckpt_path", "last"]).trainer.callback_metrics
    logged = scalars(run)
    for name in ("val/loss", "val/acc"):
        assert metrics[name].item() == logged[name][-1][1]
    assert f"val/acc {metrics['val/acc']:.4f}" in capsys.readouterr().out


def test_test_writes_its_results_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--ckpt_path", "best"]) == 0
    results = json.loads((run / "test.json").read_text())
    assert results["checkpoint"] == "lightning_logs/version_0/checkpoints/best.ckpt"
    assert results["step"] in (6, 12)
    assert (results["data"], results["images"], results["tta"]) == ("Shapes10", 100, "one")
    assert sum(score["images"] for score in results["per_class"].values()) == 100
    hits = sum(round(score["images"] * score["acc"]) for score in results["per_class"].values())
    assert results["test/acc"] == pytest.approx(hits / 100)
    assert results["test/loss"] > 0
    with Image.open(run / "test_confusion.png") as picture:
        assert picture.width >= 500
    output = capsys.readouterr().out
    assert "checkpoint: lightning_logs/version_0/checkpoints/best.ckpt\n" in output
    assert f"test/acc {results['test/acc']:.4f}" in output
    assert "precision" in output
    assert [p.name for p in Path("lightning_logs").iterdir()] == ["version_0"], "an evaluation is not a run"


def test_predict_names_class_and_probability_of_any_image_and_the_unreadable(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("pictures")
    folder.mkdir(exist_ok=True)
    Image.new("RGBA", (300, 40), (255, 0, 0, 100)).save(folder / "wide.png")
    Image.new("L", (5, 9), 7).save(folder / "small.jpg")
    Path("broken.png").write_bytes(b"no picture")
    assert main(["predict", "--ckpt_path", "best", "--data.images", "pictures", "broken.png"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: broken.png: it is not an image that can be read\n"
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["pictures/small.jpg", "pictures/wide.png"]
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    assert rows[0]["class"] in captured.out
    assert main(["predict", "--ckpt_path", "best", "--data.images", "pictures"]) == 0
    Image.new("L", (5, 9), 7).save("[1].png")
    assert main(["predict", "--ckpt_path", "best", "--data.images", "[1].png"]) == 0
    assert main(["predict", "--ckpt_path", "best"]) == 1
    assert "no image given" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are UTF-8")
def test_files_of_any_name_are_predicted_whatever_the_output_can_show(run: Path, tmp_path: Path) -> None:
    names = ["a.png", "猫.png", os.fsdecode(b"bad\xff.png"), "\x1b]0;x\a.png"]
    for name in names:
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    command = ["predict", "--ckpt_path", str(run / "checkpoints/last.ckpt"), "--data.images", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"}
    closed = f'exec {sys.executable} -m src "$@" >&-'
    for words in ([sys.executable, "-m", "src", *command], ["sh", "-c", closed, "sh", *command]):
        (run / "predictions.csv").unlink(missing_ok=True)
        done = subprocess.run(words, env=env, capture_output=True, check=False)
        assert (done.returncode, done.stderr, b"\x1b" in done.stdout) == (0, b"", False)
        written = (run / "predictions.csv").read_bytes()
        assert all(os.fsencode(name) in written for name in names)


@pytest.mark.usefixtures("run")
def test_who_has_read_enough_is_not_told_of_a_broken_pipe() -> None:
    journal = Journal(Path("busy/live/journal.jsonl"))
    for step in range(300):
        journal.append(step, "set", "lr", before=0.1, requested=0.2, effective=0.2)
    reading, writing = os.pipe()
    os.close(reading)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for command, status in ((["steer", "busy", "history"], 141), (["test", "--ckpt_path=last"], 141)):
        words = [sys.executable, "-m", "src", *command]
        done = subprocess.run(words, env=env, stdout=writing, stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr) == (status, b""), command
    os.close(writing)


@pytest.mark.usefixtures("run")
def test_the_command_line_beats_the_config_which_beats_the_checkpoint(tmp_path: Path) -> None:
    from src.cli import CLI

    (tmp_path / "a.yaml").write_text("model: {label_smoothing: 0.2}\ndata: {eval_batch_size: 7}")
    cli = CLI(["validate", "--config", str(tmp_path / "a.yaml"), "--ckpt_path", "last", "--data.eval_batch_size=9"])
    assert cli.model.hparams["label_smoothing"] == 0.2
    assert cli.datamodule.eval_batch_size == 9
    assert cli.datamodule.batch_size == 50, "what nobody names comes from the checkpoint"


def test_no_checkpoint_is_what_null_asks_for_and_the_rest_of_the_command_line_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["fit", *TINY, "--ckpt_path=null", "--trainer.max_steps=3"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert manifest(Path("lightning_logs/version_0/checkpoints/last.ckpt")).step == 3


def test_the_config_that_is_printed_is_the_one_that_is_used(run: Path) -> None:
    checkpoint = f"--ckpt_path={run.resolve() / 'checkpoints/last.ckpt'}"
    for command in ("fit", "test"):
        printed = yaml.safe_load(run_src(command, checkpoint, "--print_config", cwd=run).stdout)
        assert printed["data"]["init_args"]["train_images"] == 400, "the checkpoint's, not the default"


def test_the_saved_config_starts_the_same_run_again(run: Path) -> None:
    assert main(["fit", "--config", str(run / "config.yaml"), "--trainer.default_root_dir", "again"]) == 0
    first, second = (
        torch.load(root / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for root in (run, Path("again/lightning_logs/version_0"))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours, theirs = scalars(run), scalars(Path("again/lightning_logs/version_0"))
    assert ours["train/loss"] == theirs["train/loss"]


def test_another_seed_gives_another_run(run: Path) -> None:
    assert main(["fit", *TINY, "--seed_everything=1", "--trainer.default_root_dir=other"]) == 0
    assert scalars(run)["train/loss"] != scalars(Path("other/lightning_logs/version_0"))["train/loss"]


@pytest.fixture
def tensorboard(run: Path) -> Iterator[str]:
    """The address of TensorBoard on the tiny fit's run, until the test ends."""
    from tensorboard import program

    server = program.TensorBoard()
    # Its thread outlives this test: it is to read once, and not to look for the run from another test's folder.
    once = ["--load_fast", "false", "--reload_interval", "0"]
    server.configure(argv=[None, "--logdir", str(run.resolve()), "--port", "0", *once])
    yield server.launch()


@pytest.mark.filterwarnings(
    "ignore:html5lib's sanitizer is deprecated:DeprecationWarning",  # html5lib issue 443, by way of bleach
)
def test_tensorboard_serves_every_curve_picture_and_hyper_parameter(tensorboard: str, run: Path) -> None:
    def get(path: str) -> dict[str, dict[str, object]]:
        with urllib.request.urlopen(f"{tensorboard}data/plugin/{path}", timeout=30) as answer:
            content: dict[str, dict[str, object]] = json.load(answer)
            return content

    def post(path: str, body: object) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{tensorboard}data/plugin/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    tags = get("scalars/tags")["."]
    assert set(CURVES) <= tags.keys()
    with urllib.request.urlopen(f"{tensorboard}data/plugin/scalars/scalars?run=.&tag=val%2Facc", timeout=30) as answer:
        assert [point[1] for point in json.load(answer)] == [6, 12]
    assert {"train/batch", "val/confusion"} <= get("images/tags")["."].keys()

    sessions = post("hparams/session_groups", {"colParams": [], "sliceSize": 9, "allowedStatuses": STATUSES})
    (group,) = sessions["sessionGroups"]
    assert group["hparams"]["data.batch_size"] == 50
    assert group["hparams"]["model.optimizer.lr"] == 0.02
    found = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    assert found == {name: pytest.approx(scalars(run)[name][-1][1]) for name in ("val/acc", "val/loss")}


def test_two_processes_train_as_one(run: Path, tmp_path: Path) -> None:
    # A small lr, as a large one makes rounding errors grow from step to step.
    same = ["--config", str(run.resolve() / "config.yaml"), "--trainer.precision=32-true", "--model.optimizer.lr=0.005"]
    devices = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2"]
    run_src("fit", *same, *devices, cwd=tmp_path)
    assert main(["fit", *same, "--trainer.default_root_dir=single"]) == 0
    single, double = (scalars(folder / "lightning_logs/version_0") for folder in (Path("single"), tmp_path))
    assert [step for step, _ in single["train/loss"]] == [step for step, _ in double["train/loss"]]
    for (_, one), (_, two) in zip(single["train/loss"], double["train/loss"], strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    assert single["val/acc"] == double["val/acc"]


def test_averaged_weights_are_what_validates_and_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from src.cli import CLI

    monkeypatch.chdir(tmp_path)
    ema = "{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}"
    assert main(["fit", *TINY, "--trainer.callbacks+", ema]) == 0
    checkpoint = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    raw = checkpoint["current_model_state"]
    assert not torch.equal(raw["network.head.weight"], checkpoint["state_dict"]["network.head.weight"])
    metrics = CLI(["validate", "--ckpt_path", "last"]).trainer.callback_metrics
    assert metrics["val/loss"].item() == scalars(Path("lightning_logs/version_0"))["val/loss"][-1][1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_precision_that_is_asked_for_is_used(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["fit", *TINY, "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.precision", precision])
        == 0
    )
    assert f"precision: {precision} (as configured)" in capsys.readouterr().out


def test_a_run_that_ends_before_any_validation_leaves_its_last_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *TINY, "--trainer.max_steps=3"]) == 0
    assert capsys.readouterr().out.endswith("--ckpt_path lightning_logs/version_0/checkpoints/last.ckpt\n")
    assert torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


def test_a_run_without_a_val_split_keeps_its_last_weights_as_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *TINY, "--data.val_size=0"]) == 0
    assert "no validation" in capsys.readouterr().out
    checkpoint = torch.load("lightning_logs/version_0/checkpoints/best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 16
    assert main(["test", "--ckpt_path", "best"]) == 0
    assert main(["validate", "--ckpt_path", "best"]) == 2
    assert "data.val_size: 0 leaves no val split" in capsys.readouterr().err


def test_a_resumed_fit_goes_by_the_command_line_and_else_by_the_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from src.cli import CLI

    schedule = ["--model.lr_scheduler=OneCycle", "--model.lr_scheduler.pct_start=0"]
    assert main(["fit", *TINY, *schedule, "--trainer.default_root_dir=first"]) == 0
    last = "--ckpt_path=first/lightning_logs/version_0/checkpoints/last.ckpt"
    changed = ["--model.optimizer.lr=0.01", "--model.optimizer.momentum=0.5", "--trainer.max_epochs=4"]
    cli = CLI(["fit", last, *changed, "--trainer.default_root_dir=resumed"])
    group = cli.trainer.optimizers[0].param_groups[0]
    assert (group["initial_lr"], group["momentum"], group["nesterov"]) == (0.01, 0.5, True)
    assert cli.trainer.lr_scheduler_configs[0].scheduler.base_lrs == [0.01, 0.01]
    curves = scalars(Path("resumed/lightning_logs/version_0"))
    steps, lrs = zip(*curves["lr"], strict=True)
    assert steps == tuple(range(13, 25)), "it goes on at the step where the first fit ended"
    assert lrs[0] == pytest.approx(0.01 * 0.5, rel=0.1), "half of the schedule of 24 steps is over"
    assert cli.datamodule.batch_size == 50

    # A plain lr, without a schedule of ours, is scaled too.
    cli = CLI(
        ["fit", f"--ckpt_path={run}/checkpoints/last.ckpt", "--model.optimizer.lr=0.01", "--trainer.max_epochs=3"]
    )
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    assert capsys.readouterr().err == ""


def test_gradient_accumulation_shows_the_true_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frozen = [
        *TINY,
        "--model.optimizer.lr=0",
        "--data.augment=[]",
        "--trainer.max_epochs=1",
        "--trainer.precision=32-true",
    ]
    for name, count in (("one", 1), ("three", 3)):
        arguments = [f"--trainer.accumulate_grad_batches={count}", f"--trainer.default_root_dir={name}"]
        assert main(["fit", *frozen, *arguments]) == 0
    one, three = (scalars(Path(n) / "lightning_logs/version_0")["train/loss"] for n in ("one", "three"))
    assert [step for step, _ in three] == [1, 2]
    assert three[0][1] == pytest.approx(sum(loss for _, loss in one[:3]) / 3, rel=1e-5)


def test_a_logger_without_a_folder_gets_no_config_and_names_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *TINY, "--trainer.logger=lightning.pytorch.loggers.logger.DummyLogger"]) == 0
    assert "run:" not in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}


def test_a_fit_can_have_the_loggers_the_bar_and_the_bareness_of_lightning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bar = "--trainer.callbacks=lightning.pytorch.callbacks.TQDMProgressBar"
    assert (
        main(["fit", *TINY, bar, "--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=."])
        == 0
    )
    out, err = capsys.readouterr()
    assert "Epoch 1: 100%" in out + err
    assert "TensorBoard" not in out, "there is nothing for it to show"
    assert "run:" not in run_src("fit", *TINY, "--trainer.barebones=true", cwd=tmp_path).stdout
    timer = "--trainer.callbacks=lightning.pytorch.callbacks.Timer"
    assert main(["fit", *TINY, "--trainer.val_check_interval=00:00:00:01", timer]) == 0


def test_the_last_lines_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *TINY, "--trainer.default_root_dir=a b"]) == 0
    out = capsys.readouterr().out
    assert "tensorboard --logdir 'a b/lightning_logs/version_0'\n" in out
    assert "--ckpt_path 'a b/lightning_logs/version_0/checkpoints/best.ckpt'\n" in out


def test_the_lr_is_shown_where_groups_have_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *TINY, "--model.network=WhitenedCNN", "--model.optimizer=src.optim.Muon"]) == 0
    assert all("  lr 0.02" in line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch "))


def test_a_schedule_goes_by_what_it_is_told_to_go_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[float] = []

    def step(_: Any, metrics: float) -> None:
        told.append(metrics)

    monkeypatch.setattr(torch.optim.lr_scheduler.ReduceLROnPlateau, "step", step)
    schedule = ["--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/acc"]
    assert main(["fit", *TINY, *schedule]) == 0
    assert told == pytest.approx([value for _, value in scalars(Path("lightning_logs/version_0"))["val/acc"]])


def test_the_best_checkpoint_is_that_of_the_lowest_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *TINY, "--trainer.max_epochs=4", "--checkpoint.monitor=val/loss"]) == 0
    step, _ = min(scalars(Path("lightning_logs/version_0"))["val/loss"], key=lambda point: point[1])
    assert step != 6, "the first is not the best: else the test says nothing"
    assert manifest(Path("lightning_logs/version_0/checkpoints/best.ckpt")).step == step


def test_a_schedule_that_is_too_short_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = ["torch.optim.lr_scheduler.OneCycleLR", "--model.lr_scheduler.max_lr=0.1"]
    assert main(["fit", *TINY, "--model.lr_scheduler", *schedule, "--model.lr_scheduler.total_steps=5"]) == 2
    assert capsys.readouterr().err.startswith("error: model.lr_scheduler: Tried to step 6 times")


def test_a_run_that_could_not_begin_is_deleted_but_not_what_was_fed_to_it(tmp_path: Path) -> None:
    for fed in (False, True):
        logger = RunLogger(tmp_path)
        logger.log_metrics({"lr": 1.0}, 0)
        logger.save()
        segments = Path(logger.log_dir) / "live" / "segments"
        segments.mkdir(parents=True)
        if fed:
            (segments / "000000.npz").touch()
        logger.discard()
        assert segments.is_dir() == fed
        logger.finalize("failed")


def test_a_test_of_some_batches_is_not_written(run: Path) -> None:
    (run / "test.json").unlink(missing_ok=True)
    for part in ("fast_dev_run=true", "limit_test_batches=1", "limit_test_batches=0.5"):
        assert main(["test", "--ckpt_path=last", f"--trainer.{part}", "--data.eval_batch_size=20"]) == 0
    assert not (run / "test.json").exists()


def test_for_the_folder_of_a_run_a_file_in_it_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", f"--ckpt_path={run}"]) == 1
    what = f"{run} is the folder of a run; give a file, such as {run}/checkpoints/best.ckpt"
    assert capsys.readouterr().err == f"error: ckpt_path: {what}\n"


def test_an_older_run_that_is_taken_for_want_of_a_checkpoint_in_the_newest_is_told_of(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "lightning_logs"
    shutil.copytree(run, runs / "version_0")
    (runs / "version_1").mkdir()
    shutil.copy(run / "config.yaml", runs / "version_1")  # a copy that begins now
    assert main(["validate", "--ckpt_path=best", f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert f"note: ckpt_path: {runs}/version_1 is newer, but has no best.ckpt\n" in capsys.readouterr().out
    shutil.copy(run / "checkpoints" / "best.ckpt", tmp_path / "older.ckpt")
    assert newer_run(runs / "version_0/checkpoints/best.ckpt", runs) == runs / "version_1"
    (runs / "version_1" / "checkpoints").mkdir()
    (tmp_path / "older.ckpt").rename(runs / "version_1/checkpoints/best.ckpt")
    assert newer_run(runs / "version_0/checkpoints/best.ckpt", runs) is None


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_weights_are_not_evaluated_on_classes_that_they_were_not_trained_on(
    command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, f"--ckpt_path={run}/checkpoints/best.ckpt", "--data=CIFAR10"]) == 2
    assert capsys.readouterr().err == (
        "error: data: CIFAR10 has other classes than src.data.Shapes10, which the weights were trained on; "
        "leave data away, or give a data set with the same classes\n"
    )
