"""The mean loss over all images of an evaluation, however they were cut into batches and shared among processes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """Sums losses in float64, whatever the precision of the weights (float32 where a device has no better).

    torchmetrics' own ``MeanMetric`` forgets the weights where it is not to look for NaN (1.9.0), and takes on the
    precision of the module that it is in.
    """

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, mean: Tensor, images: int) -> None:
        """Add the mean loss of a number of images."""
        exact = torch.float32 if mean.device.type == "mps" else torch.float64
        self.total = self.total.to(exact) + mean.to(exact) * images
        self.images += images

    def compute(self) -> Tensor:
        """Return the mean over all images, float32."""
        return (self.total / self.images).float()

    def _apply(self, fn: Any, exclude_state: Any = "") -> "MeanLoss":
        """Follow the module to another device, but not to another precision."""
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)  # type: ignore[return-value]
