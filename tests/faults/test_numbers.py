"""Numbers go wrong: no infinite or undefined one reaches the weights, and the line says where it arose."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from src.callbacks.guard import MAX_ROLLBACKS, Guard
from src.checkpoint_io import read
from src.cli import main
from src.errors import Failure
from src.live.journal import Journal
from tests.conftest import REPOSITORY
from tests.faults.breakers import SMALL, STARTS

RUN = Path("lightning_logs/version_0")
LAST = RUN / "checkpoints/last.ckpt"
ALWAYS = "--checkpoint.every_n_steps=1"
ROLLBACK = "--guard.on_nonfinite=rollback"
EMA = "{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def callbacks(*more: str, at: Sequence[int] = (), where: str = "output", rank: int = -1, end: int = -1) -> str:
    """Return the argument for a `Spoiler`, and further callbacks."""
    arguments = {"at": [*at], "where": where, "rank": rank, "end": end}
    spoiler = json.dumps({"class_path": "tests.faults.breakers.Spoiler", "init_args": arguments})
    return f"--trainer.callbacks=[{', '.join([spoiler, *more])}]"


def error_line(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a fit that must fail; return its error, the last line that it prints."""
    assert main(["fit", *SMALL, *args]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [*[False] * (len(lines) - 1), True], lines
    return lines[-1].removeprefix("error: ")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Return whether weights are equal, and finite; counters of metrics are none."""
    names = [name for name in one if name.startswith("network.")]
    return bool(names) and all(torch.equal(one[name], two[name]) and bool(one[name].isfinite().all()) for name in names)


def rollbacks() -> list[dict[str, Any]]:
    return [line for line in Journal(RUN / "live/journal.jsonl").read() if line["kind"] == "rollback"]


@pytest.mark.parametrize(
    ("where", "what"),
    [("output", "layer second gives a non-finite output"), ("gradient", "the gradient of second.bias is not finite")],
)
def test_the_fit_stops_before_the_step_and_names_step_epoch_images_and_layer(
    where: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, ALWAYS, callbacks(at=[5], where=where))
    ids = ", ".join(map(str, STARTS[5].ids[:8]))
    assert len(STARTS) == 6
    assert line.startswith(f"step 6, epoch 2: {what} (batch of the images {ids}, …); the last finite checkpoint is ")
    assert f"{LAST}: go on from it with a smaller model.optimizer.lr, or with --guard.on_nonfinite rollback" in line
    checkpoint = read(LAST)
    assert checkpoint["global_step"] == 5
    assert same(checkpoint["state_dict"], STARTS[5].weights)
    assert not same(STARTS[5].weights, STARTS[4].weights)


def test_all_images_of_a_small_batch_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "--data.batch_size=3", callbacks(at=[0]))
    assert f"(batch of the images {', '.join(map(str, STARTS[0].ids))})" in line


@pytest.mark.parametrize("at", [4, 5])
def test_with_accumulated_gradients_the_batch_at_fault_is_named(at: int, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, ALWAYS, "--trainer.accumulate_grad_batches=2", callbacks(at=[at]))
    assert line.startswith("step 3, epoch 2: layer second gives a non-finite output (batch of the images ")
    named = re.findall(r"\d+", line.partition("images")[2].partition(")")[0])
    assert [int(name) for name in named] == STARTS[at].ids[:8]
    assert read(LAST)["global_step"] == 2
    assert same(read(LAST)["state_dict"], STARTS[4].weights)


@pytest.mark.parametrize(
    "more", [["lr=1e20"], ["lr=3e38"], ["lr=3e38", "weight_decay=1000"]], ids=["outputs", "almost", "weights"]
)
def test_an_lr_that_is_far_too_large_leaves_no_checkpoint_that_is_not_finite(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, ALWAYS, *(f"--model.optimizer.{word}" for word in more), callbacks())
    assert re.match(r"step [12], epoch 1: .* not? (finite|-finite)|.*non-finite", line), line
    assert "smaller model.optimizer.lr" in line
    assert len(STARTS) <= 3
    if LAST.is_file():
        assert all(bool(tensor.isfinite().all()) for tensor in read(LAST)["state_dict"].values())


def test_before_the_first_checkpoint_a_smaller_lr_is_all_there_is_to_advise(capsys: pytest.CaptureFixture[str]) -> None:
    cnn = [*SMALL, "--model.network=src.networks.CNN", "--model.optimizer.lr=1e20"]
    assert main(["fit", *cnn]) == 1
    error = capsys.readouterr().err
    assert re.match(r"error: step \d, epoch 1: layer \S+ gives a non-finite output \(batch of the images \d", error)
    assert error.endswith("there is no checkpoint yet: try a smaller model.optimizer.lr\n")
    assert list(RUN.rglob("*ckpt")) == []


def test_an_lr_that_no_weight_can_hold_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *SMALL, "--model.optimizer.lr=1e39"]) == 2
    assert capsys.readouterr().err.startswith("error: model.optimizer.lr: 1e+39 is out of range: ")


@pytest.mark.parametrize(
    ("more", "also"),
    [
        ([], []),
        (["--model.lr_scheduler=OneCycle"], []),
        (["--model.lr_scheduler=torch.optim.lr_scheduler.StepLR", "--model.lr_scheduler.step_size=3"], []),
        (["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.01", "--trainer.gradient_clip_val=1"], []),
        ([], [EMA]),
    ],
    ids=["plain", "OneCycle", "StepLR", "AdamW and clipping", "EMA"],
)
def test_a_rollback_takes_the_last_weights_halves_the_lr_and_goes_on(
    more: list[str], also: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *SMALL, *more, callbacks(*also)]) == 0
    lrs = [start.lr for start in STARTS]
    capsys.readouterr()
    there = ["--trainer.default_root_dir=there", ROLLBACK]
    assert main(["fit", *SMALL, *more, *there, callbacks(*also, at=[6])]) == 0
    assert [start.lr for start in STARTS] == pytest.approx([*lrs[:7], lrs[7] / 2])
    ids = ", ".join(map(str, STARTS[6].ids[:8]))
    assert capsys.readouterr().err == (
        f"warning: step 7, epoch 2: layer second gives a non-finite output (batch of the images {ids}, …); "
        f"took the weights of step 4, lr times 0.5\n"
    )
    assert same(STARTS[7].weights, STARTS[4].weights), "they are not those of the last checkpoint"
    assert not same(STARTS[6].weights, STARTS[4].weights)
    (line,) = Journal("there" / RUN / "live/journal.jsonl").read()
    assert (line["kind"], line["name"], line["step"]) == ("rollback", "lr", 6)
    assert (line["before"], line["requested"], line["effective"]) == (lrs[6], 0.5, lrs[6] / 2)
    checkpoint = read("there" / LAST)
    assert (checkpoint["global_step"], checkpoint["lr_scale"]) == (8, 0.5)
    states = [checkpoint["state_dict"], checkpoint.get("current_model_state", {})]
    assert all(bool(tensor.isfinite().all()) for state in states for tensor in state.values())


def test_a_fit_that_ends_after_a_rollback_goes_on_with_the_smaller_lr(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the test ends here" in error_line(capsys, ROLLBACK, callbacks(at=[6], end=7))
    checkpoint = read(LAST)
    assert (checkpoint["global_step"], checkpoint["lr_scale"]) == (7, 0.5)
    assert same(checkpoint["state_dict"], STARTS[4].weights)
    own = ["--model.network=tests.faults.breakers.Weak", callbacks()]
    assert main(["fit", f"--ckpt_path={LAST}", *own]) == 0
    assert [(start.step, start.lr) for start in STARTS] == [(7, 0.01)]
    assert same(STARTS[0].weights, checkpoint["state_dict"])
    assert main(["fit", f"--ckpt_path={LAST}", *own, "--model.optimizer.lr=0.1", "--trainer.max_epochs=3"]) == 0
    assert {start.lr for start in STARTS} == {0.05}, "a new lr is scaled, too"


def test_with_averaged_weights_a_rollback_takes_the_trained_ones_and_their_average(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", *SMALL, callbacks(EMA), "--trainer.max_epochs=1"]) == 0
    old = read(LAST)
    there = ["--trainer.default_root_dir=there", ROLLBACK]
    assert "the test ends here" in error_line(capsys, *there, callbacks(EMA, at=[6], end=7))
    new = read("there" / LAST)
    assert new["global_step"] == 7
    assert not same(old["state_dict"], old["current_model_state"])
    assert same(new["current_model_state"], old["current_model_state"])
    for name, tensor in new["state_dict"].items():
        if name.startswith("network."):  # the step that changed nothing is averaged in too
            mean = 0.9 * old["state_dict"][name] + 0.1 * old["current_model_state"][name]
            torch.testing.assert_close(tensor, mean)


def test_with_accumulated_gradients_a_rollback_leaves_out_the_whole_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *SMALL, ROLLBACK, ALWAYS, "--trainer.accumulate_grad_batches=2", callbacks(at=[2])]) == 0
    assert "warning: step 2, epoch 1: layer second" in capsys.readouterr().err
    weights = [start.weights for start in STARTS]
    assert same(weights[2], weights[4])
    assert not same(weights[4], weights[6])
    assert [start.step for start in STARTS] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_after_too_many_rollbacks_a_run_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *SMALL, ROLLBACK, "--trainer.max_epochs=5", callbacks(at=range(5, 20))]) == 1
    *warnings, error = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(rollbacks()) == MAX_ROLLBACKS
    assert error.startswith(f"error: step {5 + MAX_ROLLBACKS + 1}, epoch ")
    assert [line["effective"] for line in rollbacks()] == pytest.approx([0.02 / 2**i for i in range(1, 11)])
    checkpoint = read(LAST)
    assert checkpoint["lr_scale"] == 0.5**MAX_ROLLBACKS
    assert same(checkpoint["state_dict"], STARTS[4].weights)


def test_a_rollback_without_any_checkpoint_stops(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no checkpoint yet" in error_line(capsys, ROLLBACK, callbacks(at=[2]))
    assert rollbacks() == []


def test_who_ignores_it_trains_on() -> None:
    assert main(["fit", *SMALL, "--guard.on_nonfinite=ignore", callbacks(at=[2])]) == 0
    assert len(STARTS) == 8
    assert same(STARTS[2].weights, STARTS[2].weights)
    assert not same(STARTS[3].weights, STARTS[3].weights), "the fault did not fire"


def test_when_one_of_two_processes_meets_it_both_act_and_the_one_is_named(tmp_path: Path) -> None:
    spoilt = range(3, 3 + MAX_ROLLBACKS + 1)
    devices = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=5"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # left to itself, one process would wait half an hour for the other
        [sys.executable, "-m", "src", "fit", *SMALL, *devices, ROLLBACK, ALWAYS, callbacks(at=spoilt, rank=1)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "warning: "))]
    assert [line.partition(":")[0] for line in lines] == [*["warning"] * MAX_ROLLBACKS, "error"], done.stderr
    assert "Traceback" not in done.stderr
    assert all(f"step {i + 1}, epoch" in line for i, line in zip(spoilt, lines, strict=True))
    assert [(line["step"], line["effective"]) for line in rollbacks()] == [
        (step, pytest.approx(0.02 / 2**i)) for i, step in enumerate(spoilt[:-1], start=1)
    ]
    checkpoint = read(LAST)
    assert (checkpoint["global_step"], checkpoint["lr_scale"]) == (spoilt[-1], 0.5**MAX_ROLLBACKS)
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint["state_dict"].values())
    ids = ", ".join(map(str, json.loads(Path("spoilt").read_text())))
    assert f"layer second gives a non-finite output (batch of the images {ids}" in lines[-1]


def test_a_journal_leaves_out_a_torn_last_line_and_goes_on_below_it() -> None:
    path = Path("live/journal.jsonl")
    for step in range(3):
        Journal(path).append(step, "rollback", "lr", before=0.1, requested=0.5, effective=0.05)
    whole = path.read_bytes()
    first, second, third = whole.splitlines(keepends=True)
    for length in range(1, len(third)):
        path.write_bytes(first + second + third[:length])
        journal = Journal(path)
        # All but the end of the line is all there is to a line.
        kept = 3 if length == len(third) - 1 else 2
        assert [line["step"] for line in journal.read()] == [0, 1, 2][:kept]
        journal.append(7, "resume")
        journal.append(8, "resume")
        assert [(line["seq"], line["step"]) for line in journal.read()[kept:]] == [(kept, 7), (kept + 1, 8)]
        assert path.read_bytes().startswith(first + second + third[:length] + b"\n")


def test_a_journal_leaves_out_damaged_lines_alone() -> None:
    path = Path("journal.jsonl")
    for step in range(3):
        Journal(path).append(step, "resume", "config", before={"a": [1, "é\n"]}, effective={"a": None})
    whole = Journal(path).read()
    assert [line["before"] for line in whole] == [{"a": [1, "é\n"]}] * 3
    first, second, third = path.read_bytes().splitlines(keepends=True)
    for place in range(len(second) - 1):
        path.write_bytes(first + second[:place] + bytes([second[place] ^ 1]) + second[place + 1 :] + third)
        # Some digits of the time tell nothing: what is read is then the same.
        assert Journal(path).read() in ([whole[0], whole[2]], whole)
    for strange in (b"", b"[]", b"[1]", b"7", b'"text"', b"{}", b'{"crc": 1}', b"\xff\xfe", b"null", b"[" * 100_000):
        path.write_bytes(first + strange + b"\n" + third)
        assert [line["step"] for line in Journal(path).read()] == [0, 2]
    Journal(path).append(9, "resume")
    assert Journal(path).read()[-1]["seq"] == 3


def test_a_journal_keeps_values_that_are_no_numbers() -> None:
    journal = Journal(Path("journal.jsonl"))
    assert journal.read() == []
    values = [float("nan"), float("inf"), -float("inf"), 5e-324, -0.0, 0.1, 10**30, None, True, "", {"a": {"b": [1]}}]
    for value in values:
        journal.append(1, "change", "name", before=value, requested=value, effective=value)
    lines = Journal(journal.path).read()
    assert [repr(line["before"]) for line in lines] == [repr(value) for value in values]
    assert [line["seq"] for line in lines] == list(range(len(values)))
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_the_lines_of_a_journal_are_plain_json() -> None:
    journal = Journal(Path("journal.jsonl"))
    journal.append(1, "rollback", "lr", before=0.1, requested=0.5, effective=0.05)
    assert json.loads(journal.path.read_text()).keys() == {
        "seq", "step", "time", "kind", "actor", "id", "name", "before", "requested", "effective", "crc",
    }  # fmt: skip


# Four steps an epoch: the sixth is in the middle of a chunk.
CHUNK = [*SMALL, "--chunk_size=4", "--model.network=tests.faults.breakers.WeakOnce", "--model.network.at=6"]


def test_what_goes_wrong_within_a_chunk_is_told_at_its_end_and_reaches_no_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", *CHUNK]) == 1
    line = capsys.readouterr().err.removeprefix("error: ")
    assert line.startswith("step 6, epoch 2: weight first.weight is not finite (batch of the images "), line
    assert f"the last finite checkpoint is {LAST}" in line
    checkpoint = read(LAST)
    assert checkpoint["global_step"] == 4
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint["state_dict"].values())


def test_a_rollback_within_a_chunk_takes_the_weights_of_the_last_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *CHUNK, ROLLBACK, "--trainer.max_epochs=3"]) == 0
    assert "warning: step 6, epoch 2: " in capsys.readouterr().err
    (line,) = rollbacks()
    assert (line["step"], line["before"] / line["effective"]) == (7, 2)
    checkpoint = read(LAST)
    assert checkpoint["global_step"] == 12
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint["state_dict"].values())


def test_what_is_saved_may_be_huge_or_nothing_but_not_infinite() -> None:
    trainer, module = pl.Trainer(logger=False, enable_checkpointing=False), pl.LightningModule()
    for state in ({}, {"count": torch.ones((), dtype=torch.int64)}, {"a": torch.full((9,), 3e38), "b": torch.ones(2)}):
        Guard().on_save_checkpoint(trainer, module, {"state_dict": state})
    with pytest.raises(Failure, match="step 0, epoch 1: b is not finite after the step, and was not saved"):
        Guard().on_save_checkpoint(
            trainer, module, {"state_dict": {"a": torch.ones(9), "b": torch.tensor([1, -math.inf])}}
        )
