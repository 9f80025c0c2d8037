"""Behaviour of src/data/cifar10.py: official files are read exactly; anything else is refused and never run."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets import CIFAR10 as OFFICIAL

from src.data import CIFAR10
from src.data.cifar10 import parse_batch
from src.data.module import Part
from src.errors import Failure

FOLDER, ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
NAMES = ("data_batch_1", "data_batch_2", "test_batch")


def official_batch(
    pixels: NDArray[np.uint8], classes: Sequence[int], module: bytes = b"numpy.core.multiarray"
) -> bytes:
    """Pickle a batch by protocol 2 as Python 2 did for the official files: its strings are byte strings."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def numbers(*values: int) -> bytes:
        return b"".join(b"J" + struct.pack("<i", value) for value in values)

    content = pixels.tobytes()
    empty = b"c" + module + b"\n_reconstruct\n(cnumpy\nndarray\n(" + numbers(0) + b"t" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + numbers(0, 1) + b"tR"
    dtype += b"(" + numbers(3) + text(b"|") + b"NNN" + numbers(-1, -1, 0) + b"tb"
    state = b"(" + numbers(1) + b"(" + numbers(*pixels.shape) + b"t" + dtype + b"\x89"
    state += b"T" + struct.pack("<i", len(content)) + content + b"t"
    labels = b"](" + numbers(*classes) + b"e"
    return b"\x80\x02}(" + text(b"data") + empty + state + b"b" + text(b"labels") + labels + b"u."


def fake_pixels(file: int) -> NDArray[np.uint8]:
    """Return rows that differ from each other and from file to file, and are cheap to compress."""
    numbers = np.arange(10_000).astype(np.uint8)
    return numbers[:, None] + 3 * numbers[:3072] + np.uint8(50 * file)


def fake_row(file: int, row: int) -> NDArray[np.uint8]:
    return ((row + 3 * (np.arange(3072) % 256) + 50 * file) % 256).astype(np.uint8)


def fake_classes(file: int) -> NDArray[np.int64]:
    return (np.arange(10_000) * 3 + file) % 10


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder that holds the fake official folder and archive."""
    root = tmp_path_factory.mktemp("originals")
    (root / FOLDER).mkdir()
    for file, name in enumerate(NAMES):
        content = official_batch(fake_pixels(file), fake_classes(file).tolist())
        (root / FOLDER / name).write_bytes(content)
    with tarfile.open(root / ARCHIVE, "w:gz", compresslevel=1) as tar:
        tar.add(root / FOLDER, FOLDER)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def md5s(originals: Path) -> list[list[str]]:
    """Return name and MD5 of each fake file."""
    return [[name, md5((originals / FOLDER / name).read_bytes())] for name in NAMES]


@pytest.fixture
def root(md5s: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder, while the fake files pass for the official ones."""
    monkeypatch.setattr(OFFICIAL, "train_list", md5s[:2])
    monkeypatch.setattr(OFFICIAL, "test_list", md5s[2:])
    monkeypatch.setattr("src.data.cifar10.download_url", refuse_download)
    return tmp_path


def refuse_download(*_: object) -> None:
    raise AssertionError("nothing may be downloaded here")


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def take_folder(originals: Path, root: Path) -> Path:
    """Make the fake folder appear in `root`; its files may be replaced, not written to."""
    return Path(shutil.copytree(originals / FOLDER, root / FOLDER, copy_function=os.link))


def take_archive(originals: Path, root: Path) -> Path:
    return Path(shutil.copy(originals / ARCHIVE, root / ARCHIVE))


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def refusal(root: Path, **kwargs: Any) -> str:
    """Return the one line with which loading the train part is refused."""
    with pytest.raises(Failure) as caught:
        CIFAR10(root, **kwargs).load("train")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("form", ["folder", "archive"])
@pytest.mark.parametrize("named_itself", [False, True])
def test_the_files_are_read_from_folder_and_archive(originals: Path, root: Path, form: str, named_itself: bool) -> None:
    itself = take_folder(originals, root) if form == "folder" else take_archive(originals, root)
    data = CIFAR10(itself if named_itself else root)
    pixels, labels = data.load("train")
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (20_000, 32, 32, 3))
    assert (labels.dtype, labels.shape) == (torch.int64, (20_000,))
    assert labels.tolist() == [*fake_classes(0), *fake_classes(1)]
    for i in (0, 9_999, 10_000, 19_999):
        row = fake_row(i // 10_000, i % 10_000)
        assert np.array_equal(pixels[i].numpy(), row.reshape(3, 32, 32).transpose(1, 2, 0))
    pixels, labels = data.load("test")
    assert (len(pixels), labels.tolist()) == (10_000, fake_classes(2).tolist())


def test_a_row_is_read_as_planes_of_red_green_and_blue(originals: Path, root: Path) -> None:
    take_folder(originals, root)
    image = CIFAR10(root).load("test")[0][7]
    row = fake_row(2, 7).tolist()
    for y, x in ((0, 0), (0, 31), (5, 9), (31, 0)):
        assert image[y, x].tolist() == [row[32 * y + x], row[1024 + 32 * y + x], row[2048 + 32 * y + x]]


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_batches_of_old_and_new_numpy_are_read(module: bytes) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    pixels, labels = parse_batch("x", official_batch(rows, [3, 1, 4, 1], module))
    assert np.array_equal(pixels.numpy(), rows)
    assert labels.tolist() == [3, 1, 4, 1]


def test_a_missing_file_is_named(originals: Path, root: Path) -> None:
    path = take_folder(originals, root) / "data_batch_2"
    path.unlink()
    assert refusal(root).startswith(f"{path} cannot be read")


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_a_damaged_file_is_named(originals: Path, root: Path, damage: str) -> None:
    path = take_folder(originals, root) / "data_batch_1"
    content = bytearray(path.read_bytes())
    content[15_000_000] ^= 1
    replace(path, {"truncated": bytes(content[:-1]), "altered": bytes(content), "empty": b""}[damage])
    assert refusal(root).startswith(f"{path} is not the official file")


def test_a_damaged_file_does_not_hinder_the_other_part(originals: Path, root: Path) -> None:
    replace(take_folder(originals, root) / "data_batch_1", b"")
    assert len(CIFAR10(root).load("test")[0]) == 10_000


def gzipped_with_invalid_block(content: bytes) -> bytes:
    """Compress the first half of the content, then go on with bits that no compressor writes."""
    compressor = zlib.compressobj(1, wbits=31)
    half = compressor.compress(content[: len(content) // 2]) + compressor.flush(zlib.Z_FULL_FLUSH)
    return half + b"\xff" * 4096


@pytest.mark.parametrize("damage", ["truncated", "empty", "not gzip", "invalid block"])
def test_a_damaged_archive_is_named(originals: Path, root: Path, damage: str) -> None:
    path = take_archive(originals, root)
    content = path.read_bytes()
    if damage == "invalid block":
        content = gzipped_with_invalid_block(zlib.decompress(content, wbits=31))
    else:
        content = {"truncated": content[: len(content) // 2], "empty": b"", "not gzip": b"<html>"}[damage]
    replace(path, content)
    assert refusal(root).startswith(f"{path} is damaged")


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_an_archive_whose_header_claims_gigabytes_is_refused_before_they_are_read(root: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 3_000_000_000
    with gzip.open(root / ARCHIVE, "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(100_000_000))
    tracemalloc.start()
    try:
        said = refusal(root)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said.startswith(f"{root / ARCHIVE} is damaged (a header is too large)")
    assert peak < 20_000_000


def test_an_archive_of_headers_without_an_end_is_refused_in_one_line(root: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    with gzip.open(root / ARCHIVE, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT) * 2000)
    assert refusal(root).startswith(f"{root / ARCHIVE} is damaged")


def test_an_archive_without_a_member_is_named_with_it(originals: Path, root: Path) -> None:
    first = (originals / FOLDER / "data_batch_1").read_bytes()
    write_archive(root / ARCHIVE, {f"{FOLDER}/data_batch_1": first, "data_batch_2": b"not in the folder"})
    assert refusal(root).startswith(f"{root / ARCHIVE} lacks {FOLDER}/data_batch_2")


def test_an_altered_member_of_an_archive_is_named(originals: Path, root: Path) -> None:
    first = (originals / FOLDER / "data_batch_1").read_bytes()
    write_archive(root / ARCHIVE, {f"{FOLDER}/data_batch_1": first, f"{FOLDER}/data_batch_2": first})
    assert refusal(root).startswith(f"{root / ARCHIVE}:{FOLDER}/data_batch_2 is not the official file")


def test_nothing_is_extracted_from_an_archive(originals: Path, root: Path) -> None:
    take_archive(originals, root)
    CIFAR10(root).load("test")
    assert [path.name for path in root.iterdir()] == [ARCHIVE]


class _Gadget:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_code_in_a_file_is_refused_and_not_run_even_if_its_md5_is_right(
    originals: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = root / "marker"
    content = pickle.dumps({"data": _Gadget(marker), "labels": []}, protocol=2)
    path = take_folder(originals, root) / "data_batch_1"
    replace(path, content)
    monkeypatch.setattr(OFFICIAL, "train_list", [["data_batch_1", md5(content)]])
    assert refusal(root).startswith("data_batch_1 is not a CIFAR-10 batch: it asks for")
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists(), "the gadget works where it is let"


ROWS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02.",
        b"junk",
        pickle.dumps([1, 2], protocol=2),
        pickle.dumps({}, protocol=2),
        official_batch(ROWS, [1, 10]),
        official_batch(ROWS, [1, -1]),
        official_batch(ROWS, [1]),
        official_batch(ROWS[:, 1:], [1, 2]),
        official_batch(ROWS, [1, 2])[:-2000],
        official_batch(ROWS, [1, 2]).replace(b"cnumpy\nndarray", b"cnumpy\nmatrix"),
    ],
)
def test_what_is_not_a_batch_is_refused_by_name(content: bytes) -> None:
    with pytest.raises(Failure, match=r"^somewhere is not a CIFAR-10 batch: "):
        parse_batch("somewhere", content)


def test_a_failed_download_says_where_to_put_what(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, folder: str, name: str, md5: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / name).write_bytes(b"half")
        raise URLError(f"no route for {url} {md5}")

    monkeypatch.setattr("src.data.cifar10.download_url", fail)
    message = refusal(root)
    assert message.startswith("CIFAR-10 could not be downloaded (<urlopen error no route")
    assert f"put {ARCHIVE} from {OFFICIAL.url} into {root}" in message
    assert "configs/quickstart.yaml" in message
    assert list(root.iterdir()) == [], "no half a file is left to stumble over"
    root.rmdir()
    assert refusal(root).startswith("CIFAR-10 could not be downloaded")
    assert not root.exists(), "nor a folder that was not there"


def test_without_download_nothing_is_fetched_and_the_advice_is_the_same(root: Path) -> None:
    message = refusal(root, download=False)
    assert message.startswith(f"there is no CIFAR-10 in {root}: put {ARCHIVE} from {OFFICIAL.url} into {root}")
    assert "configs/quickstart.yaml" in message


@pytest.mark.parametrize("name", ["", FOLDER, ARCHIVE])
def test_a_download_is_read_right_away_whichever_path_was_named(
    originals: Path, root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fetched = []

    def fetch(url: str, folder: str, name: str, md5: str) -> None:
        fetched.append((url, md5))
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(originals / ARCHIVE, Path(folder) / name)

    monkeypatch.setattr("src.data.cifar10.download_url", fetch)
    for _ in range(2):
        assert len(CIFAR10(root / "new" / name).load("test")[0]) == 10_000
    assert fetched == [(OFFICIAL.url, OFFICIAL.tgz_md5)]


def test_a_root_that_is_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("not a folder")
    assert refusal(plain) == f"data.root: {plain} is not a folder"


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_real_files_give_what_torchvision_gives(cifar_root: Path, part: str) -> None:
    expected = OFFICIAL(str(cifar_root), train=part == "train")
    pixels, labels = CIFAR10(cifar_root, download=False).load("train" if part == "train" else "test")
    assert np.array_equal(pixels.numpy(), expected.data)
    assert labels.tolist() == expected.targets
    assert CIFAR10.classes == tuple(expected.classes)


def test_what_was_parsed_is_kept_and_read_again(cifar_root: Path, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").symlink_to(cifar_root / "cifar-10-batches-py")
    first = CIFAR10(root=tmp_path).load("test")
    (kept,) = tmp_path.glob("cifar10-test-*.npz")
    (tmp_path / "cifar-10-batches-py").unlink()
    again = CIFAR10(root=tmp_path, download=False).load("test")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_the_fingerprint_is_that_of_the_images_whoever_gives_them(
    cifar_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(CIFAR10):
        def load(self, part: Part) -> tuple[Tensor, Tensor]:
            pixels, labels = super().load(part)
            labels[0] = 9 - labels[0]
            return pixels, labels

    def sha256(data: CIFAR10) -> str:
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in data._part("train"))).hexdigest()

    wrong, right = Wrong(root=cifar_root), CIFAR10(root=cifar_root)
    assert wrong.fingerprint == sha256(wrong)
    monkeypatch.setattr(CIFAR10, "_hash", None)  # it is known already: the files were checked by it
    assert right.fingerprint == sha256(right) != wrong.fingerprint


@pytest.mark.parametrize("damage", ["cut short", "another image", "not an archive", "a pickle"])
def test_what_was_kept_and_is_not_the_official_set_is_parsed_anew(
    damage: str, cifar_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "cifar-10-batches-py").symlink_to(cifar_root / "cifar-10-batches-py")
    pixels, labels = CIFAR10(root=tmp_path).load("test")
    (kept,) = tmp_path.glob("cifar10-test-*.npz")
    if damage == "cut short":
        kept.write_bytes(kept.read_bytes()[:-1000])
    elif damage == "not an archive":
        kept.write_bytes(b"hello")
    elif damage == "a pickle":
        with kept.open("wb") as file:
            np.savez(file, pixels=np.array([Path("x")], dtype=object), labels=labels.numpy())
    else:
        other = pixels.clone()
        other[5] += 1
        with kept.open("wb") as file:
            np.savez(file, pixels=other.numpy(), labels=labels.numpy())
    again = CIFAR10(root=tmp_path).load("test")
    assert torch.equal(again[0], pixels)
    assert torch.equal(again[1], labels)
