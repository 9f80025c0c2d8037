"""A run's folder, and what is kept in it of what was asked for: config.yaml, and the hparams of TensorBoard."""

import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from filelock import FileLock, Timeout
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from src.checkpoint_io import commit
from src.errors import Failure
from src.trust import TRUSTED, class_paths, elsewhere

if TYPE_CHECKING:  # TensorBoard is imported where it is used: the help does without
    from torch.utils.tensorboard import SummaryWriter

_THICK, _HELD = 0.05, 0.25
"""Points come thick if they are less than so many seconds apart; they are then written together, once so many seconds
have passed: with the next point, a validation, a checkpoint or the end of the run, whichever comes first."""


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger with points on disk within a second, in a folder that belongs to this process alone.

    Args:
        root: The folder that holds ``lightning_logs``; a new run takes the next free version there.
        resumed: The folder of a run that goes on.
        step: The step it goes on from: points beyond it, of a process that was killed, are taken from the curves.
    """

    def __init__(self, root: Path, resumed: Path | None = None, step: int = 0) -> None:
        if resumed is None:
            super().__init__(root, name="lightning_logs", default_hp_metric=False, flush_secs=1)
        else:
            super().__init__(
                resumed.parent, "", resumed.name, default_hp_metric=False, flush_secs=1, purge_step=step + 1
            )
        self._lock: FileLock | None = None
        self._held: list[tuple[Mapping[str, float], int | None, float]] = []
        self._logged = self._wrote = 0.0
        threading.excepthook = _tell_of_thread

    @property
    def version(self) -> int | str:
        """The run's version; until something is written, the one that is free now."""
        return self._get_next_version() if self._version is None else self._version

    @property
    def experiment(self) -> "SummaryWriter":
        """TensorBoard's writer; to ask for it is to take the folder."""
        if _get_rank() in (0, None) and self._lock is None:
            self._take_folder()
        writer: SummaryWriter = super().experiment
        return writer

    def _take_folder(self) -> None:
        """Make or enter the folder, so that no other process can.

        Raises:
            Failure: If it cannot be written to, or another process trains the run that it holds.
        """
        folder = Path(self.log_dir)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            while self._version is None:
                try:
                    folder.mkdir()  # atomic: of two runs that start at once one gets the next version
                    self._version = int(folder.name.removeprefix("version_"))
                except FileExistsError:
                    folder = folder.with_name(f"version_{int(folder.name.removeprefix('version_')) + 1}")
            self._lock = FileLock(folder / ".lock")
            self._lock.acquire(blocking=False)
            _wait_for_a_later_name(folder)
        except Timeout as error:
            raise Failure(
                f"{folder}: another process is training this run; stop it first, or start a new one"
            ) from error
        except OSError as error:
            raise Failure(
                f"{folder} cannot be written to ({error.strerror}); name another place: --trainer.default_root_dir DIR"
            ) from error

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write all scalars of a step in one record, which takes a fraction of the time that one each would."""
        now = time.monotonic()
        self._held.append((metrics, step, time.time()))
        # Points that come thick are written together, which takes half the time.
        if now - self._logged > _THICK or now - self._wrote > _HELD:
            self._write(now)
        self._logged = now

    def _write(self, now: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._wrote = now
        held, self._held = self._held, []
        for metrics, step, wall_time in held:
            values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
            self.experiment._get_file_writer().add_summary(Summary(value=values), step, wall_time)  # type: ignore[no-untyped-call]

    @rank_zero_only
    def discard(self) -> None:
        """Delete the folder of a run that could not begin; but not images that have been fed to it."""
        if self._lock is not None and not any((Path(self.log_dir) / "live" / "segments").glob("*")):
            shutil.rmtree(self.log_dir, ignore_errors=True)

    @rank_zero_only
    def save(self) -> None:
        """Write to disk what was logged."""
        self._write(time.monotonic())
        self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the writer and leave the folder."""
        try:
            if self._experiment is not None:
                self._write(time.monotonic())
                super().finalize(status)
        except OSError:
            if status != "failed":  # else what failed first is told
                raise
        finally:
            if self._lock is not None:
                self._lock.release()


_tell_of_any_thread = threading.excepthook


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Leave it to the fit to tell what TensorBoard's thread cannot write: it is told with the next that it writes."""
    if type(failed.thread).__name__ != "_AsyncWriterThread" or not isinstance(failed.exc_value, OSError):
        _tell_of_any_thread(failed)


def _wait_for_a_later_name(folder: Path) -> None:
    """Let the second pass in which the newest events file was made: TensorBoard reads them in the order of their names.

    Such a name begins with the second, and in the same one it is the process's number that decides.
    """
    seconds = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(second) for second in seconds if second.isdigit()), default=0)
    now = time.time()
    if newest == int(now):
        time.sleep(newest + 1 - now)


class RunRecord(SaveConfigCallback):
    """Writes the whole config of a fit, so that ``fit --config RUN/config.yaml`` starts the same run again.

    A run that is resumed keeps its config.yaml; what has changed is in its journal. Who wants to steer or to watch the
    run needs its folder now, so that is told at once.
    """

    _text = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write config.yaml, and say where the run is; a run's folder belongs to its fit alone."""
        if stage != "fit" or not trainer.loggers:
            return
        log_dir = trainer.log_dir  # asked for on all ranks: it is broadcast; a logger of the user's may have none
        if log_dir is None or not trainer.is_global_zero:
            return
        path = Path(log_dir) / "config.yaml"
        if not path.is_file():
            commit(self._config_text().encode(), path)
        sys.stdout.write(f"run: {os.path.relpath(log_dir)}\n")
        sys.stdout.flush()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the config, as YAML, into the checkpoint: it can be tested without naming a config."""
        checkpoint["config"] = self._config_text()

    def _config_text(self) -> str:
        if not self._text:  # it takes a tenth of a second
            config = self.config.clone()
            for key in ("ckpt_path", "new_run"):  # of the command, not of the run
                config.pop(key, None)
            self._text = self.parser.dump(config, skip_unset=False, format="yaml")
        return self._text

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the hyper-parameters in TensorBoard; the last points of the curves stand beside them as results."""
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            from torch.utils.tensorboard.summary import hparams

            curves = ["val/acc", "val/loss"] if trainer.enable_validation else ["train/acc", "train/loss"]
            writer = trainer.logger.experiment._get_file_writer()
            for summary in hparams(flatten(self.config.as_dict()), dict.fromkeys(curves, 0.0)):  # type: ignore[no-untyped-call]
                writer.add_summary(summary)


def option_of_own(trainer: pl.Trainer, run: Path) -> str:
    """Return what a command needs beside a checkpoint whose config names classes of the user's own, or other places.

    They are not trusted in a checkpoint, but are in a config.
    """
    record = next((c for c in trainer.callbacks if isinstance(c, RunRecord)), None)  # type: ignore[attr-defined] # set outside of __init__
    if record is None:
        return ""
    config = record.config.as_dict()
    own = any(not name.startswith(TRUSTED) for name in class_paths(config))
    if not own and all(key == "trainer/default_root_dir" for key, _ in elsewhere(config, [Path(), run])):
        return ""
    return f" --config {shlex.quote(os.path.relpath(run / 'config.yaml'))}"


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
