"""Which checkpoints a fit keeps: the last, and the best on the val split."""

from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt`` in the run's folder.

    Args:
        monitor: What ``best`` means: the name of a metric. Without a val split the best checkpoint is the last.
        mode: Whether more (``max``) or less (``min``) of it is better.
        every_n_epochs: Epochs between two checkpoints, at least 1.
    """

    def __init__(self, monitor: str = "val/acc", mode: Literal["max", "min"] = "max", every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs: {every_n_epochs} is out of range: at least 1")
        super().__init__(
            monitor=monitor,
            mode=mode,
            every_n_epochs=every_n_epochs,
            filename="best",
            save_top_k=1,
            save_last=True,
            enable_version_counter=False,
        )

    @property
    def best(self) -> Path | None:
        """The checkpoint to test: the best one, else the last, else none."""
        path = self.best_model_path or self.last_model_path
        return Path(path) if path else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without validation there is nothing to choose by."""
        if not trainer.enable_validation:
            self.monitor = None
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pass over an epoch that was cut short before its validation: `on_train_end` saves it."""
        if self.monitor is None or self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the weights of a run that ended between two checkpoints, e.g. by ``max_steps``."""
        super().on_train_end(trainer, pl_module)
        if trainer.global_step != self._last_global_step_saved and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
