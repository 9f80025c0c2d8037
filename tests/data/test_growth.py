"""Properties of src/data/growth.py: what joins, when and whatever else happens, is drawn exactly once a pass."""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.classifier import ImageClassifier
from src.data import Batch, MixUp, RandomCrop, RandomFlip, ResidentLoader
from src.data.augment import Augmentation
from src.data.growth import Growth
from src.data.loader import Normalize
from src.data.order import derive_seed, spread
from src.errors import Failure
from src.live.segments import Segment, read_segment, segment_path, write_segment
from src.networks import CNN

OWN, SIZE, CLASSES, BLOCK = 12, 4, 5, 4
AUGMENT: list[Augmentation] = [RandomCrop(1), RandomFlip()]

Op = tuple[str, int, int]
"""``join``, how many; ``drop``, which; ``relabel``, which, class; ``resize``, batch size; ``kill``."""
Plan = dict[int, list[Op]]
"""What happens between two batches, by how many have been drawn before, over all epochs."""

ops = st.one_of(
    st.tuples(st.just("join"), st.integers(1, 9), st.just(0)),
    st.tuples(st.just("drop"), st.integers(0, 10**6), st.just(0)),
    st.tuples(st.just("relabel"), st.integers(0, 10**6), st.integers(0, CLASSES - 1)),
    st.tuples(st.just("resize"), st.integers(1, 8), st.just(0)),
    st.tuples(st.just("kill"), st.just(0), st.just(0)),
)
plans = st.dictionaries(st.integers(0, 20), st.lists(ops, min_size=1, max_size=4), max_size=8)


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.data.growth._BLOCK", BLOCK)
        yield


def image(id: int) -> Tensor:
    """Return the pixels of an image, which no other has."""
    return torch.arange(SIZE * SIZE * 3).mul(5 + id // 200).add(id).remainder(256).to(torch.uint8).view(SIZE, SIZE, 3)


def label_of(id: int) -> int:
    return id * 3 % CLASSES


def build(world_size: int, ids: int = OWN, batch_size: int = 4, seed: int = 0, **options: Any) -> list[ResidentLoader]:
    """Return a loader for each rank, of the first `ids` images of the data set's own."""
    pixels = torch.stack([image(id) for id in range(OWN)])
    labels = torch.tensor([label_of(id) for id in range(OWN)])
    kept = {"room": 500, "window": None, "weight": 1.0, **options}
    augment = kept.pop("augment", AUGMENT)
    mix = kept.pop("mix", None)
    return [
        ResidentLoader(
            pixels,
            labels,
            torch.arange(ids),
            batch_size,
            Normalize((0.0,) * 3, (1 / 255,) * 3, torch.device("cpu")),
            num_classes=CLASSES,
            seed=seed,
            shuffle=True,
            augment=augment,
            mix=mix,
            rank=rank,
            world_size=world_size,
            growth=Growth(OWN, labels, SIZE, seed=seed, **kept),
        )
        for rank in range(world_size)
    ]


def segment(store: Path, number: int, first: int, count: int) -> Segment:
    """Store images that are to have the ids from `first` on."""
    ids = range(first, first + count)
    path = segment_path(store, number)
    pixels = [image(id).numpy() for id in ids]
    sha256 = write_segment(path, pixels, [label_of(id) for id in ids], [f"{id}.png" for id in ids], [])
    return read_segment(path, sha256)


def growth_of(loader: ResidentLoader) -> Growth:
    assert loader.growth is not None
    return loader.growth


def join(store: Path, ranks: list[ResidentLoader], count: int) -> list[int]:
    """Let images join on all ranks; return the ids of those that stay."""
    growth = growth_of(ranks[0])
    number = sum(event.kind == "segment" for event in growth.events)
    new = segment(store, number, OWN + growth.joined, count)
    (ids,) = {tuple(loader.join(new).tolist()) for loader in ranks}
    return list(ids)


class Run:
    """Epochs that are drawn by several ranks while things happen, beside a note of what is due.

    Two sets of loaders take part: one is never interrupted; the other is built anew from plain values at each ``kill``.
    """

    def __init__(self, store: Path, plan: Plan, world_size: int, **options: Any) -> None:
        self.store, self.plan, self.world_size, self.options = store, plan, world_size, options
        self.straight = build(world_size, **options)
        self.resumed = build(world_size, **options)
        self.labels = {id: label_of(id) for id in range(OWN)}
        self.due: set[int] = set()
        self.stayed: set[int] = set()  # dropped, and drawn all the same: else a rank would have gone without
        self.iterators: list[Iterator[Batch]] = []
        self.boundaries = 0

    def known(self) -> set[int]:
        return set(self.straight[0].ids.tolist())

    def epoch(self, number: int) -> None:
        """Draw an epoch; check each batch, and that none is missing at the end."""
        for loader in (*self.straight, *self.resumed):
            loader.set_epoch(number)
        self.due, self.stayed = self.known(), set()
        self.iterators = [iter(loader) for loader in (*self.straight, *self.resumed)]
        first = self.straight[0]
        while first.drawn < first.count or not first.drawn:  # after the last batch comes the first of the next epoch
            self._happen(number)
            while first.count < self.world_size:  # a fit waits here
                self._join(1)
            begun, size, order = first.drawn, first.batch_size, first.order.order
            batches = [next(iterator) for iterator in self.iterators]
            self.boundaries += 1
            self._check(batches, begun, size, order)
        assert not self.due, "none is lost"
        assert [next(iterator, None) for iterator in self.iterators] == [None] * 2 * self.world_size

    def _happen(self, epoch: int) -> None:
        for kind, which, label in self.plan.pop(self.boundaries, ()):
            every = [*self.straight, *self.resumed]
            known = sorted(self.known())
            if kind == "join":
                self._join(which)
            elif kind == "resize":
                for loader in every:
                    loader.batch_size = max(which, self.world_size)
            elif kind == "kill":
                self._rebuild(epoch)
            elif known:
                id = known[which % len(known)]
                for loader in every:
                    loader.correct(id, label if kind == "relabel" else None)
                if kind == "relabel":
                    self.labels[id] = label
                elif id in self.due and len(self.due) <= self.world_size and self.straight[0].drawn:
                    self.stayed.add(id)
                else:
                    self.due.discard(id)

    def _join(self, count: int) -> None:
        ids = join(self.store, [*self.straight, *self.resumed], count)
        self.labels |= {id: label_of(id) for id in ids}
        oldest = growth_of(self.straight[0]).oldest
        self.due = {id for id in {*self.due, *ids} if id < OWN or id >= oldest}

    def _rebuild(self, epoch: int) -> None:
        state = json.loads(json.dumps(growth_of(self.resumed[0]).state()))
        old = self.resumed[0]
        self.resumed = build(self.world_size, **{**self.options, "batch_size": old.batch_size})
        for loader in self.resumed:
            loader.rebuild(state, self.store)
            loader.set_epoch(epoch)
            if old.drawn:
                loader.start_at(old.drawn)
        self.iterators[self.world_size :] = [iter(loader) for loader in self.resumed]

    def _check(self, batches: list[Batch], begun: int, size: int, order: Tensor) -> None:
        ranks, again = batches[: self.world_size], batches[self.world_size :]
        ids = [id for batch in ranks for id in batch.ids.tolist()]
        assert ids == order[begun : begun + len(ids)].tolist(), "the ranks share out what is next in the order"
        assert all(batch.total == len(ids) for batch in ranks)
        assert all(len(batch.ids) for batch in ranks), "no rank goes without"
        last = begun + len(ids) == len(order)
        assert len(ids) < size + self.world_size if last else len(ids) == size
        assert len(set(ids)) == len(ids)
        assert set(ids) <= self.due, "each is known, has not left, and was not drawn before in this epoch"
        self.due -= set(ids)
        for one, other in zip(ranks, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
            assert (one.total, one.weight) == (other.total, other.weight)
            assert one.labels.tolist() == [self.labels[id] for id in one.ids.tolist()]
            for picture, id in zip(one.images, one.ids.tolist(), strict=True):
                assert torch.equal(picture, self._as_drawn(id)), id

    def _as_drawn(self, id: int) -> Tensor:
        """Return an image of this epoch as it is whoever else takes part."""
        pixels, epoch, seed = image(id)[None], self.straight[0].epoch, self.options.get("seed", 0)
        for augmentation in AUGMENT:
            if id < OWN:
                draw = augmentation.draw(OWN, seed, epoch)[id]
            else:
                block, row = divmod(id - OWN, BLOCK)
                draw = augmentation.draw(BLOCK, derive_seed(seed, "feed", block), epoch)[row]
            pixels = augmentation.apply(pixels, draw[None])
        return pixels[0].permute(2, 0, 1).float()


@settings(max_examples=200, deadline=None)
@given(
    plan=plans,
    world_size=st.integers(1, 3),
    batch_size=st.integers(3, 8),
    ids=st.integers(0, OWN),
    seed=st.integers(0, 2**32 - 1),
)
@example(plan={0: [("join", 5, 0), ("kill", 0, 0)]}, world_size=2, batch_size=4, ids=OWN, seed=1)
@example(plan={2: [("join", 1, 0), ("drop", 0, 0), ("kill", 0, 0)]}, world_size=1, batch_size=4, ids=OWN, seed=2)
@example(plan={}, world_size=3, batch_size=4, ids=0, seed=3)
@example(plan={2: [("drop", 10, 0)] * 4}, world_size=1, batch_size=4, ids=OWN, seed=4)
def test_each_id_is_drawn_once_a_pass_and_a_run_that_is_killed_draws_as_one_that_is_not(
    plan: Plan, world_size: int, batch_size: int, ids: int, seed: int
) -> None:
    with TemporaryDirectory() as store:
        run = Run(Path(store), dict(plan), world_size, batch_size=batch_size, ids=ids, seed=seed)
        for number in range(3):
            run.epoch(number)


@settings(max_examples=150, deadline=None)
@given(
    plan=plans,
    world_size=st.integers(1, 3),
    window=st.integers(3, 12),
    batch_size=st.integers(3, 8),
    ids=st.sampled_from([0, 0, 5]),
)
@example(plan={0: [("join", 9, 0), ("kill", 0, 0)], 1: [("join", 2, 0)]}, world_size=1, window=3, batch_size=3, ids=0)
@example(plan={0: [("join", 2, 0), ("drop", 1, 0)]}, world_size=3, window=3, batch_size=3, ids=0)
@example(plan={1: [("join", 1, 0), ("join", 1, 0)]}, world_size=3, window=3, batch_size=3, ids=0)
@example(
    plan={0: [("join", 2, 0)], 1: [("join", 1, 0)], 2: [("drop", 6, 0), ("join", 2, 0)]},
    world_size=2,
    window=3,
    batch_size=3,
    ids=5,
)
def test_a_window_keeps_the_newest_and_each_of_them_whole(
    plan: Plan, world_size: int, window: int, batch_size: int, ids: int
) -> None:
    with TemporaryDirectory() as store:
        run = Run(Path(store), dict(plan), world_size, batch_size=batch_size, ids=ids, window=window)
        for number in range(3):
            run.epoch(number)
            growth = growth_of(run.resumed[0])
            newest = range(OWN + max(0, growth.joined - window), OWN + growth.joined)
            assert growth.names == {f"{id}.png": id for id in newest}
            fed = {id for id in run.known() if id >= OWN}
            dropped = {event.number for event in growth.events if event.kind == "drop"}
            assert fed == set(newest) - dropped
            for id in newest:
                assert growth.has(id)
                assert growth.label(id) == run.labels[id]
            assert not growth.has(newest.start - 1) or newest.start == OWN
            assert not growth.has(newest.stop)


@settings(max_examples=50, deadline=None)
@given(
    joins=st.dictionaries(st.integers(0, 6), st.integers(1, 9), max_size=4),
    world_size=st.integers(2, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_order_is_that_of_one_process_for_the_same_arrivals(
    joins: dict[int, int], world_size: int, seed: int
) -> None:
    plan = {batch: [("join", count, 0)] for batch, count in joins.items()}
    with TemporaryDirectory() as store:
        run = Run(Path(store), plan, world_size, seed=seed)
        run.epoch(0)
        run.epoch(1)
        (alone,) = build(1, seed=seed)
        alone.rebuild(growth_of(run.straight[0]).state(), Path(store))
        alone.set_epoch(1)
        assert torch.equal(alone.order.order, run.straight[0].order.order)
        assert torch.equal(alone.ids, run.straight[0].ids)


@settings(max_examples=100, deadline=None)
@given(rest=st.integers(0, 60), arrived=st.integers(1, 60), seed=st.integers(0, 99), number=st.integers(0, 99))
def test_what_arrives_is_spread_over_the_rest_which_keeps_its_order(
    rest: int, arrived: int, seed: int, number: int
) -> None:
    old, new = torch.arange(rest), torch.arange(100, 100 + arrived)
    merged = spread(old, new, seed, 0, number)
    assert merged[merged < 100].tolist() == old.tolist()
    assert sorted(merged[merged >= 100].tolist()) == new.tolist()


def test_what_arrives_is_spread_evenly() -> None:
    means = [
        float((spread(torch.arange(900), torch.arange(1000, 1100), seed, 0, 0) >= 1000).nonzero().float().mean())
        for seed in range(200)
    ]
    assert sum(means) / len(means) == pytest.approx(499.5, abs=6)  # three deviations of this mean


@settings(max_examples=60, deadline=None)
@given(
    joins=st.dictionaries(st.integers(0, 5), st.integers(1, 9), max_size=4),
    world_size=st.integers(1, 3),
    weight=st.sampled_from([0.25, 3.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    mixed=st.booleans(),
)
def test_the_loss_weighs_what_was_fed_and_its_mean_over_ranks_is_that_of_the_batch(
    joins: dict[int, int], world_size: int, weight: float, smoothing: float, mixed: bool
) -> None:
    torch.manual_seed(0)
    module = ImageClassifier(CNN(num_classes=CLASSES), num_classes=CLASSES, label_smoothing=smoothing)
    ranks = build(world_size, weight=weight, mix=MixUp() if mixed else None)
    with TemporaryDirectory() as store:
        iterators = [iter(loader) for loader in ranks]
        batch_idx = 0
        while ranks[0].drawn < ranks[0].count:
            if batch_idx in joins:
                join(Path(store), ranks, joins[batch_idx])
            batches = [_grown(next(iterator)) for iterator in iterators]
            module._trainer = SimpleNamespace(world_size=world_size)  # type: ignore[assignment]
            with torch.no_grad():
                found = sum(float(module.training_step(batch, 0)["loss"]) for batch in batches) / world_size
                logits = torch.cat([module.network(batch.images) for batch in batches]).double()
            labels = torch.cat([batch.labels for batch in batches])
            ids = torch.cat([batch.ids for batch in batches])
            targets = labels.double() if mixed else torch.nn.functional.one_hot(labels, CLASSES).double()
            targets = targets * (1 - smoothing) + smoothing / CLASSES
            losses = -(targets * logits.log_softmax(1)).sum(1)
            weights = [weight if id >= OWN else 1.0 for id in ids.tolist()]
            wanted = sum(w * float(loss) for w, loss in zip(weights, losses, strict=True)) / sum(weights)
            assert found == pytest.approx(wanted, rel=1e-5)
            batch_idx += 1


def _grown(batch: Batch) -> Batch:
    """Return a batch of images as large as the network takes."""
    return batch._replace(images=batch.images.repeat(1, 1, 8, 8))


def test_a_run_that_is_not_fed_draws_as_one_without_a_feed() -> None:
    (fed,) = build(1, weight=3.0)
    (plain,) = build(1)
    plain.growth = None
    for epoch in (0, 1):
        for loader in (fed, plain):
            loader.set_epoch(epoch)
        for one, other in zip(fed, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
            assert (one.weights, one.total) == (other.weights, other.total)


def test_memory_that_is_not_used_is_not_touched() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("it is read from /proc")
    before = resident()
    grown = Growth(OWN, torch.zeros(OWN, dtype=torch.int64), 32, room=300_000, window=None, weight=1.0, seed=0)
    assert resident() - before < 50e6 < grown.pixels.numel()


def test_more_than_there_is_room_for_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    ranks = build(1, room=5)
    join(tmp_path, ranks, 3)
    ids = ranks[0].ids.tolist()
    with pytest.raises(Failure, match=r"data\.feed_room: 5 images have no room"):
        join(tmp_path, ranks, 3)
    growth = growth_of(ranks[0])
    assert (growth.joined, len(growth.events), ranks[0].ids.tolist()) == (3, 1, ids)


@pytest.mark.parametrize(
    "state",
    [
        [["segment", 0, -1, "a", 0]],
        [["segment", 0, -1, "a", 0, -1]],
        [["segment", -1, -1, "a", 0, 0]],
        [["segment", "0", -1, "a", 0, 0]],
        [["segment", 0, -1, None, 0, 0]],
        [None],
        [["segment", True, -1, "a", 0, 0]],
    ],
)
def test_a_record_that_is_none_is_refused(state: list[Any], tmp_path: Path) -> None:
    with pytest.raises(Failure, match="record of what was fed is none"):
        build(1)[0].rebuild(state, tmp_path)


def test_a_segment_that_is_missing_or_another_is_refused_by_name(tmp_path: Path) -> None:
    (loader,) = build(1)
    join(tmp_path, [loader], 3)
    state = growth_of(loader).state()
    path = segment_path(tmp_path, 0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Failure, match=r"000000\.npz has been changed"):
        build(1)[0].rebuild(state, tmp_path)
    path.unlink()
    with pytest.raises(Failure, match=r"000000\.npz: the images that were fed cannot be read"):
        build(1)[0].rebuild(state, tmp_path)


def test_names_lead_to_the_newest_image_of_that_name(tmp_path: Path) -> None:
    (loader,) = build(1, window=2)
    pixels = [np.full((SIZE, SIZE, 3), value, dtype=np.uint8) for value in range(3)]
    for number, name in enumerate(("a", "b", "a")):
        sha256 = write_segment(segment_path(tmp_path, number), [pixels[number]], [0], [name], [])
        loader.join(read_segment(segment_path(tmp_path, number), sha256))
    assert growth_of(loader).names == {"b": OWN + 1, "a": OWN + 2}
