"""What the tests of this folder share: small fits that are stopped at given moments, and what makes two runs equal."""

import contextlib
import hashlib
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.callbacks.steering import Steering
from src.cli import main
from src.data.loader import Batch

SMALL = [
    "--data=Shapes10",
    "--data.train_images=115",
    "--data.test_images=10",
    "--data.val_size=60",
    "--data.batch_size=10",
    "--data.eval_batch_size=30",
    "--model.network.dropout=0.3",
    "--model.network.norm=batch",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
]
"""A fit of two epochs of 6 steps, the last on 5 images; dropout and batch norm make each step tell on the next."""


class Probe(pl.Callback):
    """Appends a line for each batch, and sends this process a signal when asked to.

    Args:
        log: The file to append to: one JSON list ``[step, epoch, batch, ids, digest, loss]`` a line. The digest is of
            the images and labels as the network gets them. Each rank has a file, ``.0``, ``.1`` and so on.
        at: When to send the signal: ``train 5`` (in the batch after step 5), ``val 5`` (in the validation at step 5),
            ``sanity``; empty for never.
        number: The signal's name.
        rank: The only process that sends one.
        stuck: Send it a second time, in a step that never ends.
    """

    between_chunks = False  # so that the fit takes the steps it takes without this callback

    def __init__(self, log: Path, at: str = "", number: str = "SIGTERM", rank: int = 0, stuck: bool = False) -> None:
        self.file, self.at, self.number, self.rank, self.stuck = log, at, signal.Signals[number], rank, stuck

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._send(trainer, f"train {trainer.global_step}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        seen = b"".join(
            part.cpu().flatten().view(torch.uint8).numpy().tobytes() for part in (batch.images, batch.labels)
        )
        line = [
            trainer.global_step,
            trainer.current_epoch,
            batch_idx,
            batch.ids.tolist(),
            hashlib.blake2b(seen, digest_size=8).hexdigest(),
            float(outputs["mean"]).hex(),
        ]
        with self.file.with_suffix(f".{trainer.global_rank}").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._send(trainer, "sanity" if trainer.sanity_checking else f"val {trainer.global_step}")

    def _send(self, trainer: pl.Trainer, now: str) -> None:
        if (now, trainer.global_rank) != (self.at, self.rank):
            return
        self.at = ""
        os.kill(os.getpid(), self.number)
        if self.stuck:
            time.sleep(0.1)
            os.kill(os.getpid(), self.number)
            time.sleep(1000)


SCRIPT = Path("script.json")


class CrashError(Exception):
    """The run dies as if it had been killed: nothing is saved."""


class Steerer(pl.Callback):
    """Sends the commands of ``script.json`` after given steps, and waits until each is due; dies where that says so."""

    between_chunks = False
    step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not SCRIPT.is_file() or step == self.step:  # gradients are being accumulated
            return
        self.step = step
        script = json.loads(SCRIPT.read_text())
        if step in script["crashes"]:
            script["crashes"].remove(step)
            SCRIPT.write_text(json.dumps(script))
            raise CrashError
        steering: Any = next(c for c in trainer.callbacks if isinstance(c, Steering))  # type: ignore[attr-defined]
        folder = Path(trainer.log_dir or "") / "live"
        for i, command in enumerate(script["commands"].get(str(step), [])):
            id = f"{step}-{i}"
            known = id in steering._inbox._known
            (folder / "inbox" / f"{step:09}-{id}.json").write_text(json.dumps({"id": id, "actor": "test", **command}))
            deadline = time.monotonic() + 10
            while not (known or self._arrived(steering, folder, id)):
                assert time.monotonic() < deadline, f"{command} was neither accepted nor refused"
                time.sleep(0.005)

    def _arrived(self, steering: Any, folder: Path, id: str) -> bool:
        return id in steering._inbox._known or (folder / f"answers/{id}.json").is_file()


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def probed(
    log: Path, at: str = "", *callbacks: dict[str, Any], number: str = "SIGTERM", rank: int = 0, stuck: bool = False
) -> list[str]:
    """Return the arguments for a fit with these callbacks, last of them the probe."""
    # All of its arguments: a resumed fit takes those that are left out from the checkpoint.
    arguments = {"log": str(log), "at": at, "number": number, "rank": rank, "stuck": stuck}
    probe = {"class_path": "tests.faults.probe.Probe", "init_args": arguments}
    return ["--trainer.callbacks", json.dumps([*callbacks, probe])]


def fit(*args: str | Path) -> Done:
    """Run ``python -m src fit`` in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(["fit", *map(str, args)])
    return Done(status, out.getvalue(), err.getvalue())


def fit_through(crashes: int, command: list[str], again: list[str]) -> Done:
    """Run a fit that dies so often, and go on with it after each crash, to its end."""
    for _ in range(crashes):
        with pytest.raises(CrashError):
            fit(*command)
        command = again
    done = fit(*command)
    assert done.status == 0, done
    return done


def batches(log: Path, rank: int = 0) -> list[list[Any]]:
    """Return the lines that a probe has written."""
    return [json.loads(line) for line in log.with_suffix(f".{rank}").read_text().splitlines()]


def load(run: Path, name: str = "last") -> dict[str, Any]:
    """Return a checkpoint of a run."""
    checkpoint: dict[str, Any] = torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)
    return checkpoint


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return all curves of a run, (step, value) by tag, but the one that measures time."""
    events = EventAccumulator(str(run)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag != "images/s"
    }


def assert_same_run(run: Path, reference: Path, *, distinct: bool = False) -> None:
    """Check that two runs ended in the same state, to the last bit, by the same way.

    Args:
        run: One.
        reference: The other.
        distinct: Count equal points of a curve as one: what a command had written at the very step of the checkpoint
            that a fit goes on from is written again.
    """
    one, other = load(run), load(reference)
    assert one["global_step"] == other["global_step"]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "lr_scale", "callbacks", "curves"):
        assert_equal(one[key], other[key], key)
    # With averaged weights, state_dict has the average, and these the weights that are trained.
    averaging = {"current_model_state", "averaging_state"}
    assert averaging & one.keys() == averaging & other.keys()
    for key in averaging & one.keys():
        assert_equal(one[key], other[key], key)
    one, other = load(run, "best"), load(reference, "best")
    assert one["global_step"] == other["global_step"]
    assert_equal(one["state_dict"], other["state_dict"], "best")
    found, wanted = curves(run), curves(reference)
    if distinct:
        found, wanted = ({tag: sorted(set(points)) for tag, points in c.items()} for c in (found, wanted))
    assert found == wanted


_OF_THE_CLOCK = ("images/s", "feed/waiting", "feed/refused")
"""What no two runs have in common: a replay looks at no folder."""


def assert_equal(one: Any, other: Any, key: str) -> None:
    """Compare plain values and tensors, bit by bit, and name the first that differs."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), key
        for name in one:
            assert_equal(one[name], other[name], f"{key}.{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), key
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{key}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), key
    else:
        assert one == other or key.endswith(_OF_THE_CLOCK), key
