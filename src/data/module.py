"""What every data set of images here is: a LightningDataModule around one resident tensor of pixels.

To add a data set, subclass `ImageData`, say its classes, mean and std, and load its pixels; see `src/data/cifar10.py`.
"""

import hashlib
import math
import os
import threading
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from src.data.augment import Augmentation, Mixing
from src.data.growth import Growth
from src.data.images import ImageFiles
from src.data.loader import Normalize, ResidentLoader
from src.data.order import generator, stratified_split
from src.errors import Failure, UsageError

Part = Literal["train", "test"]


class ImageData(pl.LightningDataModule):
    """Splits, orders, augments and serves a data set of labelled images.

    Args:
        batch_size: Images in a batch, over all devices together, at least 1; ``trainer.accumulate_grad_batches`` of
            them make an optimizer step.
        eval_batch_size: Images in a batch of validation, test or prediction, likewise.
        val_size: Left out of training for validation: a number of images (0 for none), or a share between 0 and 1.
            Stratified, and the same for every run with the same `split_seed`.
        train_fraction: Train on this share of what is left, above 0, up to 1; or 0 with `feed`, to learn from what is
            fed alone. Stratified.
        samples_per_class: Train on this many images of each class instead, at least 1.
        split_seed: Seed of the choice of the val split and of the images trained on.
        augment: Augmentations of each image while training, applied in this order.
        mix: Mixes the images of a batch while training: `src.data.MixUp` or `src.data.CutMix`.
        small_epochs: Epochs, from the first, that train on images scaled down to `small_size`, which take less time
            (progressive resizing; Howard et al., DAWNBench 2018); 0 for none.
        small_size: Height and width of those images, from 8 pixels to the images' own.
        feed: A folder that images are put into while a fit runs: ``CLASS/NAME.png`` and other pictures, or shards of
            many (``.npz``, ``.tar``); see ``python -m src feed --help``. They are learned from the next step on.
        feed_room: Images that may be fed in a run, at least 1; more are refused. On a GPU their memory (3 KB each) is
            taken at the start; on a CPU as they come.
        feed_weight: What the loss of a fed image counts, against 1 of the data set's own, above 0.
        replay_only: Keep only so many of the newest fed images, at least 1, for a stream without an end; null keeps
            all, up to `feed_room`.
        images: Image files, or folders of them, for `predict`; of any size and mode.
        seed: Seed of order and augmentation; linked to ``seed_everything`` on the command line.

    Attributes:
        classes: The names of the classes, in the order of their labels; set by a subclass, as the next three.
        mean: Mean of each channel over the train set, in units of the full range (0 to 1).
        std: Standard deviation of each channel, likewise.
        image_size: Height and width of the images, pixels.
        store: The folder of the segments that have been fed to a run, for a fit that goes on.
    """

    classes: ClassVar[tuple[str, ...]]
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]
    image_size: ClassVar[int] = 32

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        val_size: int | float = 5000,
        train_fraction: float = 1.0,
        samples_per_class: int | None = None,
        split_seed: int = 0,
        augment: list[Augmentation] | None = None,
        mix: Mixing | None = None,
        small_epochs: int = 0,
        small_size: int = 24,
        feed: Path | None = None,
        feed_room: int = 50_000,
        feed_weight: float = 1.0,
        replay_only: int | None = None,
        images: list[Path] | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        for name in ("classes", "mean", "std"):
            if not hasattr(self, name):
                raise ValueError(f"data: {type(self).__name__} has no {name}; a data set has classes, mean and std")
        feed, images = None if feed is None else Path(feed), [Path(path) for path in images or []]
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{name}: {value} is out of range: at least 1 image")
        if not val_size >= 0 or (isinstance(val_size, float) and val_size >= 1):
            raise ValueError(f"val_size: {val_size} is out of range: a number of images, or a share in [0, 1)")
        if not (0 if feed is not None else 1e-12) <= train_fraction <= 1:
            raise ValueError(f"train_fraction: {train_fraction} is out of range: above 0, up to 1; or 0 with data.feed")
        if samples_per_class is not None and samples_per_class < 1:
            raise ValueError(f"samples_per_class: {samples_per_class} is out of range: at least 1 image")
        if samples_per_class is not None and train_fraction != 1:
            raise ValueError("samples_per_class and train_fraction exclude each other: give one of them")
        if small_epochs < 0:
            raise ValueError(f"small_epochs: {small_epochs} is out of range: 0 or more epochs")
        if not 8 <= small_size <= max(self.image_size, 0 if small_epochs else 24):  # the default is for larger images
            raise ValueError(f"small_size: {small_size} is out of range: 8 to {self.image_size} pixels")
        for name, number in (("feed_room", feed_room), ("replay_only", replay_only)):
            if number is not None and not 1 <= number <= 100_000_000:
                raise ValueError(f"{name}: {number} is out of range: 1 to 100,000,000 images")
        if feed is not None and feed.exists() and not feed.is_dir():
            raise ValueError(f"feed: {feed} is not a folder")
        if not 0 < feed_weight < math.inf:
            raise ValueError(f"feed_weight: {feed_weight} is out of range: above 0")
        self.batch_size, self.eval_batch_size, self.val_size = batch_size, eval_batch_size, val_size
        self.train_fraction, self.samples_per_class = train_fraction, samples_per_class
        self.split_seed, self.seed = split_seed, seed
        self.augment, self.mix = augment or [], mix
        self.small_epochs, self.small_size = small_epochs, small_size
        self.feed, self.feed_room, self.feed_weight, self.replay_only = feed, feed_room, feed_weight, replay_only
        self.images = images
        self.store: Path | None = None
        self._growth: Growth | None = None
        self._fed: list[list[Any]] = []
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}
        self._split: tuple[Tensor, Tensor] | None = None
        self.digests: dict[Part, str] = {}
        self._fingerprint = ""
        self._hashing: threading.Thread | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @abstractmethod
    def load(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return all images of a part, uint8 ``[n, h, w, 3]``, and their classes, int64 ``[n]``.

        Raises:
            Failure: If a file is missing or damaged; the message names it and what to do.
        """

    def prepare_data(self) -> None:
        """Load what this stage needs, so that a missing or damaged file stops it before a run begins."""
        assert self.trainer is not None
        if self.trainer.state.fn == "predict":
            return
        self._part("test" if self.trainer.state.fn == "test" else "train")
        if self.trainer.state.fn == "fit":
            self.split()

    def _hash(self, tensors: tuple[Tensor, Tensor]) -> None:
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.cpu().contiguous().numpy().data)
        self._fingerprint = digest.hexdigest()

    def check(self, world_size: int) -> None:
        """See, before a run begins, that every rank gets a share of each batch and that the augmentations fit.

        Raises:
            UsageError: If not.
        """
        for name in ("batch_size", "eval_batch_size"):
            if (value := getattr(self, name)) < world_size:
                raise UsageError(f"data.{name}: {value} is less than the number of devices, {world_size}")
        if self.replay_only is not None and self.replay_only < world_size:
            raise UsageError(f"data.replay_only: {self.replay_only} is less than the number of devices, {world_size}")
        if self.feed is not None:
            there = next(path for path in (self.feed, *self.feed.parents, Path()) if os.path.lexists(path))
            if not there.is_dir():
                raise UsageError(f"data.feed: {there} is not a folder")
        pixels = torch.zeros((1, self.image_size, self.image_size, 3), dtype=torch.uint8)
        for augmentation in self.augment:
            try:
                augmentation.apply(pixels, augmentation.draw(1, self.seed, 0))
            except ValueError as error:
                raise UsageError(f"data.augment.{error}") from error

    def split(self) -> tuple[Tensor, Tensor]:
        """Return the ids that are trained on and those of the val split, int64, ascending and disjoint.

        Raises:
            UsageError: If `val_size` or `samples_per_class` asks for more images than there are.
        """
        if self._split is None:
            self._split = self._draw_split(self._part("train")[1].cpu())
        return self._split

    def _draw_split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        count = len(labels)
        val_count = round(self.val_size * count) if isinstance(self.val_size, float) else self.val_size
        if self.val_size and not val_count:
            raise UsageError(f"data.val_size: {self.val_size} of {count} images is none; give 0, or more")
        if val_count >= count:
            raise UsageError(f"data.val_size: {val_count} leaves nothing to train on: the train set has {count} images")
        val, train = stratified_split(labels, val_count, self.split_seed, "val")
        if self.samples_per_class is not None:
            members = [train[labels[train] == label] for label in range(self.num_classes)]
            if (fewest := min(map(len, members))) < self.samples_per_class:
                raise UsageError(
                    f"data.samples_per_class: {self.samples_per_class} is more than the train split has: {fewest}"
                )
            draws = [generator(self.split_seed, "train", label) for label in range(self.num_classes)]
            orders = [torch.randperm(len(m), generator=draw) for m, draw in zip(members, draws, strict=True)]
            picked = [m[order[: self.samples_per_class]] for m, order in zip(members, orders, strict=True)]
            train = torch.cat(picked).sort().values
        elif self.train_fraction == 0:
            train = train[:0]
        elif self.train_fraction < 1:
            wanted = max(1, round(self.train_fraction * len(train)))
            train = train[stratified_split(labels[train], wanted, self.split_seed, "train")[0]]
        return train, val

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the images and labels that training and validation draw from."""
        self._part("train")
        if self._hashing is not None:
            self._hashing.join()
        return self._fingerprint

    def sample(self, count: int) -> Tensor:
        """Return the first images of the train split as a network is given them, float32 ``[count, 3, h, w]``."""
        pixels = self._part("train")[0]
        train, val = self.split()
        ids = (train if len(train) else val)[:count].to(pixels.device)
        return Normalize(self.mean, self.std, pixels.device)(pixels[ids])

    def train_dataloader(self) -> ResidentLoader:
        """Return the loader of the training images, in a new order each epoch."""
        shuffle = self.trainer is None or self.trainer.overfit_batches == 0  # type: ignore[attr-defined] # set outside of __init__
        loader = self._loader("train", self.split()[0], self.batch_size, shuffle=shuffle, train=True)
        if self.feed is not None:
            loader.growth = self._growth = Growth(
                len(loader.labels),
                loader.labels,
                loader.pixels.shape[1],
                room=self.feed_room,
                window=self.replay_only,
                weight=self.feed_weight,
                seed=self.seed,
                classes=self.num_classes,
            )
            if self._fed:
                assert self.store is not None
                loader.rebuild(self._fed, self.store)
        elif self._fed:
            raise Failure("data.feed: the checkpoint's run was fed, which this one would do without; name the folder")
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Return what has been fed, and put right."""
        return {} if self._growth is None else {"fed": self._growth.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let what has been fed join again when the loader is made; the segments are in `store`."""
        self._fed = state_dict["fed"]

    def val_dataloader(self) -> ResidentLoader | list[ResidentLoader]:
        """Return the loader of the val split, or none if that is empty."""
        ids = self.split()[1]
        return self._loader("train", ids, self.eval_batch_size) if len(ids) else []

    def test_dataloader(self) -> ResidentLoader:
        """Return the loader of the test set."""
        return self._loader("test", torch.arange(len(self._part("test")[1])), self.eval_batch_size)

    def predict_dataloader(self) -> ImageFiles:
        """Return the loader of the image files to predict."""
        normalize = Normalize(self.mean, self.std, self._device())
        return ImageFiles(self.images or [], self.image_size, self.eval_batch_size, normalize)

    def _part(self, part: Part) -> tuple[Tensor, Tensor]:
        """Load a part once and keep it on the training device, the only copy of it."""
        device = self._device()
        if part not in self._parts:
            found = self.load(part)
            if problem := self._problem_of(found):
                raise UsageError(f"data: {type(self).__name__}.load returns {problem}")
            self._parts[part] = found
            if part == "train" and part in self.digests:
                self._fingerprint = self.digests[part]
            elif part == "train":  # beside all else that is to be done before the first checkpoint asks for it
                self._hashing = threading.Thread(target=self._hash, args=(self._parts[part],))
                self._hashing.start()
        pixels, labels = self._parts[part]
        if pixels.device != device:
            self._parts[part] = pixels.to(device), labels.to(device)
        return self._parts[part]

    def _problem_of(self, found: Any) -> str:
        """Return what is wrong with what `load` has returned; nothing if all is right."""
        if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, Tensor) for part in found)):
            return f"{_kinds(found)}; images and labels are due, two tensors"
        (pixels, labels), size, most = found, self.image_size, self.num_classes - 1
        if list(pixels.shape[1:]) != [size, size, 3]:
            return f"images of shape {list(pixels.shape[1:])}; its image_size asks for {[size, size, 3]}"
        if pixels.dtype != torch.uint8:
            return f"images of {pixels.dtype}; torch.uint8 is due, from 0 to 255"
        if labels.dtype != torch.int64 or labels.ndim != 1:
            return f"labels of {labels.dtype} and shape {list(labels.shape)}; torch.int64 and [{len(pixels)}] are due"
        if len(pixels) != len(labels):
            return f"{len(pixels)} images and {len(labels)} labels"
        if len(labels) and not 0 <= labels.min() <= labels.max() <= most:
            return f"labels from {labels.min()} to {labels.max()}; with its {most + 1} classes they are 0 to {most}"
        return ""

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _loader(
        self, part: Part, ids: Tensor, batch_size: int, *, shuffle: bool = False, train: bool = False
    ) -> ResidentLoader:
        pixels, labels = self._part(part)
        augment: Sequence[Augmentation] = self.augment if train else ()
        return ResidentLoader(
            pixels,
            labels,
            ids,
            batch_size,
            Normalize(self.mean, self.std, pixels.device),
            num_classes=self.num_classes,
            seed=self.seed,
            shuffle=shuffle,
            augment=augment,
            mix=self.mix if train else None,
            small=(self.small_epochs, self.small_size) if train else (0, 0),
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=1 if self.trainer is None else self.trainer.world_size,
        )


def _kinds(value: Any) -> str:
    """Say what a value is, and what is in it if it is a tuple."""
    inside = f" of {', '.join(type(part).__name__ for part in value)}" if isinstance(value, tuple) else ""
    return f"{type(value).__name__}{inside}"
