"""What a person sees while a fit runs: a progress bar in a terminal, two lines an epoch elsewhere."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.progress import BarColumn, Progress, ProgressColumn

from src.callbacks.curves import Curves


def progress_callback(curves: Curves) -> pl.Callback:
    """Return the bar if standard output is a terminal, else the lines."""
    return LiveBar(curves) if sys.stdout.isatty() else EpochLines(curves)


class LiveBar(RichProgressBar):
    """Lightning's Rich progress bar with epoch, train/loss, val/acc, images/s and lr.

    Args:
        curves: Where the values come from; reading them costs no synchronisation with the device.
    """

    between_chunks = True

    def __init__(self, curves: Curves) -> None:
        theme = RichProgressBarTheme(metrics_text_delimiter="  ")
        super().__init__(refresh_rate=2, leave=True, theme=theme)
        self.curves = curves
        self._drawn = 0.0

    def configure_columns(self, trainer: pl.Trainer) -> list[ProgressColumn]:
        """Make room for the metrics: a short bar, and no batches a second, as images a second are shown."""
        columns: list[ProgressColumn] = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = 10
        return columns[:-1]

    def _get_train_description(self, current_epoch: int) -> str:
        """Count epochs from 1, as people do and as `EpochLines` does."""
        return f"{epoch_name(self.trainer, current_epoch).capitalize():{len(self.validation_description)}}"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step, as often as the screen is drawn anew; more often would cost more than a small step does."""
        now = time.monotonic()
        if now - self._drawn >= 1 / self.refresh_rate or batch_idx + 1 == trainer.num_training_batches:
            self._drawn = now
            if self.progress is not None and self.train_progress_bar_id is not None:  # another batch size changes it
                self.progress.update(self.train_progress_bar_id, total=trainer.num_training_batches)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _stop_progress(self) -> None:
        """End the bar of an epoch; Lightning's would wait for the thread that draws, which sleeps half a second."""
        if self.progress is not None:
            Progress.stop(self.progress)
            self.progress.live._get_renderable = None  # else the sleeper keeps alive what it draws, data set and all
            self._progress_stopped = True

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """Return the values to show, in this order."""
        shown = format_values(self.curves.latest, ("train/loss", "val/acc", "images/s", "lr"))
        return shown | format_fed(self.curves.latest)


class EpochLines(pl.Callback):
    """Prints two lines an epoch, and a third of a fit that is fed, for logs and pipes.

    Args:
        curves: Where the speed and the lr come from.
    """

    def __init__(self, curves: Curves) -> None:
        self.curves = curves
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the epoch, also where a fit is resumed in the middle of one."""
        self._began = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the epoch."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what training and validation gave."""
        if not trainer.is_global_zero:
            return
        self.curves.settle(trainer)
        values = self.curves.latest | self.curves.epoch()  # not callback_metrics: to read them is to wait for all ranks
        train = format_values(values, ("train/loss", "train/acc", "images/s", "lr"))
        val = format_values(values, ("val/loss", "val/acc"))
        head = epoch_name(trainer, trainer.current_epoch)
        seconds = f"{time.perf_counter() - self._began:.1f} s"
        sys.stdout.write(f"{head}  step {trainer.global_step:,}  {_join(train)}\n")
        sys.stdout.write(f"{' ' * len(head)}  {_join(val) if val else 'no validation'}  {seconds}\n")
        if fed := format_fed(values):
            fed |= format_values(values, ("feed/prequential_acc",))
            sys.stdout.write(f"{' ' * len(head)}  {_join(fed)}\n")
        sys.stdout.flush()


def epoch_name(trainer: pl.Trainer, epoch: int) -> str:
    """Return e.g. ``epoch 3/10`` for epoch 2."""
    return f"epoch {epoch + 1}" + ("" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}")


def format_values(values: dict[str, float], names: tuple[str, ...]) -> dict[str, str]:
    """Return the named values that are known, each in the form a person reads best."""
    forms = {"images/s": ",.0f", "lr": ".3g"}
    return {name: format(values[name], forms.get(name, ".4f")) for name in names if name in values}


def format_fed(values: dict[str, float]) -> dict[str, str]:
    """Return the images that have been fed, that wait and that were refused, if a fit is fed."""
    if "feed/images" not in values:
        return {}
    rest = (f"{values.get(f'feed/{name}', 0):,.0f} {name}" for name in ("waiting", "refused"))
    return {"fed": ", ".join([f"{values['feed/images']:,.0f}", *rest])}


def _join(values: dict[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in values.items())
