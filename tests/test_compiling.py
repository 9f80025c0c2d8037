"""torch.compile: what it costs is told, whenever it is paid."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from src.classifier import ImageClassifier
from src.cli import main
from src.data.loader import Batch
from src.networks import CNN
from tests.faults.breakers import SMALL, Child


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="there is no C++ compiler")
def test_compiling_is_told_of_with_the_step_after_which_it_was_paid(tmp_path: Path) -> None:
    smaller_images_first = ["--data.small_epochs=1", "--data.small_size=24"]
    network = ["--model.network=src.networks.WhitenedCNN", "--model.network.widths=[24,24,24]"]
    options = [*SMALL, *network, *smaller_images_first, "--data.val_size=0", "--model.compile=default"]
    done = Child(main, ["fit", *options], cwd=tmp_path).wait()
    assert done.status == 0, done
    lines = [line for line in done.out.splitlines() if line.startswith("compile")]
    assert [re.sub(r"\d+\.\d", "N", line) for line in lines] == ["compile: N s by step 1", "compile: N s by step 7"]
    assert all(float(line.split()[1]) > 0 for line in lines)


def test_a_network_is_compiled_for_more_kinds_of_steps_than_torch_would_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler = _counter(monkeypatch)
    model = ImageClassifier(CNN(), compile="default")
    for images in range(1, 13):
        batch = Batch(
            torch.zeros(images, 3, 32, 32), torch.zeros(images, dtype=torch.int64), torch.arange(images), images
        )
        model.training_step(batch, 0)
    assert compiler.frame_count == 12


def test_what_was_frozen_is_compiled_anew_when_it_begins_to_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = _counter(monkeypatch)
    model = ImageClassifier(CNN(), compile="default", freeze_backbone=1)
    batch = Batch(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64), torch.arange(4), 4)
    for learns in (False, False, True, True):
        for parameter in model.network.backbone_parameters():
            parameter.requires_grad_(learns)
        model.training_step(batch, 0)
    assert compiler.frame_count == 2


def _counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Let torch.compile only count what it is to compile."""
    compiler, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda network, dynamic, **_: compile_(network, backend=compiler, dynamic=dynamic)
    )
    return compiler
