"""Shards: what is whole is read, and whatever else there may be is an OSError, before it takes memory or time."""

import io
import os
import struct
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from src.live.decode import decode_image
from src.live.shards import MAX_SHARD_BYTES, read_shard, tar_members


def noise(n: int, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def npz(compressed: bool = False, **arrays: Any) -> bytes:
    content = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(content, **arrays)
    return content.getvalue()


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def tar(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def read(content: bytes, suffix: str, size: int = 8, first: int = 0) -> list[tuple[Any, Any]]:
    return list(read_shard(io.BytesIO(content), suffix, size, first))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("labels", [["cat", "dog", "cat"], [0, 1, 0], np.array([b"cat", b"dog", b"cat"])])
def test_an_npz_gives_its_images_and_labels(labels: Any, compressed: bool) -> None:
    images = noise(3)
    found = read(npz(compressed, images=images, labels=labels), ".npz")
    assert all(np.array_equal(pixels, image) for (_, pixels), image in zip(found, images, strict=True))
    wanted = [x.decode() if isinstance(x, bytes) else x for x in np.asarray(labels).tolist()]
    assert [label for label, _ in found] == wanted
    assert [label for label, _ in read(npz(compressed, images=images, labels=labels), ".npz", first=2)] == wanted[2:]


def test_grey_and_larger_images_of_an_npz_are_fitted() -> None:
    ((_, grey),) = read(npz(images=np.full((1, 16, 20), 77, np.uint8), labels=[0]), ".npz")
    assert grey.shape == (8, 8, 3)
    assert (grey == 77).all()


def test_a_tar_gives_the_images_that_have_labels() -> None:
    images = noise(4)
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    content = tar(
        ("../../up/000.png", png(images[0])),
        ("../../up/000.cls", b"cat\n"),
        ("/absolute/001.cls", b"1"),
        ("/absolute/001.png", png(images[1])),
        ("/absolute/001.json", b"{}"),
        ("002.png", png(images[2])),
        (link, b""),
        ("link.cls", b"0"),
        ("003.png", png(images[3])[:100]),
        ("003.cls", b"0"),
        ("read.me", b"a text"),
    )
    found = read(content, ".tar")
    assert [label for label, _ in found] == ["cat", "1", None, None, "0"]
    assert np.array_equal(found[0][1], images[0])
    assert np.array_equal(found[1][1], images[1])
    assert [pixels.split(":")[0] for _, pixels in found[2:4]] == ["'002' has no label", "'link' has no image"]
    assert "truncated" in found[4][1]
    assert [label for label, _ in read(content, ".tar", first=3)] == [None, "0"]


def claim(shape: tuple[int, ...], content: bytes = b"", descr: str = "'|u1'", name: str = "images.npy") -> bytes:
    """An .npz whose array is said to have another shape than it has."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content
        archive.writestr(name, array)
        other = io.BytesIO()
        np.lib.format.write_array(other, np.zeros(1, np.int64) if name == "images.npy" else noise(1))
        archive.writestr("labels.npy" if name == "images.npy" else "images.npy", other.getvalue())
    return file.getvalue()


def zip_that_claims(length: int) -> bytes:
    content = bytearray(npz(images=noise(1), labels=[0]))
    where = content.index(b"PK\x01\x02")
    content[where + 24 : where + 28] = struct.pack("<I", length)
    return bytes(content)


BAD = {
    "empty": (".npz", b"", "damaged"),
    "text": (".npz", b"a text" * 100, "not a zip"),
    "no labels": (".npz", npz(images=noise(1)), "no array 'labels'"),
    "pickle": (".npz", npz(images=noise(1), labels=np.array([object()])), "array of object"),
    "floats": (".npz", npz(images=noise(1).astype(float), labels=[0]), "array of float64, and not of uint8"),
    "lengths": (".npz", npz(images=noise(2), labels=[0]), "2 images and 1 labels"),
    "none": (".npz", npz(images=noise(0), labels=np.zeros(0, int)), "holds no image"),
    "shape": (".npz", npz(images=np.zeros((2, 8, 8, 4), np.uint8), labels=[0, 1]), r"the shape is \[2, 8, 8, 4\]"),
    "flat": (".npz", npz(images=np.zeros((2, 0, 8, 3), np.uint8), labels=[0, 1]), "the shape is"),
    "fortran": (".npz", npz(images=np.asfortranarray(noise(2)), labels=[0, 1]), "Fortran"),
    "terabytes": (".npz", claim((1, 1_000_000, 1_000_000, 3)), "claims 3,000,000,000,000 bytes, and there are 0"),
    "overflow": (".npz", claim((1, 2**62, 2**62, 3)), "the shape is"),
    "negative": (".npz", claim((-1, 8, 8, 3)), "the shape is"),
    "wide label": (".npz", claim((1,), b"", "'<U500000000'", "labels.npy"), "claims 2,000,000,000 bytes"),
    "structure": (".npz", claim((1,), b"", "[('a', '<i8')]", "labels.npy"), "not of names or numbers"),
    "too many": (".npz", claim((10**6, 1, 1, 3), bytes(3 * 10**6)), "at most 100,000 images"),
    "pixels": (".npz", claim((1, 8000, 8000, 3), bytes(8000 * 8000 * 3)), "more than 50,000,000"),
    "deep": (".npz", claim((1,), b"", "[" * 50, "labels.npy"), "damaged"),
    "false length": (".npz", zip_that_claims(MAX_SHARD_BYTES + 1), "when it is unpacked"),
    "cut": (".npz", npz(images=noise(9), labels=[0] * 9)[:-40], "damaged"),
    "no tar": (".tar", b"a text" * 1000, "damaged"),
    "no images": (".tar", tar(("a.txt", b"x")), "holds no image"),
    "no end": (".tar", tar(("a.png", png(noise(1)[0])), ("a.cls", b"0"))[:2048], "cut short"),
    "cut tar": (".tar", tar(("a.cls", b"0"), ("a.png", bytes(5000)))[:3000], "damaged|cut short"),
}


@pytest.mark.parametrize(("suffix", "content", "reason"), BAD.values(), ids=BAD)
def test_a_bad_shard_is_refused_as_a_whole(suffix: str, content: bytes, reason: str) -> None:
    begun = time.process_time()
    with pytest.raises(OSError, match=reason):
        read(content, suffix)
    assert time.process_time() - begun < 2


def test_an_npz_whose_array_claims_a_header_of_gigabytes_takes_no_memory() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("images.npy", b"x")
        archive.writestr("labels.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", (1 << 31) - 1000) + b" " * 100_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(OSError, match="labels: the header has 2,147,482,648 bytes; 10,000 are the most"):
            read(file.getvalue(), ".npz")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_an_npz_with_a_flipped_bit_gives_no_image() -> None:
    content = bytearray(npz(images=noise(50), labels=[0] * 50))
    content[5000] ^= 1
    with pytest.raises(OSError, match="Bad CRC-32"):
        next(iter(read_shard(io.BytesIO(content), ".npz", 8)))


def test_a_tar_with_a_damaged_header_in_the_middle_gives_no_image() -> None:
    content = bytearray(tar(*[(f"{i}.{end}", data) for i in range(4) for end, data in (("png", b"x"), ("cls", b"0"))]))
    content[4 * 512 + 150] ^= 1
    with pytest.raises(OSError, match="end is missing"):
        next(iter(read_shard(io.BytesIO(content), ".tar", 8)))


def test_a_tar_whose_header_claims_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    path = tmp_path / "x.tar"
    path.write_bytes(header)
    os.truncate(path, (1 << 30) + 4096)
    with path.open("rb") as file, pytest.raises(OSError, match="a header is too large"):
        list(read_shard(file, ".tar", 8))


def pax(content: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A header that says more of the member behind it, or of all that follow."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.GNU_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def test_so_it_is_with_many_headers_that_are_small_each() -> None:
    content = tar(("a.png", png(noise(1)[0])), ("a.cls", b"0"))
    assert len(read(pax(b"40000 comment=".ljust(39_999, b"x") + b"\n") + content, ".tar")) == 1
    headers = pax(b"40000 comment=".ljust(39_999, b"x") + b"\n") * 40
    with pytest.raises(OSError, match="a header is too large"):
        read(headers + content, ".tar")


def test_what_headers_say_of_all_that_follows_is_not_gathered() -> None:
    members = [tar((f"{i}.png", b"x"))[:1024] for i in range(20)]
    content = b"".join(pax(b"11 key%02d=x\n" % i, tarfile.XGLTYPE) + member for i, member in enumerate(members))
    found = list(tar_members(io.BytesIO(content + bytes(1024))))
    assert [member.name for member in found] == [f"{i}.png" for i in range(20)]
    assert max(len(member.pax_headers) for member in found) <= 1


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes of a file, a few of them changed, left out or put in."""
    place = st.integers(0, len(content) - 1)
    edit = st.tuples(place, st.sampled_from(["set", "cut", "put", "end"]), st.binary(min_size=1, max_size=8))

    def apply(edits: list[tuple[int, str, bytes]]) -> bytes:
        result = content
        for at, kind, data in edits:
            rest = at + len(data) if kind == "set" else at + 1 + data[0] if kind == "cut" else at
            result = result[:at] + (b"" if kind in ("cut", "end") else data) + (b"" if kind == "end" else result[rest:])
        return result

    return st.lists(edit, min_size=1, max_size=4).map(apply)


NPZ = npz(images=noise(2, 2), labels=["cat", "dog"])
PACKED = npz(True, images=noise(2, 2), labels=[0, 1])
TAR = tar(("a.png", png(noise(1, 2)[0])), ("a.cls", b"0"), ("b.png", png(noise(1, 2, 1)[0])), ("b.cls", b"1"))


@settings(max_examples=400, deadline=None)
@given(st.one_of(mutated(NPZ), mutated(PACKED)))
def test_any_bytes_are_an_npz_or_an_oserror(content: bytes) -> None:
    try:
        for _, pixels in read(content, ".npz", 4):
            assert pixels.shape == (4, 4, 3)
    except OSError as error:
        assert str(error)


@settings(max_examples=300, deadline=None)
@given(mutated(TAR))
def test_any_bytes_are_a_tar_or_an_oserror(content: bytes) -> None:
    try:
        for _, pixels in read(content, ".tar", 4):
            assert pixels if isinstance(pixels, str) else pixels.shape == (4, 4, 3)
    except OSError as error:
        assert str(error)


@settings(max_examples=300, deadline=None)
@given(st.one_of(mutated(png(noise(1)[0])), mutated(png(noise(1, 8)[0, ..., 0]))))
def test_any_bytes_are_an_image_or_an_oserror(content: bytes) -> None:
    try:
        assert decode_image(io.BytesIO(content), 8).shape == (8, 8, 3)
    except OSError as error:
        assert str(error)


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    (image,) = noise(1, 32)
    assert np.array_equal(decode_image(io.BytesIO(png(image)), 32), image)


def jpeg(scans: int = 0, **options: Any) -> bytes:
    """A progressive JPEG, whose last scan comes so many times more."""
    content = io.BytesIO()
    Image.fromarray(noise(1, 64)[0]).save(content, "JPEG", progressive=True, **options)
    whole = content.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * scans + whole[-2:]


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded() -> None:
    for content in (jpeg(3000), jpeg(95)):
        begun = time.process_time()
        with pytest.raises(OSError, match="it is a JPEG of more than 100 scans"):
            decode_image(io.BytesIO(content), 32)
        assert time.process_time() - begun < 1


def test_what_is_no_scan_of_a_jpeg_does_not_count_as_one() -> None:
    usual = decode_image(io.BytesIO(jpeg()), 32)
    assert decode_image(io.BytesIO(jpeg(50)), 32).shape == (32, 32, 3)
    for content in (jpeg() + b"\xff\xda" * 1000, jpeg(comment=b"\xff\xda" * 1000), jpeg(exif=b"\xff\xda" * 1000)):
        assert np.array_equal(decode_image(io.BytesIO(content), 32), usual)
