"""Lightning's loop over the batches of an epoch, without what a step of ours has no use for.

Per batch Lightning goes through profilers, result collections and wrappers of the optimizer, some 0.4 ms in all: more
than a small network needs on a GPU. This loop takes the same steps, calls the same hooks in the same order and counts
on the same counters; `tests/test_step_loop.py` holds it to that. Whatever it does not know it leaves to Lightning.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from src.errors import UsageError
from src.step_graph import StepGraph, obstacle

# What is called around a batch, by the callbacks alone: a module that has one of these is left to Lightning.
_HOOKS = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
          "on_before_optimizer_step", "on_train_batch_end")  # fmt: skip
_AROUND = ("on_train_batch_start", "on_train_batch_end")
_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_WRAPPERS = ("backward", "optimizer_step", "optimizer_zero_grad", *_TRANSFERS)

Hook = Callable[..., Any]


class Epoch(NamedTuple):
    """What the steps of an epoch need, looked up once: a small network's step takes less time than looking.

    Attributes:
        optimizer: The only one.
        parameters: All that it trains.
        schedule: What is stepped with it, if that is a single schedule; None leaves schedules to Lightning.
        every: Batches whose gradients an optimizer step gathers.
        autocast: What a forward pass runs under.
        inner_step: The optimizer's step as it is called within a chunk.
        hooks: The callbacks' methods, by name.
        inner_hooks: Those that are called within a chunk too.
        graph: What takes the steps by recordings; none takes them one piece after the other.
    """

    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]
    schedule: Any
    every: int
    autocast: AbstractContextManager[Any]
    inner_step: Callable[[Callable[[], torch.Tensor]], Any]
    hooks: dict[str, list[Hook]]
    inner_hooks: dict[str, list[Hook]]
    graph: StepGraph | None


class StepLoop(_TrainingEpochLoop):
    """Takes a step in a fraction of the time that Lightning's own loop takes on top of the step itself.

    Attributes:
        chunk_size: Optimizer steps that are taken in one go, at least 1. Chunks end at multiples of it, and wherever
            a validation or the epoch's end follows. Within one, callbacks that say ``between_chunks = True`` are not
            called for each batch, and the guard does not look. Weights and curves are the same whatever the size.
            A callback of your own that says ``between_chunks``, True or False, and logs nothing through the module
            from its batch hooks, is taken along; any other has the fit left to Lightning's own loop.
        cuda_graph: Whether steps are recorded, where they can be, see `src.step_graph`. Callbacks' hooks around the
            backward pass are then called after the optimizer's step, and batches come to them without the content of
            their images, see `src.data.loader.ResidentLoader.whole`.
        mid_chunk: Whether the step that is being taken is followed by another of the same chunk.
        boundary: Called between two optimizer steps, before the next batch is drawn, when all that belongs to the
            last step (validation, checkpoint) has been done; but not between those of a chunk.
        on_command: Whether a validation is under way that `validate` has begun.
        chunk_end: A step that a chunk ends at besides, if something is to be done after it.
    """

    chunk_size = 1
    cuda_graph = False
    mid_chunk = False
    boundary: Callable[[], None] | None = None
    on_command = False
    chunk_end: int | None = None
    _first = True
    _epoch: Epoch | None = None
    _graph: StepGraph | None = None
    _validates: bool | None = None

    @classmethod
    def install(cls, trainer: pl.Trainer, chunk_size: int = 1, cuda_graph: bool = False) -> None:
        """Give a Trainer this loop, before it has run."""
        own = trainer.fit_loop.epoch_loop
        loop = cls(trainer, own.min_steps, own.max_steps)
        loop.chunk_size, loop.cuda_graph = chunk_size, cuda_graph
        trainer.fit_loop.epoch_loop = loop

    @property
    def global_step(self) -> int:
        """The number of optimizer steps: what callbacks ask for ten times a step."""
        if self._epoch is None:
            return super().global_step
        return self.automatic_optimization.optim_progress.optimizer.step.total.completed

    def run(self, data_fetcher: _DataFetcher) -> None:
        """Take the batches of an epoch."""
        try:
            super().run(data_fetcher)
        finally:
            self._epoch = self._validates = None

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """At the start of an epoch, find out which way to go."""
        super().on_run_start(data_fetcher)
        self._validates = self._should_check_val_epoch()
        self.mid_chunk, self._first = False, True
        if self._is_plain(data_fetcher):
            trainer, callbacks = self.trainer, self.trainer.callbacks
            optimizer = trainer.optimizers[0]
            stepped = [c for c in trainer.lr_scheduler_configs if c.interval == "step"]
            alone = len(trainer.lr_scheduler_configs) == len(stepped) == 1 and stepped[0].frequency == 1
            waiting = [c for c in callbacks if getattr(c, "between_chunks", False)]
            hooks = {name: _methods(name, callbacks) for name in _HOOKS}
            inner = {name: _methods(name, [c for c in callbacks if c not in waiting]) for name in _AROUND}
            autocast = _forward_context(trainer)
            if self.cuda_graph and self._graph is None:
                self._graph = self._build_graph(autocast)
            if self._graph is not None:
                self._graph.begin_epoch()
            self._epoch = Epoch(
                optimizer=optimizer,
                parameters=[p for group in optimizer.param_groups for p in group["params"]],
                schedule=stepped[0].scheduler if alone else None,
                every=trainer.accumulate_grad_batches,
                autocast=autocast,
                inner_step=_inner_step(optimizer),
                hooks=hooks,
                inner_hooks=hooks | inner,
                graph=self._graph,
            )
        elif self.chunk_size > 1:
            self.chunk_size = 1
            if self.trainer.is_global_zero:
                why = "more is for one device, without a profiler or callbacks of your own"
                sys.stdout.write(f"note: chunk_size: 1 is taken; {why}\n")

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Take batches, as Lightning would, up to the next that is followed by more than another batch."""
        epoch = self._epoch
        between = not self.restarting or not self._should_check_val_fx(data_fetcher)
        if between and self.boundary is not None and not self._mid_step():
            self.boundary()
        if epoch is None or (self.restarting and epoch.graph is None):
            super().advance(data_fetcher)
            return
        if self.restarting and self._goes_on_after_training(data_fetcher):
            return
        self.val_loop.restarting = False
        trainer = self.trainer
        while True:
            accumulates = self._take(data_fetcher, epoch)
            if not self.mid_chunk and (
                self.done
                or trainer.should_stop
                or trainer.received_sigterm
                or self._skip_next_val
                or self.restarting
                or self._should_check_val_fx(data_fetcher)
            ):
                return
            if not accumulates:
                self._batches_that_stepped += 1
                if self.boundary is not None and not self.mid_chunk:
                    self.boundary()

    def forget_recordings(self) -> None:
        """Have steps recorded anew: the tensors of the optimizer's state have been replaced."""
        if self._graph is not None:
            self._graph.forget()

    def validate(self) -> None:
        """Validate now, between two steps, as `on_advance_end` does when it is due."""
        trainer = self.trainer
        self.val_loop.restarting = False  # of a fit that was resumed: this is not the validation it was in
        self.on_command = True
        trainer.validating = True
        first = trainer._logger_connector._first_loop_iter
        trainer.lightning_module.on_validation_model_zero_grad()
        self.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first
        self.on_command = False

    def _build_graph(self, autocast: AbstractContextManager[Any]) -> StepGraph | None:
        """Return what records steps; if they cannot be, say why, once."""
        if reason := obstacle(self.trainer, self.trainer.strategy.root_device.type):
            self.cuda_graph = False
            if self.trainer.is_global_zero and self.trainer.strategy.root_device.type == "cuda":
                sys.stdout.write(f"note: cuda_graph: steps are not recorded: {reason}\n")
            return None
        return StepGraph(self.trainer, autocast)

    def _goes_on_after_training(self, data_fetcher: _DataFetcher) -> bool:
        """Return whether a resumed fit goes on with what follows a batch; as Lightning's own `advance` begins."""
        if self._should_check_val_fx(data_fetcher):
            if self.val_loop.restarted_mid_evaluation:
                return True
            if self.restarted_on_last:
                self._skip_next_val = True
                return True
            self.val_loop.increment_progress_to_evaluation_end()
        return False

    def _mid_step(self) -> bool:
        """Return whether the gradients of batches before this one wait for its own."""
        return bool(self.batch_progress.current.ready % self.trainer.accumulate_grad_batches)

    def _take(self, data_fetcher: _DataFetcher, epoch: Epoch) -> bool:
        """Take one batch; return whether its gradient waits for those of others."""
        trainer, optimizer = self.trainer, epoch.optimizer
        module = trainer.lightning_module
        progress = self.automatic_optimization.optim_progress.optimizer
        batches = self.batch_progress
        batch = next(data_fetcher)[0]
        batch_idx = batches.current.ready
        batches.is_last_batch = data_fetcher.done
        batches.increment_ready()
        accumulates = self._should_accumulate()
        self.mid_chunk = self.chunk_size > 1 and not self._ends_chunk(data_fetcher, accumulates)
        hooks = epoch.hooks if self._first else epoch.inner_hooks
        for hook in hooks["on_train_batch_start"]:
            hook(trainer, module, batch, batch_idx)
        batches.increment_started()
        output: dict[str, Any] = {}

        def recorded(graph: StepGraph) -> None:
            output.update(graph.take(batch))
            for counts in (progress.zero_grad, progress.step):
                counts.increment_ready()
            progress.zero_grad.increment_started()
            for hook in hooks["on_before_zero_grad"]:
                hook(trainer, module, optimizer)
            for hook in hooks["on_before_backward"]:
                hook(trainer, module, output["loss"])
            for hook in hooks["on_after_backward"]:
                hook(trainer, module)
            for hook in hooks["on_before_optimizer_step"]:
                hook(trainer, module, optimizer)
            for counts in (progress.zero_grad, progress.step):
                counts.increment_completed()

        def gradients() -> torch.Tensor:
            with epoch.autocast:
                output.update(module.training_step(batch, batch_idx))
            loss: torch.Tensor = output["loss"] / epoch.every if epoch.every > 1 else output["loss"]
            if batch_idx % epoch.every == 0:
                progress.zero_grad.increment_ready()
                for hook in hooks["on_before_zero_grad"]:
                    hook(trainer, module, optimizer)
                progress.zero_grad.increment_started()
                for parameter in epoch.parameters:  # as `zero_grad` does, at a tenth of its time
                    parameter.grad = None
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

        if epoch.graph is not None:
            recorded(epoch.graph)
        elif accumulates:
            gradients()
        else:
            progress.step.increment_ready()
            step: Hook = optimizer.step if self._first else epoch.inner_step
            step(gradients)
            if not output:
                name = type(optimizer).__name__
                raise UsageError(f"model.optimizer: {name}.step does not call its closure, which finds the gradients")
            progress.step.increment_completed()
        batches.increment_processed()
        if not accumulates and epoch.schedule is not None:
            self.scheduler_progress.increment_ready()
            module.lr_scheduler_step(epoch.schedule, None)
            self.scheduler_progress.increment_completed()
        elif not accumulates and trainer.lr_scheduler_configs:
            self._update_learning_rates("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self._update_learning_rates("epoch", update_plateau_schedulers=False)
        hooks = epoch.inner_hooks if self.mid_chunk else epoch.hooks
        for hook in hooks["on_train_batch_end"]:
            hook(trainer, module, output, batch, batch_idx)
        batches.increment_completed()
        self._first = not self.mid_chunk
        return accumulates

    def _ends_chunk(self, data_fetcher: _DataFetcher, accumulates: bool) -> bool:
        """Return whether the batch that has just been drawn is the last of its chunk."""
        step = self.global_step + 1
        ends = step % self.chunk_size == 0 or step in (self.max_steps, self.chunk_end)
        steps = not accumulates and ends
        return steps or self._num_ready_batches_reached() or self._should_check_val_fx(data_fetcher)

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
            and type(trainer.optimizers[0]).zero_grad is torch.optim.Optimizer.zero_grad  # it is done here
            and module.automatic_optimization
            and not stepped
            and not any(is_overridden(name, module) for name in (*_HOOKS, *_WRAPPERS))
            and not any(is_overridden(name, trainer.datamodule) for name in _TRANSFERS)
            # Those of a user may log from a hook, which needs what is left out here, if they do not say that they know.
            and all(
                type(c).__module__.startswith(("src.", "lightning.pytorch.")) or hasattr(c, "between_chunks")
                for c in trainer.callbacks
            )
        )


def _methods(name: str, callbacks: list[pl.Callback]) -> list[Hook]:
    """Return a method of all callbacks that have one of their own."""
    own = [c for c in callbacks if getattr(type(c), name) is not getattr(pl.Callback, name) or name in vars(c)]
    return [getattr(callback, name) for callback in own]


def _inner_step(optimizer: torch.optim.Optimizer) -> Callable[[Callable[[], torch.Tensor]], Any]:
    """Return an optimizer's step without what torch wraps it in for profilers and hooks, if nobody has set a hook."""
    wrapped: Any = type(optimizer).step
    hooks = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks,
             optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)  # fmt: skip
    if any(hooks) or not getattr(wrapped, "hooked", False):
        return cast(Hook, optimizer.step)
    optimizer._opt_called = True  # type: ignore[attr-defined] # else a schedule warns of a first step that it has not seen
    return partial(wrapped.__wrapped__, optimizer)


def _forward_context(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    """Return what a forward pass runs under: autocast, or nothing."""
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision):
        return plugin.autocast_context_manager()
    return torch.enable_grad()
