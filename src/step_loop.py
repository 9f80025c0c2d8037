"""Lightning's loop over the batches of an epoch, without what a step of ours has no use for.

Per batch Lightning goes through profilers, result collections and wrappers of the optimizer, some 0.4 ms in all: more
than a small network needs on a GPU. This loop takes the same steps, calls the same hooks in the same order and counts
on the same counters; `tests/test_step_loop.py` holds it to that. Whatever it does not know it leaves to Lightning.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

# What is called around a batch, by the callbacks alone: a module that has one of these is left to Lightning.
_HOOKS = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
          "on_before_optimizer_step", "on_train_batch_end")  # fmt: skip
_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_WRAPPERS = ("backward", "optimizer_step", "optimizer_zero_grad", *_TRANSFERS)

Hook = Callable[..., Any]


class StepLoop(_TrainingEpochLoop):
    """Takes a step in a fraction of the time that Lightning's own loop takes on top of the step itself."""

    _hooks: dict[str, list[Hook]] | None = None
    _validates: bool | None = None

    @classmethod
    def install(cls, trainer: pl.Trainer) -> None:
        """Give a Trainer this loop, before it has run."""
        own = trainer.fit_loop.epoch_loop
        trainer.fit_loop.epoch_loop = cls(trainer, own.min_steps, own.max_steps)

    @property
    def global_step(self) -> int:
        """The number of optimizer steps: what callbacks ask for ten times a step."""
        if self._hooks is None:
            return super().global_step
        return self.automatic_optimization.optim_progress.optimizer.step.total.completed

    def run(self, data_fetcher: _DataFetcher) -> None:
        """Take the batches of an epoch."""
        try:
            super().run(data_fetcher)
        finally:
            self._hooks = self._validates = None

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """At the start of an epoch, find out which way to go."""
        super().on_run_start(data_fetcher)
        self._validates = self._should_check_val_epoch()
        if self._is_plain(data_fetcher):
            callbacks = self.trainer.callbacks
            self._hooks = {name: [getattr(c, name) for c in callbacks if _overrides(c, name)] for name in _HOOKS}

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Take one batch, as Lightning would."""
        hooks = self._hooks
        if hooks is None or self.restarting:
            super().advance(data_fetcher)
            return
        trainer = self.trainer
        module = trainer.lightning_module
        optimizer = trainer.optimizers[0]
        self.val_loop.restarting = False
        batch = next(data_fetcher)[0]
        batch_idx = self.batch_progress.current.ready
        self.batch_progress.is_last_batch = data_fetcher.done
        self.batch_progress.increment_ready()
        for hook in hooks["on_train_batch_start"]:
            hook(trainer, module, batch, batch_idx)
        self.batch_progress.increment_started()
        every = trainer.accumulate_grad_batches
        accumulates = self._should_accumulate()
        progress = self.automatic_optimization.optim_progress.optimizer
        output: dict[str, Any] = {}

        def gradients() -> torch.Tensor:
            with _forward_context(trainer):
                output.update(module.training_step(batch, batch_idx))
            loss: torch.Tensor = output["loss"] / every if every > 1 else output["loss"]
            if batch_idx % every == 0:
                progress.zero_grad.increment_ready()
                for hook in hooks["on_before_zero_grad"]:
                    hook(trainer, module, optimizer)
                progress.zero_grad.increment_started()
                optimizer.zero_grad()
                progress.zero_grad.increment_completed()
            for hook in hooks["on_before_backward"]:
                hook(trainer, module, loss)
            loss.backward()  # type: ignore[no-untyped-call]
            for hook in hooks["on_after_backward"]:
                hook(trainer, module)
            output["loss"] = loss.detach()
            if not accumulates:
                for hook in hooks["on_before_optimizer_step"]:
                    hook(trainer, module, optimizer)
                if trainer.gradient_clip_val:
                    algorithm = trainer.gradient_clip_algorithm
                    module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, algorithm)
            return loss

        if accumulates:
            gradients()
        else:
            progress.step.increment_ready()
            optimizer.step(gradients)
            progress.step.increment_completed()
        self.batch_progress.increment_processed()
        if not accumulates and trainer.lr_scheduler_configs:
            self._update_learning_rates("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self._update_learning_rates("epoch", update_plateau_schedulers=False)
        for hook in hooks["on_train_batch_end"]:
            hook(trainer, module, output, batch, batch_idx)
        self.batch_progress.increment_completed()

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate when it is time."""
        trainer = self.trainer
        ends = trainer.should_stop or trainer.received_sigterm
        if self._hooks is None or ends or self._skip_next_val or self._should_check_val_fx(data_fetcher):
            super().on_advance_end(data_fetcher)
        elif not self._should_accumulate():
            self._batches_that_stepped += 1

    def _should_check_val_epoch(self) -> bool:
        """Return what has been found out at the start of the epoch."""
        return super()._should_check_val_epoch() if self._validates is None else self._validates

    def _is_plain(self, data_fetcher: _DataFetcher) -> bool:
        """Return whether this fit asks for nothing that this loop does not do."""
        trainer, module = self.trainer, self.trainer.lightning_module
        precision = trainer.precision_plugin
        scales = isinstance(precision, MixedPrecision) and precision.scaler is not None
        stepped = [c for c in trainer.lr_scheduler_configs if c.interval == "step" and c.reduce_on_plateau]
        return (
            type(trainer.strategy) is SingleDeviceStrategy
            and type(precision) in (Precision, MixedPrecision)
            and not scales
            and isinstance(trainer.profiler, PassThroughProfiler)
            and not isinstance(data_fetcher, _DataLoaderIterDataFetcher)
            and module.automatic_optimization
            and not stepped
            and not any(is_overridden(name, module) for name in (*_HOOKS, *_WRAPPERS))
            and not any(is_overridden(name, trainer.datamodule) for name in _TRANSFERS)
            # Those of a user may log from a hook, which needs what is left out here.
            and all(type(c).__module__.startswith(("src.", "lightning.pytorch.")) for c in trainer.callbacks)
        )


def _overrides(callback: pl.Callback, name: str) -> bool:
    return getattr(type(callback), name) is not getattr(pl.Callback, name) or name in vars(callback)


def _forward_context(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    """Return what a forward pass runs under: autocast, or nothing."""
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision):
        return plugin.autocast_context_manager()
    return torch.enable_grad()
