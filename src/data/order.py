"""Which images are drawn when: pure functions of (seed, epoch), with no state to save or to lose.

A run's randomness is never a hidden stream that must be restored: each draw has its own generator, made
from what it is for and when it happens. `tests/data/test_order.py` states the properties.
"""

import hashlib

import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, *clock: int) -> int:
    """Return the 63-bit seed of one draw.

    Args:
        seed: The run's seed.
        purpose: What is drawn, e.g. ``"order"``; two purposes never share their random numbers.
        clock: When it is drawn, e.g. the epoch.

    Returns:
        The first 63 bits of BLAKE2b over the arguments: the same on every platform.
    """
    text = repr((int(seed), purpose, *map(int, clock)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *clock: int) -> torch.Generator:
    """Return a fresh CPU generator for one draw; see `derive_seed` for the arguments."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *clock))


def epoch_order(ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Return the ids in the order of an epoch: a permutation that only (seed, epoch) decide.

    Args:
        ids: The images of the split, int64 ``[n]``.
        seed: The run's seed.
        epoch: The epoch, from 0.
    """
    return ids[torch.randperm(len(ids), generator=generator(seed, "order", epoch))]


def spread(rest: Tensor, arrived: Tensor, seed: int, epoch: int, number: int) -> Tensor:
    """Return what is left of an epoch's order with images that have arrived spread evenly over it.

    What was left keeps its order; where the others are, and in which order, only (seed, epoch, number) and how many
    there are decide.

    Args:
        rest: The images that are left, int64 ``[m]``.
        arrived: Those that have come, int64 ``[k]``.
        seed: The run's seed.
        epoch: The epoch.
        number: Of the arrival: no two of a run have the same.
    """
    total = len(rest) + len(arrived)
    places = torch.randperm(total, generator=generator(seed, "arrival", epoch, number))[: len(arrived)]
    merged = torch.empty(total, dtype=torch.int64)
    own = torch.ones(total, dtype=torch.bool)
    own[places] = False
    merged[places], merged[own] = arrived, rest
    return merged


def batch_edges(count: int, batch_size: int, world_size: int = 1, start: int = 0) -> list[int]:
    """Cut an epoch, or what is left of it, into batches: batch k holds the positions ``edges[k]`` to ``edges[k + 1]``.

    The last batch is the shorter rest. Should it not give every rank an image, it is joined to the
    batch before it, so that no rank ever meets an empty batch and no image is left out.

    Args:
        count: Images in the epoch, at least `world_size`.
        batch_size: Images in a batch, over all ranks together.
        world_size: The number of ranks.
        start: The first position: all before it have been drawn.
    """
    edges = [start]
    while edges[-1] < count:
        edges.append(batch_end(edges[-1], count, batch_size, world_size))
    return edges


def batch_end(start: int, count: int, batch_size: int, world_size: int = 1) -> int:
    """Return the position after the last image of the batch that begins at a position; see `batch_edges`."""
    stop = start + batch_size
    return count if count - stop < world_size else stop


def rank_slice(start: int, stop: int, rank: int, world_size: int) -> slice:
    """Return the positions of a batch that belong to a rank: disjoint, together the whole batch.

    Args:
        start: The first position of the batch.
        stop: The position after its last.
        rank: This process, from 0.
        world_size: The number of processes.
    """
    size = stop - start
    return slice(start + size * rank // world_size, start + size * (rank + 1) // world_size)


def stratified_split(labels: Tensor, size: int, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Pick `size` ids with every class in its due share; the same for the same arguments.

    Args:
        labels: The classes of all images, int64 ``[n]``.
        size: How many to pick, 0 to n.
        seed: The seed of the split (not of the run, so that all runs leave out the same images).
        purpose: What the pick is for, e.g. ``"val"``.

    Returns:
        The picked ids and the rest, each int64 and ascending. Classes differ from their exact share by
        less than one image (largest remainders first, then the lower class).
    """
    draw = torch.randperm(len(labels), generator=generator(seed, purpose))
    by_class = [draw[labels[draw] == label] for label in range(int(labels.max()) + 1)]
    shares = [size * len(members) / len(labels) for members in by_class]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda c: counts[c] - shares[c])
    for c in by_remainder[: size - sum(counts)]:
        counts[c] += 1
    picked = torch.zeros(len(labels), dtype=torch.bool)
    for members, count in zip(by_class, counts, strict=True):
        picked[members[:count]] = True
    return picked.nonzero()[:, 0], (~picked).nonzero()[:, 0]
