"""A step of the command line against a step by hand, one after the other in one process: what Lightning costs a step.

    python -m benchmarks.step_pairs --config configs/speed94.yaml --steps 40 --root data

Before each of its optimizer steps the fit lets a loop by hand take one, on a network, an optimizer and batches of its
own, built from the same config (`benchmarks.steps.read_plan`). So whatever the machine does slower for a while, it does
slower for both; processes of their own differed by 5 %. The fit is `src.cli.main` with everything on, publishing
and steering too; its step is all the time from the end of the loop's step to the begin of its next one: batches, hooks,
logging. The bar is there if this runs in a terminal.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn import functional as F  # noqa: N812 (the field's name)

from benchmarks.paired import CORES, write
from benchmarks.steps import DEVICE, PRECISION, read_plan
from src.cli import main


class Pairs(pl.Callback):
    """Lets a loop by hand take a step before each optimizer step of the fit, and times both, in seconds."""

    between_chunks = False
    options: argparse.Namespace
    ours: list[float] = []  # noqa: RUF012 (of the only fit)
    by_hand: list[float] = []  # noqa: RUF012

    def __init__(self) -> None:
        self._steps: Iterator[None] = iter(())
        self._begun = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the loop."""
        self._steps = steps_by_hand(self.options)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the time."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        now = time.perf_counter()
        if self._begun:
            self.ours.append(now - self._begun)
        next(self._steps)
        self._begun = time.perf_counter()
        self.by_hand.append(self._begun - now)


def steps_by_hand(o: argparse.Namespace) -> Iterator[None]:
    """Take an optimizer step between any two looks."""
    plan = read_plan(o)
    plan.network.train()
    for epoch in count():
        plan.loader.set_epoch(epoch)
        plan.network.begin_epoch(epoch)
        for i, batch in enumerate(plan.loader, start=1):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=PRECISION == "bf16-mixed"):
                logits = plan.network(batch.images)
                loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=plan.smoothing)
            (loss / plan.accumulate).backward()  # type: ignore[no-untyped-call]
            if i % plan.accumulate and i < len(plan.loader):
                continue
            plan.optimizer.step()
            plan.optimizer.zero_grad()
            if plan.schedule is not None:
                plan.schedule.step()
            yield


def command() -> None:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/speed94.yaml"))
    parser.add_argument("--root", type=lambda p: Path(p).resolve(), default=Path("data").resolve())
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--skip", type=int, default=3, help="steps that are not timed, for warming up")
    parser.add_argument("--full_size", action=argparse.BooleanOptionalAction, default=True, help="no small images")
    o = parser.parse_args()
    o.batch_size = o.network = None
    Pairs.options = o
    small = ["--data.small_epochs=0"] if o.full_size and "speed9" in o.config.stem else []
    with tempfile.TemporaryDirectory() as folder:
        given = [f"--data.root={o.root}", "--data.val_size=0", f"--trainer.default_root_dir={folder}", *small]
        callback = "--trainer.callbacks+=benchmarks.step_pairs.Pairs"
        if status := main(["fit", f"--config={o.config}", *given, callback, f"--trainer.max_steps={o.steps + 1}"]):
            raise SystemExit(status)
    ours, by_hand = Pairs.ours[o.skip :], Pairs.by_hand[o.skip :]
    samples = {
        name: [{"ms a step": 1e3 * seconds} for seconds in found[: min(len(ours), len(by_hand))]]
        for name, found in (("ours", ours), ("by hand", by_hand))
    }
    what = f"A step of {o.config.name} as the command line takes it and one by hand, in turn, in one process."
    pairs = [("ms a step", "ours", "by hand")]
    name = f"step_pairs_{o.config.stem}"
    write(name, what, "ms a step", (samples, {}), pairs, threads=torch.get_num_threads() or CORES)
    print(f"ratio of means {statistics.mean(ours) / statistics.mean(by_hand):.4f}")


if __name__ == "__main__":
    import benchmarks.step_pairs

    benchmarks.step_pairs.command()  # of the module that the config names, not of __main__
