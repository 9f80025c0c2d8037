"""The results of `predict`: file, class and probability, printed and written.

python -m src predict --ckpt_path best --data.images photos/
"""

import csv
import io
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from src.checkpoint_io import commit
from src.data import Batch
from src.data.images import ImageFiles
from src.errors import visible


class Predictions(pl.Callback):
    """Prints a line for each image file and writes ``predictions.csv``; files that cannot be read are named.

    Args:
        folder: Where the file is written.

    Attributes:
        unreadable: Why a file could not be read, by file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "predictions.csv"
        self.unreadable: dict[Path, str] = {}
        self._rows: dict[int, tuple[str, float]] = {}

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Tensor,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the most probable class of each image."""
        classes = trainer.datamodule.classes  # type: ignore[attr-defined]
        for i, probability, label in zip(batch.ids.tolist(), *(v.tolist() for v in outputs.max(1)), strict=True):
            self._rows[i] = (classes[label], probability)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print and write what was found."""
        loader: Any = trainer.predict_dataloaders
        assert isinstance(loader, ImageFiles)
        self.unreadable = loader.unreadable
        names = {i: visible(str(loader.files[i])) for i in self._rows}
        width = max(map(len, names.values()), default=0)
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(["file", "class", "probability"])
        for i, (name, probability) in sorted(self._rows.items()):
            writer.writerow([loader.files[i], name, f"{probability:.6f}"])
            sys.stdout.write(f"{names[i]:{width}}  {name}  {probability:.4f}\n")
        for path, reason in self.unreadable.items():
            sys.stderr.write(f"error: {visible(f'{path}: {reason}')}\n")
        # The name of a file need not be UTF-8: its bytes are kept.
        commit(table.getvalue().encode("utf-8", "surrogateescape"), self.path)
        sys.stdout.write(f"written: {self.path}\n")
        sys.stdout.flush()
