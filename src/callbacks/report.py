"""The results of `validate` and `test`: a table a person reads, and files another program reads.

python -m src test --ckpt_path best
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from src.checkpoint_io import commit
from src.classifier import ImageClassifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report(pl.Callback):
    """Prints accuracy, loss and a table of the classes; after `test`, writes them into the run's folder.

    Args:
        folder: The run that the checkpoint belongs to.

    Attributes:
        step: Optimizer steps that the weights have seen.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the step of the weights: the Trainer keeps it to itself outside of a fit."""
        self.step = checkpoint["global_step"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the results of the val split."""
        if trainer.state.fn == "validate" and trainer.is_global_zero:
            self._print(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the results of the test set, and write ``test.json`` and ``test_confusion.png``."""
        if not trainer.is_global_zero:
            return
        results = self._print(trainer, pl_module, "test")
        loader: Any = trainer.test_dataloaders
        if results["images"] < len(loader.ids):
            Console().print("not written: this was a part of the test set", highlight=False)
            return
        assert isinstance(pl_module, ImageClassifier)
        commit((json.dumps(results, indent=2) + "\n").encode(), self.folder / "test.json")
        figure = confusion_figure(pl_module.confusion_matrix, trainer.datamodule.classes)  # type: ignore[attr-defined]
        picture = io.BytesIO()
        figure.savefig(picture)
        commit(picture.getvalue(), self.folder / "test_confusion.png")
        Console().print(f"written: {self.folder / 'test.json'}, test_confusion.png", highlight=False, soft_wrap=True)

    def _print(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> dict[str, Any]:
        assert isinstance(pl_module, ImageClassifier)
        per_class = class_scores(pl_module.confusion_matrix, trainer.datamodule.classes)  # type: ignore[attr-defined]
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        console = Console()
        console.print(scores_table(per_class))
        acc, loss = metrics[f"{stage}/acc"], metrics[f"{stage}/loss"]
        console.print(f"{stage}/acc {acc:.4f}  {stage}/loss {loss:.4f}", highlight=False)
        return {
            **metrics,
            "per_class": per_class,
            "data": type(trainer.datamodule).__name__,  # type: ignore[attr-defined]
            "images": int(pl_module.confusion_matrix.sum()),
            "tta": pl_module.tta,
            "checkpoint": str(trainer.ckpt_path),
            "step": self.step,
        }


def class_scores(matrix: Tensor, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return for each class: images of it, ``acc`` (share of them found), ``precision`` (share of the calls right).

    A share of nothing is 0.
    """
    hits, images, calls = matrix.diag().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist()
    return {
        name: {
            "images": images[i],
            "acc": hits[i] / max(images[i], 1),
            "precision": hits[i] / max(calls[i], 1),
        }
        for i, name in enumerate(classes)
    }


def scores_table(per_class: dict[str, dict[str, float]]) -> Table:
    """Return what `class_scores` found as a table."""
    table = Table("class", "images", "accuracy", "precision")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, score in per_class.items():
        table.add_row(name, f"{score['images']:,}", f"{score['acc']:.4f}", f"{score['precision']:.4f}")
    return table


def confusion_figure(matrix: Tensor, classes: Sequence[str]) -> "Figure":
    """Draw the confusion matrix: a row for each true class, a column for each prediction."""
    from matplotlib.figure import Figure  # here, as it takes half a second to load; no pyplot, whose state is global

    figure = Figure(figsize=(6.4, 6.0), dpi=100, layout="tight")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    axes.imshow(matrix.numpy(), cmap="Blues")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    for (row, column), count in np.ndenumerate(matrix.numpy()):
        colour = "white" if 2 * count > matrix.max() else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    return figure
