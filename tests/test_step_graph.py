"""Steps as recordings: here on a CPU, with a recorder that does again what it was given, as a graph would."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import src.cli
import src.step_loop
from src.step_graph import Body, Done, Recorded, StepGraph, obstacle
from tests.conftest import TINY

SGD = "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9, fused: true}}"
MUON = "--model.optimizer={class_path: src.optim.Muon, init_args: {lr: 0.05, head_lr: 0.1, bias_lr: 0.1}}"
WHITENED = "--model.network={class_path: src.networks.WhitenedCNN, init_args: {widths: [24, 24, 24]}}"
WAYS = {
    "sgd": [SGD],
    "muon, clipped": [MUON, "--trainer.gradient_clip_val=0.1", "--data.augment=[{class_path: src.data.RandomFlip}]"],
    "scheduled": [SGD, "--model.lr_scheduler=src.optim.OneCycle", "--trainer.val_check_interval=2"],
    "dropout": [SGD, "--model.network={class_path: src.networks.CNN, init_args: {dropout: 0.2, norm: batch}}"],
    "chunked": [SGD, "--chunk_size=4", "--trainer.max_steps=8", "--trainer.max_epochs=-1"],
    "selected": [SGD, "--model.selection.network=src.networks.CNN", "--model.selection.every=3"],
    "small images": [MUON, WHITENED, "--data.small_epochs=1", "--data.small_size=24"],
}


class Again:
    """Records nothing but what was done, and does it again; counts how often."""

    graph: StepGraph

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, body: Body) -> Recorded:
        """Return what a body returns, after each call of the second."""
        self.recorded += 1
        done = Done({}, [])

        def replay() -> None:
            self.replayed += 1
            again = body()
            done.measured.update(again.measured)
            done.gradients[:] = again.gradients
            for parameter in self.graph.parameters:  # a graph does nothing to what is Python's
                parameter.grad = None

        return done, replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Again:
    """Let fits record on a CPU."""
    again = Again()
    own = StepGraph.__init__

    def build(self: StepGraph, trainer: Any, autocast: Any) -> None:
        own(self, trainer, autocast, again)
        again.graph = self

    monkeypatch.setattr(StepGraph, "__init__", build)
    monkeypatch.setattr(src.step_loop, "obstacle", lambda trainer, _: obstacle(trainer, "cuda"))
    return again


def fit(folder: Path, *options: str) -> dict[str, Any]:
    """Run a fit, and return its last checkpoint."""
    assert src.cli.main(["fit", *TINY, f"--trainer.default_root_dir={folder}", *options]) == 0
    path = folder / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that two fits have ended alike, to the last bit."""
    for key in ("optimizer_states", "lr_schedulers", "loops", "global_step", "epoch"):
        assert repr(one[key]) == repr(other[key]), key
    assert {**one["curves"]["latest"], "images/s": 0} == {**other["curves"]["latest"], "images/s": 0}
    assert all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in other["state_dict"])


@pytest.mark.parametrize("way", WAYS)
def test_recorded_steps_are_the_steps_that_are_not(
    way: str, recorder: Again, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = fit(tmp_path / "recorded", *WAYS[way], "--cuda_graph=true")
    assert recorder.replayed > recorder.recorded > 0
    monkeypatch.setattr(src.step_graph, "WARM_UP", 1000)
    before = recorder.replayed
    pieces = fit(tmp_path / "pieces", *WAYS[way], "--cuda_graph=true")
    assert recorder.replayed == before
    same(recorded, pieces)
    if way == "sgd":
        plain = fit(tmp_path / "plain", *WAYS[way])
        assert plain["loops"] == recorded["loops"]
        for name, tensor in plain["state_dict"].items():  # there the lr is a number, which rounds otherwise
            torch.testing.assert_close(recorded["state_dict"][name], tensor, rtol=1e-2, atol=1e-3)


def test_a_fit_that_goes_on_in_mid_epoch_records_as_well(recorder: Again, tmp_path: Path) -> None:
    options = [SGD, "--trainer.val_check_interval=2", "--cuda_graph=true"]
    whole = fit(tmp_path / "whole", *options)
    fit(tmp_path / "cut", *options, "--trainer.max_steps=5")
    last = tmp_path / "cut" / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    before = recorder.replayed
    assert src.cli.main(["fit", f"--ckpt_path={last}", "--trainer.max_steps=-1"]) == 0
    assert recorder.replayed > before
    same(torch.load(last, weights_only=True), whole)


def test_what_is_steered_makes_a_recording_of_its_own_and_the_lr_does_not(recorder: Again, tmp_path: Path) -> None:
    fit(tmp_path, SGD, "--model.lr_scheduler=src.optim.OneCycle", "--trainer.max_epochs=3", "--data.batch_size=20")
    assert recorder.recorded == 0, "it is not asked for"
    fit(tmp_path / "asked", *WAYS["scheduled"], "--cuda_graph=true", "--trainer.max_epochs=3", "--data.batch_size=20")
    assert recorder.recorded == 1
    fit(tmp_path / "frozen", MUON, "--cuda_graph=true", "--trainer.max_epochs=3", "--model.freeze_backbone=1")
    assert recorder.recorded == 3


def test_steps_in_which_the_proxy_only_chooses_have_a_recording_of_their_own(recorder: Again, tmp_path: Path) -> None:
    fit(tmp_path, *WAYS["selected"], "--cuda_graph=true")
    assert recorder.recorded == 2


@pytest.mark.usefixtures("recorder")
def test_a_spoilt_step_ends_the_fit_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lr = "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 1.0e+30, fused: true}}"
    assert src.cli.main(["fit", *TINY, f"--trainer.default_root_dir={tmp_path}", lr, "--cuda_graph=true"]) == 1
    assert "error: step 2, epoch 1: weight features.0.weight is not finite (batch of the" in capsys.readouterr().err


class Poison(pl.Callback):
    """Makes a weight undefined before the fifth step."""

    between_chunks = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Spoil it."""
        if trainer.global_step == 4:
            with torch.no_grad():
                next(pl_module.network.parameters()).fill_(float("nan"))


def test_after_a_rollback_steps_are_recorded_anew_as_the_optimizers_state_has_been_replaced(
    recorder: Again, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rolls = ["--guard.on_nonfinite=rollback", "--checkpoint.every_n_steps=2", "--trainer.max_epochs=3"]
    end = fit(tmp_path, SGD, "--cuda_graph=true", "--trainer.callbacks+=tests.test_step_graph.Poison", *rolls)
    assert "took the weights of step 4, lr times 0.5" in capsys.readouterr().err
    assert recorder.recorded == 2
    assert end["global_step"] == 18
    assert all(tensor.isfinite().all() for tensor in end["state_dict"].values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model.optimizer={class_path: torch.optim.AdamW, init_args: {lr: 0.01}}"], "of the optimizers only"),
        (["--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.01}}"], "of the optimizers only"),
        ([SGD, "--data.mix=src.data.MixUp"], "MixUp"),
        ([SGD, "--trainer.accumulate_grad_batches=2"], "accumulate_grad_batches"),
    ],
)
def test_what_cannot_be_recorded_is_not_and_the_reason_is_known(
    options: list[str], reason: str, recorder: Again, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str | None] = []

    def spy(trainer: Any, _: str) -> str | None:
        reasons.append(obstacle(trainer, "cuda"))
        return reasons[-1]

    monkeypatch.setattr(src.step_loop, "obstacle", spy)
    fit(tmp_path, *options, "--cuda_graph=true")
    assert recorder.recorded == 0
    assert len(reasons) == 1 and reason in str(reasons[0])
