"""Test-time augmentation: which views are averaged, and with which weights."""

import pytest
import torch
from torch import Tensor

from src.views import Views, average_views


def pixel(images: Tensor) -> Tensor:
    """A network that is one pixel of the image: what it is given shows in what it says."""
    return images[:, :, 1, 1]


@pytest.mark.parametrize("views", ["one", "mirror", "six", "six_if_unsure"])
def test_a_network_that_does_not_look_at_places_says_the_same(views: Views) -> None:
    images = torch.full((2, 3, 8, 8), 0.5)
    torch.testing.assert_close(average_views(lambda x: x.mean((2, 3)), images, views), images.mean((2, 3)))


def test_the_views_are_the_mirror_pair_and_its_shifts_by_a_pixel() -> None:
    images = torch.randn(2, 3, 5, 5)

    def pair(row: int, column: int) -> Tensor:
        """Mean of a pixel and of the one that takes its place in the mirror image."""
        return (images[:, :, row, column] + images[:, :, row, column_mirrored[column]]) / 2

    assert torch.equal(average_views(pixel, images, "one"), images[:, :, 1, 1])
    column_mirrored = {1: 3}
    torch.testing.assert_close(average_views(pixel, images, "mirror"), pair(1, 1))
    upper_left = (images[:, :, 0, 0] + images[:, :, 0, 2]) / 2
    lower_right = (images[:, :, 2, 2] + images[:, :, 2, 4]) / 2
    expected = 0.5 * pair(1, 1) + 0.25 * (upper_left + lower_right)
    torch.testing.assert_close(average_views(pixel, images, "six"), expected)


@pytest.mark.parametrize("unsure", [[], [1], [0, 3, 4, 6], list(range(7))])
def test_only_an_image_of_which_the_first_view_is_unsure_is_looked_at_again(unsure: list[int]) -> None:
    images = torch.randn(7, 3, 5, 5)
    images[:, 0, 1, 1] = images[:, 1:, 1, 1].max(1).values + 2.5  # class 0 is ahead of the next by 2.5
    images[unsure, 0, 1, 1] -= 1
    given = images.clone()
    found = average_views(pixel, images, "six_if_unsure")
    expected = average_views(pixel, images, "one").clone()
    expected[unsure] = average_views(pixel, images, "six")[unsure]
    torch.testing.assert_close(found, expected)
    assert torch.equal(images, given)
    for i in range(7):  # what else is in the batch does not matter
        torch.testing.assert_close(average_views(pixel, images[i : i + 1], "six_if_unsure")[0], found[i])


def test_the_unsure_are_looked_at_in_batches_of_few_sizes() -> None:
    sizes: list[int] = []

    def network(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return pixel(images)

    for count, expected in ((0, [40]), (1, [40, *[5] * 5]), (5, [40, *[5] * 5]), (6, [40, *[10] * 5]), (40, [40] * 6)):
        images = torch.zeros(40, 3, 5, 5)
        images[count:, 0] = 3.0
        sizes.clear()
        average_views(network, images, "six_if_unsure")
        assert sizes == expected
