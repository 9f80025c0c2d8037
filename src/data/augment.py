"""Batched augmentation on the device, as a pure function of (seed, epoch, image); `Mixing`, of (seed, epoch, batch).

Each augmentation draws one row of numbers for every image of the data set at the start of an epoch. A batch takes
the rows of its images. So what an image looks like in an epoch does not depend on the batch size, on the order, on
the number of ranks, or on where a run was resumed.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

from src.data.order import generator


class Augmentation(ABC):
    """Changes each image by itself. To add one: draw numbers, apply them; name the class under ``data.augment``."""

    @abstractmethod
    def draw(self, count: int, seed: int, epoch: int) -> Tensor:
        """Return the random numbers of an epoch, ``[count, ...]`` on the CPU; row i belongs to image i."""

    @abstractmethod
    def apply(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """Return the changed images.

        Args:
            pixels: uint8 ``[b, h, w, 3]``, not to be written to.
            draws: The rows of these images, on their device.
        """


class RandomFlip(Augmentation):
    """Mirrors images left to right.

    Args:
        mode: ``random``: a fair coin for each image and epoch. ``alternating``: the coin is thrown for epoch 0,
            and every later epoch turns each image round, so that each pair of epochs shows both sides
            (Jordan, 94% on CIFAR-10 in 3.29 seconds, arXiv 2404.00498).
    """

    def __init__(self, mode: Literal["random", "alternating"] = "random") -> None:
        self.mode = mode

    def draw(self, count: int, seed: int, epoch: int) -> Tensor:
        """Return bool ``[count]``: which images are mirrored."""
        coin_epoch = epoch if self.mode == "random" else 0
        coins = torch.randint(2, (count,), generator=generator(seed, "flip", coin_epoch)).bool()
        return coins ^ (self.mode == "alternating" and epoch % 2 == 1)

    def apply(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """Return the batch with the drawn images mirrored."""
        return torch.where(draws[:, None, None, None], pixels.flip(2), pixels)


class RandomCrop(Augmentation):
    """Shifts images by up to `padding` pixels each way; the border is filled with the image's reflection.

    Args:
        padding: The largest shift in pixels, from 1 to less than the image's side.
    """

    def __init__(self, padding: int = 4) -> None:
        if padding < 1:
            raise ValueError(f"padding: {padding} is out of range: at least 1 pixel")
        self.padding = padding

    def draw(self, count: int, seed: int, epoch: int) -> Tensor:
        """Return int64 ``[count, 2]``: the shifts down and to the right."""
        side = 2 * self.padding + 1
        return torch.randint(side, (count, 2), generator=generator(seed, "crop", epoch)) - self.padding

    def apply(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """Return the shifted batch: row indices are reflected at the border, then column indices."""
        b, h, w, c = pixels.shape
        if self.padding >= min(h, w):
            raise ValueError(f"padding: {self.padding} is out of range: less than the image's side, {min(h, w)} pixels")
        rows = _reflect(torch.arange(h, device=pixels.device) + draws[:, :1], h)
        columns = _reflect(torch.arange(w, device=pixels.device) + draws[:, 1:], w)
        rows += h * torch.arange(b, device=pixels.device)[:, None]
        shifted = pixels.reshape(b * h, w * c).index_select(0, rows.flatten()).view(b, h, w, c)
        return shifted.gather(2, columns[:, None, :, None].expand(b, h, w, c))


class Cutout(Augmentation):
    """Paints a square of one colour over each image (DeVries and Taylor, arXiv 1708.04552).

    Args:
        size: The square's side in pixels, at least 1.
        fill: Its colour, red, green and blue from 0 to 255; by default the mean of CIFAR-10.
        inside: Whether all of it lies in the image, whose sides are then at least as long; if not, its centre does.
    """

    def __init__(self, size: int = 8, fill: Sequence[int] = (125, 123, 114), inside: bool = False) -> None:
        if size < 1:
            raise ValueError(f"size: {size} is out of range: at least 1 pixel")
        if len(fill) != 3 or not all(0 <= value <= 255 for value in fill):
            raise ValueError(f"fill: {list(fill)} is not a colour: three numbers from 0 to 255")
        self.size, self.inside = size, inside
        self._colour = torch.tensor(list(fill), dtype=torch.uint8)

    def draw(self, count: int, seed: int, epoch: int) -> Tensor:
        """Return float32 ``[count, 2]`` in [0, 1): where the square is, as a share of all places down and across."""
        return torch.rand((count, 2), generator=generator(seed, "cutout", epoch))

    def apply(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """Return the batch with a square painted over each image."""
        if self.inside and self.size > min(pixels.shape[1:3]):
            raise ValueError(f"size: {self.size} is out of range: at most the image's side, {min(pixels.shape[1:3])}")
        covered = []
        for axis in (0, 1):
            length = pixels.shape[1 + axis]
            if self.inside:
                first = (draws[:, axis, None] * (length - self.size + 1)).long()
            else:
                first = (draws[:, axis, None] * length).long() - self.size // 2
            offset = torch.arange(length, device=pixels.device) - first
            covered.append((offset >= 0) & (offset < self.size))
        square = covered[0][:, :, None] & covered[1][:, None, :]
        self._colour = self._colour.to(pixels.device)  # copied once: a copy would hold up the host
        return torch.where(square[..., None], self._colour, pixels)


class ColorJitter(Augmentation):
    """Makes images brighter or darker, and higher or lower in contrast, by factors drawn for each.

    Brightness multiplies an image, contrast then its distance from its mean over all pixels and colours. Much as
    torchvision's ``v2.ColorJitter``, which takes the mean of the grey image and draws once for a whole batch.

    Args:
        brightness: Largest change of the first factor, which is 1 if it is 0; in [0, 1].
        contrast: The same of the second.
    """

    def __init__(self, brightness: float = 0.14, contrast: float = 0.13) -> None:
        for name, value in (("brightness", brightness), ("contrast", contrast)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: {value} is out of range: from 0 to 1")
        self.brightness, self.contrast = brightness, contrast

    def draw(self, count: int, seed: int, epoch: int) -> Tensor:
        """Return float32 ``[count, 2]``: the factors of brightness and contrast."""
        chance = 2 * torch.rand((count, 2), generator=generator(seed, "color", epoch)) - 1
        return 1 + chance * torch.tensor([self.brightness, self.contrast])

    def apply(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """Return the changed batch; what leaves 0 to 255 is cut off."""
        brightness, contrast = draws[:, 0], draws[:, 1]
        total = pixels.sum((1, 2, 3), dtype=torch.int64)  # of whole numbers: the same in whatever order it is added up
        mean = brightness * (total * (1 / pixels[0].numel()))
        factor, offset = (v[:, None, None, None] for v in (brightness * contrast, mean * (1 - contrast)))
        return pixels.mul(factor).add_(offset).round_().clamp_(0, 255).to(torch.uint8)


class Mixing(ABC):
    """Mixes the images of a batch with one another, and their labels alike."""

    @abstractmethod
    def __call__(self, images: Tensor, weights: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the mixed images and class weights.

        Args:
            images: float32 ``[b, 3, h, w]``.
            weights: Class weights that sum to 1, float32 ``[b, num_classes]``.
            seed: Decides every random number that is drawn.
        """


class MixUp(Mixing):
    """Blends pairs of images (Zhang et al., arXiv 1710.09412), by torchvision's ``v2.MixUp``.

    Args:
        alpha: Parameter of the Beta distribution of the blend, above 0; 1 is uniform, small means little mixing.
    """

    def __init__(self, alpha: float = 0.2) -> None:
        self.transform = v2.MixUp(alpha=_positive("alpha", alpha))

    def __call__(self, images: Tensor, weights: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the blended batch."""
        return _mix(self.transform, images, weights, seed)


class CutMix(Mixing):
    """Pastes a box of one image into another (Yun et al., arXiv 1905.04899), by torchvision's ``v2.CutMix``.

    Args:
        alpha: Parameter of the Beta distribution of the box's share, above 0; 1 is uniform.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.transform = v2.CutMix(alpha=_positive("alpha", alpha))

    def __call__(self, images: Tensor, weights: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the pasted batch."""
        return _mix(self.transform, images, weights, seed)


def _reflect(index: Tensor, length: int) -> Tensor:
    """Fold indices that leave ``0 .. length - 1`` by less than `length` back in, like ``F.pad(mode="reflect")``."""
    return (length - 1) - ((length - 1) - index.abs()).abs()


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name}: {value} is out of range: above 0")
    return value


def _mix(transform: v2.Transform, images: Tensor, weights: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Run a transform that draws from torch's global CPU generator, seeded, and leave that generator as it was."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        mixed, weights = transform(images, weights)
    finally:
        torch.set_rng_state(state)
    return mixed.contiguous(memory_format=torch.channels_last), weights
