"""Smaller images are those of torchvision, on a GPU too."""

import pytest
import torch
from torchvision.transforms.v2.functional import resize

from src.data.shrink import by_products, shrink


@pytest.mark.parametrize("side", [8, 20, 24, 31])
def test_smaller_images_are_those_that_torchvision_makes(side: int) -> None:
    pixels = torch.randint(256, (50, 32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    of_floats = resize(pixels.permute(0, 3, 1, 2).float(), [side, side]).round().permute(0, 2, 3, 1)
    off = (by_products(pixels, side) - of_floats).abs()
    assert off.max() <= 1
    assert off.mean() < 0.001
    small = shrink(pixels, side)
    assert (small.shape, small.dtype) == ((50, side, side, 3), torch.uint8)
    assert (small - of_floats).abs().max() <= 1  # on a CPU numbers of fixed point, which round otherwise
