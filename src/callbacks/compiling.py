"""What it costs to compile the network, told once.

python -m src fit --model.compile default
"""

import sys
import time
from typing import Any

import lightning.pytorch as pl


class Compiling(pl.Callback):
    """Says by how much the first step took longer than the third: compiling happens there."""

    def __init__(self) -> None:
        self._began = 0.0
        self._seconds: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell, after the third step."""
        if len(self._seconds) < 3:
            self._seconds.append(time.perf_counter() - self._began)
            if len(self._seconds) == 3 and trainer.is_global_zero:
                sys.stdout.write(f"compile: {self._seconds[0] - self._seconds[2]:.1f} s in the first step\n")
                sys.stdout.flush()
