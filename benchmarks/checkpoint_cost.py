"""What a checkpoint every 100 steps costs the small CNN of configs/cifar10.yaml: extra time, as a share of the steps.

    python -m benchmarks.checkpoint_cost
    python -m benchmarks.checkpoint_cost --root data       # on CIFAR-10 instead of generated images

One fit writes a checkpoint every 200 steps. Its time is cut into blocks of 100 steps, with a checkpoint in the middle
of every other: neighbours are a pair, with and without, in the same process and seconds apart. What the disk does while
training goes on is in the block too. Blocks in which an epoch ends are left out. The processor's time, of all threads,
is compared as well: it does not see the disk, but neither does it see what else the machine is doing.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from src.callbacks.checkpoint import Checkpoint
from src.cli import main

BLOCK = 100
LIMIT = 0.02
"""The share of the steps' time that is claimed not to be exceeded."""
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "cifar10.yaml"


class Clock(pl.Callback):
    """Writes down when each step began, which began an epoch, and how long each save held the training thread.

    Args:
        path: The file to write, at the end of training.
    """

    between_chunks = False  # so that the fit takes the steps it takes without this callback

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begins: dict[int, tuple[float, float]] = {}
        self.epochs: list[int] = []
        self.held: dict[int, float] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time the saves."""
        original = Checkpoint._save

        def save(callback: Checkpoint, inner: pl.Trainer, name: str, *rest: Any) -> None:
            begun = time.perf_counter()
            original(callback, inner, name, *rest)
            self.held[inner.global_step] = time.perf_counter() - begun

        Checkpoint._save = save  # type: ignore[assignment, method-assign]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the step."""
        self.epochs.append(trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the time: all that the last step had to do, saving included, is done."""
        self.begins[trainer.global_step] = time.perf_counter(), time.process_time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it all down."""
        self.path.write_text(json.dumps({"begins": self.begins, "epochs": self.epochs, "held": self.held}))


def measure(pairs: int, root: Path | None) -> dict[str, Any]:
    """Train, and compare the blocks; return the figures."""
    # A pair in ten has the end of an epoch in it, and the first two blocks are for warming up.
    steps = BLOCK * (2 * (pairs + 1 + -(-pairs // (5 if root is None else 2))) + 1)
    data = ["--data=Shapes10", f"--data.train_images={64 * 10 * BLOCK + 500}", "--data.val_size=500"]
    with tempfile.TemporaryDirectory() as folder:
        clock = {"class_path": "benchmarks.checkpoint_cost.Clock", "init_args": {"path": f"{folder}/clock.json"}}
        status = main([
            *("fit", f"--config={CONFIG}", *(data if root is None else [f"--data.root={root}"])),
            *(f"--trainer.max_epochs={-(-steps // (5 * BLOCK))}", f"--trainer.max_steps={steps}"),
            *("--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}"),
            *(f"--checkpoint.every_n_steps={2 * BLOCK}", "--checkpoint.every_n_minutes=null"),
            *("--model.lr_scheduler=null", f"--trainer.callbacks={json.dumps([clock])}"),
        ])  # fmt: skip
        if status != 0:
            raise SystemExit(status)
        found = json.loads((Path(folder) / "clock.json").read_text())
        size = next(Path(folder).rglob("last.ckpt")).stat().st_size
    begins = {int(step): times for step, times in found["begins"].items()}
    held = {int(step): seconds for step, seconds in found["held"].items()}
    waits = [seconds for s, seconds in held.items() if s % (2 * BLOCK) == 0 and s not in found["epochs"]]
    result: dict[str, Any] = {}
    for clock_number, name in enumerate(("wall clock", "processor's time")):
        time_of = {step: times[clock_number] for step, times in begins.items()}
        blocks: dict[int, float] = {}
        for middle in range(2 * BLOCK, steps, BLOCK):
            first, last = middle - BLOCK // 2, middle + BLOCK // 2
            if last in begins and not any(first < step <= last for step in found["epochs"]):
                blocks[middle] = time_of[last] - time_of[first]
        couples = [(blocks[m], blocks[m + BLOCK]) for m in blocks if m % (2 * BLOCK) == 0 and m + BLOCK in blocks]
        result[name] = compare(
            couples[:pairs],
            statistics.median(time_of[s + 1] - time_of[s] for s in begins if s + 1 in begins and s + 1 not in held),
        )
    return result | {
        "training thread held up by a save, median ms": round(1e3 * statistics.median(waits), 1),
        "held up, at most ms": round(1e3 * max(waits), 1),
        "checkpoint, MB": round(size / 1e6, 1),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "holds": result["wall clock"]["share"] < LIMIT,
    }


def compare(couples: list[tuple[float, float]], step: float) -> dict[str, Any]:
    """Return the figures of pairs of blocks, in seconds with and without a checkpoint."""
    extra = [with_one - without for with_one, without in couples]
    low, median, high = statistics.quantiles(extra, n=4)
    return {
        "pairs": len(couples),
        "median step, ms": round(1e3 * step, 2),
        "100 steps with a checkpoint, median s": round(statistics.median(a for a, _ in couples), 3),
        "100 steps without, median s": round(statistics.median(b for _, b in couples), 3),
        "ratio of a pair, median": round(statistics.median(a / b for a, b in couples), 4),
        "ratio of a pair, all": [round(a / b, 4) for a, b in couples],
        "extra for a checkpoint, quartiles and median, ms": [round(1e3 * value, 1) for value in (low, median, high)],
        "share": round(median / (BLOCK * step), 4),
    }


def command() -> int:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--root", type=Path, help="a folder with CIFAR-10")
    options = parser.parse_args()
    result = measure(options.pairs, options.root and options.root.resolve())
    print(json.dumps(result, indent=2))
    return not result["holds"]


if __name__ == "__main__":
    sys.exit(command())
