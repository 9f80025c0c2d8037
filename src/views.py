"""Test-time augmentation: the mean of what a network says of several views of an image.

    python -m src test --ckpt_path best --model.tta six

The six views are those of K. Jordan's speed-runs (arXiv 2404.00498).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name)

Views = Literal["one", "mirror", "six"]


def average_views(network: Callable[[Tensor], Tensor], images: Tensor, views: Views) -> Tensor:
    """Return logits ``[b, classes]``, averaged over the views of each image.

    Args:
        network: Maps images to logits.
        images: Float ``[b, 3, h, w]``.
        views: ``one`` or ``mirror``; or ``six``: half of the result is that of ``mirror``, half the mean of it over the
            image shifted by a pixel to the upper left and to the lower right, its border reflected.
    """
    if views == "one":
        return network(images)
    middle = _mirrored(network, images)
    if views == "mirror":
        return middle
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    height, width = images.shape[2:]
    shifted = [_mirrored(network, padded[:, :, i : i + height, i : i + width]) for i in (0, 2)]
    return 0.5 * middle + 0.25 * (shifted[0] + shifted[1])


def _mirrored(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    images = images.contiguous(memory_format=torch.channels_last)
    return 0.5 * (network(images).float() + network(images.flip(3)).float())
