"""A folder that a run is fed from: the side of those who put labelled images there, and put labels right.

    from src.live.feed import correct, offer

    names = offer("feed", ["cat.png"], "cat")
    correct("feed", names[0], "dog")

What is offered appears as a whole, by renaming: ``feed/cat/cat-NUMBER.png``. See `src.live.intake` for the run's side.
A run leaves the names of its classes in the folder (`announce`), by which a label that it would refuse is refused here.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from src.errors import Failure, UsageError
from src.live.commands import new_command
from src.live.files import read_bounded, write_whole

if TYPE_CHECKING:
    import numpy as np

CORRECTIONS = ".corrections"
"""The folder of the feed that corrections are put into."""

CLASSES = ".classes.json"
"""The file of the feed that tells the classes of the newest run that is fed from it."""

_LARGEST_CLASSES = 1 << 20  # bytes
_LONGEST_STEM = 100  # bytes


def offer(folder: str | Path, images: Sequence[str | Path | np.ndarray], label: str) -> list[str]:
    """Give images of one class to a run; its feed's folder is made if it is not there.

    Args:
        folder: What the run was told with ``--data.feed``.
        images: Paths of image files, which are copied, or pixels: uint8 ``[height, width, 3]``.
        label: The name of their class.

    Returns:
        What they are called from now on, e.g. ``cat/1-9f86d081884c.png``.

    Raises:
        UsageError: If the label cannot be one, the folder's run has no such class, or pixels are none.
        Failure: If a file cannot be read, which is found before any is copied, or the folder not be written to.
    """
    check_label(label)
    _check_class(folder, label)
    for image in images:
        if isinstance(image, (str, Path)):
            check_file(Path(image))
        else:
            _check_pixels(image)
    names = []
    for image in images:
        path = Path(image) if isinstance(image, (str, Path)) else None
        stem, suffix = (path.stem, path.suffix) if path else ("image", ".png")
        name = f"{label}/{_plain(stem)}-{secrets.token_hex(6)}{suffix}"

        def write(file: BinaryIO, image: str | Path | np.ndarray = image) -> None:
            if isinstance(image, (str, Path)):
                with Path(image).open("rb") as source:
                    shutil.copyfileobj(source, file)
            else:
                from PIL import Image

                Image.fromarray(image).save(file, "PNG")

        _put(Path(folder) / name, write)
        names.append(name)
    return names


def offer_shard(
    folder: str | Path, images: np.ndarray, labels: Sequence[str | int] | np.ndarray, name: str | None = None
) -> str:
    """Give many images of any classes to a run, in one file.

    Args:
        folder: What the run was told with ``--data.feed``; it is made if it is not there.
        images: uint8 ``[n, height, width, 3]``.
        labels: Names or numbers of their classes.
        name: Of the file, without ``.npz``; by default one that no other has.

    Returns:
        What it is called: ``NAME.npz``; its images are ``NAME.npz#0`` and so on.

    Raises:
        UsageError: If these are not images with labels, or the name cannot be one.
        Failure: If the folder cannot be written to, or has such a file.
    """
    import numpy as np

    given = np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UsageError(f"images: {images.dtype} {list(images.shape)} is not uint8 [n, height, width, 3]")
    if given.shape != images.shape[:1] or given.dtype.kind not in "iuU":
        raise UsageError(
            f"labels: {given.dtype} {list(given.shape)} is not one name or number for {len(images)} images"
        )
    if name is not None:
        _check_name(name, "name")
    whole = f"{name or f'shard-{secrets.token_hex(6)}'}.npz"
    path = Path(folder) / whole
    if path.exists():
        raise Failure(f"{path} is there already; give it another name")
    _put(path, lambda file: np.savez(file, images=images, labels=given))
    return whole


def correct(folder: str | Path, sample: int | str, label: str | None) -> str:
    """Put the label of an image right, or take the image out of the data, from the next draw on.

    Args:
        folder: What the run was told with ``--data.feed``.
        sample: The id of an image, or what `offer` called it.
        label: The name of its class; none to drop it.

    Returns:
        The id of this correction, as it will be in the journal.

    Raises:
        UsageError: If there can be no such sample or label, or the folder's run has no such class.
        Failure: If there is no such folder, or it cannot be written to.
    """
    if label is not None:
        check_label(label)
        _check_class(folder, label)
    if sample == "" or (isinstance(sample, int) and not 0 <= sample < 2**62):
        raise UsageError(f"sample: {sample!r} is neither the id of an image, 0 or more, nor a name")
    command = new_command()
    content = json.dumps({"id": command.id, "sample": sample, "label": label, "actor": command.actor}).encode()
    if not Path(folder).is_dir():
        raise Failure(f"{folder}: there is no such folder; give the one that the run is fed from")
    path = Path(folder) / CORRECTIONS / f"{time.time_ns():020}-{command.id}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise Failure(f"{path.parent} cannot be written to ({error.strerror})") from error
    return command.id


def announce(folder: Path, classes: Sequence[str]) -> None:
    """Leave the names of a run's classes in the folder that it is fed from, for those who feed it.

    Args:
        folder: The folder; it is made if it is not there.
        classes: The names, in order of their numbers.

    Raises:
        OSError: If they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CLASSES, json.dumps(list(classes)).encode())


def announced(folder: str | Path) -> list[str] | None:
    """Return the names of the classes of the newest run that is fed from a folder; none if no run has left them."""
    try:
        names = json.loads(read_bounded(Path(folder) / CLASSES, _LARGEST_CLASSES))
    except (OSError, ValueError, RecursionError):  # not there, or a stranger's
        return None
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None


def class_of(given: str | int | None, classes: Mapping[str, int]) -> int:
    """Return the number of the class that a label means.

    Args:
        given: The label: the name of a class, or its number, also as a text.
        classes: The numbers by name, in their order.

    Raises:
        ValueError: If there is no such class; says which there are.
    """
    if isinstance(given, str) and given in classes:
        return classes[given]
    if isinstance(given, str) and given.isascii() and given.isdigit() and len(given) < 10:
        given = int(given)
    if isinstance(given, int) and 0 <= given < len(classes):
        return given
    if isinstance(given, int):
        raise ValueError(f"there is no class {given}: they are 0 to {len(classes) - 1}")
    names = list(classes)
    near = difflib.get_close_matches(given or "", names, n=1)
    few = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    hint = f"did you mean {near[0]}? There" if near else "there"
    raise ValueError(f"there is no class {given!r:.60}; {hint} are {few}")


def check_label(label: str) -> None:
    """Check that a text can be the name of a class, and of a folder.

    Raises:
        UsageError: If it cannot.
    """
    _check_name(label, "label")


def check_file(path: Path) -> None:
    """Check that a path leads to a file that can be read.

    Raises:
        Failure: If it does not; says so.
    """
    if not path.exists():
        raise Failure(f"there is no file or folder {path}")
    if not path.is_file():
        raise Failure(f"{path} is not a file")
    if not os.access(path, os.R_OK):
        raise Failure(f"{path} cannot be read: permission denied")


def _check_name(name: str, key: str) -> None:
    if not name or name.startswith(".") or "/" in name or os.sep in name or not name.isprintable() or len(name) > 200:
        raise UsageError(
            f"{key}: {name!r:.250} cannot be the name of a folder; give letters, with no / and no leading dot"
        )


def _check_class(folder: str | Path, label: str) -> None:
    names = announced(folder)
    try:
        if names is not None:
            class_of(label, {name: number for number, name in enumerate(names)})
    except ValueError as error:
        raise UsageError(f"label: {error} (by {Path(folder) / CLASSES}, of the newest run fed from there)") from error


def _plain(stem: str) -> str:
    """Return a name that a run takes and any file system holds, with what is put before and behind it."""
    printable = "".join(letter if letter.isprintable() else "_" for letter in stem.lstrip("."))
    return printable.encode()[:_LONGEST_STEM].decode(errors="ignore")


def _check_pixels(image: np.ndarray) -> None:
    if image.dtype != "uint8" or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UsageError(f"images: {image.dtype} {list(image.shape)} is not uint8 [height, width, 3]")


def _put(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file beside its place and rename it into it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                write(file)
            partial.rename(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise Failure(f"{path}: it cannot be put there ({error.strerror or error})") from error
