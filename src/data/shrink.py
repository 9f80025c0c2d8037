"""Images made smaller: a batch at once, on the device."""

from functools import cache

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize


def shrink(pixels: Tensor, side: int) -> Tensor:
    """Return images in another height and width, as torchvision's antialiased ``resize`` makes them.

    Args:
        pixels: uint8 ``[b, h, w, 3]``.
        side: The height and width, ``s``.

    Returns:
        uint8 ``[b, s, s, 3]``.
    """
    if pixels.is_cuda:
        return by_products(pixels, side)
    smaller: Tensor = resize(pixels.permute(0, 3, 1, 2), [side] * 2)
    return smaller.permute(0, 2, 3, 1)


def by_products(pixels: Tensor, side: int) -> Tensor:
    """As `shrink`, by two matrix products: torchvision's is made for few large images, and takes a GPU longer.

    A pixel may differ from it by one of 255 levels, as sums are rounded otherwise.
    """
    count, height, width, channels = pixels.shape
    across = _weights(width, side, channels, pixels.device).mT
    down = _weights(height, side, 1, pixels.device).expand(count, side, height)
    found = pixels.float().reshape(count * height, width * channels) @ across
    found = torch.bmm(down, found.view(count, height, side * channels))
    return found.round_().to(torch.uint8).view(count, side, side, channels)


@cache  # recorded steps read them where they are
def _weights(length: int, side: int, channels: int, device: torch.device) -> Tensor:
    """Return what each of some pixels in a row counts for each of fewer, float32 ``[s * c, length * c]``."""
    of_pixels: Tensor = resize(torch.eye(length)[None], [side, length])[0]
    return torch.kron(of_pixels, torch.eye(channels)).to(device)
