"""Pooling, BatchNorm and GELU in one: on a CPU, with a C compiler at hand, in half the time that torch takes.

Between two convolutions torch reads and writes a map a dozen times in a training step; `fused.c` does so four times.
Where it cannot be compiled (another system, no compiler) or is not made for it (another number format than bf16),
torch's own operations do the same to within rounding.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)

from src.networks.native import call, compiled
from src.networks.pool import max_pool2


def pool_norm_gelu(x: Tensor, norm: nn.BatchNorm2d, *, pool: bool) -> Tensor:
    """Return ``gelu(norm(max_pool2d(x, 2)))``, or without the pooling.

    Args:
        x: ``[b, c, h, w]``.
        norm: Its weight is taken to be 1.
        pool: Whether to pool first.
    """
    measured = not (norm.training or torch.is_grad_enabled()) and norm.running_mean is not None
    fits = (
        (norm.training or measured)
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.is_contiguous(memory_format=torch.channels_last)
        and min(x.shape[2:]) >= 2
    )
    if not fits or (library := compiled()) is None:
        return plain_pool_norm_gelu(x, norm, pool=pool)
    if measured:
        return _with_running_statistics(x, norm, pool, library)
    result: Tensor = _Fused.apply(x, norm.bias, norm, pool, library)
    return result


def plain_pool_norm_gelu(x: Tensor, norm: nn.BatchNorm2d, *, pool: bool) -> Tensor:
    """Return the same by torch's own operations."""
    return F.gelu(norm(max_pool2(x) if pool else x))


def _pool_and_sum(x: Tensor, pool: bool, library: ctypes.CDLL) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the pooled map, where its pixels come from, and its sums and those of squares by channel, ``[2, c]``."""
    b, c, h, w = x.shape
    shape, layout = (b, c, *((h // 2, w // 2) if pool else (h, w))), torch.channels_last
    pooled = torch.empty(shape, dtype=x.dtype, memory_format=layout) if pool else x
    where = torch.empty(shape, dtype=torch.uint8, memory_format=layout) if pool else None
    sums, partial = torch.empty((2, c), dtype=torch.float64), torch.empty((b, 2, c))
    call(library.pool_and_sum, x, pooled, where, partial, sums, b, h, w, c)
    return pooled, where, sums


def _with_running_statistics(x: Tensor, norm: nn.BatchNorm2d, pool: bool, library: ctypes.CDLL) -> Tensor:
    assert norm.running_mean is not None and norm.running_var is not None
    pooled = _pool_and_sum(x, pool, library)[0] if pool else x
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    y = torch.empty_like(pooled)
    b, c, h, w = pooled.shape
    call(library.norm_gelu, pooled, y, scale.float(), shift.float(), b * h * w, c)
    return y


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, norm: nn.BatchNorm2d, pool: bool, library: ctypes.CDLL) -> Tensor:
        b, c, h, w = x.shape
        pooled, where, sums = _pool_and_sum(x, pool, library)
        count = b * pooled.shape[2] * pooled.shape[3]
        mean = sums[0] / count
        variance = (sums[1] / count - mean * mean).clamp_(min=0)
        scale = (variance + norm.eps).rsqrt()
        shift = bias.double() - mean * scale
        momentum = norm.momentum
        if norm.running_mean is not None and norm.running_var is not None and momentum is not None:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean.float(), momentum)
            norm.running_var.lerp_((variance * (count / max(count - 1, 1))).float(), momentum)
        y = torch.empty_like(pooled)
        call(library.norm_gelu, pooled, y, scale.float(), shift.float(), count, c)
        ctx.save_for_backward(pooled, where, mean, scale, shift)
        ctx.library, ctx.size = library, (b, c, h, w)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pooled, where, mean, scale, shift = ctx.saved_tensors
        b, c, h, w = ctx.size
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        pixels = pooled.shape[2] * pooled.shape[3]
        d = torch.empty_like(pooled)
        sums, partial = torch.empty((2, c), dtype=torch.float64), torch.empty((b, 2, c))
        single = scale.float()
        call(ctx.library.gelu_back, gradient, pooled, d, single, shift.float(), partial, sums, b, pixels, c)
        # With n pixels and xhat = (p - mean) * scale: dp = scale * (d - sum(d) / n - xhat * sum(d * xhat) / n).
        n = b * pixels
        dot = (sums[1] - mean * sums[0]) * scale
        of_p = -scale * scale * dot / n
        of_one = -scale * sums[0] / n - mean * of_p
        gx = torch.empty((b, c, h, w), dtype=pooled.dtype, memory_format=torch.channels_last)
        call(ctx.library.norm_pool_back, d, pooled, where, gx, single, of_p.float(), of_one.float(), b, h, w, c)
        return gx, sums[0].float(), None, None, None
