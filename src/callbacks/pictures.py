"""Pictures for TensorBoard: what the network is shown, and what it confuses."""

from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid

from src.callbacks.report import confusion_figure
from src.classifier import ImageClassifier
from src.data import Batch, ImageData, ResidentLoader

_WRITE_AT = 8
"""The step at which a GPU has so much to do that it does not notice that the first batch is written."""


class Pictures(pl.Callback):
    """Logs the first batch of a fit as it is trained on, and the confusion matrix at every validation end."""

    between_chunks = True
    _sheet: tuple[Tensor, torch.cuda.Event | None] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Show up to 64 images of the run's first batch."""
        if trainer.global_step == 0 and batch_idx == 0 and _writer(trainer) is not None:
            if isinstance(loader := trainer.train_dataloader, ResidentLoader):
                batch = loader.whole(batch)
            sheet = picture(batch.images, trainer.datamodule)  # type: ignore[attr-defined]
            self._sheet = sheet, None
            if sheet.is_cuda:
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                host = torch.empty_like(sheet, device="cpu", pin_memory=True)
                self._sheet = host.copy_(sheet, non_blocking=True), copied
                copied.record()
        if self._sheet is not None and (not batch.ids.is_cuda or trainer.global_step >= _WRITE_AT):
            self._write(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the first batch, if that is yet to be done."""
        self._write(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the first batch, which may show why."""
        with suppress(RuntimeError):  # of a GPU that has failed
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if self._sheet is None:
            return
        (sheet, copied), self._sheet = self._sheet, None
        if copied is not None:
            copied.synchronize()
        _writer(trainer).add_image("train/batch", sheet, 0)

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
    return sheet


def _writer(trainer: pl.Trainer) -> Any:
    """Return TensorBoard's writer on the process that has one."""
    if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
        return trainer.logger.experiment
    return None
