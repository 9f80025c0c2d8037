"""What it costs to compile the network, told once.

python -m src fit --model.compile default
"""

import sys
import time
from typing import Any

import lightning.pytorch as pl


class Compiling(pl.Callback):
    """Says by how much the first two steps took longer than the third: compiling happens there.

    In the second, it is that of a proxy which only chooses.
    """

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
                first, second, third = self._seconds
                sys.stdout.write(f"compile: {first + second - 2 * third:.1f} s in the first steps\n")
                sys.stdout.flush()
