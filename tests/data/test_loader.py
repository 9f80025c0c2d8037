"""Properties of src/data/loader.py: what an epoch yields is a pure function of (seed, epoch)."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from src.data import Batch, MixUp, RandomCrop, RandomFlip, ResidentLoader
from src.data.loader import Normalize

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
COUNT = 40
IDS = torch.arange(3, 33)  # a split of 30


def pixels() -> Tensor:
    return torch.randint(256, (COUNT, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def labels() -> Tensor:
    return torch.arange(COUNT) * 7 % 10


def loader(batch_size: int = 8, **kwargs: Any) -> ResidentLoader:
    return ResidentLoader(
        pixels(), labels(), IDS, batch_size, Normalize(MEAN, STD, torch.device("cpu")), **{"shuffle": True, **kwargs}
    )


def epoch(of: ResidentLoader, number: int) -> list[Batch]:
    of.set_epoch(number)
    return list(of)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        a.total == b.total and all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 8, 30, 100])
def test_an_epoch_yields_every_id_once(batch_size: int, shuffle: bool) -> None:
    loaded = loader(batch_size, shuffle=shuffle)
    batches = list(loaded)
    assert sorted(torch.cat([b.ids for b in batches]).tolist()) == IDS.tolist()
    assert len(batches) == len(loaded)


def test_labels_and_images_are_those_of_the_ids() -> None:
    for batch in loader():
        assert batch.labels.dtype == torch.int64
        assert torch.equal(batch.labels, labels()[batch.ids])
        reference = v2.functional.to_dtype(pixels()[batch.ids].permute(0, 3, 1, 2), torch.float32, scale=True)
        reference = v2.functional.normalize(reference, list(MEAN), list(STD))
        assert batch.images.dtype == torch.float32
        assert torch.allclose(batch.images, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mix", [None, MixUp()])
def test_images_are_channels_last(mix: MixUp | None) -> None:
    for batch in loader(augment=[RandomFlip(), RandomCrop(2)], mix=mix):
        assert batch.images.shape[1:] == (3, 8, 8)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_yield_the_batches_of_one_process_bit_by_bit(world_size: int) -> None:
    augment = [RandomFlip(), RandomCrop(2)]
    alone = epoch(loader(augment=augment, seed=5), 2)
    ranks = [epoch(loader(augment=augment, seed=5, rank=r, world_size=world_size), 2) for r in range(world_size)]
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert all(len(share.ids) > 0 for share in shares)
        assert torch.equal(torch.cat([share.ids for share in shares]), whole.ids)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
        assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
        assert {share.total for share in shares} == {whole.total}


@pytest.mark.parametrize(("world_size", "totals"), [(1, [9, 9, 9, 3]), (2, [9, 9, 9, 3]), (4, [9, 9, 12])])
def test_total_counts_the_images_of_a_batch_over_all_ranks(world_size: int, totals: list[int]) -> None:
    ranks = [list(loader(9, rank=r, world_size=world_size)) for r in range(world_size)]
    for total, *shares in zip(totals, *ranks, strict=True):
        assert [share.total for share in shares] == [total] * world_size
        assert sum(len(share.images) for share in shares) == total


def test_another_epoch_or_seed_has_another_order_and_the_same_has_the_same_bits() -> None:
    augment = [RandomFlip(), RandomCrop(2)]
    loaded = loader(augment=augment)
    first, second = epoch(loaded, 0), epoch(loaded, 1)
    assert not torch.equal(torch.cat([b.ids for b in first]), torch.cat([b.ids for b in second]))
    assert same(epoch(loaded, 0), first)
    torch.manual_seed(99)
    assert same(epoch(loader(augment=augment), 1), second)
    other = epoch(loader(augment=augment, seed=1), 0)
    assert not torch.equal(torch.cat([b.ids for b in first]), torch.cat([b.ids for b in other]))


def test_iterating_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    list(loader(augment=[RandomFlip(), RandomCrop(2)], mix=MixUp()))
    assert torch.equal(torch.get_rng_state(), before)


def test_mixing_gives_class_weights_and_is_the_same_each_time() -> None:
    mixed = epoch(loader(mix=MixUp(1.0)), 3)
    assert same(epoch(loader(mix=MixUp(1.0)), 3), mixed)
    for batch in mixed:
        assert (batch.labels.dtype, batch.labels.shape) == (torch.float32, (len(batch.ids), 10))
        assert torch.allclose(batch.labels.sum(1), torch.ones(len(batch.ids)))
    blends = {round(float(batch.labels.max()), 6) for batch in mixed}
    assert len(blends) == len(mixed), "every batch has a blend of its own"


def test_a_loader_that_shuffles_is_its_own_sampler() -> None:
    loaded = loader()
    loaded.sampler.set_epoch(4)
    assert same(list(loaded), epoch(loader(), 4))


def test_a_loader_that_does_not_shuffle_keeps_the_order_and_has_no_sampler() -> None:
    loaded = loader(shuffle=False)
    assert not hasattr(loaded, "sampler")
    assert torch.equal(torch.cat([b.ids for b in epoch(loaded, 1)]), IDS)


def test_an_empty_split_yields_nothing() -> None:
    normalize = Normalize(MEAN, STD, torch.device("cpu"))
    empty = ResidentLoader(pixels(), labels(), torch.arange(0), 8, normalize, shuffle=True)
    assert len(empty) == 0
    assert list(empty) == []


def test_normalisation_has_the_deviation_it_promises() -> None:
    normalize = Normalize((0.5, 0.25, 0.0), (0.5, 0.25, 1.0), torch.device("cpu"))
    white = normalize(torch.full((1, 1, 1, 3), 255, dtype=torch.uint8))
    assert white.flatten().tolist() == pytest.approx([1.0, 3.0, 1.0], abs=1e-6)


def test_the_first_epochs_are_small() -> None:
    pixels = torch.full((10, 32, 32, 3), 7, dtype=torch.uint8)
    labels, ids = torch.zeros(10, dtype=torch.int64), torch.arange(10)
    normalize = Normalize((0.0, 0.0, 0.0), (1 / 255,) * 3, torch.device("cpu"))
    loader = ResidentLoader(pixels, labels, ids, 4, normalize, shuffle=True, small=(2, 24))
    for epoch, side in ((0, 24), (1, 24), (2, 32)):
        loader.set_epoch(epoch)
        for batch in loader:
            assert batch.images.shape == (len(batch.ids), 3, side, side)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert (batch.images == 7).all()


def test_what_recorded_steps_read_to_normalize_images_stays_where_it_is_when_others_have_another_size() -> None:
    normalize = Normalize(MEAN, STD, torch.device("cpu"))
    places = []
    for side in (24, 32, 24):
        normalize(torch.zeros(1, side, side, 3, dtype=torch.uint8))
        places.append([constant.data_ptr() for constant in normalize._whole[torch.Size((24, 24, 3))]])
    assert places[0] == places[1] == places[2]
