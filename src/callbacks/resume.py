"""Exact resume: a fit that goes on from a checkpoint equals one that was never stopped, to the last bit.

    python -m src fit --ckpt_path last

No random state is kept: the order, the augmentation and the random numbers of each step are computed anew from the seed
and the step. What a checkpoint holds besides weights and optimizer is where in the epoch the run stood, and on what.
"""

import hashlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from src.data import ImageData
from src.data.loader import ResidentLoader
from src.data.order import derive_seed
from src.errors import Failure
from src.live.journal import Journal

Position = Literal["batch", "validated", "validation", "epoch", "cut short", "start"]
"""Where a run is saved: after a batch; after the validation that followed one; before that validation; after all that
an epoch does; after an epoch that ``max_steps`` has cut short; or before the first batch of an epoch."""

_SEEDS = 64
_CUT = ("data.val_size", "data.train_fraction", "data.samples_per_class", "data.split_seed")


class Resume(pl.Callback):
    """Seeds every step by itself, and lets a resumed fit go on at the very batch, or refuses where it cannot.

    Args:
        changes: What the command line sets otherwise than the checkpoint's config: ``[before, now]`` by dotted key.
        source: The folder of the run that the checkpoint is of.
        goes_on: Whether that is where the run is to go on; a logger of the user's own may have another.
    """

    def __init__(self, changes: dict[str, list[Any]], source: Path | None = None, goes_on: bool = False) -> None:
        self.changes, self.source, self.goes_on = changes, source, goes_on
        self._start = self._seed = 0
        self._resumed = False
        self._order: dict[str, Any] = {}
        self._reseeds: list[Callable[[int], Any]] = []
        self._seeds: dict[int, int] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what the data were, how they were cut into batches, and on what machine."""
        drawn = loader.drawn if isinstance(loader := trainer.train_dataloader, ResidentLoader) else 0
        checkpoint["data"] = {"fingerprint": data_of(trainer).fingerprint, "drawn": drawn, **self._order_of(trainer)}
        checkpoint["machine"] = _machine(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the batch to go on with; refuse other images, or another order in the middle of an epoch."""
        if trainer.state.fn != "fit":
            return
        found, own = checkpoint["data"], self._order_of(trainer)
        if found["fingerprint"] != data_of(trainer).fingerprint:
            raise Failure(
                "ckpt_path: the checkpoint was trained on other images or labels than data gives now; "
                "resume with the data it was made with, or start anew"
            )
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        done = counts["ready"]
        if done:
            cut = " or ".join([key for key in _CUT if key in self.changes] or _CUT)
            kept = ("seed", "seed_everything"), ("split", cut), ("window", "data.replay_only")
            for key, names in kept:
                if found.get(key) != own[key]:
                    raise Failure(
                        f"ckpt_path: {names} differs from the checkpoint's, which is from the middle of an epoch: "
                        f"images would be left out or repeated; change it at the end of an epoch"
                    )
            self._start = found["drawn"]
            data = data_of(trainer)
            if data.feed is None:  # else it is not known yet how many there are
                self._check_place(len(data.split()[0]))
        self._resumed = True
        was, now = checkpoint["machine"], _machine(trainer)
        other = [name for name in now if was.get(name, now[name]) != now[name]]
        changes = [f"{name} {was[name]} before and {now[name]} now" for name in other]
        if changes and trainer.is_global_zero:
            sys.stdout.write(
                f"note: {', '.join(changes)}: this resumes to within rounding errors, not to the last bit\n"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the loader leave out what has been drawn, and note in the journal that the run goes on."""
        folder = trainer.log_dir  # asked for on all ranks: it is broadcast
        if self._resumed and trainer.is_global_zero and trainer.loggers and folder is not None:
            before, now = ({k: v[i] for k, v in self.changes.items()} for i in (0, 1))
            forks = self.source is not None and Path(folder).resolve() != self.source.resolve()
            if forks and self.goes_on:
                sys.stdout.write(
                    f"note: trainer.logger: the run goes on in {os.path.relpath(folder)}; what was done to "
                    f"{self.source} after step {trainer.global_step:,} is not done again\n"
                )
            Journal(Path(folder) / "live" / "journal.jsonl").append(
                trainer.global_step,
                "resume",
                "config" if now else "",
                before=before or None,
                requested={"forks": True} if forks else None,
                effective=now or None,
            )
        self._seed = data_of(trainer).seed
        self._reseeds = [torch.default_generator.manual_seed]
        device = pl_module.device
        if device.type == "cuda":
            self._reseeds.append(torch.cuda.default_generators[device.index or 0].manual_seed)
        elif device.type == "mps":
            self._reseeds.append(torch.mps.manual_seed)
        if self._start:
            for callback in trainer.callbacks:  # type: ignore[attr-defined] # set outside of __init__
                if isinstance(callback, GradientAccumulationScheduler):  # Lightning calls it at an epoch's start alone
                    callback.on_train_epoch_start(trainer)
            loader = trainer.train_dataloader
            assert isinstance(loader, ResidentLoader)
            self._check_place(loader.count)
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            every = trainer.accumulate_grad_batches
            count_batches(trainer, done + loader.batches_from(self._start))
            if done < trainer.num_training_batches:
                loader.start_at(self._start)
                if done % every and trainer.is_global_zero:
                    sys.stdout.write(
                        f"note: it goes on in the middle of a step, without the gradients of {done % every} of its "
                        f"{every} batches: this is not the run that was stopped, to the last bit\n"
                    )
            else:
                loader.drawn = self._start  # only the validation at the end of the epoch is left

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the seeds of another epoch, and how many batches it had."""
        self._seeds = {}
        if isinstance(loader := trainer.train_dataloader, ResidentLoader):
            count_batches(trainer, len(loader))

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

    def _check_place(self, images: int) -> None:
        if not isinstance(self._start, int) or not 0 < self._start <= images:
            raise Failure(f"ckpt_path: the checkpoint's place in the epoch, {self._start}, is none of {images} images")

    def _order_of(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return what decides which images are in which batch."""
        if not self._order:
            data = data_of(trainer)
            ids = data.split()[0]
            split = hashlib.sha256(ids.numpy().data).hexdigest()
            self._order = {"seed": data.seed, "split": split, "window": data.replay_only}
        return self._order


def count_batches(trainer: pl.Trainer, total: int) -> None:
    """Tell the Trainer how many batches this epoch has: another batch size may cut what is left of it into others.

    Args:
        trainer: The Trainer.
        total: The batches that have been taken of it, and those that the loader has left.
    """
    loop = trainer.fit_loop
    fetcher, combined = loop._data_fetcher, loop._combined_loader
    assert fetcher is not None and combined is not None
    limit: int | float = trainer.limit_train_batches
    total = min(total, limit) if isinstance(limit, int) else int(total * limit)
    combined.limits = [total]
    fetcher.length = loop.max_batches = total
    interval = getattr(trainer, "val_check_interval", None)  # not there where it is a time
    if isinstance(interval, float):
        trainer.val_check_batch = max(1, int(total * interval))


def total_steps(trainer: pl.Trainer) -> int | None:
    """Return how many optimizer steps the run will have taken at its end, however long its batches have been.

    Called between two steps; none for a run whose end is not known.
    """
    every, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    ends = [] if trainer.max_steps == -1 else [trainer.max_steps]
    if trainer.max_epochs not in (None, -1):
        epochs = max(trainer.max_epochs - trainer.current_epoch - 1, 0)
        left = 0 if done >= batches else math.ceil(batches / every) - done // every
        ends.append(int(trainer.global_step + left + epochs * _steps_of_epoch(trainer)))
    return min(ends, default=None)


def planned_steps(trainer: pl.Trainer) -> int | None:
    """Return how many optimizer steps a run would take that was from its start as this one is now."""
    ends = [] if trainer.max_steps == -1 else [trainer.max_steps]
    if trainer.max_epochs not in (None, -1):
        ends.append(trainer.max_epochs * _steps_of_epoch(trainer))
    return min(ends, default=None)


def _steps_of_epoch(trainer: pl.Trainer) -> int:
    loader, limit = trainer.train_dataloader, trainer.limit_train_batches
    assert isinstance(loader, ResidentLoader)
    batches = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
    return math.ceil(batches / trainer.accumulate_grad_batches)


def mark_position(checkpoint: dict[str, Any], position: Position) -> None:
    """Write into a checkpoint where the Trainer's loops go on; left to themselves they repeat or skip what is due.

    Args:
        checkpoint: What the Trainer is about to save.
        position: Where the run stands.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if position in ("epoch", "start"):
        done = "ready" if position == "epoch" else "completed"
        checkpoint["epoch"] = epochs["current"][done]
        for counts in (epochs["current"], epochs["total"]):
            counts |= dict.fromkeys(counts, counts[done])
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


def data_of(trainer: pl.Trainer) -> ImageData:
    """Return the data of a fit."""
    data = trainer.datamodule  # type: ignore[attr-defined] # set outside of __init__
    assert isinstance(data, ImageData)
    return data


def _machine(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what the last bits of a sum depend on; not the threads of the host, where a GPU sums."""
    device = trainer.strategy.root_device.type
    kind = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "torch": str(torch.__version__),
        "device": f"{device} {kind}",
        **({} if device == "cuda" else {"threads": torch.get_num_threads()}),
        "processes": trainer.world_size,
    }
