"""A 3x3 convolution whose backward pass is fast on small maps on a CPU too."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)
from torch.nn.grad import conv2d_input

from src.networks.native import call, compiled

_SMALL_MAP = 64
"""Pixels of a map up to which oneDNN takes longer for the gradient of the filters than a matrix product does: 1.6 times
at 7x7, 8 times at 3x3 (batches of 125, 256 channels, bf16, AMX, torch 2.15)."""

_PART = 128
"""Images whose patches are multiplied at once: more of them would leave the caches, and glibc's stock of memory."""


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` with 3x3 filters, padding 1 and no bias; equal to it but for rounding.

    Args:
        width_in: Channels that come in.
        width_out: Channels that go out.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, width_in, h, w]`` to ``[b, width_out, h, w]``."""
        small = x.shape[2] * x.shape[3] <= _SMALL_MAP
        if x.device.type != "cpu" or not small or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        result: Tensor = _SmallMap.apply(x, weight)
        return result


class _SmallMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = conv2d_input(x.shape, weight, gradient, padding=1)  # type: ignore[no-untyped-call]
        channels = x.shape[1]
        total = torch.zeros(len(weight), 9 * channels)
        for part, of_part in zip(torch.split(x, _PART), torch.split(gradient, _PART), strict=True):
            columns, patches = _matrices(part.permute(0, 2, 3, 1), of_part.permute(0, 2, 3, 1))
            total += columns @ patches
        of_weight = total.to(weight.dtype).view(len(weight), 3, 3, channels).permute(0, 3, 1, 2)
        return of_x, of_weight


def _matrices(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two matrices whose product is the gradient of the filters.

    Args:
        x: What the convolution was given, ``[b, h, w, c]``.
        gradient: That of its result, ``[b, h, w, out]``.

    Returns:
        ``[out, b*h*w]``, and the patches, ``[b*h*w, 9*c]``.
    """
    b, h, w, channels = x.shape
    pixels, width_out = b * h * w, gradient.shape[3]
    library = None if torch.compiler.is_compiling() else compiled()
    if library is None or not (x.is_contiguous() and gradient.is_contiguous()):
        padded = F.pad(x, (0, 0, 1, 1, 1, 1)).contiguous()
        image, row, column, _ = padded.stride()
        strided = padded.as_strided((b, h, w, 3, 3 * channels), (image, row, column, row, 1))
        return gradient.reshape(pixels, width_out).T.contiguous(), strided.reshape(pixels, 9 * channels)
    columns, patches = x.new_empty((width_out, pixels)), x.new_empty((pixels, 9 * channels))
    call(library.transpose, gradient, columns, pixels, width_out)
    call(library.patches3x3, x, patches, b, h, w, channels)
    return columns, patches
