"""Slow because the machine is busy: says so, and what helps."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch

from src.hardware import contention, used

_AFTER = 3.0
"""Seconds of training that are looked at."""


class Contention(pl.Callback):
    """Looks once, on a CPU, whether other processes want the cores that torch's threads run on."""

    between_chunks = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to look."""
        on_cpu = trainer.strategy.root_device.type == "cpu" and trainer.world_size == 1
        self._before = used() if on_cpu and torch.get_num_threads() > 1 else None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say what was found, once."""
        if self._before is None or time.monotonic() - self._before.at < _AFTER:
            return
        said = contention(self._before, used(), torch.get_num_threads())
        self._before = None
        if said is not None:
            sys.stdout.write(f"note: {said}\n")
            sys.stdout.flush()
