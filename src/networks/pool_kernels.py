"""The kernels of `src.networks.pool`, in Triton, which is loaded with this file: at their first use alone."""
# Triton takes annotations of a kernel's arguments for its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
from torch import Tensor
from triton import language as tl

_BLOCK = 1024
_OPTIONS = {"enable_fp_fusion": True}  # nothing is to be fused here, but Triton 3.9 warns of what is not said


@triton.jit
def _pool_kernel(
    x, pooled, where, height: tl.constexpr, width: tl.constexpr, channels: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    # One program for a part of a row of the pooled map: so that to find a place takes no division for each number.
    row, place = tl.program_id(0), tl.program_id(1) * block + tl.arange(0, block)
    image, line = (row // (height // 2)).to(tl.int64), row % (height // 2)
    there = place < (width // 2) * channels
    first = x + (image * height + 2 * line) * (width * channels) + place + place // channels * channels
    best = tl.load(first, there).to(tl.float32)
    index = tl.zeros((block,), tl.uint8)
    for i in tl.static_range(1, 4):  # in torch's order, the first of equals
        other = tl.load(first + (i // 2) * (width * channels) + i % 2 * channels, there).to(tl.float32)
        better = (other > best) | (other != other)
        best, index = tl.where(better, other, best), tl.where(better, i, index).to(tl.uint8)
    out = row.to(tl.int64) * ((width // 2) * channels) + place
    tl.store(pooled + out, best, there)
    tl.store(where + out, index, there)


@triton.jit
def _spread_kernel(
    gradient, where, out, height: tl.constexpr, width: tl.constexpr, channels: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    # One program for a part of two rows of the map before pooling; of an odd number the last row has no pooled one.
    lines: tl.constexpr = (height + 1) // 2
    row, place = tl.program_id(0), tl.program_id(1) * block + tl.arange(0, block)
    image, line = (row // lines).to(tl.int64), row % lines
    column = place // channels
    pooled = column < tl.where(line < height // 2, width // 2, 0)
    source = (image * (height // 2) + line) * ((width // 2) * channels) + place
    value = tl.load(gradient + source, pooled, 0.0).to(tl.float32)
    index = tl.load(where + source, pooled, 0)
    first = out + (image * height + 2 * line) * (width * channels) + place + column * channels
    for i in tl.static_range(4):
        inside = 2 * column + i % 2 < tl.where(2 * line + i // 2 < height, width, 0)
        tl.store(first + (i // 2) * (width * channels) + i % 2 * channels, tl.where(index == i, value, 0.0), inside)


def pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of each two by two, and which of the four it is, uint8.

    Args:
        x: ``[b, c, h, w]``, channels_last.
    """
    b, c, h, w = x.shape
    shape = (b, c, h // 2, w // 2)
    pooled = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    where = torch.empty_like(pooled, dtype=torch.uint8)
    grid = (b * (h // 2), triton.cdiv((w // 2) * c, _BLOCK))
    _pool_kernel[grid](x, pooled, where, h, w, c, _BLOCK, **_OPTIONS)
    return pooled, where


def spread(gradient: Tensor, where: Tensor, height: int, width: int) -> Tensor:
    """Return the gradient of what was pooled, ``[b, c, height, width]``.

    Args:
        gradient: Of the pooled map, channels_last.
        where: What `pool` has found.
        height: Of the map before.
        width: Likewise.
    """
    b, c = gradient.shape[:2]
    out = torch.empty(
        (b, c, height, width), dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last
    )
    grid = (b * ((height + 1) // 2), triton.cdiv((width + 1) // 2 * c, _BLOCK))
    _spread_kernel[grid](gradient, where, out, height, width, c, _BLOCK, **_OPTIONS)
    return out
