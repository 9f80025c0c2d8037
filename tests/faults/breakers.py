"""What the tests of this folder break a fit with: a network, callbacks, and processes that may be killed."""

import json
import math
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from src.data.loader import Batch
from src.errors import Failure
from src.networks import Network

SMALL = [
    "--data=Shapes10",
    "--data.train_images=60",
    "--data.test_images=10",
    "--data.val_size=20",
    "--data.batch_size=10",
    "--data.augment=[]",
    "--model.network=tests.faults.breakers.Weak",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
]
"""A fit of 8 steps in two epochs, with a network of three layers."""

Where = Literal["output", "gradient"]


class _Spoil(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.nan


class Layer(nn.Linear):
    """A linear layer whose output, or the gradient that reaches it, can be spoilt."""

    spoilt: Where | None = None

    def forward(self, values: Tensor) -> Tensor:
        values = super().forward(values)
        if self.spoilt == "gradient":
            spoil: Callable[[Tensor], Tensor] = _Spoil.apply
            return spoil(values)
        return values / 0 if self.spoilt == "output" else values


class Weak(Network):
    """Three layers, of which the second is spoilt by batches that begin with a certain image."""

    poison: Tensor | None = None
    where: Where = "output"

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 8, stride=8)
        self.second = Layer(64, 16)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        poisoned = self.poison is not None and torch.equal(images[0], self.poison)
        self.second.spoilt = self.where if poisoned else None
        logits: Tensor = self.head(self.second(self.first(images).flatten(1)).relu())
        return logits


class WeakOnce(Weak):
    """In the training step `at`, from 1, gives an output that is no number, or sends its process a signal."""

    def __init__(self, num_classes: int = 10, at: int = 0, what: Literal["NaN", "SIGTERM"] = "NaN") -> None:
        super().__init__(num_classes)
        self.at, self.what, self.seen = at, what, 0

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[b, num_classes]``."""
        logits = super().forward(images)
        self.seen += self.training
        if not self.training or self.seen != self.at:
            return logits
        if self.what == "NaN":
            return logits * math.nan
        os.kill(os.getpid(), signal.SIGTERM)
        return logits


class Start(NamedTuple):
    """What stood at the start of a batch."""

    step: int
    ids: list[int]
    lr: float
    weights: dict[str, Tensor]


STARTS: list[Start] = []
"""Of all batches of the last fit in this process; see `Spoiler`."""


class Spoiler(pl.Callback):
    """Makes `Weak` fail in some batches, and writes all batches down.

    Args:
        at: The batches that are spoilt, counted from 0 in this process.
        where: What is spoilt.
        rank: The only process to do so; -1 for all.
        end: The batch before which the fit fails; -1 for never.
    """

    between_chunks = False  # so that the fit takes the steps it takes without this callback

    def __init__(self, at: list[int] | None = None, where: Where = "output", rank: int = -1, end: int = -1) -> None:
        self.at, self.where, self.rank, self.end = at or [], where, rank, end
        self.step = -1
        STARTS.clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        network = pl_module.network
        assert isinstance(network, Weak)
        if len(STARTS) == self.end:
            raise Failure("the test ends here")
        if trainer.global_step != self.step:  # a batch stays spoilt until the step that it is part of
            network.poison, network.where, self.step = None, self.where, trainer.global_step
        if len(STARTS) in self.at and self.rank in (-1, trainer.global_rank):
            network.poison = batch.images[0].clone()
            Path("spoilt").write_text(json.dumps(batch.ids.tolist()))
        weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        STARTS.append(Start(trainer.global_step, batch.ids.tolist(), lr, weights))


class Done(NamedTuple):
    """How a process ended; negative if by a signal."""

    status: int
    out: str
    err: str


def refused(done: Done, status: int = 1) -> str:
    """Return the one line with which a command was refused."""
    assert done.status == status, done
    assert done.err.startswith("error: "), done
    assert done.err.count("\n") == 1, done
    return done.err.removeprefix("error: ").rstrip()


class Child:
    """A process that runs a function in a folder; it is forked, in a moment, from one that has imported everything."""

    _count = 0

    def __init__(self, function: Callable[..., Any], *args: Any, cwd: Path, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["src.cli", __name__])
        Child._count += 1
        self.files = [cwd.parent / f"{cwd.name}.{Child._count}.{stream}" for stream in ("out", "err")]
        self.process: BaseProcess = context.Process(
            target=_run, args=(function, args, cwd, self.files, environment), daemon=True
        )
        self.process.start()

    def wait(self, timeout: float = 120) -> Done:
        """Wait until it has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError("it did not end")
        return Done(self.process.exitcode, *(file.read_text() for file in self.files))


def _run(
    function: Callable[..., Any], args: tuple[Any, ...], cwd: Path, files: list[Path], environment: dict[str, str]
) -> None:
    os.environ |= environment
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))  # as for `python -m`
    torch.set_num_threads(1)
    try:
        status = function(*args)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)
