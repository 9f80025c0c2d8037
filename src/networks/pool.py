"""Max-pooling by twos: on a GPU, in a network that is compiled, by kernels of our own.

What torch.compile makes of its gradient looks up for each number of the large map which number of the small one may
concern it, and takes four times as long as memory allows.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name)

_HAS_TRITON = find_spec("triton") is not None


def max_pool2(x: Tensor) -> Tensor:
    """Return ``max_pool2d(x, 2)``, the same numbers and gradients everywhere.

    Args:
        x: ``[b, c, h, w]``.
    """
    # Compiled only: else there may be no compiler for what Triton compiles; exported it is to be known elsewhere.
    fits = (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and _HAS_TRITON
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.is_contiguous(memory_format=torch.channels_last)
        and min(x.shape[2:]) >= 2
    )
    return pool(x)[0] if fits else F.max_pool2d(x, 2)


@torch.library.custom_op("live_cifar10::pool", mutates_args=())
def pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `src.networks.pool_kernels.pool`."""
    from src.networks import pool_kernels  # here: Triton takes a second to load

    return pool_kernels.pool(x)


@torch.library.custom_op("live_cifar10::spread", mutates_args=())
def spread(gradient: Tensor, where: Tensor, height: int, width: int) -> Tensor:
    """See `src.networks.pool_kernels.spread`."""
    from src.networks import pool_kernels

    gradient = gradient.contiguous(memory_format=torch.channels_last)
    return pool_kernels.spread(gradient, where, height, width)


@pool.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    b, c, h, w = x.shape
    pooled = torch.empty((b, c, h // 2, w // 2), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


@spread.register_fake
def _(gradient: Tensor, _where: Tensor, height: int, width: int) -> Tensor:
    shape = (*gradient.shape[:2], height, width)
    return torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.size = inputs[0].shape[2:]


def _backward(ctx: Any, gradient: Tensor, _: Any) -> Tensor:
    (where,) = ctx.saved_tensors
    of_x: Tensor = spread(gradient, where, *ctx.size)
    return of_x


pool.register_autograd(_backward, setup_context=_keep)
