"""Shapes10: ten classes of small rendered RGB shapes, a pure function of a seed.

Every picture is one shape over a graded background, with clutter behind and in front of it and pixel
noise; the shapes are signed distance functions evaluated with torch on whole chunks of pictures.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

CLASSES: tuple[str, ...] = (
    "circle",
    "ring",
    "moon",
    "heart",
    "square",
    "bar",
    "triangle",
    "star",
    "cross",
    "arrow",
)

SIZE = 32
"""Height and width of a picture, in pixels."""


def render_shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Render a class-balanced set of labelled pictures in random order.

    The result depends on nothing but the arguments: neither on the global random state nor on the number
    of threads.

    Args:
        count: How many pictures to render, at least 0.
        seed: Seed of everything random; different seeds give independent sets.

    Returns:
        The images, uint8 [count, 32, 32, 3] in 0..255, and their labels, int64 [count], indices into
        `CLASSES` of which each occurs `count / 10` times, rounded up or down.
    """
    generator = Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    images = torch.empty(count, SIZE, SIZE, 3, dtype=torch.uint8)
    for start in range(0, count, _CHUNK):
        chunk = images[start : start + _CHUNK]
        chunk.copy_(_render_chunk(len(chunk), generator))
    labels = torch.arange(count) % len(CLASSES)
    return images[order], labels[order]


# Pictures drawn at once: bounds the memory to some 30 MB. A multiple of the number of classes, so that every
# chunk starts with class 0.
_CHUNK = 500

_CLUTTER_BEHIND = 2
_CLUTTER_IN_FRONT = 1


def _render_chunk(n: int, generator: Generator) -> Tensor:
    """Render n pictures, the i-th of class i % 10, as uint8 [n, 32, 32, 3]."""
    # Only elementwise operations that round alike in vectorised and scalar code (no lerp, addcmul or hypot)
    # touch pixels: which of the two a pixel meets depends on how the threads divide the tensor.

    # The contrast has one sign in all channels and exceeds what slope and noise can hide. More shapes are
    # light than dark, and none is turned by more than 45 degrees: without such a linear hint to start from,
    # a plain network spends epochs at chance level.
    dark = _uniform(generator, n, 3, low=0.0, high=0.6)
    light = dark + _uniform(generator, n, 3, low=0.15, high=0.4)
    inverse = torch.rand(n, 1, generator=generator) < 0.3
    background, foreground = torch.where(inverse, light, dark), torch.where(inverse, dark, light)

    ramp, _ = _local_grid(n, generator, reach=0.0, turn=torch.pi)
    slope = _uniform(generator, n, 3, low=-0.12, high=0.12) / SIZE
    canvas = background[..., None, None] + slope[..., None, None] * ramp[:, None]
    for _ in range(_CLUTTER_BEHIND):
        _paint_clutter(canvas, generator)
    _paint(canvas, _shape_distance(n, generator), foreground)
    for _ in range(_CLUTTER_IN_FRONT):
        _paint_clutter(canvas, generator)

    noise = torch.randn(canvas.shape, generator=generator)
    canvas += noise.mul_(_uniform(generator, n, 1, 1, 1, low=0.01, high=0.06))
    return canvas.mul_(255.0).round_().clamp_(0.0, 255.0).to(torch.uint8).permute(0, 2, 3, 1)


def _shape_distance(n: int, generator: Generator) -> Tensor:
    """Signed distance in pixels, float32 [n, 32, 32], to random shapes, the i-th of class i % 10."""
    radius = _uniform(generator, n, 1, 1, low=7.5, high=12.0)
    stretch = _uniform(generator, n, 1, 1, low=0.87, high=1.15)
    x, y = _local_grid(n, generator, reach=4.0, turn=0.25 * torch.pi)
    x /= radius * stretch
    y /= radius / stretch
    distance = torch.empty_like(x)
    for label, name in enumerate(CLASSES):
        mine = slice(label, None, len(CLASSES))
        distance[mine] = _DISTANCES[name](x[mine], y[mine])
    return distance.mul_(radius)


def _paint_clutter(canvas: Tensor, generator: Generator) -> None:
    """Paint one small blob or line of a random colour on each picture of the canvas, in place."""
    n = len(canvas)
    length = _uniform(generator, n, 1, 1, low=0.0, high=5.0)
    radius = _uniform(generator, n, 1, 1, low=0.6, high=1.9)
    x, y = _local_grid(n, generator, reach=16.0, turn=torch.pi)
    x = x.abs_().sub_(length).clamp_(min=0.0)
    distance = x.mul_(x).add_(y.mul_(y)).sqrt_().sub_(radius)
    _paint(canvas, distance, _uniform(generator, n, 3, low=0.0, high=1.0))


def _paint(canvas: Tensor, distance: Tensor, colour: Tensor) -> None:
    """Blend a colour [n, 3] into the canvas [n, 3, 32, 32] in place, where the distance is negative."""
    coverage = distance.neg_().add_(0.5).clamp_(0.0, 1.0)
    canvas += (colour[..., None, None] - canvas).mul_(coverage[:, None])


def _local_grid(n: int, generator: Generator, *, reach: float, turn: float) -> tuple[Tensor, Tensor]:
    """Pixel coordinates (right, up), float32 [n, 32, 32] each, in n randomly shifted and turned frames.

    A frame's origin lies within `reach` pixels of the picture's centre, horizontally and vertically; its
    angle within `turn` radians of upright.
    """
    angle = _uniform(generator, n, 1, 1, low=-turn, high=turn)
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    right = axis - _uniform(generator, n, 1, 1, low=-reach, high=reach)
    up = -axis[:, None] - _uniform(generator, n, 1, 1, low=-reach, high=reach)
    cos, sin = angle.cos(), angle.sin()
    return cos * right + sin * up, cos * up - sin * right


def _uniform(generator: Generator, *shape: int, low: float, high: float) -> Tensor:
    """Draw uniform float32 values in low..high."""
    return torch.rand(shape, generator=generator) * (high - low) + low


# Distances to shapes that about fill the unit circle, negative inside, y pointing up. Beyond corners they
# fall short of the true distance, which antialiased edges hardly show.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return _norm(x, y) - 0.9


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_norm(x, y) - 0.72).abs() - 0.22


def _moon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_norm(x, y) - 1.0, 0.8 - _norm(x - 0.5, y))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    # A square standing on its corner, with discs bulging from its two upper sides.
    x, y = 0.707 * (x + y) + 0.2, 0.707 * (y - x) + 0.2
    lobes = torch.minimum(_norm(x - 0.6, y), _norm(x, y - 0.6))
    return torch.minimum(lobes, torch.maximum(x.abs(), y.abs())) - 0.6


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.78


def _bar(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() - 1.0, y.abs() - 0.35)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(0.866 * x.abs() + 0.5 * y, -y) - 0.52


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Mirror everything into the half of one arm that lies right of its axis; there it is a half-plane.
    x = x.abs()
    for sign in (1.0, -1.0):
        beyond = (sign * 0.809 * x - 0.588 * y).clamp(min=0.0)
        x, y = x - 2.0 * sign * 0.809 * beyond, y + 2.0 * 0.588 * beyond
    return 0.92 * x.abs() + 0.39 * (y - 1.1)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.minimum(x, y) - 0.28, torch.maximum(x, y) - 0.95)


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    head = torch.maximum(0.75 * y.abs() + 0.66 * (x - 1.0), -x)
    shaft = torch.maximum(y.abs() - 0.22, (x + 0.45).abs() - 0.55)
    return torch.minimum(head, shaft)


def _norm(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "ring": _ring,
    "moon": _moon,
    "heart": _heart,
    "square": _square,
    "bar": _bar,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "arrow": _arrow,
}
