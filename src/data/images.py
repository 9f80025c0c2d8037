"""Image files of any size and mode, for `predict`.

python -m src predict --ckpt_path best --data.images cat.png photos/
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from src.data.loader import Batch, Normalize
from src.errors import Failure
from src.live.decode import decode_image
from src.live.decode import list_images as list_folder


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
        device = self.normalize.device
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
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += list_folder(path)
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
        OSError: If the file cannot be read as an image, or claims too many pixels: see `src.live.decode`.
    """
    return torch.from_numpy(decode_image(path, size))
