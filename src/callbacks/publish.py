"""Live weights of a fit: other processes read the network while it trains, whole and never torn.

    python -m src watch lightning_logs/version_0

What is published lies in shared memory, see `src.live.weights`; training does not wait for it and is not changed by it.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from src.classifier import ImageClassifier
from src.live.weights import Publisher


class Publish(pl.Callback):
    """Publishes parameters, buffers and their moving averages every few steps.

    Args:
        every_n_steps: Optimizer steps from one publication to the next, at least 1.
    """

    between_chunks = False  # the clock goes on within a chunk

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.publisher: Publisher | None = None
        self._step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the weights that training begins with."""
        folder = trainer.log_dir  # asked for on all ranks: it is broadcast
        if not trainer.is_global_zero or not trainer.loggers or folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined] # set outside of __init__
            return
        if os.name == "nt" or not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            where = "on Windows" if os.name == "nt" else "by processes that share out the parameters"
            sys.stdout.write(f"note: live weights are not published {where}\n")
            return
        config = Path(folder) / "config.yaml"
        digest = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else ""
        facts = {"run": str(Path(folder).resolve()), "config_sha256": digest}
        try:
            self.publisher = Publisher(Path(folder) / "live", facts)
        except OSError as error:
            self._say(f"{error.filename or 'shared memory'} ({error.strerror})")
            return
        self._step = trainer.global_step
        self.publisher.tick(self._step)
        self._publish(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let readers know the step, and publish when it is due."""
        step = trainer.global_step
        if self.publisher is None or step == self._step:  # gradients are being accumulated
            return
        self.publisher.tick(step)
        if getattr(trainer.fit_loop.epoch_loop, "mid_chunk", False):
            return
        before, self._step = self._step, step
        if step // self.every_n_steps > before // self.every_n_steps:
            self._publish(trainer, pl_module)

    def publish_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the weights of this step before they are due, and wait until they are there."""
        if self.publisher is None:
            return
        self.publisher.wait()  # what is under way may be of this very step
        if self.publisher.published is None or self.publisher.published[0] != self._step:
            self._publish(trainer, pl_module)
        if self.publisher is not None:
            self.publisher.wait()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing in the shared memory."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing in the shared memory."""
        self._close()

    def _publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ImageClassifier) and self.publisher is not None
        ema = None
        averaged: Any
        for callback in trainer.callbacks:  # type: ignore[attr-defined] # set outside of __init__
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                averaged = callback._average_model.module
                ema = averaged.network.state_dict()
        self.publisher.publish(pl_module.network.state_dict(), self._step, trainer.current_epoch, ema)
        if self.publisher.failure is not None:
            self._close()

    def _say(self, why: str) -> None:
        sys.stderr.write(f"warning: the weights are not published any more: {why}; training is not affected\n")

    def _close(self) -> None:
        if self.publisher is not None:
            publisher, self.publisher = self.publisher, None
            publisher.close()  # waits for what is under way, so that a failure is told however short the run
            if publisher.failure is not None:
                self._say(publisher.failure)
