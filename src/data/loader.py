"""The resident loader: the data set stays on the training device as uint8, and batches are cut there by index.

No worker processes, no pickling, no Python for each image.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from src.data.augment import Augmentation, Mixing
from src.data.order import batch_edges, batch_end, derive_seed, epoch_order, rank_slice


class Batch(NamedTuple):
    """One rank's share of one batch.

    Attributes:
        images: Normalised float32 ``[b, 3, h, w]`` in channels_last layout.
        labels: Classes, int64 ``[b]``; after MixUp or CutMix class weights, float32 ``[b, classes]``.
        ids: Positions of the images in the data set, int64 ``[b]``.
        total: Images in this batch over all ranks. A rank's loss is the sum over its images divided by
            ``total / world_size``, so that the mean over ranks is the mean over the batch, whoever holds how many.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    total: int


class Normalize:
    """Turns uint8 pixels into floats of zero mean and unit deviation, by channel.

    Args:
        mean: Mean of each channel, in units of the full range (0 to 1).
        std: Standard deviation of each channel, likewise.
        device: Where the pixels are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.shift = torch.tensor([255 * m for m in mean], device=device).expand(1, 1, 3)
        self.scale = torch.tensor([1 / (255 * s) for s in std], device=device).expand(1, 1, 3)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map uint8 ``[b, h, w, 3]`` to float32 ``[b, 3, h, w]`` in channels_last layout, which takes no copy."""
        if self.shift.shape != pixels.shape[1:]:  # a whole image of them is 2.5 times as fast as three numbers are
            shape = pixels.shape[1:]
            self.shift, self.scale = (t[-1, -1].expand(shape).contiguous() for t in (self.shift, self.scale))
        return pixels.float().sub_(self.shift).mul_(self.scale).permute(0, 3, 1, 2)


class ResidentLoader:
    """Iterates over one epoch of batches; what it yields is a pure function of (seed, epoch).

    Lightning calls ``loader.sampler.set_epoch(epoch)`` before each epoch, as it does for samplers of torch; a loader
    that shuffles is its own sampler, one that does not has none.

    Args:
        pixels: All images of the data set, uint8 ``[n, h, w, 3]``, on the device.
        labels: Their classes, int64 ``[n]``, on the device.
        ids: The images of this split, int64 ``[m]``, on the CPU.
        batch_size: Images in a batch, over all ranks together. It may be changed between two batches.
        normalize: Maps pixels to what the network takes.
        num_classes: The number of classes.
        seed: The run's seed.
        shuffle: Whether each epoch has an order of its own.
        augment: Applied to each image, in this order.
        mix: Applied to each batch, last.
        small: The number of epochs, from the first, whose images are scaled down, and their height and width.
        rank: This process, from 0.
        world_size: The number of processes.

    Attributes:
        drawn: Images of the epoch that have been drawn, over all ranks together.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        ids: Tensor,
        batch_size: int,
        normalize: Normalize,
        *,
        num_classes: int = 10,
        seed: int = 0,
        shuffle: bool = False,
        augment: Sequence[Augmentation] = (),
        mix: Mixing | None = None,
        small: tuple[int, int] = (0, 0),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.pixels, self.labels, self.ids = pixels, labels, ids
        self.normalize, self.augment, self.mix, self.small = normalize, augment, mix, small
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self.rank, self.world_size = rank, world_size
        self.num_classes = num_classes
        if shuffle:
            self.sampler = self
        self.batch_size = batch_size
        self.drawn = self._start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def start_at(self, position: int) -> None:
        """Let the next iteration, and only that, leave out what comes before a position of the epoch's order."""
        self.drawn = self._start = position

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return self.batches_from(0)

    def batches_from(self, start: int) -> int:
        """Return the number of batches from a position of the epoch's order on."""
        return len(batch_edges(len(self.ids), self.batch_size, self.world_size, start)) - 1

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch."""
        self.drawn = self._start
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        device = self.pixels.device
        order = epoch_order(self.ids, self.seed, self.epoch) if self.shuffle else self.ids
        order = _send(order, device)
        draws = [_send(a.draw(len(self.labels), self.seed, self.epoch), device) for a in self.augment]
        self._start = 0
        while self.drawn < len(self.ids):
            start, stop = self.drawn, batch_end(self.drawn, len(self.ids), self.batch_size, self.world_size)
            self.drawn = stop
            ids = order[rank_slice(start, stop, self.rank, self.world_size)]
            pixels, labels = self.pixels.index_select(0, ids), self.labels.index_select(0, ids)
            for augmentation, draw in zip(self.augment, draws, strict=True):
                pixels = augmentation.apply(pixels, draw.index_select(0, ids))
            if self.epoch < self.small[0]:
                pixels = resize(pixels.permute(0, 3, 1, 2), [self.small[1]] * 2).permute(0, 2, 3, 1)
            images = self.normalize(pixels)
            if self.mix is not None:
                seed = derive_seed(self.seed, "mix", self.epoch, start, self.rank)
                weights = torch.nn.functional.one_hot(labels, self.num_classes).float()
                images, labels = self.mix(images, weights, seed)
            yield Batch(images, labels, ids, stop - start)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
