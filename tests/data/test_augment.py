"""Properties of src/data/augment.py: augmentation is a pure function of (seed, epoch, image)."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name)

from src.data import Augmentation, ColorJitter, CutMix, Cutout, Mixing, MixUp, RandomCrop, RandomFlip, ResidentLoader
from src.data.loader import Normalize

AUGMENTATIONS = [
    RandomFlip(),
    RandomFlip("alternating"),
    RandomCrop(4),
    Cutout(8),
    Cutout(8, inside=True),
    ColorJitter(),
]
each_augmentation = pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda a: type(a).__name__)
each_mixing = pytest.mark.parametrize("mixing", [MixUp(1.0), CutMix(1.0)], ids=lambda m: type(m).__name__)


def random_pixels(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@each_augmentation
def test_draws_depend_on_seed_and_epoch_only(augmentation: Augmentation) -> None:
    first = augmentation.draw(200, seed=3, epoch=5)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(augmentation.draw(200, seed=3, epoch=5), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(augmentation.draw(200, seed=3, epoch=6), first)
    assert not torch.equal(augmentation.draw(200, seed=4, epoch=5), first)


def test_draws_have_a_row_for_each_image_and_use_their_whole_range() -> None:
    flips = RandomFlip().draw(10_000, 0, 0)
    assert (flips.dtype, flips.shape) == (torch.bool, (10_000,))
    assert 0.45 < float(flips.float().mean()) < 0.55

    shifts = RandomCrop(3).draw(10_000, 0, 0)
    assert (shifts.dtype, shifts.shape) == (torch.int64, (10_000, 2))
    assert all(set(shifts[:, axis].tolist()) == set(range(-3, 4)) for axis in (0, 1))

    centres = Cutout().draw(10_000, 0, 0)
    assert (centres.dtype, centres.shape) == (torch.float32, (10_000, 2))
    assert 0 <= float(centres.min()) < 0.01
    assert 0.99 < float(centres.max()) < 1

    factors = ColorJitter(0.2, 0.5).draw(10_000, 0, 0)
    assert (factors.dtype, factors.shape) == (torch.float32, (10_000, 2))
    torch.testing.assert_close(factors.amin(0), torch.tensor([0.8, 0.5]), atol=1e-3, rtol=0)
    torch.testing.assert_close(factors.amax(0), torch.tensor([1.2, 1.5]), atol=1e-3, rtol=0)


@each_augmentation
def test_an_augmentation_keeps_shape_and_type_and_leaves_its_input_alone(augmentation: Augmentation) -> None:
    pixels = random_pixels(16, 12, 20, 3)
    given_pixels = pixels.clone()
    changed = augmentation.apply(pixels, augmentation.draw(16, 0, 1))
    assert (changed.shape, changed.dtype) == (pixels.shape, torch.uint8)
    assert changed.is_contiguous()
    assert torch.equal(pixels, given_pixels)
    assert not torch.equal(changed, pixels)


def test_a_flip_mirrors_the_drawn_images_left_to_right() -> None:
    pixels = random_pixels(2, 4, 5, 3)
    flipped = RandomFlip().apply(pixels, torch.tensor([True, False]))
    for column in range(5):
        assert torch.equal(flipped[0, :, column], pixels[0, :, 4 - column])
    assert torch.equal(flipped[1], pixels[1])


def test_alternating_flips_turn_every_image_round_in_odd_epochs() -> None:
    flip = RandomFlip("alternating")
    first = flip.draw(100, 7, 0)
    assert 0 < int(first.sum()) < 100
    for epoch in range(1, 6):
        assert torch.equal(flip.draw(100, 7, epoch), ~first if epoch % 2 else first)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_crop_equals_padding_by_reflection_and_cutting_out(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(2, 9), "height"), data.draw(st.integers(2, 9), "width")
    padding = data.draw(st.integers(1, min(height, width) - 1), "padding")
    pixels = random_pixels(6, height, width, 3)
    shifts = RandomCrop(padding).draw(6, data.draw(st.integers(0, 99), "seed"), 0)
    cropped = RandomCrop(padding).apply(pixels, shifts)
    for image, (down, right), found in zip(pixels, shifts.tolist(), cropped, strict=True):
        padded = F.pad(image.permute(2, 0, 1)[None].float(), (padding,) * 4, mode="reflect")[0]
        top, left = padding + down, padding + right
        expected = padded[:, top : top + height, left : left + width].permute(1, 2, 0)
        assert torch.equal(found.float(), expected)


def test_a_crop_that_shifts_by_nothing_changes_nothing() -> None:
    pixels = random_pixels(5, 8, 8, 3)
    assert torch.equal(RandomCrop(2).apply(pixels, torch.zeros(5, 2, dtype=torch.int64)), pixels)


def test_a_crop_wider_than_the_image_is_refused_rather_than_filled_from_its_neighbour() -> None:
    pixels, shifts = random_pixels(2, 8, 8, 3), torch.tensor([[0, 0], [8, 0]])
    with pytest.raises(ValueError, match=r"^padding: 8 is out of range"):
        RandomCrop(8).apply(pixels, shifts)


centre = st.floats(0, 1, exclude_max=True, width=32)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 12), row=centre, column=centre)
def test_cutout_paints_one_square_that_may_hang_over_the_border(size: int, row: float, column: float) -> None:
    black = torch.zeros(1, 16, 10, 3, dtype=torch.uint8)
    painted = Cutout(size, fill=(1, 2, 3)).apply(black, torch.tensor([[row, column]]))[0]
    rows, columns = painted[..., 0].nonzero().T.tolist()
    assert 1 <= len(rows) <= size * size
    assert len(rows) == len(set(rows)) * len(set(columns))
    assert painted[rows, columns].tolist() == [[1, 2, 3]] * len(rows)
    top, left = ((torch.tensor([row, column]) * torch.tensor([16, 10])).long() - size // 2).tolist()
    if top >= 0 and left >= 0 and top + size <= 16 and left + size <= 10:
        assert len(rows) == size * size
    assert set(rows) == set(range(max(top, 0), min(top + size, 16)))
    assert set(columns) == set(range(max(left, 0), min(left + size, 10)))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 10), row=centre, column=centre)
def test_cutout_paints_a_whole_square_anywhere_in_the_image_if_asked_to(size: int, row: float, column: float) -> None:
    black = torch.zeros(1, 16, 10, 3, dtype=torch.uint8)
    painted = Cutout(size, fill=(1, 2, 3), inside=True).apply(black, torch.tensor([[row, column]]))[0]
    rows, columns = painted[..., 0].nonzero().T.tolist()
    assert len(rows) == size * size
    place = torch.tensor([row, column]) * torch.tensor([17 - size, 11 - size])
    assert [min(rows), min(columns)] == place.long().tolist()
    assert (max(rows), max(columns)) == (min(rows) + size - 1, min(columns) + size - 1)


def test_a_square_that_is_larger_than_the_image_cannot_lie_inside() -> None:
    with pytest.raises(ValueError, match="size: 11 is out of range: at most the image's side, 10"):
        Cutout(11, inside=True).apply(random_pixels(2, 16, 10, 3), torch.rand(2, 2))


def test_cutout_paints_each_image_elsewhere_and_keeps_the_rest() -> None:
    pixels = random_pixels(2, 8, 8, 3)
    painted = Cutout(4, fill=(9, 9, 9)).apply(pixels, torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    expected = pixels.clone()
    expected[0, 2:6, 2:6] = 9
    expected[1, :2, :2] = 9
    assert torch.equal(painted, expected)


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((1.0, 1.0), [0, 40, 80, 200]),
        ((0.5, 1.0), [0, 20, 40, 100]),
        ((1.5, 1.0), [0, 60, 120, 255]),
        ((1.0, 0.0), [80, 80, 80, 80]),
        ((1.0, 0.5), [40, 60, 80, 140]),
        ((0.5, 2.0), [0, 0, 40, 160]),
    ],
)
def test_brightness_multiplies_an_image_and_contrast_its_distance_from_its_mean(
    factors: tuple[float, float], expected: list[int]
) -> None:
    coloured = torch.tensor([[[0, 40, 80], [200, 80, 80]]], dtype=torch.uint8)  # of mean 80, as each colour is not
    changed = ColorJitter().apply(torch.stack([coloured, coloured // 2]), torch.tensor([factors, (1.0, 1.0)]))
    assert changed[0].flatten()[:4].tolist() == expected
    assert torch.equal(changed[1], coloured // 2)


def mixable() -> tuple[Tensor, Tensor, Tensor]:
    """Return images whose every pixel is their class, those classes one-hot, and the classes."""
    classes = torch.arange(8)
    images = classes[:, None, None, None].expand(8, 3, 16, 16).float().contiguous()
    return images, F.one_hot(classes, 10).float(), torch.arange(10).float()


@each_mixing
def test_mixed_labels_sum_to_one_and_say_what_is_in_the_image(mixing: Mixing) -> None:
    images, weights, values = mixable()
    for seed in range(10):
        mixed, mixed_weights = mixing(images, weights, seed)
        assert torch.allclose(mixed_weights.sum(1), torch.ones(8))
        assert torch.allclose(mixed.mean((1, 2, 3)), mixed_weights @ values, atol=1e-5)


@each_mixing
def test_mixing_depends_on_its_seed_only_and_leaves_the_global_random_state(mixing: Mixing) -> None:
    images, weights, _ = mixable()
    mixed, mixed_weights = mixing(images, weights, 5)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again, again_weights = mixing(images, weights, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again, mixed)
    assert torch.equal(again_weights, mixed_weights)
    assert not torch.equal(mixing(images, weights, 6)[0], mixed)


@each_mixing
def test_mixing_gives_the_global_random_state_back_after_an_error(mixing: Mixing) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r".+"):
        mixing(torch.zeros(2, 3, 4, 4), torch.eye(10), 0)
    assert torch.equal(torch.get_rng_state(), before)


@each_mixing
def test_mixed_images_are_channels_last(mixing: Mixing) -> None:
    images, weights, _ = mixable()
    assert mixing(images, weights, 0)[0].is_contiguous(memory_format=torch.channels_last)


def images_by_id(batch_size: int, *, shuffle: bool, world_size: int, epoch: int) -> Tensor:
    """Return an epoch's augmented images in the order of their ids."""
    images, ids = [], []
    for rank in range(world_size):
        loader = ResidentLoader(
            random_pixels(30, 12, 12, 3),
            torch.zeros(30, dtype=torch.int64),
            torch.arange(2, 30),
            batch_size,
            Normalize((0.5,) * 3, (0.25,) * 3, torch.device("cpu")),
            seed=11,
            shuffle=shuffle,
            augment=[RandomFlip(), RandomCrop(3), Cutout(5), ColorJitter(0.5, 0.5)],
            rank=rank,
            world_size=world_size,
        )
        loader.set_epoch(epoch)
        for batch in loader:
            images.append(batch.images)
            ids.append(batch.ids)
    return torch.cat(images)[torch.cat(ids).argsort()]


@pytest.mark.parametrize(
    ("batch_size", "shuffle", "world_size"), [(28, False, 1), (5, True, 1), (5, False, 1), (9, True, 3)]
)
def test_an_image_is_augmented_alike_in_any_batch_order_and_rank(
    batch_size: int, shuffle: bool, world_size: int
) -> None:
    reference = images_by_id(7, shuffle=True, world_size=1, epoch=4)
    found = images_by_id(batch_size, shuffle=shuffle, world_size=world_size, epoch=4)
    assert torch.equal(found, reference)
    assert not torch.equal(images_by_id(7, shuffle=True, world_size=1, epoch=5), reference)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: RandomCrop(0), "padding"),
        (lambda: RandomCrop(-1), "padding"),
        (lambda: Cutout(size=0), "size"),
        (lambda: ColorJitter(brightness=-0.1), "brightness"),
        (lambda: ColorJitter(contrast=float("nan")), "contrast"),
        (lambda: Cutout(fill=(1, 2)), "fill"),
        (lambda: Cutout(fill=(0, 0, 256)), "fill"),
        (lambda: Cutout(fill=(0, -1, 0)), "fill"),
        (lambda: MixUp(0), "alpha"),
        (lambda: MixUp(-1), "alpha"),
        (lambda: MixUp(float("nan")), "alpha"),
        (lambda: CutMix(0), "alpha"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(build: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        build()
