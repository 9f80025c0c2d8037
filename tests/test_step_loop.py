"""The loop over the steps of an epoch: it does what Lightning's own does, and leaves to it what it does not know."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_post_hook

import src.cli
from src.callbacks.checkpoint import Checkpoint
from src.callbacks.curves import Curves
from src.step_loop import StepLoop
from tests.conftest import TINY

HOOKS = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
         "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_train_epoch_end")  # fmt: skip

EMA = "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}"
WAYS = {
    "plain": [],
    "accumulated": ["--trainer.accumulate_grad_batches=4"],
    "clipped": ["--trainer.gradient_clip_val=0.1", "--trainer.precision=bf16-mixed"],
    "by value": ["--trainer.gradient_clip_val=0.01", "--trainer.gradient_clip_algorithm=value"],
    "scheduled": ["--model.lr_scheduler=src.optim.OneCycle", "--trainer.val_check_interval=2"],
    "by epoch": ["--model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau", "--model.optimizer.momentum=0.5"],
    "averaged": [EMA],
    "cut short": ["--trainer.max_steps=8", "--trainer.max_epochs=-1"],
    "selected": ["--model.selection.network=src.networks.CNN", "--model.selection.every=2"],
    "limited": ["--trainer.limit_train_batches=3", "--trainer.accumulate_grad_batches=2"],
}


def fit(folder: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, *, ours: bool) -> tuple[Any, list[Any]]:
    """Run a fit with our loop or with Lightning's; return its last checkpoint and the hooks that were called."""
    calls: list[Any] = []
    with monkeypatch.context() as patch:
        if not ours:
            patch.setattr(StepLoop, "install", lambda *_: None)
        for name in HOOKS:
            own = getattr(Curves, name)

            def spy(self: Curves, trainer: Any, *args: Any, name: str = name, own: Any = own) -> None:
                loop = trainer.fit_loop.epoch_loop
                calls.append((name, trainer.global_step, loop.batch_progress.current.ready, loop._should_accumulate()))
                own(self, trainer, *args)

            patch.setattr(Curves, name, spy)
        assert src.cli.main(["fit", *TINY, f"--trainer.default_root_dir={folder}", *options]) == 0
    path = folder / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True), calls


def watch(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that will say, for each epoch, whether our loop goes its own way."""
    own, taken = StepLoop._is_plain, []

    def spy(self: StepLoop, fetcher: Any) -> bool:
        taken.append(own(self, fetcher))
        return taken[-1]

    monkeypatch.setattr(StepLoop, "_is_plain", spy)
    return taken


@pytest.mark.parametrize("way", WAYS)
def test_it_takes_the_steps_that_lightning_takes(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = watch(monkeypatch)
    ours, our_calls = fit(tmp_path / "ours", WAYS[way], monkeypatch, ours=True)
    assert taken and all(taken), "our loop was not taken"
    theirs, their_calls = fit(tmp_path / "theirs", WAYS[way], monkeypatch, ours=False)
    assert our_calls == their_calls
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "epoch", "callbacks"):
        assert repr(ours[key]) == repr(theirs[key]), key
    assert all(torch.equal(ours["state_dict"][name], theirs["state_dict"][name]) for name in theirs["state_dict"])


CURVES = ("train/loss", "train/acc", "val/loss", "val/acc", "lr")


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of a run."""
    events = EventAccumulator(str(folder / "lightning_logs" / "version_0"))
    events.Reload()
    return {
        name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"] if name in CURVES
    }


@pytest.mark.parametrize("way", [way for way in WAYS if way != "by epoch"])
@pytest.mark.parametrize("chunk_size", [4, 100])
def test_the_size_of_a_chunk_changes_no_weight_and_no_point(
    chunk_size: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = watch(monkeypatch)
    chunked, calls = fit(tmp_path / "chunked", [*WAYS[way], f"--chunk_size={chunk_size}"], monkeypatch, ours=True)
    single, single_calls = fit(tmp_path / "single", WAYS[way], monkeypatch, ours=True)
    assert taken and all(taken), "our loop was not taken"
    assert calls == single_calls, "a callback that has not said so was left out"
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "epoch"):
        assert repr(chunked[key]) == repr(single[key]), key
    assert all(torch.equal(chunked["state_dict"][name], single["state_dict"][name]) for name in single["state_dict"])
    assert points(tmp_path / "chunked") == points(tmp_path / "single")


def test_a_chunk_ends_at_multiples_of_its_size_and_before_a_validation_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []

    def spy(_: Checkpoint, trainer: pl.Trainer, *__: Any) -> None:
        ends.append(trainer.global_step)

    monkeypatch.setattr(Checkpoint, "on_train_batch_end", spy)
    options = ["--chunk_size=4", "--trainer.val_check_interval=3", "--trainer.max_steps=11"]
    fit(tmp_path, options, monkeypatch, ours=True)
    assert ends == [3, 4, 6, 8, 9, 11]


def test_checkpoints_are_written_at_the_first_chunk_that_ends_when_they_are_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    own = Checkpoint._save

    def spy(self: Checkpoint, trainer: Any, name: str, position: Any) -> None:
        if position == "batch":
            saved.append(trainer.global_step)
        own(self, trainer, name, position)

    monkeypatch.setattr(Checkpoint, "_save", spy)
    options = ["--chunk_size=4", "--checkpoint.every_n_steps=3", "--trainer.max_epochs=1", "--data.batch_size=20"]
    fit(tmp_path, options, monkeypatch, ours=True)
    assert saved == [4, 8, 12]


def test_hooks_that_are_set_on_optimizers_are_called_in_a_chunk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        fit(tmp_path, ["--chunk_size=4"], monkeypatch, ours=True)
    finally:
        handle.remove()
    assert len(steps) == 12


@pytest.mark.parametrize(
    "option",
    [
        "--trainer.profiler=simple",
        "--trainer.precision=bf16-true",
        "--trainer.callbacks+=tests.test_step_loop.OfTheUser",
    ],
)
def test_what_it_does_not_know_it_leaves_to_lightning(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = watch(monkeypatch)
    fit(tmp_path, [option, "--chunk_size=4"], monkeypatch, ours=True)
    assert taken and not any(taken)
    assert capsys.readouterr().out.count("note: chunk_size: 1 is taken; ") == 1


class OfTheUser(pl.Callback):
    """A callback that logs from a hook, which only Lightning's own loop is made for."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log."""
        pl_module.log("seen", float(batch_idx))
