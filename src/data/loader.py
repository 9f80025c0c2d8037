"""The resident loader: the data set stays on the training device as uint8, and batches are cut there by index.

No worker processes, no pickling, no Python for each image.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.data.augment import Augmentation, Mixing
from src.data.growth import EpochOrder, Event, Growth
from src.data.order import batch_edges, batch_end, derive_seed, epoch_order, rank_slice
from src.data.shrink import shrink
from src.live.segments import Segment


class Batch(NamedTuple):
    """One rank's share of one batch.

    Attributes:
        images: Normalised float32 ``[b, 3, h, w]`` in channels_last layout; a tensor without content, on the device
            ``meta``, where they are yet to be cut, see `ResidentLoader.defers`.
        labels: Classes, int64 ``[b]``; after MixUp or CutMix class weights, float32 ``[b, classes]``.
        ids: Positions of the images in the data set, int64 ``[b]``.
        total: Images in this batch over all ranks. A rank's loss is the sum over its images divided by
            ``total / world_size``, so that the mean over ranks is the mean over the batch, whoever holds how many.
        weights: What the loss of each image is multiplied by, float32 ``[b]``; none: 1.
        weight: Their sum over all ranks, which then stands in place of ``total``.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    total: int
    weights: Tensor | None = None
    weight: float = 0.0


class Normalize:
    """Turns uint8 pixels into floats of zero mean and unit deviation, by channel.

    Args:
        mean: Mean of each channel, in units of the full range (0 to 1).
        std: Standard deviation of each channel, likewise.
        device: Where the pixels are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        self._shift = torch.tensor([255 * m for m in mean], device=device)
        self._scale = torch.tensor([1 / (255 * s) for s in std], device=device)
        self._whole: dict[torch.Size, tuple[Tensor, Tensor]] = {}  # kept: recorded steps read them where they are

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map uint8 ``[b, h, w, 3]`` to float32 ``[b, 3, h, w]`` in channels_last layout, which takes no copy."""
        shape = pixels.shape[1:]
        if shape not in self._whole:  # a whole image of them is 2.5 times as fast as three numbers are
            self._whole[shape] = self._shift.expand(shape).contiguous(), self._scale.expand(shape).contiguous()
        shift, scale = self._whole[shape]
        return pixels.float().sub_(shift).mul_(scale).permute(0, 3, 1, 2)


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
        growth: What joins the images while they are learned; none: nothing does.

    Attributes:
        ids: The images that are trained on from the next epoch on, int64 on the CPU.
        drawn: Images of the epoch that have been drawn, over all ranks together.
        defers: Whether batches come without the content of their images, for who cuts them himself (`cut`).
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
        growth: Growth | None = None,
    ) -> None:
        self.pixels, self.labels, self.ids = pixels, labels, ids
        self.normalize, self.augment, self.mix, self.small = normalize, augment, mix, small
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self.rank, self.world_size = rank, world_size
        self.num_classes = num_classes
        if shuffle:
            self.sampler = self
        self.batch_size = batch_size
        self.growth = growth
        self.drawn = self._start = 0
        self.defers = False
        self._order: EpochOrder | None = None
        self._sent = torch.empty(0, dtype=torch.int64)
        self._draws: list[Tensor] = []

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def start_at(self, position: int) -> None:
        """Let the next iteration, and only that, leave out what comes before a position of the epoch's order."""
        self.drawn = self._start = position

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch; at least 1 if images may yet join."""
        batches = len(batch_edges(len(self.ids), self.batch_size, self.world_size)) - 1
        return batches if self.growth is None else max(batches, 1)

    @property
    def count(self) -> int:
        """The number of images in this epoch, those that have been drawn among them."""
        return len(self.order.order)

    @property
    def order(self) -> EpochOrder:
        """The order of this epoch."""
        if self._order is None or self._order.epoch != self.epoch:
            order = epoch_order(self.ids, self.seed, self.epoch) if self.shuffle else self.ids
            self._order = EpochOrder(self.ids, order, self.seed, self.epoch)
        return self._order

    def batches_from(self, start: int) -> int:
        """Return the number of batches from a position of the epoch's order on."""
        return len(batch_edges(self.count, self.batch_size, self.world_size, start)) - 1

    def join(self, segment: Segment) -> Tensor:
        """Let images take part from the next batch on, each once in what is left of this epoch; return their ids."""
        assert self.growth is not None
        order, event = self.order, Event("segment", segment.number, -1, segment.sha256, self.epoch, self.drawn)
        ids = self.growth.add(segment)
        self.growth.events.append(event)
        self._happen(order, event, ids)
        return ids

    def correct(self, id: int, label: int | None) -> None:
        """Give an image that is trained on another class, or leave it out, from the next batch on."""
        assert self.growth is not None
        kind = "drop" if label is None else "relabel"
        event = Event(kind, id, -1 if label is None else label, "", self.epoch, self.drawn)
        if label is not None:
            self.growth.relabel(id, label)
        self.growth.events.append(event)
        self._happen(self.order, event, torch.tensor([id]))

    def rebuild(self, state: Iterable[Sequence[Any]], store: Path) -> None:
        """Let happen again what `Growth.state` tells of."""
        assert self.growth is not None
        for event, ids in self.growth.rebuild(state, store):
            self.epoch = event.epoch
            self._happen(self.order, event, ids)

    def _happen(self, order: EpochOrder, event: Event, ids: Tensor) -> None:
        growth = self.growth
        assert growth is not None
        if event.kind == "segment":
            order.join(ids, event.number, event.place)
            # What was dropped may be in the rest of the epoch yet, see `EpochOrder.leave`, but its pixels are gone now.
            mine = torch.cat([self.ids, order.order[event.place :]])
            old = mine[(mine >= growth.first) & (mine < growth.oldest)]
            if len(old):
                order.leave(old, event.place, self.world_size)
        elif event.kind == "drop":
            order.leave(ids, event.place, self.world_size)
        self.ids = order.ids
        self._sent = torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch."""
        self.drawn = self._start
        return self._batches()

    @property
    def small_now(self) -> bool:
        """Whether this epoch's images are scaled down."""
        return self.epoch < self.small[0]

    def cut(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return images as a batch of this epoch has them, and their classes: what `Batch` says, but not mixed.

        Nothing here waits for the device, and what an epoch draws lies where that of the last one lay.

        Args:
            ids: Which images, int64 ``[b]`` on the device.
        """
        pixels, labels = self._take(ids)
        rows = ids if self.growth is None else self.growth.rows(ids)
        for augmentation, draw in zip(self.augment, self._draws, strict=True):
            pixels = augmentation.apply(pixels, draw.index_select(0, rows))
        if self.small_now:
            pixels = shrink(pixels, self.small[1])
        return self.normalize(pixels), labels

    def _take(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.growth is not None:
            return self.growth.pixels_and_labels(self.pixels, ids)
        return self.pixels.index_select(0, ids), self.labels.index_select(0, ids)

    def whole(self, batch: Batch) -> Batch:
        """Return a batch of this epoch with its images, also if it came without."""
        return batch._replace(images=self.cut(batch.ids)[0]) if batch.images.is_meta else batch

    def _draw(self) -> None:
        """Draw what the augmentations of this epoch need."""
        if self.growth is None:
            draws = [a.draw(len(self.labels), self.seed, self.epoch) for a in self.augment]
        else:
            draws = [self.growth.draw(a, self.epoch) for a in self.augment]
        self._draws = [_send(new, self.pixels.device, old) for new, old in zip_longest(draws, self._draws)]

    def _batches(self) -> Iterator[Batch]:
        self._start = 0
        self._draw()
        self._sent = _send(self.order.order, self.pixels.device)
        blocks = self.growth.drawn_blocks if self.growth is not None else None
        count = self.count
        while self.drawn < count:  # which may change while this generator waits
            if self.growth is not None and not len(self._sent):
                self._sent, count = _send(self.order.order, self.pixels.device), self.count
                if blocks != self.growth.drawn_blocks:
                    blocks = self.growth.drawn_blocks
                    self._draw()
            start, stop = self.drawn, batch_end(self.drawn, count, self.batch_size, self.world_size)
            self.drawn = stop
            ids = self._sent[rank_slice(start, stop, self.rank, self.world_size)]
            if self.defers:
                height, width = (self.small[1],) * 2 if self.small_now else self.pixels.shape[1:3]
                shape = torch.empty((len(ids), 3, height, width), device="meta")
                yield Batch(shape, self.labels.index_select(0, ids), ids, stop - start)
                continue
            images, labels = self.cut(ids)
            if self.mix is not None:
                seed = derive_seed(self.seed, "mix", self.epoch, start, self.rank)
                weights = torch.nn.functional.one_hot(labels, self.num_classes).float()
                images, labels = self.mix(images, weights, seed)
            yield Batch(images, labels, ids, stop - start, *self._weights(ids, start, stop))

    def _weights(self, ids: Tensor, start: int, stop: int) -> tuple[Tensor | None, float]:
        """Return the weights of images of a batch, and the sum of those of the whole batch, on all ranks."""
        growth = self.growth
        if growth is None or growth.weight == 1 or not growth.joined:
            return None, 0.0
        fed = int((self.order.order[start:stop] >= growth.first).sum())
        weights = torch.where(ids >= growth.first, growth.weight, 1.0)
        return weights, stop - start + (growth.weight - 1) * fed


def _send(tensor: Tensor, device: torch.device, old: Tensor | None = None) -> Tensor:
    """Copy a tensor to a device without waiting for it, into the place of an old one if that is alike."""
    if device.type != "cuda":
        return tensor.to(device)
    sent = tensor.pin_memory()
    if old is not None and (old.shape, old.dtype) == (sent.shape, sent.dtype):
        return old.copy_(sent, non_blocking=True)
    return sent.to(device, non_blocking=True)
