"""CIFAR-10 (Krizhevsky, 2009): 60,000 photographs of ten classes, 32x32 pixels.

    python -m src fit --config configs/cifar10.yaml

The files are the official Python batches, which are pickles. Each is read once, the bytes that were read are checked
against their published MD5, and those very bytes are parsed by an unpickler that knows NumPy arrays and nothing else.
"""

import gzip
import hashlib
import io
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.datasets.utils import download_url

from src.data.module import ImageData, Part
from src.errors import Failure
from src.live.shards import tar_members

_OFFICIAL = torchvision.datasets.CIFAR10
_FOLDER: str = _OFFICIAL.base_folder
_ARCHIVE: str = _OFFICIAL.filename
_IMAGES_PER_FILE = 10_000
# SHA-256 of the parsed pixels and labels.
_CONTENT: dict[Part, str] = {
    "train": "67e12c2a5906880a4fe5595fe6d768185ad7ca587f35d3a7ece3c3b8b85035d2",
    "test": "e54a434ec35094516eacbaac0f2f9550358d985e9d1f71b47d41d333c15ba304",
}


class CIFAR10(ImageData):
    """The real CIFAR-10: 50,000 images to train on, 10,000 to test on.

    Downloaded by torchvision at first use (170 MB), unless it is there already.

    Args:
        root: Folder that holds the official files: ``cifar-10-batches-py/``, or the archive
            ``cifar-10-python.tar.gz``, which is read as it is; the path of either itself will do too.
        download: Whether to download the archive into `root` if neither is there.
        kwargs: The arguments of `src.data.ImageData`.
    """

    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def __init__(self, root: Path = Path("data"), download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.download = Path(root), download

    def load(self, part: Part) -> tuple[Tensor, Tensor]:
        """Read, verify and parse the files of a part straight into one tensor."""
        kept = self._kept(part)
        ours = type(self).load is CIFAR10.load  # else who calls this may change what it returns
        if (found := _recall(kept, _CONTENT[part])) is not None:
            self.digests |= {part: _CONTENT[part]} if ours else {}
            return found
        files = _OFFICIAL.train_list if part == "train" else _OFFICIAL.test_list
        pixels = torch.empty((len(files) * _IMAGES_PER_FILE, 32, 32, 3), dtype=torch.uint8)
        labels = torch.empty(len(pixels), dtype=torch.int64)
        for i, (name, content) in enumerate(self._read(dict(files))):
            rows, classes = parse_batch(name, content)
            span = slice(i * _IMAGES_PER_FILE, (i + 1) * _IMAGES_PER_FILE)
            pixels[span] = rows.view(-1, 3, 32, 32).permute(0, 2, 3, 1)
            labels[span] = classes
        if _digest(pixels, labels) == _CONTENT[part]:
            self.digests |= {part: _CONTENT[part]} if ours else {}
            _keep(kept, pixels, labels)
        return pixels, labels

    def _kept(self, part: Part) -> Path:
        """Return where the parsed images are kept, by the hash of what they hold."""
        folder = self.root.parent if self.root.name in (_FOLDER, _ARCHIVE) else self.root
        return folder / f"cifar10-{part}-{_CONTENT[part][:12]}.npz"

    def _read(self, md5s: dict[str, str]) -> Iterator[tuple[str, bytes]]:
        """Yield name and verified content of each file, in order."""
        folder = self.root if self.root.name == _FOLDER else self.root / _FOLDER
        archive = self.root if self.root.name == _ARCHIVE else folder.parent / _ARCHIVE
        if not folder.is_dir() and not archive.is_file():
            self._fetch(archive)
        pairs = _from_folder(folder, md5s) if folder.is_dir() else _from_archive(archive, md5s)
        for path, name, content in pairs:
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5s[name]:
                raise Failure(
                    f"{path} is not the official file: it has {len(content):,} bytes and another MD5 than published; "
                    f"delete it and run again"
                )
            yield name, content

    def _fetch(self, archive: Path) -> None:
        advice = (
            f"put {_ARCHIVE} from {_OFFICIAL.url} into {archive.parent}, or name its folder by --data.root; "
            f"configs/quickstart.yaml needs no download"
        )
        if not self.download:
            raise Failure(f"there is no CIFAR-10 in {archive.parent}: {advice}")
        folder = archive.parent
        if folder.exists() and not folder.is_dir():
            raise Failure(f"data.root: {folder} is not a folder")
        existed = folder.exists()
        partial = archive.with_name(f"{archive.name}.part")  # a download that is broken off leaves no archive
        try:
            download_url(_OFFICIAL.url, str(folder), partial.name, _OFFICIAL.tgz_md5)
            partial.replace(archive)
        except (OSError, RuntimeError) as error:  # RuntimeError: the download came out with another MD5
            with suppress(OSError):
                partial.unlink(missing_ok=True)
                if not existed:
                    folder.rmdir()
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Failure(f"CIFAR-10 could not be downloaded ({reason}): {advice}") from error


def _digest(pixels: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(pixels.numpy().data)
    digest.update(labels.numpy().data)
    return digest.hexdigest()


def _recall(path: Path, digest: str) -> tuple[Tensor, Tensor] | None:
    """Read what an earlier run has parsed, if it is there and as it was."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = torch.from_numpy(arrays["pixels"]), torch.from_numpy(arrays["labels"])
        return found if _digest(*found) == digest else None
    except Exception:  # a damaged archive can raise almost anything; the official files are read instead
        return None


def _keep(path: Path, pixels: Tensor, labels: Tensor) -> None:
    """Keep what has been parsed, so that the next run loads it at the speed of memory; where it cannot, do without."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez(file, pixels=pixels.numpy(), labels=labels.numpy())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def _from_folder(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, str, bytes]]:
    for name in names:
        path = folder / name
        try:
            yield str(path), name, path.read_bytes()
        except OSError as error:
            raise Failure(
                f"{path} cannot be read ({error.strerror}): CIFAR-10 needs it; get the whole set anew"
            ) from error


def _from_archive(archive: Path, names: Iterable[str]) -> Iterator[tuple[str, str, bytes]]:
    """Read members in memory: nothing is extracted, so no path in the archive can lead anywhere."""
    found: dict[str, bytes] = {}
    wanted = {f"{_FOLDER}/{name}": name for name in names}
    try:
        with gzip.open(archive) as file:
            for member in tar_members(file):  # type: ignore[arg-type]
                # A member may claim any size; the official files are 31 MB.
                if member.name in wanted and member.isfile() and 0 <= member.size < 40_000_000:
                    file.seek(member.offset_data)
                    found[wanted[member.name]] = file.read(member.size)
                    if len(found) == len(wanted):
                        break
    except Exception as error:  # what a damaged archive can raise is not listed anywhere
        raise Failure(f"{archive} is damaged ({error}); delete it and run again") from error
    for name in wanted.values():
        if name not in found:
            raise Failure(f"{archive} lacks {_FOLDER}/{name}: it is not the official archive; delete it and run again")
        yield f"{archive}:{_FOLDER}/{name}", name, found.pop(name)


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and NumPy arrays, and refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the three globals that a pickled array needs."""
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }:
            return np.empty(0).__reduce__()[0]  # NumPy's own, wherever this version keeps it
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def parse_batch(name: str, content: bytes) -> tuple[Tensor, Tensor]:
    """Parse one official batch file.

    Args:
        name: The file, for errors.
        content: Its bytes.

    Returns:
        Pixels, uint8 ``[n, 3072]`` (all red, then green, then blue, each row by row), and classes, int64 ``[n]``.

    Raises:
        Failure: If the bytes are not such a batch. Nothing in them is executed.
    """
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        rows, classes = batch[b"data"], torch.tensor(batch[b"labels"], dtype=torch.int64)
        if not (isinstance(rows, np.ndarray) and rows.dtype == np.uint8 and rows.shape == (len(classes), 3072)):
            raise ValueError("its data is not uint8 [n, 3072]")
        if classes.ndim != 1 or (len(classes) and not (int(classes.min()) >= 0 and int(classes.max()) < 10)):
            raise ValueError("its labels are not classes from 0 to 9")
    except Exception as error:  # a damaged pickle can raise almost anything
        raise Failure(f"{name} is not a CIFAR-10 batch: {error}") from error
    return torch.from_numpy(rows), classes
