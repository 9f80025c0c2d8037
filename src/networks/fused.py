"""Pooling, BatchNorm and GELU in one: on a CPU, with a C compiler at hand, in half the time that torch takes.

Between two convolutions torch reads and writes a map a dozen times in a training step; `fused.c` does so four times. It
is compiled at the first use, for this very processor, and kept in the user's cache. Where it cannot be (another system,
no compiler, another number format than bf16), torch's own operations do the same to within rounding.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)

_SOURCE = Path(__file__).with_name("fused.c")
_FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]


def pool_norm_gelu(x: Tensor, norm: nn.BatchNorm2d, *, pool: bool) -> Tensor:
    """Return ``gelu(norm(max_pool2d(x, 2)))``, or without the pooling.

    Args:
        x: ``[b, c, h, w]``.
        norm: Its weight is taken to be 1.
        pool: Whether to pool first.
    """
    fits = (
        norm.training
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.is_contiguous(memory_format=torch.channels_last)
        and min(x.shape[2:]) >= 2
    )
    if not fits or (library := compiled()) is None:
        return plain_pool_norm_gelu(x, norm, pool=pool)
    result: Tensor = _Fused.apply(x, norm.bias, norm, pool, library)
    return result


def plain_pool_norm_gelu(x: Tensor, norm: nn.BatchNorm2d, *, pool: bool) -> Tensor:
    """Return the same by torch's own operations."""
    return F.gelu(norm(F.max_pool2d(x, 2) if pool else x))


@cache
def compiled() -> ctypes.CDLL | None:
    """Return the compiled functions, or none where there cannot be any."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    # A second OpenMP in the process would fight with torch's for the cores.
    openmp = _loaded_openmp()
    if sys.platform != "linux" or compiler is None or openmp is None:
        return None
    source = _SOURCE.read_bytes()
    with contextlib.suppress(OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
        key = hashlib.sha256(b"\0".join([source, version, " ".join(_FLAGS).encode(), _processor().encode()]))
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "live-cifar10"
        path = folder / f"fused-{key.hexdigest()[:16]}.so"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                unlinked, linked = Path(work) / "fused.o", Path(work) / "fused.so"
                for command in (
                    [compiler, *_FLAGS, "-fPIC", "-c", str(_SOURCE), "-o", str(unlinked)],
                    [compiler, "-shared", str(unlinked), "-lm", "-o", str(linked)],
                ):
                    subprocess.run(command, capture_output=True, check=True, timeout=120)
                linked.replace(path)
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    return None


def _loaded_openmp() -> str | None:
    """Return the path of the OpenMP library that torch has loaded."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "libgomp" in line:
                return line.split(maxsplit=5)[5]
    return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "".join(line for line in lines if line.startswith(("model name", "flags")))
    return platform.processor()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, norm: nn.BatchNorm2d, pool: bool, library: ctypes.CDLL) -> Tensor:
        b, c, h, w = x.shape
        height, width = (h // 2, w // 2) if pool else (h, w)
        shape, layout = (b, c, height, width), torch.channels_last
        pooled = torch.empty(shape, dtype=x.dtype, memory_format=layout) if pool else x
        where = torch.empty(shape, dtype=torch.uint8, memory_format=layout) if pool else None
        sums, partial = torch.empty((2, c), dtype=torch.float64), torch.empty((b, 2, c))
        _call(library.pool_and_sum, x, pooled, where, partial, sums, b, h, w, c)
        count = b * height * width
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
        y = torch.empty(shape, dtype=x.dtype, memory_format=layout)
        _call(library.norm_gelu, pooled, y, scale.float(), shift.float(), count, c)
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
        _call(ctx.library.gelu_back, gradient, pooled, d, single, shift.float(), partial, sums, b, pixels, c)
        # With n pixels and xhat = (p - mean) * scale: dp = scale * (d - sum(d) / n - xhat * sum(d * xhat) / n).
        n = b * pixels
        dot = (sums[1] - mean * sums[0]) * scale
        of_p = -scale * scale * dot / n
        of_one = -scale * sums[0] / n - mean * of_p
        gx = torch.empty((b, c, h, w), dtype=pooled.dtype, memory_format=torch.channels_last)
        _call(ctx.library.norm_pool_back, d, pooled, where, gx, single, of_p.float(), of_one.float(), b, h, w, c)
        return gx, sums[0].float(), None, None, None


def _call(function: Any, *arguments: Tensor | int | None) -> None:
    """Call a C function with pointers to tensors, a null pointer for none, and longs."""
    function(*(
        ctypes.c_long(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr())
        for a in arguments
    ))  # fmt: skip
