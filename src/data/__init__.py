"""The data sets, their order, and what happens to their images on the way to the network."""

from src.data.augment import Augmentation, ColorJitter, CutMix, Cutout, Mixing, MixUp, RandomCrop, RandomFlip
from src.data.cifar10 import CIFAR10
from src.data.loader import Batch, ResidentLoader
from src.data.module import ImageData
from src.data.shapes10 import Shapes10

__all__ = [
    "CIFAR10",
    "Augmentation",
    "Batch",
    "ColorJitter",
    "CutMix",
    "Cutout",
    "ImageData",
    "MixUp",
    "Mixing",
    "RandomCrop",
    "RandomFlip",
    "ResidentLoader",
    "Shapes10",
]
