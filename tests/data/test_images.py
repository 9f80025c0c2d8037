"""Behaviour of src/data/images.py: pictures of any size and mode are read, anything else is an OSError."""

import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.images import ImageFiles, list_images, read_image
from src.data.loader import Normalize
from src.errors import Failure
from tests.conftest import REPOSITORY

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def save(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def assert_one_colour(path: Path, colour: tuple[int, int, int], tolerance: int = 0) -> None:
    pixels = read_image(path, 16)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (16, 16, 3))
    difference = (pixels.int() - torch.tensor(colour)).abs().max()
    assert int(difference) <= tolerance, f"{pixels[8, 8].tolist()} is not {colour}"


@pytest.mark.parametrize(
    ("mode", "value", "suffix", "colour"),
    [
        ("RGB", (200, 100, 50), "png", (200, 100, 50)),
        ("RGB", (200, 100, 50), "bmp", (200, 100, 50)),
        ("RGBA", (200, 100, 50, 255), "png", (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), "png", WHITE),
        ("RGBA", (200, 100, 0, 51), "png", (244, 224, 204)),
        ("L", 77, "png", (77, 77, 77)),
        ("LA", (77, 255), "png", (77, 77, 77)),
        ("LA", (77, 0), "png", WHITE),
        ("1", 1, "png", WHITE),
        ("1", 0, "png", (0, 0, 0)),
        ("I;16", 200 * 257, "png", (200, 200, 200)),
        ("I;16", 65535, "png", WHITE),
        ("I;16", 0, "png", (0, 0, 0)),
        ("I;16", 200 * 257, "tiff", (200, 200, 200)),
        ("CMYK", (0, 255, 255, 0), "tiff", RED),
        ("F", 80.0, "tiff", (80, 80, 80)),
    ],
)
def test_every_mode_is_shown_as_rgb(
    tmp_path: Path, mode: str, value: float | tuple[int, ...], suffix: str, colour: tuple[int, int, int]
) -> None:
    path = save(Image.new(mode, (40, 20), value), tmp_path / f"picture.{suffix}")
    with Image.open(path) as written:
        assert written.mode == mode
    assert_one_colour(path, colour, tolerance=1 if mode in ("RGBA", "CMYK") else 0)


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.new("P", (40, 20), 1)
    image.putpalette([*RED, *BLUE])
    assert_one_colour(save(image, tmp_path / "palette.png"), BLUE)
    image.save(tmp_path / "transparent.png", transparency=1)
    assert_one_colour(tmp_path / "transparent.png", WHITE)
    image.save(tmp_path / "alpha.png", transparency=bytes([255, 0]))
    assert_one_colour(tmp_path / "alpha.png", WHITE)


def test_a_cmyk_jpeg_is_shown_in_its_colours(tmp_path: Path) -> None:
    assert_one_colour(save(Image.new("CMYK", (40, 20), (0, 255, 255, 0)), tmp_path / "red.jpg"), RED, tolerance=3)


def test_a_16_bit_picture_keeps_its_upper_byte_however_dark_it_is(tmp_path: Path) -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    pixels = read_image(save(Image.fromarray(ramp), tmp_path / "ramp.png"), 16)
    assert pixels[..., 0].flatten().tolist() == list(range(256))
    dark = Image.fromarray(np.full((16, 16), 200, np.uint16))
    assert_one_colour(save(dark, tmp_path / "dark.png"), (0, 0, 0))


@pytest.mark.parametrize(
    ("orientation", "corners"),
    [
        (1, (RED, RED, BLUE, BLUE)),
        (3, (BLUE, BLUE, RED, RED)),
        (6, (BLUE, RED, BLUE, RED)),
        (8, (RED, BLUE, RED, BLUE)),
    ],
)
def test_a_photograph_is_turned_upright(
    tmp_path: Path, orientation: int, corners: tuple[tuple[int, int, int], ...]
) -> None:
    image = Image.new("RGB", (64, 64), RED)
    image.paste(BLUE, (0, 32, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    pixels = read_image(tmp_path / "photo.jpg", 16).int()
    for found, colour in zip((pixels[2, 2], pixels[2, 13], pixels[13, 2], pixels[13, 13]), corners, strict=True):
        assert int((found - torch.tensor(colour)).abs().max()) < 30


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 30), (30, 500), (2000, 1500)])
def test_any_size_is_scaled_to_a_square(tmp_path: Path, size: tuple[int, int], suffix: str) -> None:
    path = save(Image.new("RGB", size, (200, 100, 50)), tmp_path / f"picture.{suffix}")
    assert_one_colour(path, (200, 100, 50), tolerance=0 if suffix == "png" else 3)


@pytest.mark.parametrize("wide", [True, False])
def test_the_central_square_is_taken(tmp_path: Path, wide: bool) -> None:
    image = Image.new("RGB", (500, 30) if wide else (30, 500), RED)
    # The square is 30 pixels; the filter looks a few beyond its edges.
    image.paste(GREEN, (230, 0, 270, 30) if wide else (0, 230, 30, 270))
    assert_one_colour(save(image, tmp_path / "picture.png"), GREEN)


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# The second is more than ours and less than Pillow's own limit, the third between the two at which Pillow
# warns and refuses.
@pytest.mark.parametrize("size", [(60_000, 60_000), (8_000, 8_000), (10_000, 10_000)])
def test_a_picture_that_claims_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_claims(*size))
    start = time.process_time()
    with pytest.raises(OSError, match=r"more than 50,000,000"):
        read_image(path, 32)
    assert time.process_time() - start < 1


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_that_claims(50_000, 50_000))
    code = """if True:
        import resource, sys
        from pathlib import Path
        from src.data.images import read_image
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read_image(Path("bomb.png"), 32)
        except OSError as error:
            print(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    reason, growth = done.stdout.splitlines()
    assert reason == "it claims more than 50,000,000 pixels"
    assert int(growth) < 200_000  # kilobytes; its pixels would take 7.5 GB


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"


@pytest.mark.parametrize("suffix", ["png", "eps", "pdf"])
@pytest.mark.parametrize("content", [EPS, b"\xc5\xd0\xd3\xc6" + struct.pack("<7I", 32, len(EPS), *[0] * 5) + EPS, PDF])
def test_what_is_for_a_printer_is_refused_and_ghostscript_is_not_run(
    tmp_path: Path, suffix: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/marker\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # it would remember that there was none
    path = tmp_path / f"picture.{suffix}"
    path.write_bytes(content)
    if content == EPS:
        with Image.open(path) as image, pytest.raises(OSError):
            image.load()
        (tmp_path / "marker").unlink()  # left to itself Pillow runs it
    with pytest.raises(OSError, match=r"^it is not an image that can be read$"):
        read_image(path, 32)
    assert not (tmp_path / "marker").exists()
    if suffix != "png":
        with pytest.raises(Failure, match="no image in"):
            list_images([tmp_path])


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
def test_a_truncated_picture_is_an_oserror(tmp_path: Path, suffix: str, share: float) -> None:
    whole = save(noise(), tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(OSError, match=r"."):
        read_image(path, 32)


@pytest.mark.parametrize("content", [b"", b"a text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"\0" * 5000])
def test_what_is_no_picture_is_an_oserror(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fake.png"
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"^it is not an image that can be read$"):
        read_image(path, 32)


def test_a_folder_or_missing_file_is_an_oserror_too(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^Is a directory$"):
        read_image(tmp_path, 32)
    with pytest.raises(OSError, match=r"^No such file or directory$"):
        read_image(tmp_path / "gone.png", 32)


def test_folders_are_listed_recursively_and_sorted(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("b.png", "a.JPG", "sub/deep/c.webp", "sub/a.png", "notes.txt", "sub.png/inner.gif"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    listed = ["a.JPG", "b.png", "sub/a.png", "sub/deep/c.webp", "sub.png/inner.gif"]
    assert list_images([folder]) == [folder / name for name in listed]


def test_files_keep_the_order_in_which_they_were_named(tmp_path: Path) -> None:
    for name in ("z.png", "a.dat", "folder/m.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    named = [tmp_path / "z.png", tmp_path / "folder", tmp_path / "a.dat"]
    assert list_images(named) == [tmp_path / "z.png", tmp_path / "folder/m.png", tmp_path / "a.dat"]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"there is no file or folder .*gone\.png$"):
        list_images([tmp_path, tmp_path / "gone.png"])


def test_nothing_to_predict_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(Failure, match=f"no image in {tmp_path}: name image files"):
        list_images([tmp_path])
    with pytest.raises(Failure, match=r"no image given: name image files"):
        list_images([])


def test_unreadable_files_are_left_out_and_named(tmp_path: Path) -> None:
    for i in (0, 1, 4):
        save(Image.new("RGB", (20, 20), (50 * i, 0, 0)), tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_text("a text")
    (tmp_path / "3.png").write_bytes(save(noise(), tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "whole.png").unlink()
    normalize = Normalize((0.0,) * 3, (1 / 255,) * 3, torch.device("cpu"))
    files = ImageFiles([tmp_path], size=8, batch_size=2, normalize=normalize)
    batches = list(files)
    assert len(files) == len(batches) == 3
    assert [b.ids.tolist() for b in batches] == [[0, 1], [], [4]]
    assert [b.total for b in batches] == [2, 0, 1]
    for batch in batches:
        assert batch.images.shape == (len(batch.ids), 3, 8, 8)
        assert batch.labels.tolist() == [-1] * len(batch.ids)
        for i, image in zip(batch.ids.tolist(), batch.images, strict=True):
            assert files.files[i].name == f"{i}.png"
            assert image[0].flatten().tolist() == pytest.approx([50 * i] * 64)
    assert [path.name for path in files.unreadable] == ["2.png", "3.png"]
    assert files.unreadable[tmp_path / "2.png"] == "it is not an image that can be read"
    assert all(files.unreadable.values())
