"""Which checkpoints a fit keeps: the last, and the best on the val split."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from src.errors import UsageError


class Checkpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt`` (each epoch) and ``checkpoints/best.ckpt`` in the run's folder.

    Lightning's ``save_last`` skips the epochs in which nothing got better, and so is not used.

    Args:
        monitor: What ``best`` means: the name of a metric. Without a val split the best checkpoint is the last.
        mode: Whether more (``max``) or less (``min``) of it is better.
    """

    def __init__(self, monitor: str = "val/acc", mode: Literal["max", "min"] = "max") -> None:
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

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self.monitor not in monitor_candidates:
            known = ", ".join(sorted(k for k in monitor_candidates if "/" in k))
            raise UsageError(f"checkpoint.monitor: there is no metric {self.monitor}; there are {known}")
        super()._save_topk_checkpoint(trainer, monitor_candidates)
