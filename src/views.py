"""Test-time augmentation: the mean of what a network says of several views of an image.

    python -m src test --ckpt_path best --model.tta six

The six views are those of K. Jordan's speed-runs (arXiv 2404.00498); to look again only where there is a doubt comes
from Hiverge's (hiverge/cifar10-speedrun, 2025), which takes a quarter of the images.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name)

Views = Literal["one", "mirror", "six", "six_if_unsure"]

_SURE = 2.0
"""Of the most probable class over the next, in logits: the log of their odds, 7.4 to 1."""


def average_views(network: Callable[[Tensor], Tensor], images: Tensor, views: Views) -> Tensor:
    """Return logits ``[b, classes]``, averaged over the views of each image.

    Args:
        network: Maps images to logits.
        images: Float ``[b, 3, h, w]``.
        views: ``one`` or ``mirror``; or ``six``: half of the result is that of ``mirror``, half the mean of it over the
            image shifted by a pixel to the upper left and to the lower right, its border reflected; or
            ``six_if_unsure``: ``six`` of the images alone of which ``one`` finds no class at least e² times as
            probable as the next. That is a matter of the image, not of its batch; but the number of passes depends on
            the images, so no network will do whose passes wait for those of other processes.
    """
    if views in ("one", "six_if_unsure"):
        first = network(images)
        return first if views == "one" else _look_again(network, images, first.float())
    middle = _mirrored(network, images)
    return middle if views == "mirror" else _shifted(network, images, middle)


def _look_again(network: Callable[[Tensor], Tensor], images: Tensor, first: Tensor) -> Tensor:
    """Return the first logits, with those of six views in place of the unsure ones."""
    best, second = first.topk(2).values.unbind(1)
    rows = (best - second < _SURE).nonzero()[:, 0]
    if len(rows):
        # Up to an eighth of a batch, or two, and so on: convolutions are prepared anew for each size that they meet.
        eighth = -(-len(images) // 8)
        padded = rows[torch.arange(-(-len(rows) // eighth) * eighth, device=rows.device) % len(rows)]
        chosen = images[padded].contiguous(memory_format=torch.channels_last)
        middle = 0.5 * (first[padded] + network(chosen.flip(3)).float())
        first = first.index_copy(0, rows, _shifted(network, chosen, middle)[: len(rows)])
    return first


def _shifted(network: Callable[[Tensor], Tensor], images: Tensor, middle: Tensor) -> Tensor:
    """Return the logits of six views, given those of the mirror pair."""
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    height, width = images.shape[2:]
    corners = [_mirrored(network, padded[:, :, i : i + height, i : i + width]) for i in (0, 2)]
    return 0.5 * middle + 0.25 * (corners[0] + corners[1])


def _mirrored(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    images = images.contiguous(memory_format=torch.channels_last)
    return 0.5 * (network(images).float() + network(images.flip(3)).float())
