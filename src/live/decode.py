"""Pictures of any size and mode as pixels, whatever a stranger has put into the file.

python -m src predict --ckpt_path best --data.images cat.png photos/
"""

import functools
import re
import warnings
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

MAX_PIXELS = 50_000_000
"""A picture that claims more pixels than this (150 MB as RGB) is refused before it is decoded."""

FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, if Pillow was built with it: pictures alone, none of the formats that Pillow runs Ghostscript for."""

_MOST_SCANS = 100
"""Scans of a JPEG at most: each goes over all of its pixels, and may take two bytes. A progressive one has some ten."""
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")  # of a JPEG, but for those that are nothing or within a scan

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def decode_image(file: Path | BinaryIO, size: int) -> Pixels:
    """Read an image file of any size and mode.

    Args:
        file: Where it is, or the file opened to read its bytes.
        size: Side of the result in pixels. The central square is cut out and scaled to it.

    Returns:
        uint8 RGB ``[size, size, 3]``; a picture of this size keeps its pixels. Transparent parts are shown on white;
        16-bit pictures are scaled down to 8 bits.

    Raises:
        OSError: If the file cannot be read as an image, or claims more than `MAX_PIXELS` pixels, or is made to take
            minutes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise OSError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
                if isinstance(image, JpegImageFile) and _has_too_many_scans(image.fp):
                    raise OSError(f"it is a JPEG of more than {_MOST_SCANS} scans")
                image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
                return _square(_to_rgb(ImageOps.exif_transpose(image)), size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise OSError(f"it claims more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise OSError("it is not an image that can be read") from error
    except OSError as error:
        raise OSError(error.strerror or str(error) or "it cannot be read") from error
    except Exception as error:  # decoders raise almost anything on damaged files
        raise OSError(f"it is damaged: {error}") from error


def fit_pixels(pixels: Pixels, size: int) -> Pixels:
    """Cut the central square out of the pixels of an image, and scale it.

    Args:
        pixels: uint8 ``[height, width, 3]``, or ``[height, width]`` for one in grey.
        size: Side of the result in pixels.

    Returns:
        uint8 ``[size, size, 3]``; an image of this size keeps its pixels.
    """
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape == (size, size, 3):
        return pixels
    return _square(Image.fromarray(np.ascontiguousarray(pixels)), size)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the files that can be read, in small letters: ``.png`` and others."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and in those below it, by their names' order and suffixes."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in image_suffixes() and p.is_file())


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _has_too_many_scans(file: IO[bytes] | None) -> bool:
    assert file is not None
    file.seek(0)
    content, at, scans = file.read(), 2, 0
    while scans <= _MOST_SCANS and (marker := _MARKER.search(content, at)) and marker[1] != b"\xd9":  # the end
        scans += marker[1] == b"\xda"
        at = marker.end() + max(2, int.from_bytes(content[marker.end() : marker.end() + 2], "big"))
    return scans > _MOST_SCANS


def _square(image: Image.Image, size: int) -> Pixels:
    return np.array(ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC))


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
