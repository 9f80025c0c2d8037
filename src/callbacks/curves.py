"""The live curves of a fit: train/loss, train/acc, val/loss, val/acc, lr and images/s by step.

    tensorboard --logdir lightning_logs

What is written is decided by the step, never by the wall clock, so that equal runs write equal curves: a point for
every `log_every_n_steps` optimizer steps, the mean over all images learned since the last point, over all ranks. The
hot path only keeps references to losses and logits on the device; they are summed when a point is due, and on a GPU
read one point late.
"""

import time
from collections import deque
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from src.data.loader import Batch

_NAMES = ("train/loss", "train/acc")
_MOST_PENDING = 50
"""Batches whose logits are kept, at most, before they are summed."""


class Measured(NamedTuple):
    """What a step has measured of one batch, on the device.

    Attributes:
        mean: The mean loss of this rank's images that were learned.
        logits: Of these, ``[k, classes]``.
        labels: Of these.
        total: Images in the batch, learned or not, of all ranks.
    """

    mean: Tensor
    logits: Tensor
    labels: Tensor
    total: int


class Point(NamedTuple):
    """One point of the curves, perhaps still on its way from the device."""

    step: int
    sums: Tensor
    copied: torch.cuda.Event | None
    rates: dict[str, float]

    def arrived(self) -> bool:
        """Return whether the sums can be read without waiting."""
        return self.copied is None or bool(self.copied.query())  # type: ignore[no-untyped-call]


class Sums:
    """Loss and hits of some images, summed.

    Attributes:
        sums: Of this rank's images that were learned: loss, hits and their number, ``[3]`` on the device; none before
            the first. In float64 they are exact, whenever they are summed.
        images: Images that were drawn, over all ranks.
    """

    def __init__(self, sums: Tensor | None = None, images: int = 0) -> None:
        self.sums, self.images = sums, images

    def add(self, sums: Tensor, images: int) -> None:
        """Add those of more images."""
        self.sums = sums if self.sums is None else self.sums + sums
        self.images += images

    def over_ranks(self) -> "Sums":
        """Return the sums over all ranks."""
        if self.sums is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        sums = self.sums.clone()
        torch.distributed.all_reduce(sums)
        return Sums(sums, self.images)

    def pack(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"sums": self.sums, "images": self.images}

    @classmethod
    def unpack(cls, packed: dict[str, Any], device: torch.device, keep: bool) -> "Sums":
        """Undo `pack`: one rank keeps the sums, the others begin with zeros."""
        sums, images = packed["sums"], packed["images"]
        if sums is not None and len(sums) == 2:  # as an earlier version has it: all were learned
            sums = torch.cat([sums, sums.new_tensor([images])])
        if sums is not None:
            sums = (sums if keep else torch.zeros_like(sums)).to(device)
        return cls(sums, images)


class Curves(pl.Callback):
    """Collects what training measures, and logs it.

    Attributes:
        latest: The newest values that were logged, by name.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self._pending: list[Measured] = []
        self._interval, self._epoch = Sums(), Sums()
        self._means: Tensor | None = None
        self._points: deque[Point] = deque()
        self._lrs: dict[str, float] = {}
        self._step = 0
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of images/s."""
        self._step, self._since = trainer.global_step, time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the sums of an epoch."""
        self._flush()
        self._epoch = Sums()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the lr that this step will use: afterwards the schedule has moved on."""
        self._lrs = {}
        for group in trainer.optimizers[0].param_groups:
            name = f"lr/{group['name']}" if group.get("name") else "lr"
            self._lrs.setdefault(name, float(group["lr"]))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Keep what the step measured, and make a point of it when one is due."""
        labels = outputs.get("labels", batch.labels)
        self._pending.append(Measured(outputs["mean"], outputs["logits"], labels, batch.total))
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined] # set outside of __init__
            if every and self._step % every == 0:
                self._add_point(trainer)
        if len(self._pending) >= _MOST_PENDING:
            self._flush()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the sums in progress, over all ranks; all points until now reach the disk before the checkpoint does."""
        self.settle(trainer)
        for logger in trainer.loggers:
            logger.save()
        self._flush()
        checkpoint["curves"] = {
            "interval": self._interval.over_ranks().pack(),
            "epoch": self._epoch.over_ranks().pack(),
            "latest": self.latest,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the sums in progress."""
        state = checkpoint["curves"]
        self.latest = state["latest"]
        self._interval, self._epoch = (
            Sums.unpack(state[name], trainer.strategy.root_device, trainer.is_global_zero)
            for name in ("interval", "epoch")
        )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock of images/s, and let all points be seen: the next may be long in coming."""
        self._since -= time.perf_counter()
        for logger in trainer.loggers:
            logger.save()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the clock of images/s run on, and log what validation found, at the step whose weights it judged."""
        if not trainer.sanity_checking:
            values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self.latest |= values
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)
        self._since += time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Offer the means of the epoch to other callbacks (early stopping); a GPU is not waited for."""
        self._flush()
        if self._epoch.images:
            sums = self._epoch.over_ranks().sums
            assert sums is not None
            self._means = sums[:2] / sums[2]
            means = dict(zip(_NAMES, self._means.unbind(), strict=True))
            pl_module.log_dict(means, logger=False, sync_dist=trainer.world_size > 1)

    def epoch(self) -> dict[str, float]:
        """Return the means of the last epoch, by name."""
        return {} if self._means is None else dict(zip(_NAMES, self._means.tolist(), strict=True))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the steps since the last point."""
        self._flush()
        if self._interval.images and trainer.log_every_n_steps:  # type: ignore[attr-defined] # set outside of __init__
            self._add_point(trainer)
        self.settle(trainer)

    def _flush(self) -> None:
        """Sum what the last batches have measured."""
        if self._pending:
            measured, self._pending = self._pending, []
            sums, images = _summed(measured)
            self._interval.add(sums, images)
            self._epoch.add(sums, images)

    def _add_point(self, trainer: pl.Trainer) -> None:
        self._flush()
        sums, count = self._interval.over_ranks().sums, self._interval.images
        assert sums is not None
        self._interval = Sums()
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        copied = None
        if sums.is_cuda:
            device_sums, sums = sums, torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            sums.copy_(device_sums, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        rates = self._lrs | {"images/s": count / max(elapsed, 1e-9)}
        self._points.append(Point(self._step, sums, copied, rates))
        while self._points and self._points[0].arrived():
            self._log_point(trainer)

    def settle(self, trainer: pl.Trainer) -> None:
        """Log all points until now, also those that have not arrived from the device yet."""
        while self._points:
            self._log_point(trainer)

    def _log_point(self, trainer: pl.Trainer) -> None:
        step, sums, copied, rates = self._points.popleft()
        if copied is not None:
            copied.synchronize()
        loss, correct, learned = sums.tolist()
        values = {**dict(zip(_NAMES, (loss / learned, correct / learned), strict=True)), **rates}
        self.latest |= {"lr": next(iter(rates.values())), **values}  # of several, the first group's
        for logger in trainer.loggers:
            logger.log_metrics(values, step)


def _summed(measured: list[Measured]) -> tuple[Tensor, int]:
    """Return loss, hits and number of this rank's learned images, ``[3]`` on the device, and all that were drawn."""
    means, logits, labels, totals = zip(*measured, strict=True)
    dtype = torch.float32 if means[0].device.type == "mps" else torch.float64
    sizes = [len(of_batch) for of_batch in labels]
    loss = torch.zeros((), dtype=dtype, device=means[0].device)
    for size in sorted(set(sizes)):  # in almost every case there is one
        loss += torch.stack([m for m, n in zip(means, sizes, strict=True) if n == size]).to(dtype).sum() * size
    target = torch.cat(labels)
    hits = torch.cat(logits).argmax(1) == (target.argmax(1) if target.is_floating_point() else target)
    return torch.stack([loss, hits.sum().to(dtype), loss.new_full((), sum(sizes))]), sum(totals)
