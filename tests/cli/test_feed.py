"""The sub-command ``feed``, as its user meets it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.live.feed import announce
from tests.conftest import REPOSITORY, help_of, run_src


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


def feed(*args: str | Path, cwd: Path, status: int = 0) -> str:
    done = run_src("feed", *args, cwd=cwd, status=status)
    assert (done.stdout if status else done.stderr) == ""
    return done.stderr if status else done.stdout


def test_files_and_folders_are_fed_under_their_label(tmp_path: Path) -> None:
    for name in ("one.png", "photos/two.jpg", "photos/deep/three.png", "photos/notes.txt"):
        save(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("a text")
    note = "note: no run has left its classes in dir; is this what its --data.feed names?\n"
    assert feed("dir", "one.png", "photos", "--label", "cat", cwd=tmp_path) == f"fed 3 images to dir/cat\n{note}"
    fed = sorted((tmp_path / "dir/cat").iterdir())
    assert [path.name.split("-")[0] for path in fed] == ["one", "three", "two"]
    assert fed[0].read_bytes() == (tmp_path / "one.png").read_bytes()
    announce(tmp_path / "dir", ["cat", "dog"])
    assert feed("dir", "one.png", "--label=dog", cwd=tmp_path) == "fed 1 image to dir/dog\n"
    assert feed("dir", "one.png", "--label=dok", cwd=tmp_path, status=2) == (
        "error: label: there is no class 'dok'; did you mean dog? There are cat, dog (by dir/.classes.json, of the "
        "newest run fed from there)\n"
    )


def test_labels_are_put_right_by_id_or_name(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    assert feed("dir", "--relabel", "17", "cat", cwd=tmp_path).startswith("asked to relabel 17 as cat (")
    assert feed("dir", "--drop", "cat/1.png", cwd=tmp_path).startswith("asked to drop cat/1.png (")
    lines = [json.loads(path.read_text()) for path in sorted((tmp_path / "dir/.corrections").iterdir())]
    assert [(line["sample"], line["label"]) for line in lines] == [(17, "cat"), ("cat/1.png", None)]


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["gone.png", "--label", "cat"], 1, "there is no file or folder gone.png"),
        (["one.png", "gone.png", "--label", "cat"], 1, "there is no file or folder gone.png"),
        (["pipe.png", "--label", "cat"], 1, "pipe.png is not a file"),
        (["empty", "--label", "cat"], 1, "no image in empty: name image files"),
        (["notes.txt", "--label", "cat"], 2, "notes.txt: .txt is no image's suffix"),
        (["--label", "cat"], 1, "no image given"),
        (["one.png"], 2, "give images and their --label, or --relabel ID CLASS, or --drop ID"),
        (["one.png", "--label", ""], 2, "label: '' cannot be"),
        (["one.png", "--label", "a/b"], 2, "label: 'a/b' cannot be"),
        (["one.png", "--label", ".."], 2, "label: '..' cannot be"),
        (["--label", "cat", "--drop", "1"], 2, "one of the three"),
        (["one.png", "--drop", "1"], 2, "one.png: --drop takes no images"),
        (["--drop", ""], 2, "sample: ''"),
        (["--relabel", "1"], 2, "expected 2 arguments; see python -m src feed --help"),
        (["--drop", "1"], 1, "dir: there is no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_fed(tmp_path: Path, args: list[str], status: int, said: str) -> None:
    save(tmp_path / "one.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("a text")
    os.mkfifo(tmp_path / "pipe.png")
    error = feed("dir", *args, cwd=tmp_path, status=status)
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "dir").exists()


def test_it_starts_at_once_and_loads_no_torch(tmp_path: Path) -> None:
    save(tmp_path / "one.png")
    heavy = {"torch", "lightning", "yaml", "jsonargparse", "rich", "watchfiles"}
    code = (
        "import sys, src.feed; status = src.feed.main(['dir', 'one.png', '--label', 'cat'])\n"
        f"sys.exit(status or bool({heavy} & {{*sys.modules}}))"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=env, capture_output=True)
    assert time.monotonic() - begun < 5
    assert len(list((tmp_path / "dir/cat").iterdir())) == 1


def test_its_help_names_what_it_does() -> None:
    said = help_of("feed")
    for word in ("--label CLASS", "--relabel ID CLASS", "--drop ID", "IMAGE"):
        assert word in said
