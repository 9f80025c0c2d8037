"""Kills a fit hundreds of times with SIGKILL, at random moments, and compares it with one that ran through.

    python -m benchmarks.soak --kills 200 --steps 2000

Each restart is ``fit --ckpt_path RUN/checkpoints/last.ckpt``, in a process of its own; before the first checkpoint it
is a fit from scratch. A kill comes at a uniformly random moment after training has begun in that process. In the end
every step's images and loss, the curves and the final state must equal the uninterrupted run's to the last bit.
What this does not show: a loss of power, after which the disk may hold less than was written.

2026-11-21, --kills 210 --steps 2100, one thread on one of 2 cores of an Intel Xeon with AMX, torch 2.15.0, lightning
2.6.6, n = 1 run: 210 kills, 75 of them while a checkpoint was made or written (23 left a half-written file), 315 steps
repeated; no difference. 19 minutes.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.paired import ROOT
from src.checkpoint_io import verify
from src.data import Batch
from src.live.journal import Journal

STEPS_PER_EPOCH = 20
CONFIG: dict[str, Any] = {
    "seed_everything": 1,
    "trainer": {"accelerator": "cpu", "log_every_n_steps": 3, "enable_progress_bar": False},
    "checkpoint": {"every_n_steps": 2},
    "model": {
        "network": {"class_path": "src.networks.CNN", "init_args": {"norm": "batch", "dropout": 0.2}},
        "lr_scheduler": {"class_path": "src.optim.OneCycle"},
    },
    "data": {
        "class_path": "src.data.Shapes10",
        "init_args": {
            "train_images": STEPS_PER_EPOCH * 16 + 50,
            "test_images": 10,
            "val_size": 50,
            "batch_size": 16,
            "augment": [{"class_path": "src.data.RandomCrop"}, {"class_path": "src.data.RandomFlip"}],
        },
    },
}


class Trace(pl.Callback):
    """Appends a line of JSON, by one write that no kill can tear, for all that is compared.

    Args:
        folder: Where ``trace.jsonl`` is: ``["start", step]``, ``["save", step]`` before a checkpoint is made,
            ``["saved", step]`` when training goes on, and ``[step, ids, loss]`` after each step.
    """

    between_chunks = False  # so that the fit takes the steps it takes without this callback

    def __init__(self, folder: Path) -> None:
        self.file = folder / "trace.jsonl"
        self._saving = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that training begins: from now on the process may be killed."""
        self._write(["start", trainer.global_step])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say that a checkpoint is about to be written."""
        self._write(["save", trainer.global_step])
        self._saving = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Say that a checkpoint has been handed to the disk."""
        if self._saving:
            self._saving = False
            self._write(["saved", trainer.global_step])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Write what the step was made of."""
        self._write([trainer.global_step, batch.ids.tolist(), float(outputs["loss"]).hex()])

    def _write(self, line: list[Any]) -> None:
        with self.file.open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")


class Process:
    """A fit in a process of its own.

    Args:
        folder: Where it runs, and its config and trace are.
        checkpoint: What it goes on from, if anything.
    """

    def __init__(self, folder: Path, checkpoint: Path | None) -> None:
        resume = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
        self.trace = folder / "trace.jsonl"
        self.read = self.trace.stat().st_size if self.trace.is_file() else 0
        self.begun = time.time_ns()
        self.output = folder / "output.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "src", "fit", "--config", "soak.yaml", *resume],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def lines(self) -> list[list[Any]]:
        """Return what this process has traced."""
        if not self.trace.is_file():
            return []
        with self.trace.open("rb") as file:
            file.seek(self.read)
            return [json.loads(line) for line in file]

    def wait_for_training(self) -> None:
        """Wait until training has begun, or the process has ended."""
        while self.process.poll() is None and not (self.trace.is_file() and self.trace.stat().st_size > self.read):
            time.sleep(0.002)

    def kill(self) -> bool:
        """Kill it; return whether it was still running."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        if self.process.wait() != 0:
            raise SystemExit(f"a fit failed: {self.output.read_text()}")


class State(NamedTuple):
    """All that two runs are compared by."""

    weights: str
    optimizer: str
    steps: dict[int, tuple[Any, ...]]
    curves: dict[str, list[tuple[int, float]]]


def prepare(folder: Path, steps: int) -> None:
    """Make a folder with the config of a run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trace = {"class_path": "benchmarks.soak.Trace", "init_args": {"folder": str(folder)}}
    trainer = {**CONFIG["trainer"], "max_epochs": -(-steps // STEPS_PER_EPOCH), "callbacks": [trace]}
    (folder / "soak.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": trainer}))


def newest_run(folder: Path) -> Path | None:
    """Return the folder of the run that was begun last."""
    runs = sorted((folder / "lightning_logs").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    return runs[-1] if runs else None


def digest(value: Any) -> str:
    """Return the SHA-256 of nested values and tensors."""
    sha = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, dict):
            for key, inner in item.items():
                sha.update(repr(key).encode())
                add(inner)
        elif isinstance(item, (list, tuple)):
            for inner in item:
                add(inner)
        elif isinstance(item, torch.Tensor):
            sha.update(item.contiguous().numpy().tobytes())
        else:
            sha.update(repr(item).encode())

    add(value)
    return sha.hexdigest()


def state(folder: Path, differences: list[str]) -> State:
    """Read a finished run; note steps that were not the same each time they were taken."""
    run = newest_run(folder)
    assert run is not None
    steps: dict[int, tuple[Any, ...]] = {}
    for line in (folder / "trace.jsonl").read_text().splitlines():
        step, *content = json.loads(line)
        if isinstance(step, int):
            found = tuple(map(str, content))
            if steps.setdefault(step, found) != found:
                differences.append(f"step {step} was repeated with another batch or loss")
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every restart
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "images/s"]
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    return State(digest(checkpoint["state_dict"]), digest(checkpoint["optimizer_states"]), steps, curves)


def soak(kills: int, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run a fit to its end, once without and once with kills; return the figures and the differences."""
    rng, differences, begun = random.Random(seed), list[str](), time.monotonic()
    prepare(folder / "through", steps)
    process = Process(folder / "through", None)
    process.wait_for_training()
    trained = time.monotonic()
    process.finish()
    step_time = (time.monotonic() - trained) / steps
    reference = state(folder / "through", differences)

    folder = folder / "killed"
    prepare(folder, steps)
    done = in_writes = in_saves = in_both = from_scratch = taken = stray = 0
    while True:
        run = newest_run(folder)
        last = run / "checkpoints/last.ckpt" if run else None
        if last is not None and last.is_file():
            verify(last)  # raises unless it is whole
            at = int(torch.load(last, weights_only=True)["global_step"])
        else:
            last, at = None, 0
            from_scratch += done > 0
        process = Process(folder, last)
        if done == kills:
            process.finish()
            taken += sum(isinstance(line[0], int) for line in process.lines())
            break
        process.wait_for_training()
        # Twice the steps that are to be gained, and those that are lost between two checkpoints; the end is for later.
        span = step_time * (2 * max(0, 0.95 * steps - at) / (kills - done) + CONFIG["checkpoint"]["every_n_steps"])
        time.sleep(rng.uniform(0, span))
        alive = process.kill()
        lines = process.lines()
        taken += sum(isinstance(line[0], int) for line in lines)
        if not alive:
            differences.append(f"the run ended after {done} kills: {process.output.read_text()[-2000:]}")
            break
        done += 1
        run = newest_run(folder)
        partial = [path for path in run.rglob(".*.partial") if path.stat().st_mtime_ns > process.begun] if run else []
        saving = lines[-1][0] == "save"
        in_writes, in_saves, in_both = in_writes + bool(partial), in_saves + saving, in_both + bool(partial or saving)
        if done % 10 == 0:
            print(f"# {done} kills, step {max([at, *_steps(lines)])}", flush=True)

    found = state(folder, differences)
    run = newest_run(folder)
    assert run is not None
    stray = len(list(run.rglob(".*.partial")))
    for name, one, other in zip(State._fields, found, reference, strict=True):
        if one != other:
            differences.append(f"{name} differ from the uninterrupted run's")
    if sorted(reference.steps) != list(range(1, steps + 1)):
        differences.append(f"the uninterrupted run has not taken {steps} steps")
    return {
        "kills": done,
        "kills while a checkpoint was made or written": in_both,
        "of these, while the training thread made it": in_saves,
        "of these, while the disk was written, leaving a half-written file": in_writes,
        "restarts from scratch, before a first checkpoint": from_scratch,
        "steps": len(found.steps),
        "steps repeated": taken - len(found.steps),
        "points compared": sum(map(len, found.curves.values())),
        "lines of kind resume in the journal": len(Journal(run / "live/journal.jsonl").read()),
        "half-written files left at the end": stray,
        "milliseconds a step": round(1000 * step_time, 1),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "weights": found.weights,
        "differences": differences,
    }


def _steps(lines: list[list[Any]]) -> list[int]:
    return [line[0] for line in lines if isinstance(line[0], int)]


def command() -> int:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000, help=f"rounded up to epochs of {STEPS_PER_EPOCH}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("build/soak"))
    options = parser.parse_args()
    steps = -(-options.steps // STEPS_PER_EPOCH) * STEPS_PER_EPOCH
    result = soak(options.kills, steps, options.seed, options.folder.resolve())
    print(json.dumps(result, indent=2))
    return bool(result["differences"])


if __name__ == "__main__":
    sys.exit(command())
