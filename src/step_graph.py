"""A whole optimizer step as one CUDA graph: augmentation, forward pass, backward pass, optimizer.

    python -m src fit --config configs/cifar10.yaml --cuda_graph true

A step of a network is hundreds of small pieces of work, and to start each of them takes the host longer than a GPU
takes to do it. Recorded once, they are started all at once. What changes from step to step (which images, the lr, the
seed of what is drawn at random) is written where the recorded work reads it; what changes seldom (the size of a batch
or of its images, a steered momentum, a layer that is frozen) makes a recording of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakSet

import lightning.pytorch as pl
import torch
from torch import Tensor

from src.classifier import ImageClassifier
from src.data.loader import Batch, ResidentLoader
from src.optim import DecoupledSGD, Muon

WARM_UP = 2
"""Steps of each kind that are taken one piece after the other before one is recorded: they load what libraries load at
their first use, make the optimizer's state, and let torch.compile compile."""
_MOST = 8  # recordings that are kept


class Done(NamedTuple):
    """What a step leaves behind: what it measured, by name, and the gradients of the parameters."""

    measured: dict[str, Tensor]
    gradients: list[Tensor | None]


Body = Callable[[], Done]
Recorded = tuple[Done, Callable[[], None]]


class StepGraph:
    """Takes the steps of a fit, most of them by recordings.

    After a step the gradients are where they always are, so that who looks at them after the optimizer's step (the
    guard of a fit on a GPU is late anyway) sees them.

    Args:
        trainer: The Trainer, when it trains.
        autocast: What a forward pass runs under.
        recorder: Records what a function does; returns the function's result, and what does it all again and writes
            that result anew.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        autocast: AbstractContextManager[Any],
        recorder: Callable[[Body], Recorded] | None = None,
    ) -> None:
        module, loader = trainer.lightning_module, trainer.train_dataloader
        assert isinstance(module, ImageClassifier) and isinstance(loader, ResidentLoader)
        self.trainer, self.module, self.loader, self.autocast = trainer, module, loader, autocast
        self.optimizer = trainer.optimizers[0]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._recorder = recorder or Recorder(loader.labels.device)
        self._lrs = [torch.zeros((), device=loader.labels.device) for _ in self.optimizer.param_groups]
        self._kind: tuple[Any, ...] = ()
        self._warm: dict[Any, int] = {}
        self._recorded: dict[Any, tuple[Tensor, Done, Callable[[], None]]] = {}

    def begin_epoch(self) -> None:
        """See what is frozen now, and have the loader leave the cutting of batches to the recordings."""
        self.loader.defers = True
        frozen = tuple(p.requires_grad for p in self.parameters)
        self._kind = (self.loader.small_now, frozen, tuple(m.training for m in self.module.modules()))

    def forget(self) -> None:
        """Drop all recordings: tensors that they read or write have been replaced."""
        self._warm, self._recorded = {}, {}

    def take(self, batch: Batch) -> dict[str, Tensor]:
        """Take an optimizer step on a batch whose images have not been cut, and return what it measured."""
        groups = self.optimizer.param_groups
        for lr, group in zip(self._lrs, groups, strict=True):
            lr.fill_(group["lr"])
        module = self.module
        key = (len(batch.ids), self._kind, module.label_smoothing, module.proxy_learns, *map(_settings, groups))
        if key not in self._recorded:
            if self._warm.get(key, 0) < WARM_UP:
                self._warm[key] = self._warm.get(key, 0) + 1
                with aside(batch.ids.device):
                    return self._step(batch.ids).measured
            if len(self._recorded) == _MOST:
                self.forget()
            ids = batch.ids.clone()
            self._recorded[key] = ids, *self._recorder(lambda: self._step(ids))
        ids, done, replay = self._recorded[key]
        ids.copy_(batch.ids)
        replay()
        for parameter, gradient in zip(self.parameters, done.gradients, strict=True):
            parameter.grad = gradient  # each recording has its own
        return {name: tensor.clone() for name, tensor in done.measured.items()}

    def _step(self, ids: Tensor) -> Done:
        trainer, groups = self.trainer, self.optimizer.param_groups
        images, labels = self.loader.cut(ids)
        for parameter in self.parameters:
            parameter.grad = None
        with self.autocast:
            measured = self.module.training_step(Batch(images, labels, ids, len(ids)), 0)
        measured["loss"].backward()  # type: ignore[no-untyped-call]
        if trainer.gradient_clip_val:
            algorithm = trainer.gradient_clip_algorithm
            self.module.configure_gradient_clipping(self.optimizer, trainer.gradient_clip_val, algorithm)
        numbers = [group["lr"] for group in groups]
        try:
            for group, lr in zip(groups, self._lrs, strict=True):
                group["lr"] = lr
            self.optimizer.step()
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number
        return Done({k: v.detach() for k, v in measured.items()}, [p.grad for p in self.parameters])


def obstacle(trainer: pl.Trainer, device: str) -> str | None:
    """Return why the steps of a fit cannot be recorded, or none if they can.

    Args:
        trainer: The Trainer, when it trains.
        device: The type of its device.
    """
    module, loader, optimizer = trainer.lightning_module, trainer.train_dataloader, trainer.optimizers[0]
    fused = type(optimizer) in (torch.optim.SGD, DecoupledSGD) and all(g["fused"] for g in optimizer.param_groups)
    if device != "cuda":
        return "it is for a CUDA GPU"
    if type(module) is not ImageClassifier or not isinstance(loader, ResidentLoader) or loader.mix is not None:
        return "MixUp and CutMix draw on the host"
    if loader.growth is not None:
        return "data.feed changes what would be recorded"
    if not (fused or type(optimizer) is Muon):
        return "of the optimizers only SGD with fused: true, DecoupledSGD and Muon read their lr on the device"
    if trainer.accumulate_grad_batches != 1:
        return "trainer.accumulate_grad_batches must be 1"
    if module.hparams["compile"] not in (None, "default"):
        return "model.compile must be default, or null: other modes record graphs themselves"
    return None


class Recorder:
    """Records CUDA graphs that share their memory: no two of them run at a time.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, body: Body) -> Recorded:
        """Record what a function does on the GPU, where nothing is done yet; see `StepGraph`."""
        if not self._graphs:  # torch gives a memory up with the last recording in it, and refuses another one there
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph, which gives all free memory back: steps of another kind are soon to want it.
        with aside(self.device):
            # By the thread: another one may copy published weights meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                done = body()
            except BaseException:
                with suppress(RuntimeError):  # that it was broken off, which is no news
                    graph.capture_end()
                raise
            graph.capture_end()
        self._graphs.add(graph)
        return done, graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Put work for a GPU on a stream of its own, as what is recorded must be, and what warms up for it."""
    if device.type != "cuda":
        yield
        return
    here = torch.cuda.current_stream(device)
    stream = _stream(device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        yield
    here.wait_stream(stream)


def _settings(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a recording of an optimizer's step holds as it is now: all of a parameter group but its lr."""
    return tuple(value for name, value in group.items() if name not in ("params", "lr", "initial_lr"))
