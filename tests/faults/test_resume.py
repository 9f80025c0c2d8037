"""What a resumed fit promises: wherever and however often it was stopped, it equals the fit that never was.

Equal is: the same images in the same batches, augmented and dropped out alike, the same losses, weights, averaged
weights, optimizer, schedule, curves and best checkpoint; all to the last bit.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from src.callbacks.checkpoint import Checkpoint
from src.callbacks.resume import _machine
from src.checkpoint_io import manifest
from src.classifier import ImageClassifier
from src.cli import main
from src.data import Batch
from src.live.journal import Journal
from tests.conftest import run_src
from tests.faults.probe import SMALL, Done, assert_equal, assert_same_run, batches, curves, fit, load, probed

pytestmark = pytest.mark.usefixtures("fast_and_in_order", "here")

RUN = Path("lightning_logs/version_0")
LAST = RUN / "checkpoints/last.ckpt"

AUGMENT = '--data.augment=[{"class_path": "RandomCrop"}, {"class_path": "RandomFlip"}]'
ONE_CYCLE = "--model.lr_scheduler=OneCycle"
EMA = {
    "class_path": "lightning.pytorch.callbacks.EMAWeightAveraging",
    "init_args": {"decay": 0.9, "update_starting_at_epoch": 1},
}
LOOKAHEAD = {
    "class_path": "src.callbacks.lookahead.Lookahead",
    "init_args": {"every": 2, "decay": 0.9, "power": 1.0},
}
HOPELESS = {  # no epoch is ever good enough: it stops after the second
    "class_path": "lightning.pytorch.callbacks.EarlyStopping",
    "init_args": {"monitor": "val/loss", "min_delta": 100.0, "patience": 1},
}


GATHERING = {  # each step of the first epoch has a batch of its own, those of the later ones gather three
    "class_path": "lightning.pytorch.callbacks.GradientAccumulationScheduler",
    "init_args": {"scheduling": {0: 1, 1: 3}},
}


def schedule(name: str, **settings: object) -> list[str]:
    options = [f"--model.lr_scheduler.{key}={value}" for key, value in settings.items()]
    return [f"--model.lr_scheduler=torch.optim.lr_scheduler.{name}", *options]


# No loss is ever good enough: from the second on, each validation cuts the lr.
PLATEAU = schedule("ReduceLROnPlateau", patience=0, threshold=1e9, threshold_mode="abs")

RECIPES: dict[str, list[str]] = {
    "one_cycle": [AUGMENT, ONE_CYCLE],
    "cutmix": ["--data.mix=CutMix", "--trainer.log_every_n_steps=4"],
    "accumulate": [ONE_CYCLE, "--trainer.accumulate_grad_batches=4"],  # steps of 4 and 2 batches
    "accumulate_and_validate": ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=3"],
    "plateau": [*PLATEAU, "--model.optimizer=AdamW", "--trainer.max_epochs=3"],
    "schedule_of_torch": schedule("OneCycleLR", max_lr=0.05, total_steps=12),
    "frozen": ["--model.freeze_backbone=1"],
    "validate_often": ["--trainer.val_check_interval=2"],
    "validate_rarely": ["--trainer.check_val_every_n_epoch=2"],
    "no_validation": ["--data.val_size=0", "--data.batch_size=20"],
    "accumulate_in_chunks": [
        ONE_CYCLE,
        "--trainer.accumulate_grad_batches=2",
        "--trainer.val_check_interval=5",
        "--chunk_size=4",
    ],
    "scheduled": ["--trainer.max_epochs=3"],
    "saved_rarely": ["--checkpoint.every_n_epochs=3", "--trainer.check_val_every_n_epoch=2", "--trainer.max_epochs=3"],
    "max_steps": [ONE_CYCLE, "--trainer.max_steps=9"],
    "averaged": [ONE_CYCLE],
    "lookahead": [ONE_CYCLE],
    "lookahead_accumulated": ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=3"],
    "early_stopping": ["--trainer.max_epochs=4"],
    "selection": [
        "--model.selection.network=CNN",
        "--model.selection.network.dropout=0.2",
        "--model.selection.share=0.33",
        "--model.selection.every=2",
        "--trainer.accumulate_grad_batches=2",
    ],
}
CALLBACKS: dict[str, list[dict[str, Any]]] = {
    "averaged": [EMA],
    "lookahead": [LOOKAHEAD],
    "lookahead_accumulated": [LOOKAHEAD],
    "selection": [LOOKAHEAD],
    "early_stopping": [HOPELESS],
    "scheduled": [GATHERING],
}

STOPS = [
    ("one_cycle", "sanity"),
    ("one_cycle", "train 0"),
    ("one_cycle", "train 3"),
    ("one_cycle", "train 5"),
    ("one_cycle", "val 6"),
    ("one_cycle", "train 6"),
    ("one_cycle", "val 12"),
    ("one_cycle", "sanity, train 1, train 3, val 6, val 6, train 9"),
    ("cutmix", "train 2, train 3"),
    ("cutmix", "train 9"),
    ("accumulate", "train 0"),
    ("accumulate", "val 2, train 2"),
    ("accumulate_and_validate", "val 1"),  # half of the second step's gradients are there
    ("accumulate_and_validate", "train 2"),
    ("accumulate_in_chunks", "train 1"),  # its chunk ends with half of a step's gradients
    ("scheduled", "train 6"),
    ("saved_rarely", "train 5, train 11"),  # between two epochs, of which the first has not been saved
    ("plateau", "val 12, train 12"),
    ("schedule_of_torch", "train 3"),
    ("frozen", "train 3"),
    ("frozen", "val 6"),
    ("validate_often", "train 1"),
    ("validate_often", "val 2, train 3"),
    ("validate_often", "val 6"),
    ("validate_often", "train 7, val 8"),
    ("validate_rarely", "train 5"),
    ("validate_rarely", "train 8, val 12"),
    ("no_validation", "train 2, train 5, train 7"),
    ("max_steps", "train 7"),
    ("averaged", "sanity, train 3"),
    ("averaged", "val 6"),
    ("averaged", "train 8"),
    ("averaged", "val 12"),
    ("lookahead", "sanity, train 3, val 6"),
    ("lookahead_accumulated", "val 1, train 2"),
    ("selection", "train 2, val 3, train 5"),
    ("early_stopping", "train 3"),
    ("early_stopping", "train 8, val 12"),
]
"""Where each recipe is stopped; ``train 5`` is in the step after step 5. See the probe for the words.

Epochs have 6 steps; 3 when 2 batches are accumulated, 2 when 4 are.
"""


@pytest.fixture(autouse=True)
def _listener() -> Iterator[None]:
    """Let a signal that no fit listens to fail the test, instead of ending pytest."""

    def lost(*_: object) -> None:
        raise AssertionError("nobody listened to the signal")

    before = {number: signal.signal(number, lost) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a recipe's fit that nothing stopped: its batches in log.0, its run where RUN says."""

    @cache
    def run(recipe: str) -> Path:
        folder = tmp_path_factory.mktemp(recipe)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            done = fit(*SMALL, *RECIPES[recipe], *probed(Path("log"), "", *CALLBACKS.get(recipe, [])))
        assert (done.status, done.err) == (0, ""), done
        return folder

    return run


@pytest.fixture(scope="module")
def stopped_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fit(*SMALL, *probed(Path("log"), "train 3")).status == 143
    return folder


@pytest.fixture
def stopped(stopped_folder: Path, tmp_path: Path) -> None:
    """A run that was stopped after step 4 of the 6 of its first epoch, in the folder that the test works in."""
    shutil.copytree(stopped_folder, tmp_path, dirs_exist_ok=True)


def resume(*args: str | Path, at: str = "", callbacks: list[dict[str, Any]] | None = None) -> Done:
    return fit("--ckpt_path", LAST, *probed(Path("log"), at, *(callbacks or [])), *args)


@pytest.mark.parametrize(("recipe", "stops"), STOPS)
def test_a_fit_that_is_stopped_and_resumed_equals_one_that_is_not(
    recipe: str, stops: str, reference: Callable[[str], Path]
) -> None:
    callbacks = CALLBACKS.get(recipe, [])
    first, *others = stops.split(", ")
    done = fit(*SMALL, *RECIPES[recipe], *probed(Path("log"), first, *callbacks))
    for at in [*others, ""]:
        assert done.status == 143, done
        assert done.err.startswith("stopped by SIGTERM at step ")
        assert done.err.endswith(f"; go on with: python -m src fit --config {RUN}/config.yaml --ckpt_path {LAST}\n")
        assert done.err.count("\n") == 1
        done = resume(at=at, callbacks=callbacks)
    assert (done.status, done.err) == (0, "")
    assert batches(Path("log")) == batches(reference(recipe) / "log")
    assert_same_run(RUN, reference(recipe) / RUN)
    assert [p.name for p in RUN.parent.iterdir()] == [RUN.name], "the run goes on in its own folder"


def test_a_fit_that_is_killed_goes_on_from_its_last_checkpoint_and_repeats_the_same_steps(
    reference: Callable[[str], Path], tmp_path: Path
) -> None:
    start = [*SMALL, *RECIPES["one_cycle"], "--checkpoint.every_n_steps=2"]
    for at in ("train 5", "val 6", "train 11"):
        run_src("fit", *start, *probed(Path("log"), at, number="SIGKILL"), cwd=tmp_path, status=-signal.SIGKILL)
        assert manifest(LAST).step < int(at.split()[1]), "the steps since then are lost"
        start = ["--ckpt_path", str(LAST)]
    assert run_src("fit", *start, *probed(Path("log")), cwd=tmp_path).stderr == ""
    log = batches(Path("log"))
    once = [line for i, line in enumerate(log) if line not in log[:i]]
    assert len(once) < len(log), "lost steps are taken again"
    assert once == batches(reference("one_cycle") / "log"), "as they were taken the first time"
    assert_same_run(RUN, reference("one_cycle") / RUN)


def test_the_printed_command_is_all_that_it_takes(
    reference: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ImageClassifier.training_step

    def stop_at_3(model: ImageClassifier, batch: Batch, index: int) -> dict[str, torch.Tensor]:
        if model.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "training_step", stop_at_3)
        done = fit(*SMALL, *RECIPES["one_cycle"])
    command = done.err.strip().partition("go on with: python -m src ")[2].split()
    assert command == ["fit", "--ckpt_path", str(LAST)]
    assert main(command) == 0
    assert_same_run(RUN, reference("one_cycle") / RUN)
    done = fit("--ckpt_path", "last")
    assert done.status == 0, "of a run that is complete nothing is left to do"
    assert "note: no step was left to take; --trainer.max_epochs or max_steps, with more" in done.out
    assert_same_run(RUN, reference("one_cycle") / RUN)


def test_a_finished_run_can_be_made_longer(reference: Callable[[str], Path]) -> None:
    shutil.copytree(reference("cutmix"), ".", dirs_exist_ok=True)
    done = resume("--trainer.max_epochs=3")
    assert (done.status, done.err) == (0, "")
    longer = fit(*SMALL, *RECIPES["cutmix"], *probed(Path("longer")), "--trainer.max_epochs=3")
    assert longer.status == 0
    assert batches(Path("log")) == batches(Path("longer"))
    # Their curves differ by a point: the first run's end is not at a multiple of 4 steps.
    assert_equal(load(RUN)["state_dict"], load(RUN.with_name("version_1"))["state_dict"], "weights")


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.max_epochs=5"], [12, 24, 30]),
        (["--trainer.max_epochs=5", "--checkpoint.every_n_epochs=7"], [30]),
        (["--trainer.max_epochs=5", "--trainer.max_steps=21"], [12, 21]),
        (["--trainer.max_epochs=5", "--checkpoint.every_n_steps=10"], [10, 12, 20, 24, 30]),
        (["--trainer.max_epochs=5", "--checkpoint.every_n_steps=18"], [12, 18, 24, 30]),
        (["--trainer.max_epochs=5", "--checkpoint.every_n_epochs=7", f"--trainer.callbacks={[HOPELESS]}"], [12]),
        (["--trainer.max_epochs=3", "--data.val_size=0", "--trainer.limit_train_batches=6"], [12, 18]),
    ],
)
def test_an_epochs_end_saves_every_so_often_and_always_where_the_fit_ends(
    options: list[str], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = Checkpoint._save

    def watched(self: Checkpoint, trainer: pl.Trainer, name: str, position: Any) -> None:
        if name == "last":
            saved.append(trainer.global_step)
        save(self, trainer, name, position)

    monkeypatch.setattr(Checkpoint, "_save", watched)
    assert fit(*SMALL, "--checkpoint.every_n_epochs=2", *options).status == 0
    assert saved == steps
    assert manifest(LAST).step == steps[-1]
    if "--data.val_size=0" in options:
        assert manifest(LAST.with_name("best.ckpt")).step == steps[-1]


def test_a_checkpoint_from_the_middle_of_a_step_says_what_is_missing() -> None:
    words = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=5", "--checkpoint.mode=min"]
    # Half of the gradients are there when it validates, and with the least accuracy that first score stays the best.
    assert fit(*SMALL, *words, "--trainer.max_epochs=1", "--model.optimizer.lr=0").status == 0
    best = LAST.with_name("best.ckpt")
    assert manifest(best).step == 2
    done = fit("--ckpt_path", best, "--new_run=true")
    said = "note: it goes on in the middle of a step, without the gradients of 1 of its 2 batches: this is not the run"
    assert done.status == 0
    assert said in done.out
    done = fit("--ckpt_path", best, "--new_run=true", "--trainer.accumulate_grad_batches=5")
    assert "note" not in done.out, "five batches are there: a step begins"


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ("--data.batch_size=20", 6),  # epochs of 3 steps
        ("--data.batch_size=5", 22),  # of 11
        ("--trainer.accumulate_grad_batches=3", 4),
        ("--trainer.max_epochs=8", 12),
    ],
)
def test_a_schedule_goes_on_where_as_much_of_the_run_is_left_whatever_its_steps_are_from_then_on(
    change: str, place: int
) -> None:
    options = ["--trainer.max_epochs=4", ONE_CYCLE, "--model.lr_scheduler.pct_start=0"]
    look = {"class_path": "src.callbacks.lookahead.Lookahead"}
    assert fit(*SMALL, *options, *probed(Path("log"), "val 12", look)).status == 143
    assert fit("--ckpt_path", LAST, *probed(Path("log"), "", look), change).status == 0
    lrs = [lr for _, lr in sorted(curves(RUN)["lr"])]
    Path("plain").mkdir()
    whole = ["--trainer.default_root_dir=plain", change]
    assert fit(*SMALL, *options, *whole).status == 0
    plain = [lr for _, lr in sorted(curves(Path("plain") / RUN)["lr"])]
    assert lrs[12:] == pytest.approx(plain[place:])
    assert fit("--ckpt_path", LAST, *probed(Path("log"), "", look)).status == 0, "and again: nothing is left"


def test_a_run_can_go_on_from_its_best_checkpoint_as_well(reference: Callable[[str], Path]) -> None:
    shutil.copytree(reference("one_cycle"), ".", dirs_exist_ok=True)
    Path("log.0").unlink()
    best = RUN / "checkpoints/best.ckpt"
    step = manifest(best).step
    done = fit("--ckpt_path", best, *probed(Path("log")))
    assert (done.status, done.err) == (0, "")
    whole = batches(reference("one_cycle") / "log")
    assert step < len(whole), "the second epoch is not the best: there is something to repeat"
    assert batches(Path("log")) == whole[step:]
    assert_same_run(RUN, reference("one_cycle") / RUN)


# What Lightning's callback says of a run that goes on: what is there may be overwritten, and past scores are not known.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("one_cycle", {"every_n_train_steps": 3}),
        ("one_cycle", {"monitor": "val/loss"}),
        ("no_validation", {"every_n_train_steps": 3}),
    ],
)
def test_a_run_goes_on_from_what_lightnings_own_callback_has_saved_as_well(
    recipe: str, settings: dict[str, Any], reference: Callable[[str], Path]
) -> None:
    init_args = {"save_top_k": -1, **settings}
    keeps = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": init_args}
    done = fit(*SMALL, *RECIPES[recipe], *probed(Path("log"), "", keeps))
    assert (done.status, done.err) == (0, "")
    assert f"--ckpt_path {RUN}/checkpoints/best.ckpt" in done.out, "the line that says how to test it"
    whole = batches(reference(recipe) / "log")
    kept = {manifest(path).step: path for path in (RUN / "checkpoints").glob("epoch=*.ckpt")}
    assert len(kept) == len(whole) // (6 if "monitor" in settings else 3)
    del kept[len(whole)]
    for step, path in kept.items():
        done = fit("--ckpt_path", path, *probed(Path(f"log{step}"), "", keeps))
        assert (done.status, done.err) == (0, "")
        assert batches(Path(f"log{step}")) == whole[step:]
        assert_equal(load(RUN)["state_dict"], load(reference(recipe) / RUN)["state_dict"], f"after step {step}")


@pytest.mark.usefixtures("stopped")
def test_what_the_command_line_says_wins_and_is_written_into_the_journal_but_not_into_the_config() -> None:
    config = (RUN / "config.yaml").read_bytes()
    assert resume("--model.optimizer.lr=0.01").status == 0
    assert [lr for _, lr in curves(RUN)["lr"]] == pytest.approx([0.02] * 4 + [0.01] * 8)
    (line,) = Journal(RUN / "live/journal.jsonl").read()
    assert (line["kind"], line["name"], line["step"]) == ("resume", "config", 4)
    before, now = (ours(line[name]) for name in ("before", "effective"))
    assert (before, now) == ({"model.optimizer.lr": 0.02}, {"model.optimizer.lr": 0.01})
    assert (RUN / "config.yaml").read_bytes() == config


@pytest.mark.usefixtures("stopped")
def test_the_journal_names_lists_that_change_too() -> None:
    assert resume(AUGMENT).status == 0
    (line,) = Journal(RUN / "live/journal.jsonl").read()
    assert any(key.startswith("data.augment") for key in line["effective"])


@pytest.mark.usefixtures("stopped")
def test_a_resume_that_changes_nothing_says_no_more_than_that_it_was_one() -> None:
    began = time.perf_counter()
    done = resume()
    took = time.perf_counter() - began
    assert (done.status, done.err) == (0, "")
    assert "note: " not in done.out
    (line,) = Journal(RUN / "live/journal.jsonl").read()
    assert (line["kind"], line["step"], ours(line["before"]), ours(line["effective"])) == ("resume", 4, {}, {})
    seconds = [float(words[-2]) for words in map(str.split, done.out.splitlines()) if words[0] == "val/loss"]
    assert sum(seconds) <= took + 0.1, "an epoch's time is what it took since the resume"


def ours(changes: dict[str, Any] | None) -> dict[str, Any]:
    """Leave out what changes the probe, which is a part of the test and not of the run."""
    return {key: value for key, value in (changes or {}).items() if not key.startswith("trainer.callbacks")}


def test_after_a_fit_the_signals_belong_to_whoever_had_them_before() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    for at, status in (("train 3", 143), ("", 0)):
        assert fit(*SMALL, *probed(Path("log"), at)).status == status
        assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("argument", "folder"),
    [
        ("--new_run=true", "lightning_logs/version_1"),
        ("--trainer.default_root_dir=new", "new/lightning_logs/version_0"),
    ],
)
def test_a_resumed_fit_leaves_its_run_alone_when_told_to_write_elsewhere(argument: str, folder: str) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}

    before = contents()
    assert resume(argument).status == 0
    assert contents() == before
    run = Path(folder)
    assert load(run)["global_step"] == 12
    assert [step for step, _ in curves(run)["train/loss"]] == list(range(5, 13))
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints/best.ckpt").is_file()


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("--seed_everything=7", "seed_everything differs"),
        ("--data.val_size=50", "data.val_size differs"),
        ("--data.render_seed=1", "trained on other images or labels"),
        ("--data.train_images=120", "trained on other images or labels"),
    ],
)
def test_another_order_or_other_images_are_refused_in_the_middle_of_an_epoch(argument: str, reason: str) -> None:
    before = LAST.read_bytes()
    done = resume(argument)
    assert done.status == 1
    assert done.err.startswith("error: ckpt_path: ")
    assert reason in done.err
    assert done.err.count("\n") == 1
    assert LAST.read_bytes() == before
    assert len(batches(Path("log"))) == 4, "no step was taken"


@pytest.mark.parametrize(
    ("argument", "status"), [("--seed_everything=7", 0), ("--data.val_size=50", 0), ("--data.render_seed=1", 1)]
)
def test_between_two_epochs_the_order_may_change_but_not_the_images(
    argument: str, status: int, reference: Callable[[str], Path]
) -> None:
    shutil.copytree(reference("cutmix"), ".", dirs_exist_ok=True)
    done = resume(argument, "--trainer.max_epochs=3")
    assert done.status == status, done.err
    if status == 0:
        third = [id for line in batches(Path("log")) if line[1] == 2 for id in line[3]]
        assert len(set(third)) == len(third) == (65 if "val_size" in argument else 55)


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(("batch_size", "sizes"), [(4, [4, 4, 4, 3]), (7, [7, 7, 1]), (100, [15])])
def test_another_batch_size_in_the_middle_of_an_epoch_draws_just_the_images_that_were_left(
    batch_size: int, sizes: list[int], reference: Callable[[str], Path]
) -> None:
    done = resume(f"--data.batch_size={batch_size}")
    assert (done.status, done.err) == (0, "")
    log, whole = batches(Path("log")), batches(reference("cutmix") / "log")
    for epoch in (0, 1):
        drawn, expected = ([id for line in of if line[1] == epoch for id in line[3]] for of in (log, whole))
        assert drawn == expected, "the order does not depend on the batch size"
    assert [len(line[3]) for line in log if line[1] == 0] == [10, 10, 10, 10, *sizes]
    assert {len(line[3]) for line in log if line[1] == 1} == {min(55, batch_size), 55 % batch_size or batch_size}
    assert load(RUN)["global_step"] == len(log)


def test_a_validation_that_was_due_comes_first_whatever_the_batches_are_from_then_on() -> None:
    assert fit(*SMALL, *probed(Path("log"), "val 6")).status == 143
    assert resume("--data.batch_size=7").status == 0
    assert [step for step, _ in curves(RUN)["val/loss"]] == [6, 14]


def test_on_a_gpu_the_threads_of_the_host_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")), world_size=1)
    assert _machine(trainer) == {"torch": torch.__version__, "device": "cuda H200", "processes": 1}


@pytest.mark.usefixtures("stopped")
def test_another_number_of_threads_is_noted_as_it_rounds_otherwise() -> None:
    torch.set_num_threads(2)
    try:
        done = resume("--trainer.max_epochs=1", "--trainer.accelerator=cpu")
    finally:
        torch.set_num_threads(1)
    assert done.status == 0
    notes = [line for line in done.out.splitlines() if line.startswith("note: ")]
    assert notes == ["note: threads 1 before and 2 now: this resumes to within rounding errors, not to the last bit"]
