"""Exact resume: a fit that goes on from a checkpoint equals one that was never stopped, to the last bit.

    python -m src fit --ckpt_path last

No random state is kept: the order, the augmentation and the random numbers of each step are computed anew from the seed
and the step. What a checkpoint holds besides weights and optimizer is where in the epoch the run stood, and on what.
"""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from src.data import ImageData
from src.data.loader import ResidentLoader
from src.data.order import batch_edges, derive_seed
from src.errors import Failure
from src.live.journal import Journal

Position = Literal["batch", "validated", "validation", "epoch", "cut short"]
"""Where a run is saved: after a batch; after the validation that followed one; before that validation; after all that
an epoch does; or after an epoch that ``max_steps`` has cut short."""

_SEEDS = 64
_CUT = ("data.val_size", "train_fraction", "samples_per_class", "split_seed")


class Resume(pl.Callback):
    """Seeds every step by itself, and lets a resumed fit go on at the very batch, or refuses where it cannot.

    Args:
        changes: What the command line sets otherwise than the checkpoint's config: ``[before, now]`` by dotted key.
    """

    def __init__(self, changes: dict[str, list[Any]]) -> None:
        self.changes = changes
        self._start = self._seed = 0
        self._resumed = False
        self._order: dict[str, Any] = {}
        self._reseeds: list[Callable[[int], Any]] = []
        self._seeds: dict[int, int] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what the data were, how they were cut into batches, and on what machine."""
        checkpoint["data"] = {"fingerprint": _data(trainer).fingerprint, **self._order_of(trainer)}
        checkpoint["machine"] = _machine(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the batch to go on with; refuse other images, or another order in the middle of an epoch."""
        if trainer.state.fn != "fit":
            return
        found, own = checkpoint["data"], self._order_of(trainer)
        if found["fingerprint"] != _data(trainer).fingerprint:
            raise Failure(
                "ckpt_path: the checkpoint was trained on other images or labels than data gives now; "
                "resume with the data it was made with, or start anew"
            )
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        done = counts["ready"]
        if done:
            for key, names in (("seed", "seed_everything"), ("split", " or ".join(_CUT))):
                if found[key] != own[key]:
                    raise Failure(
                        f"ckpt_path: {names} differs from the checkpoint's, which is from the middle of an epoch: "
                        f"images would be left out or repeated; change it at the end of an epoch"
                    )
            old = batch_edges(own["images"], found["batch_size"], checkpoint["machine"]["processes"])
            self._start = old[min(done, len(old) - 1)]
            # What is left may be cut into other batches than before.
            sizes = own["images"], own["batch_size"], trainer.world_size
            shift = len(batch_edges(*sizes)) - len(batch_edges(*sizes, self._start)) - done
            for name in counts:
                counts[name] += shift
        self._resumed = True
        was, now = checkpoint["machine"], _machine(trainer)
        changes = [f"{name} {was[name]} before and {now[name]} now" for name in now if was[name] != now[name]]
        if changes and trainer.is_global_zero:
            sys.stdout.write(
                f"note: {', '.join(changes)}: this resumes to within rounding errors, not to the last bit\n"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the loader leave out what has been drawn, and note in the journal that the run goes on."""
        folder = trainer.log_dir  # asked for on all ranks: it is broadcast
        if self._resumed and trainer.is_global_zero and trainer.loggers and folder is not None:
            before, now = ({k: v[i] for k, v in self.changes.items()} for i in (0, 1))
            Journal(Path(folder) / "live" / "journal.jsonl").append(
                trainer.global_step, "resume", "config" if now else "", before=before or None, effective=now or None
            )
        self._seed = _data(trainer).seed
        self._reseeds = [torch.default_generator.manual_seed]
        device = pl_module.device
        if device.type == "cuda":
            self._reseeds.append(torch.cuda.default_generators[device.index or 0].manual_seed)
        elif device.type == "mps":
            self._reseeds.append(torch.mps.manual_seed)
        loader = trainer.train_dataloader
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready < trainer.num_training_batches:
            assert isinstance(loader, ResidentLoader)
            loader.start_at(self._start)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the seeds of another epoch."""
        self._seeds = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed what the network draws in this step (dropout): a function of the seed and the step alone."""
        if batch_idx not in self._seeds:  # many at a time, which is several times as fast
            clock = (self._seed, "step", trainer.current_epoch)
            coming = range(batch_idx, batch_idx + _SEEDS)
            self._seeds = {i: derive_seed(*clock, i, trainer.global_rank) for i in coming}
        seed = self._seeds.pop(batch_idx)
        for reseed in self._reseeds:
            reseed(seed)
        if self._resumed:  # Lightning counts the batch in which it resumes twice, for loggers that go by it
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._resumed = False

    def _order_of(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return what decides which images are in which batch."""
        if not self._order:
            data = _data(trainer)
            ids = data.split()[0]
            split = hashlib.sha256(ids.numpy().data).hexdigest()
            self._order = {"seed": data.seed, "split": split, "images": len(ids), "batch_size": data.batch_size}
        return self._order


def mark_position(checkpoint: dict[str, Any], position: Position) -> None:
    """Write into a checkpoint where the Trainer's loops go on; left to themselves they repeat or skip what is due.

    Args:
        checkpoint: What the Trainer is about to save.
        position: Where the run stands.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if position == "epoch":
        checkpoint["epoch"] = epochs["current"]["ready"]
        for counts in (epochs["current"], epochs["total"]):
            counts |= dict.fromkeys(counts, counts["ready"])
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
    elif position == "cut short":
        for counts in (epochs["current"], epochs["total"]):
            counts |= {"processed": counts["ready"] - 1, "completed": counts["ready"] - 1}
    elif position == "validation":
        for counts in (batches["current"], batches["total"]):
            counts |= dict.fromkeys(counts, counts["ready"])
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        loops["epoch_loop.val_loop.batch_progress"] |= {"total": begun, "current": dict(begun)}


def _data(trainer: pl.Trainer) -> ImageData:
    data = trainer.datamodule  # type: ignore[attr-defined] # set outside of __init__
    assert isinstance(data, ImageData)
    return data


def _machine(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what the last bits of a sum depend on."""
    device = trainer.strategy.root_device.type
    kind = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "torch": str(torch.__version__),
        "device": f"{device} {kind}",
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
    }
