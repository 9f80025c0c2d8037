"""Classes as a user may write them; the tests of test_extending.py name them, and change what they return."""

from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from src.data import ImageData
from src.data.module import Part
from src.networks import Network


class Uniform(ImageData):
    """Three classes of 30 images each, of one colour; a test may change what is returned."""

    classes: ClassVar = ("ant", "bee", "cow")
    mean: ClassVar = (0.5, 0.5, 0.5)
    std: ClassVar = (0.5, 0.5, 0.5)
    image_size: ClassVar = 8
    change: ClassVar[Callable[[Tensor, Tensor], Any]] = staticmethod(lambda pixels, labels: (pixels, labels))

    def load(self, part: Part) -> tuple[Tensor, Tensor]:
        labels = torch.arange(3).repeat(30)
        pixels = (80 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 8, 8, 3).contiguous()
        return type(self).change(pixels, labels)  # type: ignore[no-any-return]


class Unnamed(ImageData):
    """Without a mean and so on."""

    def load(self, part: Part) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Shallow(Network):
    """One linear layer; a test may change what is returned."""

    change: ClassVar[Callable[[Tensor], Any]] = staticmethod(lambda logits: logits)

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return type(self).change(self.head(images.flatten(1)))  # type: ignore[no-any-return]


class Unheaded(Network):
    """A network whose last layer has another name."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.last = nn.Linear(3 * 8 * 8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(images.flatten(1))
        return logits


class Unready(Network):
    """A network that forgets to call its base's constructor."""

    def __init__(self, num_classes: int = 10) -> None:
        self.head = nn.Linear(3 * 8 * 8, num_classes)


class Simple(Network):
    """A network without arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits


class NoClosure(torch.optim.SGD):
    """An optimizer that takes none."""

    def step(self) -> None:  # type: ignore[override]
        super().step()


class Deaf(torch.optim.SGD):
    """An optimizer that does not call it."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()


class Peek(pl.Callback):
    """Sees the loss of each epoch twice: as it is offered at its end, and as the mean of its steps."""

    found: ClassVar[list[tuple[float, float]]] = []

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found.append((float(trainer.callback_metrics["train/loss"]), sum(self.losses) / len(self.losses)))
        self.losses = []
