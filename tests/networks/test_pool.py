"""Pooling in a compiled network on a GPU: its kernels give what torch's do, here by Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812 (the field's name)

from src.networks.fused import plain_pool_norm_gelu
from src.networks.pool import max_pool2
from tests.conftest import REPOSITORY

INTERPRETED = """
import torch
from torch.nn import functional as F
from src.networks.pool import pool

def both(pooling, x):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    pooled = pooling(x)
    pooled.backward(torch.arange(1.0, 1 + pooled.numel()).view_as(pooled).to(x.dtype))
    return pooled.detach(), x.grad

draws = torch.Generator().manual_seed(0)
ours = torch.compile(lambda x: pool(x)[0], backend="aot_eager", fullgraph=True)
for dtype in (torch.bfloat16, torch.float32):
    for shape in ((2, 24, 7, 7), (1, 64, 31, 30), (2, 40, 6, 9), (1, 600, 2, 3)):
        x = torch.randn(shape, generator=draws).mul(2).round().to(dtype)  # with many that are equal
        x[0, 0, 0, 1] = float("nan")
        x = x.contiguous(memory_format=torch.channels_last)
        for found, due in zip(both(ours, x), both(lambda x: F.max_pool2d(x, 2), x)):
            torch.testing.assert_close(found, due, rtol=0, atol=0, equal_nan=True)
            assert found.is_contiguous(memory_format=torch.channels_last)
torch.library.opcheck(pool, (torch.randn(2, 8, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_(),))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton")
def test_the_kernels_give_the_numbers_and_the_gradients_of_torch() -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_can_be_compiled_for_a_gpu(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget

    from src.networks.pool_kernels import _OPTIONS, _pool_kernel, _spread_kernel

    sizes = {"height": 31, "width": 31, "channels": 64, "block": 1024}
    for kernel in (_pool_kernel, _spread_kernel):
        kinds = {name: "*u8" if name == "where" else "*bf16" for name in kernel.arg_names}
        signature = kinds | dict.fromkeys(sizes, "constexpr")
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=sizes)
        assert "cubin" in triton.compile(source, target=GPUTarget("cuda", capability, 32), options=_OPTIONS).asm


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton")
@pytest.mark.parametrize(
    ("compiles", "exports", "layout", "dtype", "ours"),
    [
        (True, False, torch.channels_last, torch.bfloat16, True),
        (True, False, torch.channels_last, torch.float64, False),
        (True, False, torch.contiguous_format, torch.bfloat16, False),
        (False, False, torch.channels_last, torch.bfloat16, False),
        (True, True, torch.channels_last, torch.bfloat16, False),
    ],
)
def test_a_network_that_is_compiled_for_a_gpu_pools_by_them(
    compiles: bool,
    exports: bool,
    layout: torch.memory_format,
    dtype: torch.dtype,
    ours: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiles)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exports)
    called: list[Tensor] = []

    def pool(x: Tensor) -> tuple[Tensor, None]:
        called.append(x)
        return F.max_pool2d(x, 2), None

    monkeypatch.setattr("src.networks.pool.pool", pool)
    with FakeTensorMode():  # which needs no GPU
        x = torch.empty(2, 24, 31, 31, dtype=dtype, device="cuda").contiguous(memory_format=layout)
        y = plain_pool_norm_gelu(x, nn.BatchNorm2d(24, dtype=dtype, device="cuda"), pool=True)
    assert y.shape == (2, 24, 15, 15)
    assert bool(called) == ours


def test_on_a_cpu_torch_pools() -> None:
    x = torch.randn(2, 3, 7, 6).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(max_pool2, backend="aot_eager", fullgraph=True)
    for found in (max_pool2(x), compiled(x)):
        torch.testing.assert_close(found, F.max_pool2d(x, 2), rtol=0, atol=0)
