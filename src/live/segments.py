"""The files that fed images wait in: ``.npz`` with pixels, labels and names, each known by its SHA-256.

read_segment(Path("lightning_logs/version_0/live/segments/000000.npz"), sha256)
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.errors import Failure
from src.live.decode import Pixels
from src.live.files import write_whole

Source = tuple[str, int, int]
"""A file that was fed: its name in the folder, its size in bytes, and when it was changed, in nanoseconds."""

DIGEST = 16
"""Bytes of what an image is known by: see `digests`."""


class Segment(NamedTuple):
    """Images that join the data together.

    Attributes:
        number: Of its file.
        pixels: uint8 ``[n, size, size, 3]``.
        labels: int64 ``[n]``, numbers of classes.
        names: Of the images: ``cat/1.png``, or ``shard.npz#17`` for the eighteenth of a shard.
        sha256: Of its file.
        sources: The files that are dealt with once it has joined. ``shard.npz#:500`` stands for the first 500 images of
            a shard, the rest of which comes in later segments.
    """

    number: int
    pixels: Pixels
    labels: np.ndarray[Any, np.dtype[np.int64]]
    names: list[str]
    sha256: str
    sources: list[Source]


def segment_path(store: Path, number: int) -> Path:
    """Return the file of a segment."""
    return store / f"{number:06}.npz"


def write_segment(
    path: Path, pixels: Sequence[Pixels], labels: Sequence[int], names: Sequence[str], sources: Sequence[Source]
) -> str:
    """Write a segment, bring it to the disk, and return its SHA-256.

    Raises:
        OSError: If it cannot be written.
    """
    content = io.BytesIO()
    np.savez(
        content,
        pixels=np.stack(pixels),
        labels=np.asarray(labels, dtype=np.int64),
        names=np.asarray(names, dtype=np.str_),
        sources=np.asarray(json.dumps(sources)),
    )
    write_whole(path, content.getbuffer(), sync=True)
    return hashlib.sha256(content.getbuffer()).hexdigest()


def read_segment(path: Path, sha256: str) -> Segment:
    """Read a segment.

    Args:
        path: Its file, named by its number.
        sha256: What it had when it was written.

    Raises:
        Failure: If it is missing, or another, or holds no such images.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Failure(f"{path}: the images that were fed cannot be read ({error.strerror})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise Failure(f"{path} has been changed: its SHA-256 is {found[:12]}…, the run was fed {sha256[:12]}…")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as parts:
            pixels, labels, names = parts["pixels"], parts["labels"], parts["names"]
            sources = [(str(name), int(size), int(time)) for name, size, time in json.loads(str(parts["sources"]))]
        _check(pixels, labels, names)
        return Segment(int(path.stem), pixels, labels, names.tolist(), sha256, sources)
    except Exception as error:  # whoever changed it may have changed the journal too, from where its SHA-256 is
        raise Failure(f"{path} does not hold images as a run stores them: {error or type(error).__name__}") from error


def _check(pixels: Pixels, labels: np.ndarray[Any, Any], names: np.ndarray[Any, Any]) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (pixels.shape[1], pixels.shape[1], 3):
        raise ValueError(f"pixels: {pixels.dtype} {list(pixels.shape)} is not uint8 [n, size, size, 3]")
    if labels.dtype != np.int64 or labels.shape != pixels.shape[:1] or labels.min(initial=0) < 0:
        raise ValueError(f"labels: they are not {len(pixels)} numbers of classes, int64")
    if names.dtype.kind != "U" or names.shape != labels.shape:
        raise ValueError(f"names: they are not {len(pixels)} texts")


def digests(pixels: Pixels) -> bytes:
    """Return what images are known by: 16 bytes of each, the BLAKE2b of its pixels.

    Args:
        pixels: uint8 ``[n, size, size, 3]``.
    """
    return b"".join(hashlib.blake2b(image.tobytes(), digest_size=DIGEST).digest() for image in pixels)
