"""The live curves of a fit: train/loss, train/acc, val/loss, val/acc, lr and images/s by step.

    tensorboard --logdir lightning_logs

What is written is decided by the step, never by the wall clock, so that equal runs write equal curves: a point for
every `log_every_n_steps` optimizer steps, the mean over all images since the last point, over all ranks. The hot path
only keeps references to tensors on the device; they are read when a point is due, on a GPU one point late.
"""

import time
from collections import deque
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from src.data.loader import Batch


class Point(NamedTuple):
    """One point of the curves, perhaps still on its way from the device."""

    step: int
    sums: Tensor
    images: int
    copied: torch.cuda.Event | None
    rates: dict[str, float]

    def arrived(self) -> bool:
        """Return whether the sums can be read without waiting."""
        return self.copied is None or bool(self.copied.query())  # type: ignore[no-untyped-call]


class Curves(pl.Callback):
    """Collects what training measures, and logs it.

    Attributes:
        latest: The newest values that were logged, by name.
        epoch: The means of the last epoch, by name.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.epoch: dict[str, float] = {}
        self._interval: list[tuple[Tensor, Tensor, int]] = []
        self._epoch: list[tuple[Tensor, Tensor, int]] = []
        self._points: deque[Point] = deque()
        self._lrs: dict[str, float] = {}
        self._step = 0
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of images/s."""
        self._step, self._since = trainer.global_step, time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the sums of an epoch."""
        self._epoch.clear()

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
        measured = (outputs["summed"], outputs["correct"], batch.total)
        self._epoch.append(measured)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined] # set outside of __init__
        if every:
            self._interval.append(measured)
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._interval and self._step % every == 0:
                self._add_point(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the sums in progress, over all ranks; all points until now reach the disk before the checkpoint does."""
        self._write(trainer, wait=True)
        for logger in trainer.loggers:
            logger.save()
        checkpoint["curves"] = {"interval": _pack(self._interval), "epoch": _pack(self._epoch), "latest": self.latest}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the sums in progress."""
        state = checkpoint["curves"]
        self.latest = state["latest"]
        self._interval, self._epoch = (
            _unpack(state[name], trainer.strategy.root_device, trainer.is_global_zero) for name in ("interval", "epoch")
        )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock of images/s."""
        self._since -= time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the clock of images/s run on, and log what validation found, at the step whose weights it judged."""
        if not trainer.sanity_checking:
            values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self.latest |= values
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)
        self._since += time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Offer the means of the epoch to other callbacks (early stopping)."""
        self._write(trainer, wait=True)
        if self._epoch:
            self.epoch = _means(*_sums(self._epoch))
            pl_module.log_dict(self.epoch, logger=False, sync_dist=trainer.world_size > 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the steps since the last point."""
        if self._interval:
            self._add_point(trainer)
        self._write(trainer, wait=True)

    def _add_point(self, trainer: pl.Trainer) -> None:
        sums, count = _sums(self._interval)
        self._interval = []
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        copied = None
        if sums.is_cuda:
            device_sums, sums = sums, torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            sums.copy_(device_sums, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        rates = self._lrs | {"images/s": count / max(elapsed, 1e-9)}
        self._points.append(Point(self._step, sums, count, copied, rates))
        self._write(trainer)

    def _write(self, trainer: pl.Trainer, wait: bool = False) -> None:
        """Log the points that have arrived from the device; with `wait`, all."""
        while self._points and (wait or self._points[0].arrived()):
            step, sums, count, copied, rates = self._points.popleft()
            if copied is not None:
                copied.synchronize()
            values = {**_means(sums, count), **rates}
            self.latest |= values
            for logger in trainer.loggers:
                logger.log_metrics(values, step)


def _sums(measured: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, int]:
    """Return loss and hits summed over steps and ranks, ``[2]`` on the device, and the number of images."""
    losses, correct, totals = zip(*measured, strict=True)
    dtype = torch.float32 if losses[0].device.type == "mps" else torch.float64
    sums = torch.stack([torch.stack(losses).to(dtype).sum(), torch.stack(correct).to(dtype).sum()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums, sum(totals)


def _pack(measured: list[tuple[Tensor, Tensor, int]]) -> dict[str, Any]:
    """Return what each step measured, summed over all ranks: ``sums`` float64 ``[steps, 2]`` and ``images``."""
    if not measured:
        return {"sums": torch.zeros((0, 2), dtype=torch.float64), "images": []}
    losses, correct, totals = zip(*measured, strict=True)
    dtype = torch.float32 if losses[0].device.type == "mps" else torch.float64
    sums = torch.stack([torch.stack(losses).to(dtype), torch.stack(correct).to(dtype)], dim=1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return {"sums": sums.cpu(), "images": list(totals)}


def _unpack(packed: dict[str, Any], device: torch.device, keep: bool) -> list[tuple[Tensor, Tensor, int]]:
    """Undo `_pack`: one rank keeps the sums, the others begin with zeros."""
    sums = (packed["sums"] if keep else torch.zeros_like(packed["sums"])).to(device)
    return [(loss, correct, images) for (loss, correct), images in zip(sums, packed["images"], strict=True)]


def _means(sums: Tensor, count: int) -> dict[str, float]:
    loss, correct = sums.tolist()
    return {"train/loss": loss / count, "train/acc": correct / count}
