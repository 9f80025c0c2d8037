"""Steering: a fit is changed while it trains, between two of its steps, and all of it can be done again.

    python -m src steer lightning_logs/version_0 lr=0.02 batch_size=128

What is done is in the run's journal. A fit that goes on from a checkpoint does anew, at its step, what came after the
checkpoint; a replay (``fit --config RUN/config.yaml --replay RUN``) does all of it.
"""

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from src.callbacks.checkpoint import Checkpoint, start_of_epoch
from src.callbacks.controls import controls_of, plan, set_total_steps, snapshot
from src.callbacks.feeding import Feeding
from src.callbacks.publish import Publish
from src.callbacks.resume import Position, data_of, total_steps
from src.callbacks.signals import Signals
from src.checkpoint_io import manifest
from src.classifier import ImageClassifier
from src.errors import Failure
from src.live.commands import Command, Refusal
from src.live.inbox import Inbox
from src.live.journal import FED, SHOWN, Journal
from src.live.replay import Intervention, interventions, names_of, replayed
from src.live.transaction import Control, check, transact
from src.step_loop import StepLoop

_STEERED = ("label_smoothing", "log_every_n_steps", "batch_size")
"""What a checkpoint keeps here: the other values are the optimizer's, which keeps them itself."""

_PAUSE_POLL = 0.1  # seconds


class Steering(pl.Callback):
    """Takes commands between two optimizer steps, and does again what a journal says.

    Args:
        takes_commands: Whether there is an inbox; what a journal says is done in either case.
        replay: The folder of a run whose interventions are done again; none does not.
        changes: What the command line sets otherwise than the checkpoint's config: ``[before, now]`` by dotted key.
        signals: Ends the fit.
        latest: The newest values of the curves, by name.
        feeding: What feeds the fit.
    """

    between_chunks = True

    def __init__(
        self,
        takes_commands: bool,
        replay: Path | None,
        changes: Mapping[str, Any],
        signals: Signals,
        latest: Callable[[], Mapping[str, float]],
        feeding: Feeding,
    ) -> None:
        self.takes_commands, self.replay = takes_commands, replay
        self._said = names_of(changes)
        self._replanned = any(key.startswith(("data.", "trainer.")) for key in changes)
        self._signals, self._latest, self._feeding = signals, latest, feeding
        self._steered: dict[str, Any] = {}
        self._start: tuple[int, set[str]] | None = None
        self._done: list[str] = []
        self._done_step = 0
        self._resized = False
        self._total_steps: int | None = None
        self._lr_ratio = 1.0
        self._script: list[Intervention] = []
        self._inbox: Inbox | None = None
        self._journal: Journal | None = None
        self._controls: dict[str, Control] = {}
        self._paused = False
        self._shown: tuple[int, str] = (-1, "")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what has been steered, and which commands have been done since this very step."""
        done = self._done if self._done_step == trainer.global_step else []
        checkpoint["steering"] = {
            "values": dict(self._steered),
            "lr_ratio": self._lr_ratio,
            "done": list(done),
            "resized": self._resized,
            "total_steps": None if trainer.train_dataloader is None else total_steps(trainer),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with what had been steered, unless the command line says otherwise."""
        if trainer.state.fn != "fit":
            return
        found, data = checkpoint["steering"], data_of(trainer)
        self._done, self._done_step = [str(id) for id in found["done"]], checkpoint["global_step"]
        self._start = self._done_step, set(self._done)
        self._resized, self._total_steps = bool(found["resized"]), found.get("total_steps")
        self._lr_ratio = found.get("lr_ratio", 1.0)
        if type(self._lr_ratio) is not float or not 0 < self._lr_ratio < math.inf:
            raise Failure(f"ckpt_path: the checkpoint's lr_ratio, {self._lr_ratio}, is none")
        self._steered = {k: v for k, v in found["values"].items() if k in _STEERED and k not in self._said}
        if "batch_size" in self._steered:
            size = self._steered["batch_size"]
            most = len(data.split()[0]) + (data.feed_room if data.feed is not None else 0)
            if type(size) is not int or not trainer.world_size <= size <= most:
                raise Failure(f"ckpt_path: the checkpoint's batch_size, {size}, is none that the data has images for")
            data.batch_size = size
        assert isinstance(pl_module, ImageClassifier)
        self._undo(checkpoint["optimizer_states"][0]["param_groups"], pl_module)

    def _undo(self, groups: list[dict[str, Any]], module: ImageClassifier) -> None:
        """Give an optimizer what the command line says, whatever had been steered; its changes are there already."""
        for group, asked in zip(groups, module.asked(), strict=True):
            group |= {name: value for name, value in asked.items() if name in self._said and name != "lr"}
        if "lr" not in self._said or self._lr_ratio == 1:
            return
        scale = module.lr_scale / self._lr_ratio  # what a rollback has cut it by stays
        module.lr_scale, self._lr_ratio = 1.0 if math.isclose(scale, 1) else scale, 1.0
        for group, lr in zip(groups, module.schedule_lrs, strict=True):
            group["lr"] = lr * module.lr_scale

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learn what is to be done again, and begin to take commands."""
        assert isinstance(pl_module, ImageClassifier)
        self._controls = controls_of(trainer, pl_module)
        for name, value in self._steered.items():
            if problem := self._controls[name].problem(value):
                raise Failure(f"ckpt_path: the checkpoint's {name} {value} {problem}")
            if name != "batch_size":
                self._controls[name].write(value)
        if self._replanned and self._total_steps not in (None, total_steps(trainer)):
            self._resized = True
            plan(trainer, pl_module)
        elif self._resized:
            set_total_steps(trainer, pl_module)
        folder = trainer.log_dir  # asked for on all ranks: it is broadcast
        kept = bool(trainer.loggers) and folder is not None and not trainer.fast_dev_run  # type: ignore[attr-defined] # set outside of __init__
        if trainer.is_global_zero:
            live = Path(folder or ".") / "live"
            self._journal = Journal(live / "journal.jsonl") if kept else None
            self._script = self._to_be_done()
            if kept and self.takes_commands:
                self._inbox = Inbox(live, partial(check, self._controls), partial(self._status, trainer))
                self._inbox.open()
        if trainer.world_size > 1:
            self._script = trainer.strategy.broadcast(self._script)
        loop = trainer.fit_loop.epoch_loop
        if isinstance(loop, StepLoop):
            loop.boundary = partial(self._boundary, trainer, pl_module, loop)
            loop.chunk_end = self._script[0].step if self._script else None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was not done again."""
        if self._script and trainer.is_global_zero:
            step = self._script[0].step
            sys.stderr.write(
                f"warning: the run ended before step {step:,}: {len(self._script)} interventions of the journal were "
                f"not done again\n"
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take no more commands."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take no more commands."""
        self._close()

    def _close(self) -> None:
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None

    def _to_be_done(self) -> list[Intervention]:
        """Return what was done after the checkpoint by the process that is no more, and what a replay is to do."""
        step, ids = self._start or (0, set())
        own = interventions(self._journal.read()) if self._journal is not None else []
        script = [done for done in own if done.step >= step and done.id not in ids]
        if self.replay is not None:
            known = {done.id for done in own}
            lines = replayed(self.replay)
            again = interventions(lines)
            for line in (line for line in lines if line["kind"] == "rollback"):
                sys.stderr.write(
                    f"warning: {self.replay} was rolled back at step {line['step']:,}: the replay equals it only if "
                    f"the last checkpoint is then of the same step\n"
                )
            script += [done._replace(own=False) for done in again if done.step >= step and done.id not in known | ids]
        return sorted(script, key=lambda done: done.step)

    def _boundary(self, trainer: pl.Trainer, module: ImageClassifier, loop: StepLoop) -> None:
        """Do what is due between two steps."""
        while self._script and self._script[0].step <= trainer.global_step:
            self._redo(trainer, module, loop, self._script.pop(0))
            loop.chunk_end = self._script[0].step if self._script else None
        if self._waiting(trainer):
            self._take(trainer, module, loop)
        while self._paused or self._feeding.starves(trainer):
            if trainer.strategy.reduce_boolean_decision(self._signals.received > 0, all=False):
                self._signals.leave(trainer, _position(trainer))
            if self._paused and self._inbox is not None:
                self._inbox.wait(_PAUSE_POLL)
            else:
                self._feeding.wait(_PAUSE_POLL)
            if self._waiting(trainer):
                self._take(trainer, module, loop)

    def _waiting(self, trainer: pl.Trainer) -> bool:
        waiting = self._inbox is not None and bool(self._inbox.waiting)
        waiting = waiting or (self._feeding.waiting and not self._paused and not self._joins_again)
        if trainer.world_size == 1 or not (self.takes_commands or data_of(trainer).feed is not None):
            return waiting
        return trainer.strategy.reduce_boolean_decision(waiting, all=False)

    @property
    def _joins_again(self) -> bool:
        """Whether what has been fed is yet to join again; what is new waits, as ids are given in this order."""
        return any(done.own and done.kind in FED for done in self._script)

    def _take(self, trainer: pl.Trainer, module: ImageClassifier, loop: StepLoop) -> None:
        """Do the commands that have come, and let what was fed join; all ranks do the same."""
        self._take_commands(trainer, module, loop)
        if self._paused or self._joins_again:
            return
        items = self._feeding.items()
        if trainer.world_size > 1 and data_of(trainer).feed is not None:
            items = trainer.strategy.broadcast(items)
        record = partial(self._record, trainer, journaled=False, sync=False)
        if items and self._feeding.take(trainer, module, items, record):
            self._resized = True

    def _take_commands(self, trainer: pl.Trainer, module: ImageClassifier, loop: StepLoop) -> None:
        commands: list[Command] = []
        while self._inbox is not None and self._inbox.waiting:
            commands.append(self._inbox.waiting.popleft())
        if trainer.world_size > 1:
            commands = trainer.strategy.broadcast(commands)
        while commands:
            command = commands.pop(0)
            try:
                answer = self._do(trainer, module, loop, command)
            except Refusal as refusal:
                if self._inbox is not None:
                    self._inbox.refuse(command, str(refusal))
                continue
            except BaseException:  # the run ends here
                for other in commands:
                    if self._inbox is not None:
                        self._inbox.refuse(other, "the run has ended")
                raise
            if self._inbox is not None:
                self._inbox.done(command, answer)

    def _do(self, trainer: pl.Trainer, module: ImageClassifier, loop: StepLoop, command: Command) -> dict[str, Any]:
        """Do a command, journal it, and return the answer.

        Raises:
            Refusal: If it cannot be done. Nothing has been changed.
        """
        if command.set:
            return {"changes": self._set(trainer, module, command.set, command.actor, command.id)}
        if command.do == "evaluate":
            return {"result": self._evaluate(trainer, loop, command.actor, command.id)}
        if command.do in ("checkpoint", "stop"):
            result = {"path": self._save(trainer, command.do)}
            self._note(trainer, command.do, command.actor, command.id, result)
            if command.do == "stop":
                if self._inbox is not None:
                    self._inbox.done(command, {"result": result})
                self._signals.leave(trainer, None, 0)
            return {"result": result}
        if self._paused == (command.do == "pause"):
            raise Refusal(f"{command.do}: the run is {'paused already' if self._paused else 'not paused'}")
        self._note(trainer, "unpause" if command.do == "resume" else command.do, command.actor, command.id)
        self._paused = command.do == "pause"
        if self._paused:  # who looks at a run that stands still is to see what it is, not what it was some steps ago
            for callback in trainer.callbacks:  # type: ignore[attr-defined] # set outside of __init__
                if isinstance(callback, Publish):
                    callback.publish_now(trainer, module)
        return {}

    def _save(self, trainer: pl.Trainer, what: str) -> str:
        """Write the last checkpoint, and return where it is."""
        checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)), None)
        if checkpoint is None or checkpoint.folder is None:
            raise Refusal(f"{what}: this run keeps no checkpoints")
        position, path, error = _position(trainer), checkpoint.folder / "last.ckpt", ""
        try:
            if position is not None:
                checkpoint.save_now(trainer, position)
            checkpoint.wait(trainer)
            if position is None and not (path.is_file() and manifest(path).step == trainer.global_step):
                error = f"{what}: there is no checkpoint of this step; ask again after the next one"
        except Failure as failure:
            error = f"{what}: {failure}"
        if trainer.world_size > 1:  # what one process does, all do
            error = trainer.strategy.broadcast(error)
        if error:
            raise Refusal(error)
        return str(path)

    def _redo(self, trainer: pl.Trainer, module: ImageClassifier, loop: StepLoop, done: Intervention) -> None:
        """Do again what a journal says."""
        try:
            if done.kind == "evaluate":
                self._evaluate(trainer, loop, done.actor, done.id, done.own)
                return
            if done.kind in FED:
                record = partial(self._record, trainer, journaled=done.own, sync=False)
                self._feeding.redo(trainer, module, done, record)
                self._resized = True
                return
            changes = self._set(trainer, module, done.wanted, done.actor, done.id, done.own)
        except Refusal as refusal:
            raise Failure(f"journal: step {done.step:,}: {refusal}") from refusal
        for name, (_, effective) in changes.items():
            if effective != done.effective[name] and trainer.is_global_zero:
                sys.stderr.write(
                    f"warning: {name} is {effective} since step {done.step:,}, where the journal says "
                    f"{done.effective[name]}: this is not the same run\n"
                )

    def _set(
        self,
        trainer: pl.Trainer,
        module: ImageClassifier,
        wanted: Mapping[str, Any],
        actor: str,
        id: str,
        journaled: bool = False,
    ) -> dict[str, tuple[Any, Any]]:
        """Set values, all or none, and show them; journal them unless they are in the journal."""

        def commit(changes: Mapping[str, tuple[Any, Any]]) -> None:
            lines = [
                {"name": name, "before": before, "requested": wanted[name], "effective": effective}
                for name, (before, effective) in changes.items()
            ]
            self._record(trainer, "set", lines, actor, id, journaled)

        changes = transact(self._controls, wanted, partial(snapshot, trainer, module), commit)
        self._steered |= {name: effective for name, (_, effective) in changes.items() if name in _STEERED}
        self._resized = self._resized or "batch_size" in changes
        if "lr" in changes:
            self._lr_ratio *= changes["lr"][1] / changes["lr"][0]
        if trainer.is_global_zero:
            numbers = {f"steer/{k}": float(new) for k, (_, new) in changes.items() if isinstance(new, (int, float))}
            for logger in trainer.loggers:
                logger.log_metrics(numbers, trainer.global_step)
        text = ", ".join(f"{name} {_text(old)} -> {_text(new)}" for name, (old, new) in changes.items())
        self._show(trainer, f"{text} ({actor})")
        return changes

    def _evaluate(
        self, trainer: pl.Trainer, loop: StepLoop, actor: str, id: str, journaled: bool = False
    ) -> dict[str, float]:
        """Validate now; the journal knows before a schedule or a checkpoint can go by what is found."""
        if not trainer.enable_validation:
            raise Refusal("evaluate: this run has no val split")
        self._note(trainer, "evaluate", actor, id, journaled=journaled)
        loop.validate()
        return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}

    def _note(
        self,
        trainer: pl.Trainer,
        kind: str,
        actor: str,
        id: str,
        effective: Mapping[str, Any] | None = None,
        journaled: bool = False,
    ) -> None:
        """Journal what is done, unless it is in the journal, and show it."""
        shown = SHOWN.get(kind, kind)
        try:
            self._record(trainer, kind, [{"effective": effective}], actor, id, journaled)
        except OSError as error:
            raise Refusal(f"{shown}: it cannot be journaled ({error.strerror})") from error
        self._show(trainer, f"{shown} ({actor})")

    def _record(
        self,
        trainer: pl.Trainer,
        kind: str,
        lines: list[dict[str, Any]],
        actor: str,
        id: str,
        journaled: bool,
        sync: bool = True,
    ) -> None:
        """Journal lines that are not in the journal yet, and remember that they are done."""
        error = None
        if not journaled and self._journal is not None:
            try:
                self._journal.extend(trainer.global_step, kind, lines, actor=actor, id=id, sync=sync)
            except OSError as found:
                error = found
        if trainer.world_size > 1:  # what one process undoes, all do
            error = trainer.strategy.broadcast(error)
        if error is not None:
            raise error
        if self._done_step != trainer.global_step:
            self._done, self._done_step = [], trainer.global_step
        self._done.append(id)

    def _show(self, trainer: pl.Trainer, text: str) -> None:
        """Tell in the terminal and in TensorBoard what has been done."""
        if not trainer.is_global_zero:
            return
        encoding = sys.stdout.encoding or "utf-8"  # which may not have all that is in a name
        shown, step = text if text.isprintable() else ascii(text), trainer.global_step
        line = f"step {step:,}: {shown}".encode(encoding, "backslashreplace").decode(encoding)
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.save()
            if step == self._shown[0]:  # TensorBoard shows one text a step
                shown = f"{self._shown[1]}  \n{shown}"
            self._shown = step, shown
            trainer.logger.experiment.add_text("steer", shown, step)

    def _status(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return what `status` is answered with; called off the training thread."""
        waiting = len(self._inbox.waiting) if self._inbox is not None else 0
        return {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "paused": self._paused,
            "waiting": waiting,
            "values": {name: control.read() for name, control in self._controls.items()},
            "metrics": dict(self._latest()),
        }


def _position(trainer: pl.Trainer) -> Position | None:
    """Return where the run stands between two steps; none if that has been saved."""
    return "validated" if trainer.fit_loop.epoch_loop.batch_progress.current.ready else start_of_epoch(trainer)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
