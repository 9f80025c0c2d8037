"""Properties of src/data/order.py: what is drawn when depends on (seed, epoch) and on nothing else."""

from itertools import pairwise
from math import ceil, floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.data import Batch, MixUp, RandomCrop, RandomFlip, ResidentLoader
from src.data.loader import Normalize
from src.data.order import batch_edges, derive_seed, epoch_order, generator, rank_slice, stratified_split

seeds = st.integers(0, 2**32 - 1)
epochs = st.integers(0, 10_000)


def slices_by_batch(count: int, batch_size: int, world_size: int) -> list[list[list[int]]]:
    """Return the positions that each rank takes of each batch."""
    positions, edges = list(range(count)), batch_edges(count, batch_size, world_size)
    return [
        [positions[rank_slice(start, stop, rank, world_size)] for rank in range(world_size)]
        for start, stop in pairwise(edges)
    ]


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 10**6), unique=True, max_size=300), seed=seeds, epoch=epochs)
def test_an_epoch_draws_every_image_once(ids: list[int], seed: int, epoch: int) -> None:
    order = epoch_order(torch.tensor(ids, dtype=torch.int64), seed, epoch)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == sorted(ids)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, epoch=epochs, hidden=seeds)
def test_the_order_depends_on_seed_and_epoch_only(seed: int, epoch: int, hidden: int) -> None:
    ids = torch.arange(500)
    first = epoch_order(ids, seed, epoch)
    torch.manual_seed(hidden)
    before = torch.get_rng_state()
    assert torch.equal(epoch_order(ids, seed, epoch), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(epoch_order(ids, seed, epoch + 1), first)
    assert not torch.equal(epoch_order(ids, seed + 1, epoch), first)


def test_the_order_permutes_positions_whatever_the_ids_are() -> None:
    ids = torch.arange(100, 200)
    assert torch.equal(epoch_order(ids, 1, 2) - 100, epoch_order(torch.arange(100), 1, 2))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_ranks_share_out_every_batch_in_order_and_none_goes_empty(data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, 9), "world_size")
    batch_size = data.draw(st.integers(world_size, 70), "batch_size")
    count = data.draw(st.integers(world_size, 300), "count")
    batches = slices_by_batch(count, batch_size, world_size)
    taken = [position for batch in batches for share in batch for position in share]
    assert taken == list(range(count))
    for batch in batches:
        sizes = [len(share) for share in batch]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 300), batch_size=st.integers(1, 70), world_size=st.integers(1, 9))
def test_every_batch_but_the_last_is_full(count: int, batch_size: int, world_size: int) -> None:
    edges = batch_edges(count, batch_size, world_size)
    sizes = [stop - start for start, stop in pairwise(edges)]
    assert sum(sizes) == count
    assert all(size == batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] < batch_size + world_size


def test_a_rest_too_small_for_the_ranks_joins_the_batch_before_it() -> None:
    assert batch_edges(25, 8) == [0, 8, 16, 24, 25]
    assert batch_edges(25, 8, world_size=2) == [0, 8, 16, 25]
    assert batch_edges(26, 8, world_size=2) == [0, 8, 16, 24, 26]
    assert batch_edges(3, 8, world_size=2) == [0, 3]
    assert batch_edges(0, 8) == [0]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_left_of_an_epoch_is_cut_where_the_whole_epoch_is(data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, 9), "world_size")
    batch_size = data.draw(st.integers(world_size, 70), "batch_size")
    count = data.draw(st.integers(world_size, 300), "count")
    edges = batch_edges(count, batch_size, world_size)
    k = data.draw(st.integers(0, len(edges) - 1), "k")
    assert batch_edges(count, batch_size, world_size, edges[k]) == edges[k:]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_left_of_an_epoch_can_be_cut_into_other_batches_that_cover_just_that(data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, 9), "world_size")
    batch_size = data.draw(st.integers(world_size, 70), "batch_size")
    count = data.draw(st.integers(world_size, 300), "count")
    start = data.draw(st.integers(0, count), "start")
    edges = batch_edges(count, batch_size, world_size, start)
    assert (edges[0], edges[-1]) == (start, count)
    sizes = [stop - begin for begin, stop in pairwise(edges)]
    assert all(size == batch_size for size in sizes[:-1])
    assert all(size >= min(world_size, count - start) for size in sizes), "no rank is left out but for want of images"


@st.composite
def loaders(draw: st.DrawFn) -> list[ResidentLoader]:
    """One loader for each of 1 to 4 ranks, over a split of a small data set, with all that is random."""
    world_size = draw(st.integers(1, 4))
    batch_size = draw(st.integers(world_size, 20))
    ids = torch.tensor(sorted(draw(st.sets(st.integers(0, 59), min_size=world_size, max_size=60))))
    seed = draw(seeds)
    pixels = torch.arange(60 * 6 * 6 * 3).mul(37).remainder(256).to(torch.uint8).view(60, 6, 6, 3)
    normalize = Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), torch.device("cpu"))
    return [
        ResidentLoader(
            pixels,
            torch.arange(60) % 10,
            ids,
            batch_size,
            normalize,
            seed=seed,
            shuffle=True,
            augment=[RandomCrop(2), RandomFlip()],
            mix=MixUp(),
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]


def batches(loader: ResidentLoader, epoch: int) -> list[Batch]:
    loader.set_epoch(epoch)
    return list(loader)


def assert_same_batches(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.total == b.total
        for x, y in zip(a[:3], b[:3], strict=True):
            assert torch.equal(x, y)


@settings(max_examples=50, deadline=None)
@given(ranks=loaders(), accumulated=st.integers(1, 5), epoch=epochs)
def test_the_steps_of_all_ranks_take_every_image_once_an_epoch(
    ranks: list[ResidentLoader], accumulated: int, epoch: int
) -> None:
    drawn = [batches(loader, epoch) for loader in ranks]
    assert {len(share) for share in drawn} == {len(ranks[0])}, "no rank waits for a batch of another"
    steps = [
        [int(id) for share in drawn for batch in share[first : first + accumulated] for id in batch.ids]
        for first in range(0, len(ranks[0]), accumulated)
    ]
    totals = [
        sum(b.total for b in drawn[0][first : first + accumulated]) for first in range(0, len(ranks[0]), accumulated)
    ]
    assert [len(step) for step in steps] == totals
    assert sorted(id for step in steps for id in step) == ranks[0].ids.tolist()


@settings(max_examples=30, deadline=None)
@given(ranks=loaders(), epoch=epochs, hidden=seeds)
def test_an_epoch_does_not_depend_on_what_was_drawn_before_it(
    ranks: list[ResidentLoader], epoch: int, hidden: int
) -> None:
    first = batches(ranks[0], epoch)
    batches(ranks[0], epoch + 1)
    ranks[0].set_epoch(epoch + 2)
    next(iter(ranks[0]))
    torch.manual_seed(hidden)
    assert_same_batches(batches(ranks[0], epoch), first)


@settings(max_examples=50, deadline=None)
@given(ranks=loaders(), epoch=epochs, data=st.data())
def test_an_epoch_that_is_begun_at_a_later_batch_is_the_rest_of_the_whole_one(
    ranks: list[ResidentLoader], epoch: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, len(ranks[0])), "k")
    for loader in ranks:
        whole, following = batches(loader, epoch), batches(loader, epoch + 1)
        edges = batch_edges(len(loader.ids), loader.batch_size, loader.world_size)
        loader.start_at(edges[k])
        assert_same_batches(batches(loader, epoch), whole[k:])
        assert_same_batches(batches(loader, epoch + 1), following)
        assert len(loader) == len(whole), "an epoch has as many batches as ever"


def test_derived_seeds_stay_what_they_have_always_been() -> None:
    assert derive_seed(42, "order", 0) == 993273450358985366
    assert derive_seed(0, "flip", 3) == 2801760709892036572


def test_derived_seeds_do_not_depend_on_the_type_of_an_integer() -> None:
    assert derive_seed(int(torch.tensor(42)), "order", True) == derive_seed(42, "order", 1)


arguments = st.tuples(seeds, st.sampled_from(["order", "flip", "crop", "mix"]), st.lists(epochs, max_size=3))


@settings(max_examples=100, deadline=None)
@given(one=arguments, other=arguments)
def test_two_draws_share_a_seed_only_if_they_are_the_same_draw(
    one: tuple[int, str, list[int]], other: tuple[int, str, list[int]]
) -> None:
    derived = [derive_seed(seed, purpose, *clock) for seed, purpose, clock in (one, other)]
    assert all(0 <= seed < 2**63 for seed in derived)
    assert (derived[0] == derived[1]) == (one == other)


def test_digits_do_not_move_from_one_argument_to_the_next() -> None:
    draws = [derive_seed(1, "a", 23), derive_seed(12, "a", 3), derive_seed(1, "a", 2, 3), derive_seed(1, "a2", 3)]
    assert len(set(draws)) == len(draws)


def test_purposes_draw_independent_numbers() -> None:
    one, other = (torch.rand(10_000, generator=generator(0, purpose, 0)) for purpose in ("order", "flip"))
    correlation = torch.corrcoef(torch.stack([one, other]))[0, 1]
    assert abs(float(correlation)) < 0.05


labels_and_size = st.lists(st.integers(0, 9), min_size=1, max_size=200).flatmap(
    lambda labels: st.tuples(st.just(torch.tensor(labels)), st.integers(0, len(labels)))
)


@settings(max_examples=100, deadline=None)
@given(case=labels_and_size, seed=seeds)
def test_a_split_has_its_size_and_every_class_its_due_share(case: tuple[Tensor, int], seed: int) -> None:
    labels, size = case
    picked, rest = stratified_split(labels, size, seed, "val")
    assert len(picked) == size
    assert sorted([*picked.tolist(), *rest.tolist()]) == list(range(len(labels)))
    assert picked.tolist() == sorted(picked.tolist())
    assert rest.tolist() == sorted(rest.tolist())
    for label in set(labels.tolist()):
        due = size * int((labels == label).sum()) / len(labels)
        assert floor(due) <= int((labels[picked] == label).sum()) <= ceil(due)


@settings(max_examples=30, deadline=None)
@given(case=labels_and_size, seed=seeds, hidden=seeds)
def test_a_split_is_the_same_for_the_same_arguments(case: tuple[Tensor, int], seed: int, hidden: int) -> None:
    labels, size = case
    first = stratified_split(labels, size, seed, "val")
    torch.manual_seed(hidden)
    before = torch.get_rng_state()
    again = stratified_split(labels, size, seed, "val")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("seed", "purpose"), [(1, "val"), (0, "train")])
def test_another_seed_or_purpose_splits_otherwise(seed: int, purpose: str) -> None:
    labels = torch.arange(500) % 10
    picked, _ = stratified_split(labels, 100, 0, "val")
    assert not torch.equal(stratified_split(labels, 100, seed, purpose)[0], picked)
