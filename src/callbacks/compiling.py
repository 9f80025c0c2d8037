"""What it costs to compile the network, told when it has been paid.

python -m src fit --model.compile default
"""

import sys
import time
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl


class Compiling(pl.Callback):
    """Says how long torch has compiled, and by which step.

    It compiles at the first step, and again wherever it meets what it has not seen: images of another size, a layer
    that thaws, a proxy which only chooses.
    """

    def __init__(self) -> None:
        self._began = self._seconds = self._told = 0.0
        self._watching = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the compiler."""
        from torch._dynamo.callback import callback_handler  # here: it takes seconds to import

        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._stop)
        self._watching = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell of it after the step in which it was."""
        if self._seconds != self._told:
            if trainer.is_global_zero:
                sys.stdout.write(f"compile: {self._seconds - self._told:.1f} s by step {trainer.global_step:,}\n")
                sys.stdout.flush()
            self._told = self._seconds

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the compiler alone."""
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the compiler alone."""
        self._leave()

    def _start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self._seconds += time.perf_counter() - self._began

    def _leave(self) -> None:
        if self._watching:
            from torch._dynamo.callback import callback_handler

            with suppress(ValueError):  # torch._dynamo.reset() has forgotten them
                callback_handler.remove_start_callback(self._start)
                callback_handler.remove_end_callback(self._stop)
            self._watching = False
