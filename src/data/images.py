"""Image files of any size and mode, for `predict`.

python -m src predict --ckpt_path best --data.images cat.png photos/
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from src.data.loader import Batch, Normalize
from src.errors import Failure

MAX_PIXELS = 50_000_000
"""A picture that claims more pixels than this (150 MB as RGB) is refused before it is decoded."""

FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, if Pillow was built with it: pictures alone, none of the formats that Pillow runs Ghostscript for."""


class ImageFiles:
    """Iterates over image files in batches; files that cannot be read are left out and named in `unreadable`.

    Args:
        paths: Files, and folders, whose image files are taken recursively, in order of their names.
        size: Images are cut to the central square and scaled to this side, in pixels.
        batch_size: Images in a batch.
        normalize: Maps pixels to what the network takes.

    Attributes:
        files: The files, after folders were listed; `Batch.ids` are positions in it.
        unreadable: Why a file could not be read, by file; filled while iterating.

    Raises:
        Failure: If a path is not there, or nothing is to be predicted.
    """

    def __init__(self, paths: Sequence[Path], size: int, batch_size: int, normalize: Normalize) -> None:
        self.files = list_images(paths)
        self.size, self.batch_size, self.normalize = size, batch_size, normalize
        self.unreadable: dict[Path, str] = {}

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches of the readable files."""
        device = self.normalize.shift.device
        for start in range(0, len(self.files), self.batch_size):
            pixels, ids = [], []
            for i, path in enumerate(self.files[start : start + self.batch_size], start):
                try:
                    pixels.append(read_image(path, self.size))
                    ids.append(i)
                except OSError as error:
                    self.unreadable[path] = str(error)
            images = torch.stack(pixels) if pixels else torch.empty((0, self.size, self.size, 3), dtype=torch.uint8)
            none = torch.full((len(ids),), -1)
            yield Batch(self.normalize(images.to(device)), none, torch.tensor(ids, dtype=torch.int64), len(ids))


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Return the files given and the image files in the folders given.

    Raises:
        Failure: If a path is not there, or there is no file at all.
    """
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
        elif path.exists():
            files.append(path)
        else:
            raise Failure(f"--data.images: there is no file or folder {path}")
    if not files:
        where = f"no image in {', '.join(map(str, paths))}" if paths else "no image given"
        raise Failure(f"--data.images: {where}: name image files, or folders that hold some")
    return files


def read_image(path: Path, size: int) -> Tensor:
    """Read an image file of any size and mode.

    Args:
        path: The file.
        size: Side of the result in pixels. The central square is cut out and scaled to it.

    Returns:
        uint8 RGB ``[size, size, 3]``. Transparent parts are shown on white; 16-bit pictures are scaled down to 8 bits.

    Raises:
        OSError: If the file cannot be read as an image, or claims more than `MAX_PIXELS` pixels.
    """
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise OSError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
                image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
                upright = ImageOps.exif_transpose(image)
                square = ImageOps.fit(_to_rgb(upright), (size, size), method=Image.Resampling.BICUBIC)
                return torch.from_numpy(np.array(square))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise OSError(f"it claims more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise OSError("it is not an image that can be read") from error
    except OSError as error:
        raise OSError(error.strerror or str(error) or "it cannot be read") from error
    except Exception as error:  # decoders raise almost anything on damaged files
        raise OSError(f"it is damaged: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        wide = image.mode.startswith("I;16") or values.max(initial=0) > 255
        scale = 1 / 257 if wide else 1.0
        return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
