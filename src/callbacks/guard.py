"""Numbers gone wrong: stops a fit before an infinite or undefined loss or gradient reaches the weights.

python -m src fit --guard.on_nonfinite rollback
"""

import copy
import math
import sys
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from src.callbacks.checkpoint import Checkpoint
from src.callbacks.lookahead import Lookahead
from src.checkpoint_io import read
from src.classifier import ImageClassifier
from src.data.loader import Batch, ResidentLoader
from src.errors import Failure
from src.live.journal import Journal
from src.step_loop import StepLoop

MAX_ROLLBACKS = 10
"""After so many in one process a run is given up: the lr is then a thousandth of what was asked for."""
MAX_LATE = 4
"""Steps that a GPU may be behind before the host waits for it; their batches are kept until then, to be named."""

_NONE = torch.empty(0)
Measured = tuple[list[Tensor], list[Batch], int]
"""The losses and norms of gradients of an optimizer step, the batches it was taken on, and the steps before it."""


class Guard(pl.Callback):
    """Looks at the loss and at the norm of the gradient before every optimizer step.

    On a CPU nothing non-finite ever reaches the weights. On a GPU to wait for the answer would cost more than it is
    worth: it is read some steps late, and no checkpoint is written before it has been. So it is with ``chunk_size``
    above 1: the steps of a chunk are looked at before its last is taken.

    Args:
        on_nonfinite: ``stop`` ends the fit with the step, epoch, images and layer at fault; the last checkpoint is
            finite. ``rollback`` takes the weights of that checkpoint instead of the step, cuts the lr, and goes on with
            the next batch. ``ignore`` looks at nothing.
        lr_factor: What a rollback multiplies the lr by, above 0, up to 1.
    """

    def __init__(self, on_nonfinite: Literal["stop", "rollback", "ignore"] = "stop", lr_factor: float = 0.5) -> None:
        if not 0 < lr_factor <= 1:
            raise ValueError(f"lr_factor: {lr_factor} is out of range: above 0, up to 1")
        self.on_nonfinite, self.lr_factor = on_nonfinite, lr_factor
        self._batches: list[Batch] = []
        self._losses: list[Tensor] = []
        self._chunk: list[Measured] = []
        self._late: deque[tuple[Tensor, torch.cuda.Event, list[Measured]]] = deque()
        self._rollbacks = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Keep the batch, to be able to name it."""
        self._batches.append(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look, and act before the step is taken."""
        batches, losses = self._batches, self._losses
        self._batches, self._losses = [], []
        if self.on_nonfinite == "ignore":
            return
        values = losses
        mid_chunk = getattr(trainer.fit_loop.epoch_loop, "mid_chunk", False)
        if mid_chunk:  # a gradient that is not finite shows in the losses after it; the images would only take room
            batches = [batch._replace(images=_NONE) for batch in batches]
        # A scaler of float16 gradients makes them overflow on purpose, and leaves out such a step by itself.
        elif getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            values = [*losses, *torch._foreach_norm(gradients)]
        self._chunk.append((values, batches, trainer.global_step))
        if not mid_chunk:
            self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at what the steps since the last look have measured; on a GPU, send it to the host."""
        chunk, self._chunk = self._chunk, []
        total = torch.stack([value for values, *_ in chunk for value in values]).sum()
        if total.is_cuda and trainer.world_size == 1:
            if self._look_late(trainer, pl_module, MAX_LATE):
                return  # these steps' numbers come from weights that are gone
            answer = torch.empty((), pin_memory=True)
            answer.copy_(total, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            self._late.append((answer, copied, chunk))
            return
        bad = not math.isfinite(total)  # infinite or undefined if one of its parts is
        if trainer.strategy.reduce_boolean_decision(bad, all=False) if trainer.world_size > 1 else bad:
            self._act(trainer, pl_module, chunk)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the answers that are due."""
        self._settle(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See that what is saved is finite."""
        self._settle(trainer, pl_module)
        if self.on_nonfinite == "ignore":
            return
        state = {name: tensor for name, tensor in checkpoint["state_dict"].items() if tensor.is_floating_point()}
        if not state:  # another rank saves
            return
        norms = torch._foreach_norm(list(state.values()))
        if math.isfinite(torch.stack([norm.float() for norm in norms]).sum()):  # a GPU is waited for once
            return
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                where = f"step {trainer.global_step:,}, epoch {trainer.current_epoch + 1}"
                raise Failure(
                    f"{where}: {name} is not finite after the step, and was not saved; try a smaller model.optimizer.lr"
                )

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at what a chunk has left that ended within an accumulation; on a GPU, wait for what is under way."""
        if self._chunk:
            self._look(trainer, pl_module)
        self._look_late(trainer, pl_module)

    def _look_late(self, trainer: pl.Trainer, pl_module: pl.LightningModule, most: int = 0) -> bool:
        """Read the answers that have come, wait for all but some of the others; return whether one was bad."""
        while self._late and (len(self._late) > most or self._late[0][1].query()):  # type: ignore[no-untyped-call]
            total, copied, chunk = self._late.popleft()
            copied.synchronize()
            if not math.isfinite(total):
                self._late.clear()
                self._act(trainer, pl_module, chunk)
                return True
        return False

    def _act(self, trainer: pl.Trainer, pl_module: pl.LightningModule, chunk: list[Measured]) -> None:
        assert isinstance(pl_module, ImageClassifier)
        finite = (all(math.isfinite(value) for value in values) for values, *_ in chunk)
        _, batches, step = next((m for m, good in zip(chunk, finite, strict=True) if not good), chunk[-1])
        if isinstance(loader := trainer.train_dataloader, ResidentLoader):
            batches = [loader.whole(batch) for batch in batches]
        fault, batch = first_nonfinite(pl_module, batches)
        ids = ", ".join(map(str, batch.ids[:8].tolist())) + (", …" if len(batch.ids) > 8 else "")
        where = f"step {step + 1:,}, epoch {trainer.current_epoch + 1}: {fault} (batch of the images {ids})"
        if trainer.world_size > 1:  # the gradient is that of all ranks; the fault lies with one
            told: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(told, ("gradient" in fault, where))
            where = min(told, key=lambda said: said[0])[1]
        callback = next((c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)), None)
        last = callback.folder / "last.ckpt" if callback is not None and callback.folder is not None else None
        if callback is not None:
            callback.wait(trainer)
            trainer.strategy.barrier("checkpoint")  # all ranks are to read the same one
        if last is None or not last.is_file():
            raise _failure(trainer, f"{where}; there is no checkpoint yet: try a smaller model.optimizer.lr")
        if self.on_nonfinite == "stop" or self._rollbacks == MAX_ROLLBACKS:
            raise _failure(
                trainer,
                f"{where}; the last finite checkpoint is {last}: go on from it with a smaller model.optimizer.lr, "
                f"or with --guard.on_nonfinite rollback",
            )
        self._rollbacks += 1
        assert callback is not None
        self._roll_back(trainer, pl_module, trainer.optimizers[0], last, where)
        callback.request()

    def _roll_back(
        self,
        trainer: pl.Trainer,
        pl_module: ImageClassifier,
        optimizer: torch.optim.Optimizer,
        path: Path,
        where: str,
    ) -> None:
        """Take weights and optimizer state of a checkpoint; the step counts, but changes nothing."""
        checkpoint = read(path)
        pl_module.load_state_dict(checkpoint["state_dict"])
        for callback in trainer.callbacks:  # type: ignore[attr-defined] # set outside of __init__
            if isinstance(callback, WeightAveraging):
                callback.on_load_checkpoint(trainer, pl_module, checkpoint)
            elif isinstance(callback, Lookahead):
                callback.roll_back(checkpoint)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": checkpoint["optimizer_states"][0]["state"], "param_groups": groups})
        if isinstance(loop := trainer.fit_loop.epoch_loop, StepLoop):
            loop.forget_recordings()
        optimizer.zero_grad(set_to_none=True)  # what has no gradient is left alone by the step that follows
        before = optimizer.param_groups[0]["lr"]
        pl_module.scale_lr(self.lr_factor)
        if trainer.is_global_zero:
            Journal(path.parent.parent / "live" / "journal.jsonl").append(
                trainer.global_step, "rollback", "lr", before=before, requested=self.lr_factor,
                effective=optimizer.param_groups[0]["lr"],
            )  # fmt: skip
            sys.stderr.write(
                f"warning: {where}; took the weights of step {checkpoint['global_step']:,}, lr times {self.lr_factor}\n"
            )


def _failure(trainer: pl.Trainer, message: str) -> BaseException:
    """Return what ends this process; the first of several speaks for all."""
    return Failure(message) if trainer.is_global_zero else SystemExit(1)


def first_nonfinite(model: ImageClassifier, batches: list[Batch]) -> tuple[str, Batch]:
    """Say where the first infinite or undefined number of a step arose.

    Args:
        model: With the gradients of the step, before its weights have changed.
        batches: What the step was taken on.

    Returns:
        E.g. ``layer blocks.0.conv gives a non-finite output``, and the batch on which it did.
    """
    parameters = model.parameters_by_name()
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            return f"weight {name} is not finite", batches[0]
    networks = copy.deepcopy(model.networks)  # BatchNorm's statistics must not see the batch twice
    found: list[str] = []

    def look(name: str, *call: Any) -> None:
        if isinstance(call[-1], Tensor) and not call[-1].isfinite().all():
            found.append(name)

    for prefix, network in networks.items():
        for name, module in network.named_modules():
            if not list(module.children()):
                module.register_forward_hook(partial(look, prefix + name))
    with torch.no_grad(), model.trainer.precision_plugin.forward_context(), suppress(RuntimeError):
        for batch in (b for b in batches if len(b.images)):
            if not batch.images.isfinite().all():
                return "an image of the batch is not finite", batch
            for network in reversed(networks.values()):  # the proxy comes first in a step
                network(batch.images)
            if found:
                return f"layer {found[0]} gives a non-finite output", batch
    bad = [n for n, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
    if bad:  # the backward pass meets the last layer first
        return f"the gradient of {bad[-1]} is not finite", batches[-1]
    return "the loss or the norm of the gradient is not finite", batches[-1]
