"""A data set that grows while it is learned, as a pure function of what arrived when.

    python -m src fit --config configs/cifar10.yaml --data.feed incoming

Every image that was fed has an id, from the number of images of the data set on, in the order of arrival. What has
happened is a list of events, each with the epoch and the place in its order at which it took effect: from these and
the stored segments all is built again (a fit goes on, a run is replayed), to the last bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.data.augment import Augmentation
from src.data.order import derive_seed, spread
from src.errors import Failure
from src.live.segments import Segment, read_segment, segment_path

_BLOCK = 1024  # fed images whose augmentation is drawn at once


class Event(NamedTuple):
    """What happened to the images that are trained on.

    Attributes:
        kind: ``segment``: images joined; ``relabel``: an image has another class; ``drop``: it is in the data no more.
        number: Of the segment; or the id of the image.
        label: The new class, or -1.
        sha256: Of the segment's file, or empty.
        epoch: In which it took effect.
        place: Images of that epoch that had been drawn.
    """

    kind: str
    number: int
    label: int
    sha256: str
    epoch: int
    place: int


class Growth:
    """The images that joined a data set, and the labels that were put right.

    Args:
        first: The id of the first image that joins: as many as the data set has by itself.
        labels: The classes of the data set's own images, int64 ``[first]``, on the device; they are copied.
        size: Side of the images in pixels.
        room: Images that may join, at least 1. Where memory is given out when it is written to (a CPU's), what is not
            used takes none.
        window: Keep only so many of the newest; none keeps all.
        weight: What the loss of a fed image is multiplied by.
        seed: The run's seed.
        classes: The number of classes; none is not checked.

    Attributes:
        joined: Images that have joined, those that have left again among them.
        events: What has happened.
        names: The ids of the images that are kept, by name.
    """

    def __init__(
        self,
        first: int,
        labels: Tensor,
        size: int,
        *,
        room: int,
        window: int | None,
        weight: float,
        seed: int,
        classes: int | None = None,
    ) -> None:
        self.first, self.room, self.window, self.weight, self.seed = first, room, window, weight, seed
        self.size, self.classes = size, classes
        self.joined = 0
        self.events: list[Event] = []
        self.names: dict[str, int] = {}
        self.own_labels = labels.clone()
        self._slots = window or room
        filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # it would touch all of it
        try:
            self.pixels = torch.empty((self._slots, size, size, 3), dtype=torch.uint8, device=labels.device)
            self.labels = torch.empty(self._slots, dtype=torch.int64, device=labels.device)
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        self._names: list[str] = []
        self._forgotten = 0

    @property
    def oldest(self) -> int:
        """The id of the oldest fed image that is kept; images of lower ids have left."""
        return self.first + max(0, self.joined - self._slots)

    @property
    def left(self) -> int:
        """Images that may still join."""
        return self.room - self.joined if self.window is None else 2**40

    def check(self, segment: Segment) -> None:
        """Refuse a segment of other data than these, which somebody must have made so.

        Raises:
            Failure: If it is.
        """
        size, most = segment.pixels.shape[1], segment.labels.max(initial=0)
        if size != self.size or (self.classes is not None and most >= self.classes):
            raise Failure(
                f"segment {segment.number}: images of {size} pixels, and of class {most}, are not of these data, which "
                f"have {self.size} pixels and {self.classes} classes"
            )

    def add(self, segment: Segment) -> Tensor:
        """Take in the images of a segment, and return their ids, int64 on the CPU, those that stay."""
        self.check(segment)
        count = len(segment.names)
        if self.window is None and count > self.room - self.joined:
            raise Failure(f"data.feed_room: {self.room} images have no room for all that was fed; give more")
        begin = self.first + self.joined
        self.joined += count
        ids = torch.arange(max(begin, self.oldest), begin + count)
        slots = ((ids - self.first) % self._slots).to(self.pixels.device)
        kept = slice(count - len(ids), count)
        self.pixels[slots] = torch.from_numpy(segment.pixels[kept]).to(self.pixels.device)
        self.labels[slots] = torch.from_numpy(segment.labels[kept]).to(self.labels.device)
        self._names += segment.names
        self.names |= zip(segment.names, range(begin, begin + count), strict=True)
        if self.window is not None:
            self._forget()
        return ids

    def _forget(self) -> None:
        """Forget the names of images that have left."""
        gone = self.oldest - self.first - self._forgotten
        for number, name in enumerate(self._names[:gone], self.first + self._forgotten):
            if self.names.get(name) == number:
                del self.names[name]
        del self._names[:gone]
        self._forgotten += gone

    def has(self, id: int) -> bool:
        """Return whether there is an image of this id, of the data set's own or fed and kept."""
        return 0 <= id < self.first or self.oldest <= id < self.first + self.joined

    def label(self, id: int) -> int:
        """Return the class of an image."""
        return int(self.own_labels[id] if id < self.first else self.labels[(id - self.first) % self._slots])

    def relabel(self, id: int, label: int) -> None:
        """Give an image another class."""
        if id < self.first:
            self.own_labels[id] = label
        else:
            self.labels[(id - self.first) % self._slots] = label

    def pixels_and_labels(self, own: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return images of any ids, with their classes.

        Args:
            own: The pixels of the data set's own images.
            ids: int64 ``[b]`` on the device.
        """
        if not self.joined:
            return own.index_select(0, ids), self.own_labels.index_select(0, ids)
        fed = ids >= self.first
        mine, slots = ids.clamp(max=self.first - 1), (ids - self.first).clamp_(min=0) % self._slots
        pixels = torch.where(fed[:, None, None, None], self.pixels.index_select(0, slots), own.index_select(0, mine))
        labels = torch.where(fed, self.labels.index_select(0, slots), self.own_labels.index_select(0, mine))
        return pixels, labels

    def draw(self, augmentation: Augmentation, epoch: int) -> Tensor:
        """Return what an augmentation draws for an epoch: a row for each own image, then for each fed one kept.

        The rows of fed images are drawn by the block, so that they do not depend on how many have joined; see `rows`.
        """
        rows = [augmentation.draw(self.first, self.seed, epoch)]
        seeds = (derive_seed(self.seed, "feed", block) for block in range(*self.drawn_blocks))
        return torch.cat([*rows, *(augmentation.draw(_BLOCK, seed, epoch) for seed in seeds)])

    @property
    def drawn_blocks(self) -> tuple[int, int]:
        """Which blocks `draw` draws now."""
        return self._first_block, -(-self.joined // _BLOCK)

    @property
    def _first_block(self) -> int:
        return (self.oldest - self.first) // _BLOCK

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of `draw` that belong to images."""
        skipped = self._first_block * _BLOCK
        return torch.where(ids < self.first, ids, ids - skipped) if skipped else ids

    def state(self) -> list[list[Any]]:
        """Return what has happened, as plain values."""
        return [list(event) for event in self.events]

    def rebuild(self, state: Iterable[Sequence[Any]], store: Path) -> Iterator[tuple[Event, Tensor]]:
        """Let happen again what `state` tells of; yield each event, when it has happened, with the ids of its images.

        Args:
            state: What `state` returned.
            store: The folder of the segments.

        Raises:
            Failure: If a segment is missing or has been changed, or the state is none.
        """
        for values in state:
            try:
                event = Event(*values)
                typed = all(type(v) is t for v, t in zip(event, (str, int, int, str, int, int), strict=True))
            except TypeError:
                typed = False
            if not typed or min(event.number, event.epoch, event.place) < 0:
                raise Failure("ckpt_path: the checkpoint's record of what was fed is none")
            if event.kind == "segment":
                ids = self.add(read_segment(segment_path(store, event.number), event.sha256))
            elif self.has(event.number):
                ids = torch.tensor([event.number])
                if event.kind == "relabel":
                    self.relabel(event.number, event.label)
            else:  # it was corrected, and left the window later
                ids = torch.empty(0, dtype=torch.int64)
            self.events.append(event)
            yield event, ids


class EpochOrder:
    """The order of the images of an epoch, which changes while they are drawn.

    Args:
        ids: The images that are trained on, int64 ``[n]`` on the CPU.
        order: Those of this epoch, in order.
        seed: The run's seed.
        epoch: The epoch.
    """

    def __init__(self, ids: Tensor, order: Tensor, seed: int, epoch: int) -> None:
        self.ids, self.order, self.seed, self.epoch = ids, order, seed, epoch

    def join(self, ids: Tensor, number: int, place: int) -> None:
        """Let images take part, spread over what is left of the epoch after `place` of it have been drawn."""
        self.ids = torch.cat([self.ids, ids])
        rest = spread(self.order[place:], ids, self.seed, self.epoch, number)
        self.order = torch.cat([self.order[:place], rest])

    def leave(self, ids: Tensor, place: int, least: int) -> None:
        """Leave images out from now on.

        Args:
            ids: Which.
            place: Images of the epoch that have been drawn.
            least: If fewer than this would be left to draw, an epoch that has begun keeps its rest, and one that has
                not waits for more images.
        """
        self.ids = self.ids[~torch.isin(self.ids, ids)]
        rest = self.order[place:]
        kept = rest[~torch.isin(rest, ids)]
        if len(kept) >= least or not place:
            self.order = torch.cat([self.order[:place], kept])
