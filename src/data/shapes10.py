"""Shapes10, the embedded data set: ten classes of rendered shapes, made from a seed in about a second.

python -m src fit --config configs/quickstart.yaml
"""

from typing import Any

from torch import Tensor

from src.data.module import ImageData, Part
from src.data.order import derive_seed
from src.data.render import CLASSES, render_shapes


class Shapes10(ImageData):
    """Ten classes of rendered 32x32 shapes that vary in colour, pose, scale, noise and clutter. Needs no files.

    Args:
        train_images: Images to train on and to take the val split from, at least 10.
        test_images: Images to test on, at least 10.
        render_seed: Seed of the pictures.
        val_size: As for every data set: a number of images, or a share between 0 and 1.
        kwargs: The other arguments of `src.data.ImageData`.
    """

    classes = CLASSES
    mean = (0.408, 0.408, 0.407)
    std = (0.225, 0.228, 0.226)

    def __init__(
        self,
        train_images: int = 12_000,
        test_images: int = 2_000,
        render_seed: int = 0,
        val_size: int | float = 2_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(val_size=val_size, **kwargs)
        for name, value in (("train_images", train_images), ("test_images", test_images)):
            if not 10 <= value <= 10_000_000:
                raise ValueError(f"{name}: {value} is out of range: at least 10 images, at most 10 million")
        self.counts = {"train": train_images, "test": test_images}
        self.render_seed = render_seed

    def load(self, part: Part) -> tuple[Tensor, Tensor]:
        """Render the images of a part; train and test share no random number."""
        return render_shapes(self.counts[part], derive_seed(self.render_seed, f"shapes10 {part}"))
