"""Behaviour of src/data/module.py: which images are trained on, which are left out, and which requests are refused."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from src.data import ImageData, RandomCrop, ResidentLoader, Shapes10
from src.data.module import Part
from src.errors import UsageError


class Uneven(ImageData):
    """Three classes of 60, 30 and 10 blank images."""

    classes: ClassVar = ("many", "some", "few")
    mean: ClassVar = (0.5, 0.5, 0.5)
    std: ClassVar = (0.5, 0.5, 0.5)
    counts: ClassVar = (60, 30, 10)
    image_size: ClassVar = 8

    def load(self, part: Part) -> tuple[Tensor, Tensor]:
        labels = torch.arange(3).repeat_interleave(torch.tensor(self.counts))
        return torch.zeros(len(labels), 8, 8, 3, dtype=torch.uint8), labels


def test_paths_may_be_given_as_texts() -> None:
    data = Shapes10(feed="incoming", images=["cat.png"])
    assert (data.feed, data.images) == (Path("incoming"), [Path("cat.png")])


def shapes(**kwargs: Any) -> Shapes10:
    return Shapes10(**{"train_images": 500, "test_images": 20, "val_size": 100, **kwargs})


def class_counts(data: ImageData, ids: Tensor) -> list[int]:
    return torch.bincount(data.load("train")[1][ids], minlength=data.num_classes).tolist()


def test_the_val_split_is_the_same_for_every_seed_of_a_run() -> None:
    one, other = shapes(seed=1).split(), shapes(seed=2, batch_size=7).split()
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_val_split_changes_with_its_own_seed() -> None:
    assert not torch.equal(shapes(split_seed=1).split()[1], shapes(split_seed=0).split()[1])


@pytest.mark.parametrize(("val_size", "count"), [(100, 100), (0.2, 100), (0.13, 65), (33, 33), (0, 0), (0.0, 0)])
def test_the_val_split_is_stratified_and_disjoint_from_training(val_size: float, count: int) -> None:
    data = shapes(val_size=val_size)
    train, val = data.split()
    assert len(val) == count
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(500))
    assert all(abs(found - count / 10) < 1 for found in class_counts(data, val))


def test_the_split_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = shapes()
    first = data.split()
    monkeypatch.setattr("src.data.module.stratified_split", None)
    assert data.split() is first


def test_images_of_another_size_than_the_data_say_are_refused() -> None:
    class Larger(Uneven):
        image_size: ClassVar = 16

    with pytest.raises(UsageError, match=re.escape("data: Larger.load returns images of shape [8, 8, 3]; its image_")):
        Larger(val_size=10).split()


def test_classes_of_uneven_size_keep_their_shares() -> None:
    data = Uneven(val_size=0.2, train_fraction=0.5)
    train, val = data.split()
    assert class_counts(data, val) == [12, 6, 2]
    assert class_counts(data, train) == [24, 12, 4]


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 400), (0.5, 200), (0.1, 40), (0.001, 1)])
def test_a_fraction_of_training_is_stratified_and_leaves_val_alone(fraction: float, count: int) -> None:
    data = shapes(train_fraction=fraction)
    train, val = data.split()
    whole_train, whole_val = shapes().split()
    assert torch.equal(val, whole_val)
    assert len(train) == count
    assert set(train.tolist()) <= set(whole_train.tolist())
    assert all(abs(found - count / 10) < 1 for found in class_counts(data, train))


@pytest.mark.parametrize("count", [1, 7, 40])
def test_so_many_samples_of_each_class_are_trained_on(count: int) -> None:
    data = shapes(samples_per_class=count)
    train, val = data.split()
    assert class_counts(data, train) == [count] * 10
    assert torch.equal(val, shapes().split()[1])
    assert not set(train.tolist()) & set(val.tolist())


def test_so_many_samples_of_each_class_are_trained_on_however_uneven_the_classes_are() -> None:
    uneven, nearly_even = Uneven(val_size=0, samples_per_class=5), shapes(val_size=33, samples_per_class=46)
    assert class_counts(nearly_even, nearly_even.split()[0]) == [46] * 10
    assert class_counts(uneven, uneven.split()[0]) == [5, 5, 5]


def test_the_images_trained_on_change_with_the_split_seed_only() -> None:
    trained = shapes(samples_per_class=5).split()[0]
    assert torch.equal(shapes(samples_per_class=5, seed=9).split()[0], trained)
    assert not torch.equal(shapes(samples_per_class=5, split_seed=9).split()[0], trained)


def test_more_samples_of_a_class_than_there_are_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"^data.samples_per_class: 41 is more than the train split has: 40$"):
        shapes(samples_per_class=41).split()


@pytest.mark.parametrize("val_size", [500, 501])
def test_a_val_split_that_leaves_nothing_is_a_usage_error(val_size: int) -> None:
    with pytest.raises(UsageError, match=rf"^data.val_size: {val_size} leaves nothing to train on: .* 500 images$"):
        shapes(val_size=val_size).split()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("eval_batch_size", -1),
        ("val_size", -1),
        ("val_size", -0.1),
        ("val_size", 1.0),
        ("val_size", float("nan")),
        ("train_fraction", 0.0),
        ("train_fraction", 1.1),
        ("train_fraction", float("nan")),
        ("samples_per_class", 0),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: {value} is out of range: "):
        shapes(**{name: value})


def test_samples_and_fraction_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^samples_per_class and train_fraction exclude each other"):
        shapes(samples_per_class=5, train_fraction=0.5)


def test_loaders_serve_their_splits() -> None:
    data = shapes(batch_size=64, eval_batch_size=30, augment=[RandomCrop(2)], seed=3)
    train, val = data.split()
    train_loader, val_loader, test_loader = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert isinstance(val_loader, ResidentLoader)
    for loader, ids, batch_size in (
        (train_loader, train, 64),
        (val_loader, val, 30),
        (test_loader, torch.arange(20), 30),
    ):
        batches = list(loader)
        assert sorted(torch.cat([b.ids for b in batches]).tolist()) == ids.tolist()
        assert len(batches[0].ids) == min(batch_size, len(ids))
    assert train_loader.shuffle
    assert not val_loader.shuffle
    assert not test_loader.shuffle


def test_only_training_images_are_augmented() -> None:
    data = shapes(augment=[RandomCrop(4)])
    plain = data.load("train")[0]
    train_loader, val_loader = data.train_dataloader(), data.val_dataloader()
    assert isinstance(val_loader, ResidentLoader)
    train_batch, val_batch = next(iter(train_loader)), next(iter(val_loader))
    assert torch.equal(val_batch.images, val_loader.normalize(plain[val_batch.ids]))
    assert not torch.equal(train_batch.images, train_loader.normalize(plain[train_batch.ids]))


def test_an_empty_val_split_has_no_loader() -> None:
    assert shapes(val_size=0).val_dataloader() == []


def test_a_part_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = shapes()
    data.split()
    monkeypatch.setattr(Shapes10, "load", lambda *_: pytest.fail("it was loaded before"))
    data.train_dataloader()
    data.val_dataloader()
