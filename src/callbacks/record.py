"""Keeps with a run what was asked for: config.yaml, the same in every checkpoint, and the hparams of TensorBoard."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger


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

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the hyper-parameters together with what they led to."""
        if isinstance(trainer.logger, TensorBoardLogger):
            metrics = {f"final/{k.replace('/', '_')}": float(v) for k, v in trainer.callback_metrics.items()}
            trainer.logger.log_hyperparams(flatten(self.config.as_dict()), metrics, trainer.global_step)


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
