"""Keeps with a run what was asked for: config.yaml, the same in every checkpoint, and the hparams of TensorBoard."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger with points on disk within a second, and without hparams.yaml: config.yaml says it all.

    Args:
        root: The folder that holds ``lightning_logs``.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root, name="lightning_logs", default_hp_metric=False, flush_secs=1)

    @rank_zero_only
    def save(self) -> None:
        """Write to disk what was logged."""
        self.experiment.flush()


class RunRecord(SaveConfigCallback):
    """Writes the whole config of a fit, so that ``fit --config RUN/config.yaml`` starts the same run again."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write config.yaml; a run's folder belongs to its fit alone."""
        if stage == "fit" and trainer.loggers:
            super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the config, as YAML, into the checkpoint: it can be tested without naming a config."""
        checkpoint["config"] = self.parser.dump(self.config, skip_unset=False, format="yaml")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the hyper-parameters in TensorBoard; the last points of the curves stand beside them as results."""
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            curves = ["val/acc", "val/loss"] if trainer.enable_validation else ["train/acc", "train/loss"]
            writer = trainer.logger.experiment._get_file_writer()
            for summary in hparams(flatten(self.config.as_dict()), dict.fromkeys(curves, 0.0)):  # type: ignore[no-untyped-call]
                writer.add_summary(summary)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the scalars of a nested config by their dotted keys, without ``init_args``; what is null is left out."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        if isinstance(value, dict):
            flat |= flatten(value, name)
        elif isinstance(value, (bool, int, float, str)):
            flat[name.removesuffix(".class_path")] = value
        elif isinstance(value, Path):
            flat[name] = str(value)
    return flat
