"""The producers' side of a feed: what is offered appears whole, under a name of its own."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.errors import Failure, UsageError
from src.live.feed import CLASSES, announce, announced, correct, offer, offer_shard


def noise(seed: int = 0, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_files_are_copied_as_they_are_and_pixels_become_png(tmp_path: Path) -> None:
    Image.fromarray(noise()).save(tmp_path / "photo.JPG")
    first, second = offer(tmp_path / "feed", [tmp_path / "photo.JPG", noise(1)], "cat")
    assert first.startswith("cat/photo-")
    assert first.endswith(".JPG")
    assert (tmp_path / "feed" / first).read_bytes() == (tmp_path / "photo.JPG").read_bytes()
    with Image.open(tmp_path / "feed" / second) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), noise(1))
    assert sorted(p.name for p in (tmp_path / "feed/cat").iterdir()) == sorted(Path(n).name for n in (first, second))


def test_the_same_file_offered_twice_does_not_take_the_place_of_the_first(tmp_path: Path) -> None:
    Image.fromarray(noise()).save(tmp_path / "a.png")
    names = offer(tmp_path / "feed", [tmp_path / "a.png"] * 3, "cat")
    assert len(set(names)) == len(list((tmp_path / "feed/cat").iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("Screenshot at 9.41.00\u202fAM.png", "cat/Screenshot at 9.41.00_AM-"),  # as macOS calls them
        (os.fsdecode(b"caf\xe9.png"), "cat/caf_-"),
        ("\u7167" * 80 + ".png", "cat/" + "\u7167" * 33 + "-"),
        ("x" * 250 + ".png", "cat/" + "x" * 100 + "-"),
    ],
)
def test_a_file_of_any_name_gets_one_that_a_run_takes(tmp_path: Path, name: str, begin: str) -> None:
    Image.fromarray(noise()).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / name)
    (found,) = offer(tmp_path / "feed", [tmp_path / name], "cat")
    assert found.startswith(begin)
    assert found.isprintable()
    assert (tmp_path / "feed" / found).read_bytes() == (tmp_path / name).read_bytes()


def test_who_looks_never_sees_half_a_file(tmp_path: Path) -> None:
    large = noise(0, 300)
    ending = threading.Event()
    seen: set[Path] = set()

    def look() -> None:
        while not ending.is_set():
            for path in set((tmp_path / "feed/cat").glob("[!.]*")) - seen:
                with Image.open(path) as image:
                    image.load()
                seen.add(path)

    (tmp_path / "feed/cat").mkdir(parents=True)
    thread = threading.Thread(target=look)
    thread.start()
    try:
        offer(tmp_path / "feed", [large] * 5, "cat")
    finally:
        ending.set()
        thread.join()
    assert not list((tmp_path / "feed/cat").glob(".*"))


@pytest.mark.parametrize("label", ["", ".hidden", "..", "a/b", "a\nb", "x" * 300])
def test_a_label_that_is_no_folder_is_refused(tmp_path: Path, label: str) -> None:
    with pytest.raises(UsageError, match=r"^label: .* cannot be the name"):
        offer(tmp_path, [noise()], label)
    assert not list(tmp_path.iterdir())


def test_a_label_that_the_newest_run_has_no_class_for_is_refused_and_nothing_is_fed(tmp_path: Path) -> None:
    folder = tmp_path / "feed"
    announce(folder, ["owl", "kat"])
    announce(folder, ["cat", "dog"])
    there, where = "^label: there is no class", rf" \(by .*feed/{CLASSES}, of the newest run fed from there\)$"
    for feed_it in (lambda label: offer(folder, [noise()], label), lambda label: correct(folder, 3, label)):
        with pytest.raises(UsageError, match=rf"{there} 'kat'; did you mean cat\? There are cat, dog{where}"):
            feed_it("kat")
        with pytest.raises(UsageError, match=rf"{there} 'owl'; there are cat, dog{where}"):
            feed_it("owl")
        with pytest.raises(UsageError, match=rf"{there} 2: they are 0 to 1{where}"):
            feed_it("2")
    assert [path.name for path in folder.iterdir()] == [CLASSES]
    assert offer(folder, [noise()], "cat")[0].startswith("cat/")
    assert offer(folder, [noise()], "1")[0].startswith("1/"), "a number, as a run takes it"
    assert correct(folder, 3, None)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"[1]", b'["cat", null]', b"[" * 100_000, b'["\xff"]', None])
def test_a_file_of_classes_that_a_stranger_has_written_says_nothing(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / CLASSES
    if content is None:
        (tmp_path / "names").write_text('["cat"]')
        path.symlink_to("names")
    else:
        path.write_bytes(content)
    assert announced(tmp_path) is None
    assert offer(tmp_path, [noise()], "owl")


def test_a_file_of_classes_without_an_end_is_not_read(tmp_path: Path) -> None:
    (tmp_path / CLASSES).write_bytes(b'["' + b"x" * (1 << 20) + b'"]')
    assert announced(tmp_path) is None
    (tmp_path / CLASSES).unlink()
    os.mkfifo(tmp_path / CLASSES)
    assert announced(tmp_path) is None


def test_a_file_that_is_not_there_is_named_before_any_is_copied(tmp_path: Path) -> None:
    Image.fromarray(noise()).save(tmp_path / "a.png")
    with pytest.raises(Failure, match=r"there is no file or folder .*gone\.png"):
        offer(tmp_path / "feed", [tmp_path / "a.png", tmp_path / "gone.png"], "cat")
    with pytest.raises(Failure, match="is not a file"):
        offer(tmp_path / "feed", [tmp_path / "a.png", tmp_path], "cat")
    with pytest.raises(UsageError, match=r"images: float64 \[2, 2\] is not uint8"):
        offer(tmp_path / "feed", [np.zeros((2, 2))], "cat")
    assert not (tmp_path / "feed").exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "feed").write_text("a file")
    with pytest.raises(Failure, match="it cannot be put there"):
        offer(tmp_path / "feed", [noise()], "cat")
    with pytest.raises(Failure, match="there is no such folder"):
        correct(tmp_path / "feed", 3, "cat")


def test_a_shard_holds_images_and_labels_and_replaces_none(tmp_path: Path) -> None:
    images = np.stack([noise(i) for i in range(3)])
    assert offer_shard(tmp_path, images, ["cat", "dog", "cat"], "mine") == "mine.npz"
    with np.load(tmp_path / "mine.npz", allow_pickle=False) as found:
        assert np.array_equal(found["images"], images)
        assert found["labels"].tolist() == ["cat", "dog", "cat"]
    with pytest.raises(Failure, match="is there already"):
        offer_shard(tmp_path, images, [0, 1, 2], "mine")
    assert offer_shard(tmp_path, images, [0, 1, 2]) != offer_shard(tmp_path, images, np.arange(3))
    with pytest.raises(UsageError, match="labels: int64"):
        offer_shard(tmp_path, images, [0, 1])
    with pytest.raises(UsageError, match=r"name: .* cannot be"):
        offer_shard(tmp_path, images, [0, 1, 2], "../up")
    assert not list(tmp_path.glob(".*"))


def test_a_correction_is_a_file_that_says_who_wants_what(tmp_path: Path) -> None:
    ids = [correct(tmp_path, 17, "cat"), correct(tmp_path, "cat/a.png", None)]
    written = [json.loads(path.read_text()) for path in sorted((tmp_path / ".corrections").iterdir())]
    assert [line.pop("id") for line in written] == ids
    assert all("@" in line.pop("actor") for line in written)
    assert written == [{"sample": 17, "label": "cat"}, {"sample": "cat/a.png", "label": None}]
    for sample in ("", -1):
        with pytest.raises(UsageError, match="sample: "):
            correct(tmp_path, sample, None)
