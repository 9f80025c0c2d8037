"""Many labelled images in one file: ``.npz`` (images, labels) or ``.tar`` as WebDataset writes it (KEY.png, KEY.cls).

    for label, pixels in read_shard(file, ".npz", size=32):
        ...

What a header claims is checked before anything of that size is read, nothing is unpickled, and no file is written.
"""

import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, NoReturn

import numpy as np

from src.live.decode import MAX_PIXELS, Pixels, decode_image, fit_pixels, image_suffixes

MAX_SHARD_BYTES = 2 << 30
"""A shard holds at most so many bytes, and so many when it is unpacked."""

MAX_SHARD_IMAGES = 100_000
"""A shard holds at most so many images."""

MAX_IMAGE_BYTES = 64 << 20
"""An image file holds at most so many bytes."""

SHARD_SUFFIXES = (".npz", ".tar")

_MAX_MEMBERS = 4 * MAX_SHARD_IMAGES
_MAX_LABEL_BYTES = 1000
_MAX_HEADERS = 1 << 20  # bytes of all headers of one member of a tar: a name and its like
_MAX_ARRAY_HEADER = 10_000  # bytes, as NumPy has it
_BLOCK = 512  # bytes that a tar is made of
_CHUNK = 1 << 20  # bytes

Sample = tuple[str | int | None, Pixels | str]
"""The label of an image as it was given, and its pixels, or why there are none."""


def read_shard(file: BinaryIO, suffix: str, size: int, first: int = 0) -> Iterator[Sample]:
    """Yield the images of a shard, once it is known to be whole.

    Args:
        file: Opened to be read; it can be sought in.
        suffix: ``.npz`` or ``.tar``.
        size: Side of the images, in pixels.
        first: How many images to skip.

    Raises:
        OSError: If it is damaged, or no shard, or too large; says so. No image has been yielded then, unless the file
            was changed meanwhile.
    """
    try:
        if file.seek(0, os.SEEK_END) > MAX_SHARD_BYTES:
            _refuse(f"it has more than {MAX_SHARD_BYTES:,} bytes")
        file.seek(0)
        yield from (_read_npz if suffix == ".npz" else _read_tar)(file, size, first)
    except OSError as error:
        raise OSError(error.strerror or str(error) or "it cannot be read") from error
    except MemoryError as error:
        raise OSError("it takes more memory than there is") from error
    except Exception as error:  # what a damaged archive can raise is not listed anywhere
        raise OSError(f"it is damaged: {error or type(error).__name__}") from error


def _refuse(reason: str) -> NoReturn:
    raise OSError(reason)


def _read_npz(file: BinaryIO, size: int, first: int) -> Iterator[Sample]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        for name in ("images.npy", "labels.npy"):
            if name not in members:
                _refuse(f"it has no array {name.removesuffix('.npy')!r}; a shard has images and labels")
        with archive.open(_plain(members["labels.npy"])) as stream:
            labels = _read_labels(stream, members["labels.npy"].file_size)
        with archive.open(_plain(members["images.npy"])) as stream:
            shape = _read_header(stream, members["images.npy"].file_size, "images", "u")[0]
            if len(shape) not in (3, 4) or shape[3:] not in ((), (3,)) or 0 in shape[1:]:
                _refuse(f"images: the shape is {list(shape)}, and not [n, height, width, 3] or [n, height, width]")
            if shape[1] * shape[2] > MAX_PIXELS:
                _refuse(f"images: {shape[2]}x{shape[1]} pixels are more than {MAX_PIXELS:,}")
            if not shape[0]:
                _refuse("it holds no image")
            if shape[0] != len(labels):
                _refuse(f"there are {shape[0]:,} images and {len(labels):,} labels")
            while stream.read(_CHUNK):  # to its end, where its checksum is compared
                pass
        bytes_each = int(np.prod(shape[1:], dtype=np.int64))
        with archive.open(members["images.npy"]) as stream:
            _read_header(stream, members["images.npy"].file_size, "images", "u")
            for number in range(shape[0]):
                content = _read_exactly(stream, bytes_each)
                if number >= first:
                    pixels = np.frombuffer(content, dtype=np.uint8).reshape(shape[1:])
                    yield labels[number], fit_pixels(pixels, size)


def _plain(info: zipfile.ZipInfo) -> zipfile.ZipInfo:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        _refuse("it is packed in another way than NumPy does")
    if info.file_size > MAX_SHARD_BYTES:
        _refuse(f"it has more than {MAX_SHARD_BYTES:,} bytes when it is unpacked")
    return info


def _read_header(stream: IO[bytes], length: int, name: str, kinds: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header of an array, and check what it claims against the length of the member that holds it."""
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        _refuse(f"{name}: it is an array of a format that is not known")
    field = _read_exactly(stream, 2 if version == (1, 0) else 4)
    of_header = int.from_bytes(field, "little")
    if of_header > _MAX_ARRAY_HEADER:  # NumPy would read it first
        _refuse(f"{name}: the header has {of_header:,} bytes; {_MAX_ARRAY_HEADER:,} are the most")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(io.BytesIO(field + _read_exactly(stream, of_header)))
    if dtype.kind not in kinds or (name == "images" and dtype != np.uint8):
        wanted = "uint8" if name == "images" else "names or numbers"
        _refuse(f"{name}: it is an array of {dtype!s:.100}, and not of {wanted}")
    if fortran and len(shape) > 1:
        _refuse(f"{name}: the order of the array is Fortran's, and not C's")
    if not shape or not all(0 <= side <= MAX_SHARD_BYTES for side in shape) or shape[0] > MAX_SHARD_IMAGES:
        _refuse(f"{name}: the shape is {list(shape)}; a shard has at most {MAX_SHARD_IMAGES:,} images")
    claimed = dtype.itemsize
    for side in shape:
        claimed *= side
    if claimed > MAX_SHARD_BYTES or claimed + stream.tell() != length:
        _refuse(f"{name}: the header claims {claimed:,} bytes, and there are {max(0, length - stream.tell()):,}")
    return tuple(shape), dtype


def _read_labels(stream: IO[bytes], length: int) -> list[str | int | None]:
    shape, dtype = _read_header(stream, length, "labels", "iuUS")
    if len(shape) != 1 or dtype.itemsize > _MAX_LABEL_BYTES:
        _refuse(f"labels: they are {dtype} of the shape {list(shape)}, and not one name or number an image")
    content = _read_exactly(stream, shape[0] * dtype.itemsize)
    labels: list[Any] = np.frombuffer(content, dtype=dtype).tolist() if content else [""] * shape[0]
    stream.read(1)  # compares the checksum
    return [label.decode("utf-8", "replace") if isinstance(label, bytes) else label for label in labels]


def _read_exactly(stream: IO[bytes], length: int) -> bytes:
    content = stream.read(length)
    if len(content) != length:
        _refuse("it is cut short")
    return content


def _read_tar(file: BinaryIO, size: int, first: int) -> Iterator[Sample]:
    samples = _list_tar(file)
    if not samples:
        _refuse("it holds no image")
    for key, image, label in samples[first:]:
        if not image[1]:
            yield None, f"{key!r:.100} has no image"
            continue
        if not label[1]:
            yield None, f"{key!r:.100} has no label: a file {key!r:.100} with the ending .cls"
            continue
        if image[1] > MAX_IMAGE_BYTES:
            yield None, f"it has {image[1]:,} bytes; {MAX_IMAGE_BYTES:,} are the most"
            continue
        file.seek(label[0])
        given = _read_exactly(file, min(label[1], _MAX_LABEL_BYTES)).decode("utf-8", "replace").strip()
        file.seek(image[0])
        content = _read_exactly(file, image[1])
        try:
            yield given, decode_image(io.BytesIO(content), size)
        except OSError as error:
            yield given, str(error)


def _list_tar(file: BinaryIO) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
    """Return the key of each sample, and where its image and its label are: the first byte, and how many."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    samples: list[tuple[str, tuple[int, int], tuple[int, int]]] = []
    for number, member in enumerate(tar_members(file), 1):
        if number > _MAX_MEMBERS or len(samples) > MAX_SHARD_IMAGES:
            _refuse(f"a shard has at most {MAX_SHARD_IMAGES:,} images")
        if not member.isreg() or member.issparse():
            continue
        if member.offset_data + member.size > length:
            _refuse("it is cut short")
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        key, ending = f"{folder}/{stem}" if folder else stem, f".{ending.lower()}"
        is_image, is_label = ending in image_suffixes(), ending == ".cls"
        if not is_image and not is_label:
            continue
        if not samples or samples[-1][0] != key:
            samples.append((key, (0, 0), (0, 0)))
        where = (member.offset_data, member.size)
        samples[-1] = (key, where if is_image else samples[-1][1], where if is_label else samples[-1][2])
    return samples


def tar_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar; their headers, which may claim that they are gigabytes long, take no memory.

    Args:
        file: At its begin; what is between ``offset_data`` of a member and the next one may be read from it meanwhile.

    Raises:
        OSError: If a header is too large, or the end is missing; says so.
        tarfile.TarError: If it is no tar, or damaged.
    """
    headers = _Headers(file)
    with tarfile.open(fileobj=headers, mode="r:", errors="replace") as archive:  # type: ignore[call-overload]
        while member := archive.next():
            archive.members, archive.pax_headers = [], {}  # or it keeps them all
            headers.left = _MAX_HEADERS
            yield member
        end = archive.offset
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):  # tarfile takes a damaged header for the end
        _refuse("it is cut short or damaged: its end is missing")


class _Headers:
    """A file of which not much is read for one member of a tar, in however many pieces."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.left = _MAX_HEADERS
        self.tell, self.seek = file.tell, file.seek

    def read(self, length: int) -> bytes:
        """Return the next bytes."""
        if not 0 <= length <= self.left:
            _refuse("a header is too large")
        self.left -= length
        return self._file.read(length)
