"""What a user adds of their own: it works as ours does, or one line says what is wrong with it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from src.classifier import ImageClassifier
from src.cli import main
from src.live.journal import Journal
from tests.cli.own import Peek, Shallow, Uniform
from tests.cli.test_bad_input import refusal

OWN = "tests.cli.own"
RUNS = Path("lightning_logs")


FIT = ["fit", f"--data={OWN}.Uniform", "--data.val_size=30", "--data.batch_size=10", f"--model.network={OWN}.Shallow",
       "--trainer.max_epochs=2", "--trainer.precision=32-true", "--trainer.log_every_n_steps=1"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda x, y: (x.float() / 255, y), "images of torch.float32; torch.uint8 is due, from 0 to 255"),
        (lambda x, y: (x.permute(0, 3, 1, 2), y), "images of shape [3, 8, 8]; its image_size asks for [8, 8, 3]"),
        (lambda x, y: (x.tolist(), y.tolist()), "tuple of list, list; images and labels are due, two tensors"),
        (lambda x, y: (x.numpy(), y), "tuple of ndarray, Tensor; images and labels are due, two tensors"),
        (lambda *both: both[0], "Tensor; images and labels are due, two tensors"),
        (lambda *_: None, "NoneType; images and labels are due, two tensors"),
        (lambda x, y: (x, y.int()), "labels of torch.int32 and shape [90]; torch.int64 and [90] are due"),
        (lambda x, y: (x, y[:, None]), "labels of torch.int64 and shape [90, 1]; torch.int64 and [90] are due"),
        (lambda x, y: (x, y[:80]), "90 images and 80 labels"),
        (lambda x, y: (x, y + 1), "labels from 1 to 3; with its 3 classes they are 0 to 2"),
        (lambda x, y: (x, y - 1), "labels from -1 to 1; with its 3 classes they are 0 to 2"),
    ],
)
def test_what_a_data_set_returns_is_looked_at_before_there_is_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Callable[..., Any], line: str
) -> None:
    monkeypatch.setattr(Uniform, "change", staticmethod(change))
    assert refusal(FIT, capsys) == (2, f"data: Uniform.load returns {line}\n")


def test_what_a_data_set_has_to_say_of_itself_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    line = "data: Unnamed has no classes; a data set has classes, mean and std\n"
    assert refusal(["fit", f"--data={OWN}.Unnamed"], capsys) == (2, line)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda logits: logits[:, :2], "[1, 2]"),
        (lambda logits: torch.cat([logits, logits], 1), "[1, 6]"),
        (lambda logits: logits[:, :, None], "[1, 3, 1]"),
        (lambda logits: (logits, logits), "tuple"),
    ],
)
def test_what_a_network_returns_is_looked_at_before_there_is_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Callable[..., Any], found: str
) -> None:
    monkeypatch.setattr(Shallow, "change", staticmethod(change))
    line = f"Shallow gives {found} for an image of 8 pixels; logits [1, 3] are due, one for each class\n"
    assert refusal(FIT, capsys) == (2, f"model.network: {line}")


@pytest.mark.parametrize(
    ("optimizer", "line"),
    [
        ("NoClosure", "NoClosure.step takes no closure; it is to call one"),
        ("Deaf", "Deaf.step does not call its closure, which finds the gradients"),
    ],
)
def test_an_optimizer_that_does_not_call_its_closure_is_refused(
    capsys: pytest.CaptureFixture[str], optimizer: str, line: str
) -> None:
    words = [f"--model.optimizer={OWN}.{optimizer}", "--model.optimizer.lr=0.1"]
    assert refusal([*FIT, *words], capsys) == (2, f"model.optimizer: {line}\n")


def test_a_network_without_a_head_learns_and_chooses_but_its_head_cannot_learn_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*FIT, f"--model.network={OWN}.Unheaded"]
    for option in ("--model.freeze_backbone=1", "--model.backbone_lr=0.1"):
        key = option[2:].partition("=")[0]
        line = f"{key}: Unheaded has no head, which its last layer is to be called\n"
        assert refusal([*words, option], capsys) == (2, line)
    words.append(f"--model.selection.network={OWN}.Unheaded")
    line = "model.selection.network: Unheaded gives [1, 10] for an image of 8 pixels; logits [1, 3] are due, one for "
    assert refusal(words, capsys) == (2, f"{line}each class\n")
    assert main([*words, "--model.selection.network.num_classes=3"]) == 0


@pytest.mark.parametrize("key", ["model.network", "model.selection.network"])
def test_a_network_that_cannot_be_made_is_named_with_its_key(capsys: pytest.CaptureFixture[str], key: str) -> None:
    line = f"{key}: {OWN}.Unready could not be made: cannot assign module before Module.__init__() call\n"
    assert refusal([*FIT, f"--{key}={OWN}.Unready"], capsys) == (2, line)
    Path("own.yaml").write_text(yaml.safe_dump({key: {"class_path": f"{OWN}.Unready"}}))
    words = [word for word in FIT if not word.startswith(f"--{key}=")]
    assert refusal([*words, "--config=own.yaml"], capsys) == (2, line)


def test_weights_alone_are_no_checkpoint_and_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    keeper = "{class_path: ModelCheckpoint, init_args: {save_weights_only: true, filename: alone}}"
    assert main([*FIT, f"--trainer.callbacks+={keeper}"]) == 0
    (path,) = RUNS.glob("version_0/checkpoints/alone.ckpt")
    capsys.readouterr()
    line = f"error: {path} has weights alone, as of save_weights_only, and no config that says what they are of\n"
    for command in ("fit", "test"):
        assert main([command, f"--ckpt_path={path}"]) == 1
        assert capsys.readouterr().err == line


def test_a_network_may_have_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, f"--model.network={OWN}.Simple"]) == 0
    command = re.findall(r"python -m src (test .*)", capsys.readouterr().out)[0].split()
    assert main(command) == 0
    Path("own.yaml").write_text(f"model: {{network: {{class_path: {OWN}.Simple}}}}")
    assert main([*FIT[:4], "--config=own.yaml", "--trainer.max_epochs=1"]) == 0
    capsys.readouterr()


def test_a_callback_sees_the_loss_of_the_epoch_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peek, "found", [])
    assert main([*FIT, f"--trainer.callbacks+={OWN}.Peek"]) == 0
    offered, measured = zip(*Peek.found, strict=True)
    assert offered == pytest.approx(measured, rel=1e-5)
    assert len(set(offered)) == 2


def test_the_config_of_a_fit_with_callbacks_for_fits_does_for_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    bar = "--trainer.callbacks+=TQDMProgressBar"  # its output goes to pytest, which is no terminal
    keeper = "--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {monitor: val/acc, mode: max}}"
    assert main([*FIT, bar, keeper]) == 0
    found = re.search(r"test: +python -m src (test .*)", capsys.readouterr().out)
    assert found
    for command in ("test", "validate"):
        assert main([command, *found[1].split()[1:]]) == 0, command
    capsys.readouterr()


def test_a_run_with_a_logger_of_the_user_says_where_it_goes_on_and_what_it_leaves_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = "--trainer.logger={class_path: CSVLogger, init_args: {save_dir: csv}}"
    assert main([*FIT, logger]) == 0
    runs = Path("csv/lightning_logs")
    resume = ["fit", f"--config={runs}/version_0/config.yaml", f"--ckpt_path={runs}/version_0/checkpoints/last.ckpt"]
    capsys.readouterr()
    assert main([*resume, "--trainer.max_epochs=3"]) == 0
    note = (
        f"trainer.logger: the run goes on in {runs}/version_1; what was done to {runs}/version_0 after step 12 is not"
    )
    assert f"note: {note} done again\n" in capsys.readouterr().out
    (line,) = Journal(runs / "version_1/live/journal.jsonl").read()
    assert line["requested"] == {"forks": True}


def test_a_trainer_without_our_command_line_returns_and_logs_what_it_has_found(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=CSVLogger(tmp_path), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    data, model = Uniform(val_size=30, batch_size=10), ImageClassifier(Shallow(3), num_classes=3)
    trainer.fit(model, data)
    for (found,) in (trainer.validate(model, data, verbose=False), trainer.test(model, data, verbose=False)):
        assert len(found) == 2
        assert {name.partition("/")[2] for name in found} == {"loss", "acc"}
    assert "val/acc" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
