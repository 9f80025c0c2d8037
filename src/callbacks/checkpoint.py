"""Which checkpoints a fit keeps: the last, and the best on the val split."""

from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt`` (each epoch) and ``checkpoints/best.ckpt`` in the run's folder.

    Lightning's ``save_last`` skips the epochs in which nothing got better, and so is not used.

    Args:
        monitor: What ``best`` means. Without a val split the best checkpoint is the last.
        mode: Whether more (``max``) or less (``min``) of it is better.
    """

    def __init__(
        self, monitor: Literal["val/acc", "val/loss"] = "val/acc", mode: Literal["max", "min"] = "max"
    ) -> None:
        super().__init__(
            monitor=monitor,
            mode=mode,
            filename="best",
            save_top_k=1,
            save_last=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    @property
    def best(self) -> Path | None:
        """The checkpoint to test: the best one, else the last, else none."""
        path = self.best_model_path or self.last_model_path
        return Path(path) if path else None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last checkpoint; also of an epoch that ``max_steps`` cut short before its validation."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined] # set outside of __init__
            return
        self.last_model_path = self._save(trainer, "last.ckpt")
        if not trainer.enable_validation:
            self.best_model_path = self._save(trainer, "best.ckpt")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing: the last epoch's end has saved, before callbacks could put other weights into the model."""

    def _save(self, trainer: pl.Trainer, name: str) -> str:
        assert self.dirpath is not None
        path = str(Path(self.dirpath) / name)
        self._save_checkpoint(trainer, path)
        return path
