"""The fused functions between two convolutions: what torch's own do, to within the rounding of bfloat16."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src.networks.fused import plain_pool_norm_gelu, pool_norm_gelu
from src.networks.native import compiled
from tests.conftest import REPOSITORY

needs_compiler = pytest.mark.skipif(compiled() is None, reason="there is no C compiler, or this is not Linux")


def norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        layer.bias.copy_(torch.linspace(-1, 1, channels))
    return layer


def maps(b: int, c: int, h: int, w: int) -> Tensor:
    draws = torch.Generator().manual_seed(b + c + h + w)
    x = 1.5 * torch.randn(b, c, h, w, generator=draws) + 0.3
    return x.bfloat16().contiguous(memory_format=torch.channels_last)


@needs_compiler
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("shape", [(5, 64, 31, 31), (3, 40, 15, 6), (7, 24, 3, 3), (1, 256, 7, 7), (4, 1, 4, 7)])
def test_it_is_at_least_as_exact_as_torch(shape: tuple[int, int, int, int], pool: bool) -> None:
    results: list[list[Tensor]] = []
    gradient = maps(*shape[:2], *(n // 2 if pool else n for n in shape[2:]))
    for way in ("fused", "torch", "exact"):
        layer, x = norm(shape[1]), maps(*shape).requires_grad_()
        if way == "exact":
            y = plain_pool_norm_gelu(x.double(), layer.double(), pool=pool)
            y.backward(gradient.double())  # type: ignore[no-untyped-call]
        else:
            y = (pool_norm_gelu if way == "fused" else plain_pool_norm_gelu)(x, layer, pool=pool)
            assert y.dtype == torch.bfloat16
            y.backward(gradient)  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert layer.bias.grad is not None
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert layer.num_batches_tracked == 1
        found = [y.detach(), x.grad, layer.bias.grad, layer.running_mean, layer.running_var]
        results.append([tensor.double() for tensor in found])
    for ours, theirs, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm() + 1e-5 * exact.norm()


@needs_compiler
def test_two_equal_calls_are_equal_to_the_last_bit() -> None:
    found = []
    for _ in range(2):
        layer, x = norm(64), maps(50, 64, 15, 15).requires_grad_()
        y = pool_norm_gelu(x, layer, pool=True)
        y.sum().backward()  # type: ignore[no-untyped-call]
        found.append((y, x.grad, layer.running_var))
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    x = maps(2, 8, 4, 4)
    x[1, 3, 2, 1] = value
    if value < 0:
        x[1, 3, 2:, :2] = value
    assert not pool_norm_gelu(x, norm(8), pool=True)[:, 3].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("shape", [(5, 64, 31, 31), (3, 40, 15, 6), (4, 1, 4, 7)])
def test_with_running_statistics_it_is_at_least_as_exact_as_torch(shape: tuple[int, int, int, int], pool: bool) -> None:
    layer, x = norm(shape[1]), maps(*shape)
    plain_pool_norm_gelu(maps(*shape).float() * 2 - 1, layer, pool=pool)
    layer.eval()
    before = [buffer.clone() for buffer in layer.buffers()]
    with torch.no_grad():
        ours, theirs = pool_norm_gelu(x, layer, pool=pool), plain_pool_norm_gelu(x, layer, pool=pool)
        exact = plain_pool_norm_gelu(x.double(), layer.double(), pool=pool)
    assert ours.dtype == torch.bfloat16
    assert not torch.equal(ours, theirs), "else it was not our function"
    assert (ours - exact).norm() <= (theirs - exact).norm()
    assert all(torch.equal(a.double(), b.double()) for a, b in zip(before, layer.buffers(), strict=True))


def test_what_it_is_not_made_for_is_left_to_torch() -> None:
    layer = norm(8).eval()
    for x in (maps(2, 8, 4, 4), maps(2, 8, 4, 4).float(), maps(2, 8, 4, 4).contiguous()):
        assert torch.equal(pool_norm_gelu(x, layer, pool=True), plain_pool_norm_gelu(x, layer, pool=True))
    training = norm(8), norm(8)
    x = maps(2, 8, 4, 4).float()
    assert torch.equal(pool_norm_gelu(x, training[0], pool=False), plain_pool_norm_gelu(x, training[1], pool=False))


def test_without_a_compiler_there_is_none(tmp_path: Path) -> None:
    code = "import torch; from src.networks.native import compiled; print(compiled())"
    env = {"PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout == "None\n"


@needs_compiler
def test_it_is_there_whatever_the_files_are_called_that_a_process_has_mapped(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    path.write_bytes(b"x")
    compiled.cache_clear()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ):
        assert compiled() is not None
    compiled.cache_clear()


@needs_compiler
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        compiled.cache_clear()
        assert compiled() is not None
        assert len(list((tmp_path / "live-cifar10").iterdir())) == 1
    compiled.cache_clear()
