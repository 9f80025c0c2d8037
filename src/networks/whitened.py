"""The network of the speed-runs: whitened patches, then three blocks of two or three convolutions.

    python -m src fit --config configs/speed94.yaml

After K. Jordan, 94% on CIFAR-10 in 3.29 seconds on a single GPU (arXiv 2404.00498), and airbench94_muon and
airbench96_faster of 2024.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)

from src.networks.convolution import Conv3x3
from src.networks.fused import plain_pool_norm_gelu, pool_norm_gelu
from src.networks.native import compiled
from src.networks.network import Network


class WhitenedCNN(Network):
    """A 2x2 convolution that whitens patches, three blocks of [conv, pool, norm, GELU, conv, norm, GELU], and a head.

    With three convolutions a block, a residual connection leads around the last two.

    Takes float images ``[b, 3, h, w]`` of at least 9 pixels a side.

    Args:
        num_classes: The number of classes.
        widths: Channels of the three blocks, at least 24 each.
        bn_momentum: Share of a batch in BatchNorm's running statistics, in (0, 1]; 0.4 suits batches of 2,000 images;
            batches of n want 1 - 0.6 ** (n / 2000).
        whiten_bias_epochs: Epochs, from the first, in which the whitening's bias is learned, at least 0.
        convs: Convolutions a block, 2 or 3.
        unit_head: Whether the head's weights begin with a standard deviation of 1; if not, they begin as torch's do.
        logit_divisor: What the logits are divided by, above 0. With SGD it is a part of the head's lr: what a step
            does to the logits is the lr divided by its square.
        fused: Pool, normalize and apply GELU in one function, for bf16, compiled for this CPU where that is possible
            (Linux, a C compiler); otherwise, and to within rounding, by torch's own operations.
    """

    def __init__(
        self,
        num_classes: int = 10,
        widths: tuple[int, int, int] = (64, 256, 256),
        bn_momentum: float = 0.4,
        whiten_bias_epochs: int = 3,
        convs: Literal[2, 3] = 2,
        unit_head: bool = True,
        logit_divisor: float = 256.0,
        fused: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < bn_momentum <= 1:
            raise ValueError(f"bn_momentum: {bn_momentum} is out of range: above 0, up to 1")
        if min(widths) < 24:
            raise ValueError(f"widths: {list(widths)} is out of range: at least 24 channels")
        if whiten_bias_epochs < 0:
            raise ValueError(f"whiten_bias_epochs: {whiten_bias_epochs} is out of range: 0 or more epochs")
        if convs not in (2, 3):
            raise ValueError(f"convs: {convs} is out of range: 2 or 3 convolutions")
        if not 0 < logit_divisor < math.inf:
            raise ValueError(f"logit_divisor: {logit_divisor} is out of range: above 0")
        self.whiten_bias_epochs, self.logit_divisor = whiten_bias_epochs, logit_divisor
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self.fused = fused
        self.blocks = nn.Sequential(*(_Block(a, b, bn_momentum, convs, fused) for a, b in pairwise((24, *widths))))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        if unit_head:
            with torch.no_grad():
                self.head.weight.div_(self.head.weight.std())

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[b, num_classes]``."""
        features = self.blocks(F.gelu(self.whiten(images)))
        # By its size: what pools adaptively takes several times as long on a GPU, and torch.compile does not know it.
        logits: Tensor = self.head(F.max_pool2d(features, features.shape[2:]).flatten(1))
        return logits / self.logit_divisor

    def remark(self, device: str, precision: str) -> str:
        """Say whether the fused functions are compiled."""
        if not self.fused or device != "cpu":
            return ""
        if not precision.startswith("bf16"):
            return "fused: by torch's own operations, as it is for bf16"
        return "fused: compiled" if compiled() else "fused: by torch's own operations, as its C cannot be compiled here"

    def initialize(self, images: Tensor) -> None:
        """Set the filters of the first layer to the eigenvectors of the patches' covariance, and their negatives."""
        # As F.unfold would, which on a GPU starts a piece of work for each image.
        patches = images.float().unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        covariance = patches.T @ patches / len(patches)
        values, vectors = torch.linalg.eigh(covariance.cpu().double())  # of 12x12: a GPU would be slower
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(12, 3, 2, 2)
        with torch.no_grad():
            self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def begin_epoch(self, epoch: int) -> None:
        """Learn the whitening's bias in the first epochs alone."""
        assert self.whiten.bias is not None
        self.whiten.bias.requires_grad_(epoch < self.whiten_bias_epochs)


class _Block(nn.Module):
    def __init__(self, width_in: int, width_out: int, bn_momentum: float, convs: int, fused: bool) -> None:
        super().__init__()
        self.after = pool_norm_gelu if fused else plain_pool_norm_gelu
        self.conv1 = _conv(width_in, width_out)
        self.norm1 = _norm(width_out, bn_momentum)
        self.conv2 = _conv(width_out, width_out)
        self.norm2 = _norm(width_out, bn_momentum)
        self.residual = convs == 3
        if self.residual:
            self.conv3 = _conv(width_out, width_out)
            self.norm3 = _norm(width_out, bn_momentum)

    def forward(self, x: Tensor) -> Tensor:
        first = self.after(self.conv1(x), self.norm1, pool=True)
        x = self.after(self.conv2(first), self.norm2, pool=False)
        return F.gelu(self.norm3(self.conv3(x)) + first) if self.residual else x


def _conv(width_in: int, width_out: int) -> nn.Conv2d:
    """Return a 3x3 convolution whose first filters pass their input on unchanged."""
    conv = Conv3x3(width_in, width_out)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:width_in])
    return conv


def _norm(width: int, momentum: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=momentum)
    norm.weight.requires_grad_(False)
    return norm
