"""SIGINT, SIGTERM, SIGHUP and SIGUSR1 (SLURM's warning): finish the step, save, and say how to go on.

The handler only sets a flag. The flag is looked at between batches, of training, validation and the sanity check.
"""

import os
import shlex
import signal
import sys
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging

from src.callbacks.checkpoint import Checkpoint, start_of_epoch, validation_follows
from src.callbacks.record import option_of_own
from src.callbacks.resume import Position
from src.errors import Interrupted

_NUMBERS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, n)]


class Signals(pl.Callback):
    """Ends a fit at a step boundary when a signal has come; a second SIGINT ends it at once."""

    between_chunks = True

    def __init__(self) -> None:
        self.received = 0
        self._terminals = [output for output in (1, 2) if os.isatty(output)]
        self._launcher: Any = None

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen; Lightning's own handlers would end the run without a checkpoint and with exit status 0."""
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End between two epochs."""
        if trainer.global_step and self._asked(trainer):
            self.leave(trainer, start_of_epoch(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End after a step; its epoch's end, if nothing else is left to do, comes first."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if self._asked(trainer) and not 0 <= trainer.max_steps <= trainer.global_step:
            if validation_follows(trainer):
                self.leave(trainer, "validation")
            if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
                self.leave(trainer, "batch")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End in the middle of a validation, unless gradients wait for more batches; a resumed fit begins it anew."""
        mid_step = not trainer.sanity_checking and trainer.fit_loop.epoch_loop._should_accumulate()
        over = 0 <= trainer.max_steps <= trainer.global_step  # a resumed fit would do nothing: this one ends by itself
        if mid_step or over or getattr(trainer.fit_loop.epoch_loop, "on_command", False) or not self._asked(trainer):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined] # set outside of __init__
            if isinstance(callback, WeightAveraging):  # it has put the averaged weights in place of the trained ones
                callback.on_validation_epoch_end(trainer, pl_module)
        self.leave(trainer, "epoch" if trainer.sanity_checking else "validation")

    def leave(self, trainer: pl.Trainer, position: Position | None, number: int | None = None) -> None:
        """Save, if that has not been done, and end.

        Args:
            trainer: The Trainer.
            position: Where the run stands; none if it has been saved.
            number: The signal; none for the one that has come, 0 if it is a command that ends the run.

        Raises:
            Interrupted: Always.
        """
        number = (self.received or signal.SIGTERM) if number is None else number
        callback = next((c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)), None)
        if callback is None or callback.folder is None:
            raise Interrupted(number, f"at step {trainer.global_step:,}; nothing was saved")
        if position is not None:
            callback.save_now(trainer, position)
        callback.wait(trainer)
        if not (callback.folder / "last.ckpt").is_file():
            raise Interrupted(number, f"at step {trainer.global_step:,}; nothing was saved")
        path = shlex.quote(os.path.relpath(callback.folder / "last.ckpt"))
        config = option_of_own(trainer, callback.folder.parent)
        raise Interrupted(
            number,
            f"at step {trainer.global_step:,}; go on with: python -m src fit{config} --ckpt_path {path}",
        )

    def _listen(self, trainer: pl.Trainer) -> None:
        """Listen in place of Lightning, which gives the signals back to whoever had them before when the fit ends."""
        self._launcher = trainer.strategy.launcher
        if threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
                    signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h\n")  # the progress bar has hidden the cursor
                sys.stdout.flush()
            if self._launcher is not None:
                self._launcher.kill(signal.SIGKILL)
            os._exit(128 + number)
        if signal.Signals(number).name == "SIGHUP":  # to write to a terminal that is gone would be an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for output in self._terminals:
                os.dup2(nowhere, output)
        self.received = number

    def _asked(self, trainer: pl.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self.received > 0, all=False)
