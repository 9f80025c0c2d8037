"""When checkpoints are written, and which are kept: the last, and the best on the val split.

    python -m src fit --checkpoint.every_n_steps 100

Each is written at a step boundary, in a state from which `src.callbacks.resume` goes on to the last bit.
"""

import math
import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from filelock import FileLock, Timeout

from src.callbacks.record import RunLogger
from src.callbacks.resume import Position, mark_position
from src.checkpoint_io import VerifiedCheckpointIO
from src.errors import Failure


class Checkpoint(pl.callbacks.Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt`` in the run's folder.

    The last is written at the end of epochs, as often as asked for in between, and when the run ends.

    Args:
        monitor: What ``best`` means: the highest val/acc or the lowest val/loss. Without a val split the best
            checkpoint is the last epoch's.
        mode: Whether more (``max``) or less (``min``) of it is better; null: as `monitor` says.
        every_n_steps: Optimizer steps from one ``last.ckpt`` to the next, at least 1; null: only by the epoch and
            the clock.
        every_n_minutes: Minutes from one ``last.ckpt`` to the next within an epoch, above 0; null: not by the clock.
        every_n_epochs: Epochs from one at whose end ``last.ckpt`` is written to the next, at least 1. More than 1 is
            for epochs that take less than some seconds: a save takes the host some milliseconds, and a GPU waits.

    Attributes:
        skipped: Whether the end of the last epoch was not saved.
    """

    between_chunks = True

    def __init__(
        self,
        monitor: Literal["val/acc", "val/loss"] = "val/acc",
        mode: Literal["max", "min"] | None = None,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = 5.0,
        every_n_epochs: int = 1,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps: {every_n_steps} is out of range: at least 1, or null")
        if every_n_minutes is not None and not every_n_minutes > 0:
            raise ValueError(f"every_n_minutes: {every_n_minutes} is out of range: above 0, or null")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs: {every_n_epochs} is out of range: at least 1")
        self.monitor, self.mode = monitor, mode or ("min" if monitor == "val/loss" else "max")
        self.every_n_steps, self.every_n_minutes, self.every_n_epochs = every_n_steps, every_n_minutes, every_n_epochs
        self.folder: Path | None = None
        self.best_score: float | None = None
        self.skipped = False
        self._lock: FileLock | None = None
        self._due = False
        self._step = 0
        self._saved_at = 0.0
        self._position: Position | None = None

    @property
    def best(self) -> Path | None:
        """The checkpoint to test: the best one, else the last, else none."""
        paths = [self.folder / f"{name}.ckpt" for name in ("best", "last")] if self.folder else []
        return next((path for path in paths if path.is_file()), None)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the run's folder."""
        folder = trainer.log_dir or trainer.default_root_dir  # asked for on all ranks: it is broadcast
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined] # set outside of __init__
            self.folder = Path(folder) / "checkpoints"
            if trainer.is_global_zero and not isinstance(trainer.logger, RunLogger):  # whose folder no other run has
                self._take_folder(self.folder)

    def _take_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock")
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise Failure(
                f"{folder}: another process keeps its checkpoints there; name another place: "
                f"--trainer.default_root_dir DIR"
            ) from error

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the folder to others."""
        self._leave_folder()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the folder to others."""
        self._leave_folder()

    def _leave_folder(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._step, self._saved_at = trainer.global_step, time.monotonic()
        if self.folder is not None and not (self.folder / "best.ckpt").is_file():
            self.best_score = None  # the run goes on in a folder of its own

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the last checkpoint when it is due; if a validation or the epoch's end follows, after that."""
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        before, self._step = self._step, trainer.global_step
        if self._is_due(trainer, before):
            self._due = True
        loop = trainer.fit_loop.epoch_loop
        if self._due and not loop._num_ready_batches_reached() and not validation_follows(trainer):
            self._save(trainer, "last", "batch")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the best checkpoint if this is it."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = float(trainer.callback_metrics[self.monitor])
        better = math.isfinite(score) and (
            self.best_score is None or (score > self.best_score if self.mode == "max" else score < self.best_score)
        )
        if better:
            self.best_score = score
            self._save(trainer, "best", "validated")
        loop = trainer.fit_loop.epoch_loop
        if self._due and not loop._num_ready_batches_reached() and not loop._should_accumulate():
            self._save(trainer, "last", "validated")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last checkpoint if it is due, or the fit ends here."""
        if not (self._due or (trainer.current_epoch + 1) % self.every_n_epochs == 0 or _ends(trainer)):
            self.skipped = True
            return
        position: Position = "epoch" if trainer.fit_loop.epoch_loop._num_ready_batches_reached() else "cut short"
        self._save(trainer, "last", position)
        if not trainer.enable_validation and self.folder is not None:
            if not isinstance(io := trainer.strategy.checkpoint_io, VerifiedCheckpointIO):
                self._save(trainer, "best", position)
            elif trainer.is_global_zero:
                io.save_again(self.folder / "last.ckpt", self.folder / "best.ckpt")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the disk; the last epoch's end has saved, before callbacks could put in other weights."""
        self.wait(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return how good the best is."""
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember how good the best is."""
        self.best_score = state_dict["best_score"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say from where a resumed fit goes on."""
        mark_position(checkpoint, self._position or position_of(trainer))

    def request(self) -> None:
        """Have the last checkpoint written at the end of this step."""
        self._due = True

    def save_now(self, trainer: pl.Trainer, position: Position) -> None:
        """Write the last checkpoint, before its time."""
        self._save(trainer, "last", position)

    def wait(self, trainer: pl.Trainer) -> None:
        """Wait until all checkpoints are on the disk."""
        if isinstance(io := trainer.strategy.checkpoint_io, VerifiedCheckpointIO):
            io.wait()

    def _is_due(self, trainer: pl.Trainer, before: int) -> bool:
        if self.every_n_steps and trainer.global_step // self.every_n_steps > before // self.every_n_steps:
            return True
        if self.every_n_minutes is None:
            return False
        late = trainer.is_global_zero and time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        return trainer.strategy.reduce_boolean_decision(late, all=False)

    def _save(self, trainer: pl.Trainer, name: str, position: Position) -> None:
        if self.folder is None:
            return
        self._position = position
        trainer.save_checkpoint(self.folder / f"{name}.ckpt", weights_only=False)
        self._position = None
        if name == "last":
            self._due, self._saved_at, self.skipped = False, time.monotonic(), False


def _ends(trainer: pl.Trainer) -> bool:
    """Return whether the epoch that ends is the last."""
    epochs, steps = trainer.current_epoch + 1, trainer.global_step
    of_epochs = trainer.max_epochs not in (None, -1) and epochs >= trainer.max_epochs
    return trainer.should_stop or of_epochs or -1 != trainer.max_steps <= steps


def start_of_epoch(trainer: pl.Trainer) -> Position | None:
    """Return where a run stands before the first batch of an epoch; none if the end of the last has been saved."""
    return "start" if any(c.skipped for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)) else None


def position_of(trainer: pl.Trainer) -> Position:
    """Return where a run stands that is saved by something else: a ``ModelCheckpoint``, or code of the user's own."""
    loop = trainer.fit_loop.epoch_loop
    batches = loop.batch_progress.current
    if trainer.validating:
        return "validated"
    if batches.completed == batches.ready:
        return "epoch" if loop._num_ready_batches_reached() else "cut short"
    if validation_follows(trainer):
        return "validation"
    return "epoch" if loop._num_ready_batches_reached() else "batch"


def validation_follows(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer validates after the batch that has just ended."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.enable_validation and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
