"""Behaviour of src/data/shapes10.py: the embedded data set is a pure function of its seed."""

import pytest
import torch
from torch import Tensor

from src.data import Shapes10
from src.data.module import Part


def load(part: Part, train_images: int = 300, test_images: int = 300, render_seed: int = 0) -> tuple[Tensor, Tensor]:
    return Shapes10(train_images, test_images, render_seed).load(part)


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_same_seed_renders_the_same_bytes(part: Part) -> None:
    pixels, labels = load(part)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again, again_labels = load(part)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again, pixels)
    assert torch.equal(again_labels, labels)


def test_another_seed_or_part_renders_other_pictures() -> None:
    pixels, labels = load("train")
    for other, other_labels in (load("test"), load("train", render_seed=1)):
        assert not torch.equal(other_labels, labels)
        assert not set(map(bytes, other.flatten(1).numpy())) & set(map(bytes, pixels.flatten(1).numpy()))


def test_a_part_does_not_depend_on_the_size_of_the_other() -> None:
    assert torch.equal(load("test", train_images=10)[0], load("test")[0])
    assert torch.equal(load("train", test_images=10)[0], load("train")[0])


@pytest.mark.parametrize("count", [10, 300, 307])
def test_pictures_are_bytes_and_classes_are_balanced(count: int) -> None:
    pixels, labels = load("train", train_images=count)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (count, 32, 32, 3))
    assert pixels.is_contiguous()
    assert (labels.dtype, labels.shape) == (torch.int64, (count,))
    counts = torch.bincount(labels, minlength=10).tolist()
    assert len(counts) == len(Shapes10.classes) == 10
    assert max(counts) - min(counts) <= 1


def test_no_two_pictures_are_alike_and_none_is_blank() -> None:
    pixels, _ = load("train")
    assert len(set(map(bytes, pixels.flatten(1).numpy()))) == len(pixels)
    assert int((pixels.flatten(1).amax(1).int() - pixels.flatten(1).amin(1).int()).min()) > 50


@pytest.mark.parametrize("name", ["train_images", "test_images"])
@pytest.mark.parametrize("count", [9, 0, -1])
def test_too_few_images_are_refused_by_name(name: str, count: int) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: {count} is out of range: at least 10 images, at most 10 million$"):
        Shapes10(**{name: count})


def test_a_linear_model_stays_under_60_percent() -> None:
    (train, train_labels), (test, test_labels) = load("train", train_images=6000), load("test", test_images=1000)
    features, test_features = (pixels.flatten(1).double() / 127.5 - 1 for pixels in (train, test))
    best = 0.0
    for penalty in (1e1, 1e2, 1e3):  # ridge regression on the one-hot classes, in closed form
        gram = features.T @ features + penalty * torch.eye(features.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(gram, features.T @ torch.eye(10, dtype=torch.float64)[train_labels])
        best = max(best, ((test_features @ weights).argmax(1) == test_labels).double().mean().item())
    assert 0.1 < best < 0.6
