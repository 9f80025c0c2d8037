"""Pictures for TensorBoard: what the network is shown, and what it confuses."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid

from src.callbacks.report import confusion_figure
from src.classifier import ImageClassifier
from src.data import Batch, ImageData, ResidentLoader


class Pictures(pl.Callback):
    """Logs the first batch of a fit as it is trained on, and the confusion matrix at every validation end."""

    between_chunks = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Show up to 64 images of the run's first batch."""
        if trainer.global_step == 0 and batch_idx == 0 and (writer := _writer(trainer)) is not None:
            if isinstance(loader := trainer.train_dataloader, ResidentLoader):
                batch = loader.whole(batch)
            writer.add_image("train/batch", picture(batch.images, trainer.datamodule), 0)  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show which classes are taken for which."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or (writer := _writer(trainer)) is None:
            return
        assert isinstance(pl_module, ImageClassifier)
        figure = confusion_figure(pl_module.confusion_matrix, trainer.datamodule.classes)  # type: ignore[attr-defined]
        writer.add_figure("val/confusion", figure, trainer.global_step, close=False)


def picture(images: Tensor, data: ImageData) -> Tensor:
    """Return a sheet of up to 64 normalised images as they look to a person, float32 ``[3, h, w]`` in [0, 1]."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (data.mean, data.std))
    sheet: Tensor = make_grid((images[:64].float() * std + mean).clamp(0, 1), nrow=8, padding=1)
    return sheet.cpu()


def _writer(trainer: pl.Trainer) -> Any:
    """Return TensorBoard's writer on the process that has one."""
    if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
        return trainer.logger.experiment
    return None
