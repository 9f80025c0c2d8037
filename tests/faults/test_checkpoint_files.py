"""Checkpoints meet kills, damage, full disks and strangers: a whole one is always there, and nothing else is read."""

import contextlib
import copy
import enum
import errno
import json
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src import checkpoint_io
from src.checkpoint_io import VerifiedCheckpointIO, commit, fix, manifest, pack, read, serialize
from src.cli import main
from src.errors import Failure
from src.live.files import write_whole
from src.watch import main as watch
from tests.faults.breakers import SMALL, Child, refused

FIT = [argument for argument in SMALL if "Weak" not in argument]  # with the CNN, whose class a checkpoint may name
OLD, NEW = 7, 8
END = 250  # the manifest and what is before it


def tiny(step: int, size: int = 30) -> dict[str, Any]:
    weights = {"weight": torch.full((size,), float(step)), "count": torch.tensor(step)}
    made = {"pytorch-lightning_version": "2.6.6", "loops": {}, "epoch": 1, "global_step": step}
    return {"state_dict": weights, "config": "model: {}", **made}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a fit: ``last.ckpt`` of step 8, ``best.ckpt`` of step 4 or 8."""
    folder = tmp_path_factory.mktemp("trained")
    assert Child(main, ["fit", *FIT], cwd=folder).wait().status == 0
    return folder / "lightning_logs/version_0/checkpoints"


def checkpoints(trained: Path, folder: Path) -> Path:
    """Copy the run of `trained` to a folder; return where its checkpoints are."""
    copied = folder / "lightning_logs/version_0/checkpoints"
    copied.mkdir(parents=True)
    for path in trained.glob("*.ckpt"):
        (copied / path.name).write_bytes(path.read_bytes())
    (copied.parent / "config.yaml").write_bytes((trained.parent / "config.yaml").read_bytes())
    return copied


def replace_and_die(path: Path, stage: str) -> None:
    """Write the new checkpoint over the old one, and be killed at a stage of it."""
    content = serialize(tiny(NEW, size=100_000), path)
    done: list[str] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if " ".join(done) == stage:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, call)

    if stage.startswith("write"):  # the kernel kills whoever writes beyond the limit; Python has asked it not to
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) * int(stage.split()[1]) // 100, resource.RLIM_INFINITY))
    watch("fsync")
    watch("replace")
    commit(content, path)


@pytest.mark.parametrize(
    ("stage", "kept", "share"),
    [
        ("write 0 %", OLD, 0.0),
        ("write 50 %", OLD, 0.5),
        ("fsync", OLD, 1.0),
        ("fsync replace", OLD, 1.0),
        ("fsync replace fsync", NEW, None),
    ],
)
def test_whenever_a_process_is_killed_a_whole_checkpoint_is_there(
    tmp_path: Path, stage: str, kept: int, share: float | None
) -> None:
    path, partial = tmp_path / "run/last.ckpt", tmp_path / "run/.last.ckpt.partial"
    commit(serialize(tiny(OLD, size=100_000), path), path)
    done = Child(replace_and_die, path, stage, cwd=tmp_path).wait()
    assert done.status == -(signal.SIGXFSZ if stage.startswith("write") else signal.SIGKILL), done
    size = len(serialize(tiny(NEW, size=100_000), path))
    assert (partial.stat().st_size if partial.exists() else None) == (None if share is None else int(share * size))
    found = read(path)
    assert found["global_step"] == kept
    assert found["state_dict"]["weight"].tolist() == [float(kept)] * 100_000
    commit(serialize(tiny(9), path), path)
    assert read(path)["global_step"] == 9
    assert list(path.parent.iterdir()) == [path], "something was left behind"


@pytest.mark.parametrize("folder", ["/dev/shm", "nowhere"])
def test_the_folder_for_temporary_files_has_no_influence(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if folder == "nowhere":
        folder = str(tmp_path / folder)
    elif not Path(folder).is_dir() or os.stat(folder).st_dev == tmp_path.stat().st_dev:  # noqa: PTH116
        pytest.skip(f"{folder} is not another file system")
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(tempfile, "tempdir", None)
    for step in (OLD, NEW):
        commit(serialize(tiny(step), tmp_path / "last.ckpt"), tmp_path / "last.ckpt")
    assert read(tmp_path / "last.ckpt")["global_step"] == NEW
    run = tmp_path / "run"
    run.mkdir()
    assert Child(main, ["fit", *FIT, "--trainer.max_steps=2"], cwd=run, TMPDIR=folder).wait().status == 0
    assert read(run / "lightning_logs/version_0/checkpoints/last.ckpt")["global_step"] == 2


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, bytes]:
    """A checkpoint, and beside it another one, which is whole."""
    path = tmp_path / "last.ckpt"
    for step, name in ((OLD, "best.ckpt"), (NEW, "last.ckpt")):
        commit(serialize(tiny(step), tmp_path / name), tmp_path / name)
    return path, path.read_bytes()


def assert_refused(path: Path) -> str:
    with pytest.raises(Failure) as failure:
        read(path)
    line = str(failure.value)
    assert line.startswith(f"{path} ")
    assert line.endswith(f"the newest whole one beside it is of step {OLD}: --ckpt_path {path.with_name('best.ckpt')}")
    return line


def test_a_checkpoint_cut_short_at_any_length_is_refused(pair: tuple[Path, bytes]) -> None:
    path, whole = pair
    for length in [*range(0, len(whole), 9), *range(len(whole) - END, len(whole))]:
        path.write_bytes(whole[:length])
        assert "is damaged or cut short" in assert_refused(path)
    path.write_bytes(whole)
    assert read(path)["global_step"] == NEW


def test_a_checkpoint_with_any_byte_altered_is_refused(pair: tuple[Path, bytes]) -> None:
    path, whole = pair
    for place in [*range(0, len(whole), 3), *range(len(whole) - END, len(whole))]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert_refused(path)
    for altered in (whole + b"\0", b"\0" + whole, whole + whole):
        path.write_bytes(altered)
        assert_refused(path)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_in(find: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        place = find(content)
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]

    return flip


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": cut,
    "a bit of a tensor": flip_in(lambda content: len(content) // 2),
    "a bit of the directory": flip_in(lambda content: content.rindex(b"PK\x01\x02") + 20),
    "a bit of the manifest": flip_in(lambda content: content.rindex(b'"step"') + 8),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_damaged_checkpoint_is_refused_and_the_whole_one_is_offered_not_taken(
    trained: Path, tmp_path: Path, damage: str, command: str
) -> None:
    folder = checkpoints(trained, tmp_path)
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    last.write_bytes(DAMAGES[damage](last.read_bytes()))
    before = sorted(tmp_path.rglob("*"))
    # Its newest file is what `last` means, whatever state it is in.
    done = Child(main, [command, "--ckpt_path", "last" if command == "fit" else str(last)], cwd=tmp_path).wait()
    line = refused(done)
    assert "last.ckpt is damaged" in line
    assert f"is of step {manifest(best).step}: --ckpt_path" in line
    assert (tmp_path / line.split("--ckpt_path ")[1]).samefile(best)
    assert done.out == "", "it began"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for one and a half checkpoints of the CNN."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=11m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_the_fit_and_leaves_the_checkpoint_that_was_there(small_disk: Path) -> None:
    done = Child(main, ["fit", *FIT, "--data.val_size=0", "--checkpoint.every_n_steps=2"], cwd=small_disk).wait()
    line = refused(done)
    last = small_disk / "lightning_logs/version_0/checkpoints/last.ckpt"
    assert "last.ckpt could not be written (No space left on device); the one of step 2 is still there" in line
    assert read(last)["global_step"] == 2
    assert list(last.parent.iterdir()) == [last]
    resumed = ["fit", f"--ckpt_path={last}", "--trainer.default_root_dir=.", "--trainer.max_epochs=1"]
    assert Child(main, resumed, cwd=small_disk.parent).wait().status == 0


class Filler(pl.Callback):
    """Fills the disk after a number of steps, to the last byte."""

    between_chunks = False

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            io = trainer.strategy.checkpoint_io
            assert isinstance(io, VerifiedCheckpointIO)
            io.wait()  # the checkpoint of this step is on its way to the disk
            with Path("filled").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                while file.write(b"\0" * 4096) == 4096:
                    pass
                file.write(b"\0")


def test_a_disk_on_which_nothing_can_be_written_any_more_ends_the_fit_in_one_line(small_disk: Path) -> None:
    filler = "{class_path: tests.faults.test_checkpoint_files.Filler, init_args: {step: 6}}"
    done = Child(
        main,
        ["fit", *FIT, "--data.val_size=0", "--checkpoint.every_n_steps=6", "--trainer.callbacks+", filler],
        cwd=small_disk,
    ).wait()
    assert "No space left on device" in refused(done)
    assert (small_disk / "filled").exists()
    assert read(small_disk / "lightning_logs/version_0/checkpoints/last.ckpt")["global_step"] == 6


def fill(disk: Path, left: int) -> None:
    """Leave so many pages of room."""
    room = os.statvfs(disk)
    (disk / "filled").write_bytes(b"\0" * (room.f_bavail - left) * room.f_frsize)


@pytest.mark.parametrize(("left", "what"), [(0, ": the curves"), (1, "/config.yaml")], ids=["curves", "config"])
def test_a_run_that_cannot_begin_as_the_disk_is_full_leaves_nothing_there(
    small_disk: Path, left: int, what: str
) -> None:
    fill(small_disk, left)
    line = refused(Child(main, ["fit", *FIT], cwd=small_disk).wait())
    assert line == f"lightning_logs/version_0{what} could not be written (No space left on device)"
    assert sorted(path.name for path in small_disk.rglob("*")) == ["filled", "lightning_logs"]


@pytest.mark.parametrize(
    ("left", "what"),
    [(0, ": the curves could not be written"), (1, "/live/journal.jsonl could not be written or read")],
    ids=["curves", "journal"],
)
def test_a_run_that_cannot_go_on_as_the_disk_is_full_says_so_in_one_line(
    small_disk: Path, left: int, what: str
) -> None:
    assert Child(main, ["fit", *FIT, "--data.val_size=0", "--trainer.max_epochs=1"], cwd=small_disk).wait().status == 0
    run = small_disk / "lightning_logs/version_0"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    fill(small_disk, left)
    resume = ["fit", f"--config={run}/config.yaml", "--ckpt_path=last", "--trainer.max_epochs=2"]
    line = refused(Child(main, resume, cwd=small_disk).wait())
    assert line == f"lightning_logs/version_0{what} (No space left on device)"
    assert {path: path.read_bytes() for path in before} == before


def test_what_is_written_as_a_whole_is_named_if_there_is_no_room_for_it(small_disk: Path) -> None:
    fill(small_disk, 0)
    with pytest.raises(OSError, match="No space left") as failed:
        write_whole(small_disk / "weights.json", b"{}")
    assert failed.value.filename == str(small_disk / "weights.json")


def fit_with_small_files(arguments: list[str], limit: int) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return main(arguments)


def test_a_file_that_may_not_be_so_large_ends_the_fit_in_one_line(tmp_path: Path) -> None:
    arguments = ["fit", *FIT, "--publish_every_n_steps=null"]  # else these files may be too large as well
    done = Child(fit_with_small_files, arguments, 3_000_000, cwd=tmp_path).wait()
    assert ".ckpt could not be written (File too large)" in refused(done)
    assert list((tmp_path / "lightning_logs/version_0/checkpoints").iterdir()) == []


@pytest.mark.parametrize("every", [1, 10])  # told in the course of 8 steps, or at their end
def test_weights_that_cannot_be_published_are_told_of_once_and_training_is_not_affected(
    tmp_path: Path, every: int
) -> None:
    arguments = ["fit", *FIT, "--trainer.enable_checkpointing=false", f"--publish_every_n_steps={every}"]
    done = Child(fit_with_small_files, arguments, 1_000_000, cwd=tmp_path).wait()
    assert done.status == 0, done
    (line,) = done.err.splitlines()
    assert line.startswith("warning: the weights are not published any more: ")
    assert line.endswith("cannot be written to (File too large); training is not affected")


def test_a_checkpoint_of_another_format_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "future.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_io, "FORMAT", 99)
        commit(serialize(tiny(OLD), path), path)
    line = f"{path} has format 99; this version of the project reads format {checkpoint_io.FORMAT}"
    assert refused(Child(main, ["test", f"--ckpt_path={path}"], cwd=tmp_path).wait()) == line


class Gadget:
    """What makes an unpickler that trusts its input make a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:  # noqa: D105
        return os.mkdir, ("marker",)


class Pair(NamedTuple):
    """A tuple of a class of its own."""

    left: int
    right: int


class Colour(enum.Enum):
    """Something that is not plain."""

    RED = 1


class Odd(Tensor):
    """A tensor of a class that a plain unpickler does not know."""


def hostile(trained: Path, path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a checkpoint with some keys changed, and a manifest that is right."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_io, "leaves", lambda *_: iter(()))  # an attacker's version would not look
        patch.setattr(checkpoint_io, "_copied", lambda value, _: value)
        commit(serialize(read(trained / "last.ckpt") | change, path), path)


def refused_without_running(folder: Path, command: str = "test", name: str = "bad.ckpt") -> str:
    """Run a command on a hostile checkpoint; return the line with which it was refused."""
    (folder / "evil.py").write_text(
        "open('marker', 'w').close()\n"
        "from src.networks import CNN\n"
        "def function(*args, **kwargs): return 1.0\n"
        "class Net(CNN): pass\n"
    )
    done = Child(main, [command, "--ckpt_path", name], cwd=folder).wait()
    assert not (folder / "marker").exists(), f"code from the checkpoint was run: {done}"
    line = refused(done)
    assert name in line
    assert line.isprintable()
    assert done.out == "", "it began"
    return line


@pytest.mark.parametrize("place", ["config", "state_dict", "extra"])
def test_a_pickle_that_would_run_code_runs_none(
    trained: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(trained, tmp_path / "bad.ckpt", {place: Gadget()}, monkeypatch)
    monkeypatch.chdir(tmp_path)
    torch.load("bad.ckpt", weights_only=False)
    Path("marker").rmdir()  # it is loaded: an unpickler that trusts it runs it
    assert "nothing in it was run" in refused_without_running(tmp_path)


@pytest.mark.parametrize("key", ["_class_path", "_instantiator"])
@pytest.mark.parametrize("place", ["hyper_parameters", "datamodule_hyper_parameters"])
def test_hyper_parameters_that_name_what_to_import_are_refused(
    trained: Path, tmp_path: Path, place: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(trained, tmp_path / "bad.ckpt", {place: {key: "evil.function"}}, monkeypatch)
    assert "asks for evil.function" in refused_without_running(tmp_path)


CONFIGS: dict[str, Any] = {
    "network": {"model": {"network": "evil.Net"}},
    "network's class": {"model": {"network": {"class_path": "evil.Net"}}},
    "network in another alphabet": {"model": {"network": {"class_path": "évil.Net"}}},
    "optimizer": {"model": {"optimizer": "evil.function"}},
    "schedule's function": {
        "model": {
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.LambdaLR",
                "init_args": {"lr_lambda": "evil.function"},
            }
        }
    },
    "callback": {"trainer": {"callbacks": [{"class_path": "evil.Net"}]}},
    "callback, bare": {"trainer": {"callbacks": "evil.Net"}},
    "callbacks in a set": {"trainer": {"callbacks": {"evil.Net", "evil.function"}}},
    "callback's function": {
        "trainer": {
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                    "init_args": {"setup": "evil.function"},
                }
            ]
        }
    },
    "callback's other arguments": {
        "trainer": {
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.EMAWeightAveraging",
                    "dict_kwargs": {"multi_avg_fn": "evil.function"},
                }
            ]
        }
    },
    "logger": {"trainer": {"logger": "evil.Net"}},
    "strategy": {"trainer": {"strategy": "evil.Net"}},
    "plugin": {"trainer": {"plugins": ["evil.Net"]}},
    "profiler": {"trainer": {"profiler": "evil.Net"}},
    "data": {"data": "evil.Net"},
    "augmentation": {"data": {"init_args": {"augment": ["evil.Net"]}}},
    "mixing": {"data": {"init_args": {"mix": {"class_path": "evil.Net"}}}},
    "selection": {"model": {"selection": "evil.Net"}},
    "selection's network": {
        "model": {"selection": {"class_path": "src.selection.Selection", "init_args": {"network": "evil.Net"}}}
    },
    "a file for the selection": {"model": {"selection": "network"}},
    "a file for the network": {"model": {"network": "network"}},
    "a file for the data": {"data": "network"},
    "the address of a file": {"model": {"network": "file:///tmp/network"}},
    "a file in the home folder": {"model": {"network": "~/network"}},
    "a config in a text": {"model": {"network": "{class_path: evil.Net}"}},
    "somebody else's class by way of ours": {"model": {"network": {"class_path": "src.cli.os.system"}}},
    "a name that would set the terminal's title": {"model": {"network": {"class_path": "\x1b]0;x\aevil.Net"}}},
    "a class for one of some words": {"model": {"tta": "evil.Net"}},
    "a class for a word of a class": {"model": {"network": {"init_args": {"norm": "evil.Net"}}}},
    "a class for a number": {"model": {"label_smoothing": "evil.Net"}},
}


def merged(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    config = dict(config)
    for key, value in change.items():
        old = config.get(key)
        config[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return config


@pytest.mark.parametrize("what", CONFIGS)
def test_a_stored_config_that_names_strangers_is_refused(
    trained: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load(read(trained / "last.ckpt")["config"])
    (tmp_path / "network").write_text("{class_path: evil.Net}")
    (tmp_path / "évil.py").write_text("open('marker', 'w').close()\nfrom src.networks import CNN as Net")
    text = yaml.safe_dump(merged(config, CONFIGS[what]), allow_unicode=True)
    hostile(trained, tmp_path / "bad.ckpt", {"config": text}, monkeypatch)
    assert "bad.ckpt asks for " in refused_without_running(tmp_path, "fit")


def test_texts_and_words_of_a_stored_config_may_read_like_classes_configs_or_files(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load(read(trained / "last.ckpt")["config"])
    for name in ("none", "batch", "one", "max", "32-true"):
        (tmp_path / name).write_text("{class_path: evil.Net}")
    callback = {"class_path": f"{pl.__name__}.callbacks.ModelCheckpoint", "init_args": {"filename": "{epoch:02d}"}}
    logger = {"class_path": f"{pl.__name__}.loggers.CSVLogger", "init_args": {"save_dir": "x.d", "name": "exp.v2"}}
    change = {
        "data": {"init_args": {"feed": "incoming.d"}},
        "checkpoint": {"mode": "max"},
        "trainer": {"callbacks": [callback], "logger": logger},
    }
    text = yaml.safe_dump(merged(config, change))
    hostile(trained, tmp_path / "last.ckpt", {"config": text}, monkeypatch)
    for command in ("fit", "test"):
        done = Child(main, [command, "--ckpt_path", "last.ckpt"], cwd=tmp_path).wait()
        assert done.status == 0, done
    assert (tmp_path / "x.d/exp.v2").is_dir()


@pytest.mark.parametrize("way", ["dirpath", "filename", "save_dir", "default_root_dir"])
def test_a_checkpoint_does_not_make_a_fit_write_elsewhere(
    trained: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load(read(trained / "last.ckpt")["config"])
    victim, here = tmp_path / "victim", tmp_path / "here"
    for folder in (victim, here):
        folder.mkdir()
    place = "../../../../victim/file" if way == "filename" else str(victim)
    keeper = {"class_path": f"{pl.__name__}.callbacks.ModelCheckpoint", "init_args": {way: place}}
    logger = {"class_path": f"{pl.__name__}.loggers.CSVLogger", "init_args": {"save_dir": place}}
    ways: dict[str, Any] = {"save_dir": {"logger": logger}, "default_root_dir": {"default_root_dir": place}}
    change = {"trainer": ways.get(way, {"callbacks": [keeper]})}
    hostile(trained, here / "last.ckpt", {"config": yaml.safe_dump(merged(config, change))}, monkeypatch)
    done = Child(main, ["fit", "--ckpt_path", "last.ckpt"], cwd=here).wait()
    assert f"last.ckpt would have the fit write to {place}, by trainer." in refused(done)
    (here / "data.yaml").write_text(f"data: {{init_args: {{feed: {place}/deeper}}}}")  # which names another place
    done = Child(main, ["fit", "--config=data.yaml", "--ckpt_path", "last.ckpt"], cwd=here).wait()
    assert f"last.ckpt would have the fit write to {place}, by trainer." in refused(done)
    assert not list(victim.iterdir())
    assert Child(main, ["test", "--ckpt_path", "last.ckpt"], cwd=here).wait().status == 0
    (here / "own.yaml").write_text(yaml.safe_dump(change))
    more = ["--config=own.yaml", "--trainer.max_epochs=3"]
    assert Child(main, ["fit", *more, "--ckpt_path", "last.ckpt"], cwd=here).wait().status == 0
    assert list(victim.iterdir())


def test_a_run_that_writes_to_other_places_says_how_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    there = tmp_path / "there"
    logger = f"--trainer.logger={{class_path: CSVLogger, init_args: {{save_dir: {there}}}}}"
    for options, needed in (([logger], True), ([f"--trainer.default_root_dir={there}"], False)):
        done = Child(main, ["fit", *FIT, *options], cwd=tmp_path / "here").wait()
        command = re.findall(r"^test: +python -m src test (.*)$", done.out, re.MULTILINE)[0].split()
        assert ("--config" in command) == needed
        done = Child(main, ["fit", *command, "--trainer.max_epochs=3"], cwd=tmp_path / "here").wait()
        assert (done.status, done.err) == (0, "")


def test_the_name_of_a_checkpoint_does_not_make_a_class_trusted(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load(read(trained / "last.ckpt")["config"])
    text = yaml.safe_dump(merged(config, {"model": {"network": {"class_path": "evil.Net"}}}))
    hostile(trained, tmp_path / "evil.Net", {"config": text}, monkeypatch)
    assert "asks for evil.Net" in refused_without_running(tmp_path, name="evil.Net")


def test_a_class_of_the_users_own_is_trusted_once_the_user_names_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load(read(trained / "last.ckpt")["config"])
    text = yaml.safe_dump(merged(config, {"model": {"network": {"class_path": "own.Net"}}}))
    hostile(trained, tmp_path / "own.ckpt", {"config": text}, monkeypatch)
    (tmp_path / "own.py").write_text("from src.networks import CNN\nclass Net(CNN): pass")
    named = ["test", "--ckpt_path=own.ckpt", "--model.network=own.Net"]
    assert Child(main, named, cwd=tmp_path).wait().status == 0


def test_what_the_config_of_a_run_names_is_imported_once_the_user_names_it(tmp_path: Path) -> None:
    run = tmp_path / "lightning_logs/evil_run"
    (run / "live").mkdir(parents=True)
    (run / "own.py").write_text("open(__file__ + '.run', 'w').close()\nfrom src.networks import CNN as Net")
    name = "lightning_logs.evil_run.own.Net"
    (run / "config.yaml").write_text(
        yaml.safe_dump({"model": {"network": {"class_path": name}}, "data": {"class_path": "src.data.Shapes10"}})
    )
    shown = run.relative_to(tmp_path)
    for function, words in ((watch, [str(shown)]), (main, ["validate", f"--live={shown}"])):
        line = refused(Child(function, words, cwd=tmp_path).wait())
        assert line.startswith(f"{shown}/config.yaml asks for {name} as model.network.class_path, which is not a class")
        assert not (run / "own.py.run").exists()
        named = Child(function, [*words, f"--config={shown}/config.yaml"], cwd=tmp_path).wait()
        assert "publishes no weights" in refused(named)
        (run / "own.py.run").unlink()


LAUGHS = "\n".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 12))
NEST = f"b0: &b0 [1]\n{LAUGHS}\n"
endless: list[Any] = ["src.networks.CNN"]
for _ in range(60):
    endless = [endless, endless]
CONTENTS: dict[str, dict[str, Any]] = {
    "no weights": {"state_dict": None},
    "weights that are none": {"state_dict": {"network.head.weight": "text"}},
    "hyper-parameters that are none": {"hyper_parameters": "text"},
    "a name of a class that has no end": {"hyper_parameters": {"_class_path": endless}},
    "a key that is a number": {"config": "5: text"},
    "a config that is none": {"config": "text"},
    "a config that is not YAML": {"config": "{"},
    "a config with itself inside": {"config": "trainer: &a\n  callbacks: *a\n"},
    "a text that refers to itself a milliard times": {
        "config": f"data: {{class_path: src.data.Shapes10, init_args: {{feed: {json.dumps(NEST)}}}}}"
    },
    "a config that refers to itself a milliard times": {"config": NEST},
    "a config with a trainer that is none": {"config": "trainer: 5"},
    "a version that is none": {"pytorch-lightning_version": "text"},
    "a version long past": {"pytorch-lightning_version": "0.0.1"},
    "loops that are none": {"loops": {"fit_loop": 3}},
    "callbacks that are none": {"callbacks": [1]},
    "optimizers that are none": {"optimizer_states": 7},
    "no data": {"data": {}},
}


@pytest.mark.parametrize(
    ("command", "what"), [*(("fit", what) for what in CONTENTS), *(("test", what) for what in list(CONTENTS)[:8])]
)
def test_strange_content_is_refused_in_one_line_or_has_no_influence(
    trained: Path, tmp_path: Path, command: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(trained, tmp_path / "bad.ckpt", CONTENTS[what], monkeypatch)
    done = Child(main, [command, "--ckpt_path", "bad.ckpt"], cwd=tmp_path).wait(30)
    assert done.status in (0, 1, 2), done
    if done.status:
        assert "ckpt" in refused(done, done.status)


def test_equal_checkpoints_are_equal_files_and_need_no_file_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    packed = pack(fix(tiny(OLD), path), path)
    assert isinstance(packed, mmap.mmap) == (sys.platform == "linux"), "torch writes it without Python's lock"
    first = bytes(memoryview(packed))
    with path.open("w"):  # another number would be free now
        assert serialize(tiny(OLD), path) == first
    monkeypatch.setattr(sys, "platform", "another")
    commit(serialize(tiny(OLD), path), path)
    assert read(path)["global_step"] == OLD


def test_a_compressed_checkpoint_is_refused_before_it_grows(tmp_path: Path) -> None:
    path, packed = tmp_path / "bad.ckpt", tmp_path / "packed"
    torch.save(tiny(OLD, size=3_000_000), packed)
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member), zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    assert len(content) < packed.stat().st_size / 100

    def save(_: Any, target: Any) -> None:
        Path(target).write_bytes(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        commit(serialize(tiny(OLD), path), path)
    assert "torch does not compress" in refused_without_running(tmp_path)


@pytest.mark.parametrize("url", ["https://example.org/x.ckpt", "s3://bucket/x.ckpt", "file:///x.ckpt"])
def test_a_url_is_not_a_checkpoint(url: str, tmp_path: Path) -> None:
    done = Child(main, ["test", "--ckpt_path", url], cwd=tmp_path).wait()
    assert f"{url} is a URL; download it first" in refused(done, 2)


class Keeper(pl.Callback):
    """Has something to keep that is not plain."""

    between_chunks = False

    def state_dict(self) -> dict[str, Any]:
        return {"plain": 1, "things": [0, {"path": Path("a")}]}


def test_a_callback_whose_state_is_not_plain_is_refused_by_its_key_when_it_is_saved(tmp_path: Path) -> None:
    keeper = "--trainer.callbacks+=tests.faults.test_checkpoint_files.Keeper"
    line = refused(Child(main, ["fit", *FIT, keeper], cwd=tmp_path).wait())
    assert all(name in line for name in ("best.ckpt cannot keep", "Keeper", "things", "path", "PosixPath")), line
    assert list((tmp_path / "lightning_logs/version_0").rglob("*ckpt*")) == []


@pytest.mark.parametrize(
    "value",
    [
        Pair(1, 2),
        defaultdict(list),
        OrderedDict(a=1),
        {1, 2},
        {Colour.RED: 1},
        {Pair(1, 2): 1},
        Colour.RED,
        1j,
        b"",
        b"bytes",
        torch.ones(2).numpy(),
        torch.ones(2).numpy()[0],
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2).as_subclass(Odd),
        torch.ones(2).requires_grad_() * 2,
        "\ud800",
    ],
    ids=lambda value: f"{type(value).__name__} {value!r:.40}",
)
def test_what_could_not_be_read_again_is_refused_when_it_is_saved(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "last.ckpt"
    try:
        content = serialize(tiny(OLD) | {"callbacks": {"key": value}}, path)
    except Failure as failure:
        assert "cannot keep callbacks" in str(failure)
        assert "key" in str(failure)
        return
    commit(content, path)
    found = read(path)["callbacks"]["key"]
    assert torch.equal(found, value) if isinstance(value, Tensor) else found == value


def tensors(numbers: list[int], dtype: torch.dtype, shape: int) -> Tensor:
    tensor = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    if shape == 1 and len(numbers) == 4:
        return tensor.view(2, 2).t()
    return tensor[::2] if shape == 2 else tensor


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([torch.Size([]), torch.Size([3, 0]), torch.float32, torch.bool, torch.device("cpu")]),
    st.builds(
        tensors,
        st.lists(st.integers(0, 100), max_size=4),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]),
        st.integers(0, 2),
    ),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=9), st.integers(), st.booleans()), inner, max_size=4),
    ),
    max_leaves=12,
)


def assert_same(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if isinstance(one, Tensor):
        # What lies between the numbers of a slice is not kept.
        assert (one.dtype, one.shape, one.clone().stride()) == (two.dtype, two.shape, two.clone().stride())
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert [(type(key), key) for key in one] == [(type(key), key) for key in two]
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_same(left, right)
    else:
        assert one == two or one != one
        assert str(one) == str(two)  # tells -0.0 from 0.0


@given(value=VALUES)
@settings(max_examples=200, deadline=None)
def test_what_is_read_is_what_was_written(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.ckpt"
    written = tiny(OLD) | {"callbacks": {"value": value}}
    before = copy.deepcopy(written)
    path.write_bytes(serialize(written, path))
    assert_same(read(path), before)
    assert_same(torch.load(path, weights_only=True), before)
    assert_same(written, before)


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_of_a_checkpoint_stays_when_the_first_is_written_anew(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    io = VerifiedCheckpointIO()
    for step in (1, 2):
        io.save_checkpoint(tiny(step), last)
        io.save_again(last, best)
    io.save_checkpoint(tiny(3), last)
    io.teardown()
    assert (read(last)["global_step"], read(best)["global_step"]) == (3, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_what_is_fixed_stays_as_it_was(tmp_path: Path) -> None:
    checkpoint = tiny(2) | {"loops": {"inner": [1, (torch.ones(2), 3)]}}
    weights = torch.nn.Linear(2, 2).state_dict()
    checkpoint["state_dict"] = weights
    before = copy.deepcopy(checkpoint)
    fixed = fix(checkpoint, tmp_path)
    weights["weight"].zero_()  # training goes on
    weights["more"] = torch.ones(1)
    checkpoint["loops"]["inner"][1][0].zero_()
    checkpoint["loops"]["inner"].append(2)
    (tmp_path / "x.ckpt").write_bytes(pack(fixed, tmp_path))
    found = read(tmp_path / "x.ckpt")
    assert_same(found, before)
    assert found["state_dict"]._metadata == weights._metadata  # type: ignore[attr-defined]


def test_the_memory_of_a_gpu_is_let_go_only_when_the_copy_has_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is needed: what is called, and when."""
    calls: list[str] = []

    class Event:
        def record(self, stream: Any) -> None:
            calls.append("fetch")

        def synchronize(self) -> None:
            assert fixed.content is on_gpu, "training could write there"
            calls.append("arrived")

    class Stream:
        def wait_event(self, event: Any) -> None:
            calls.append("copied")

    fixed = fix(tiny(3), tmp_path)
    on_gpu = fixed.content
    fixed.gpu, fixed.copied = torch.device("cuda", 0), Event()  # type: ignore[assignment]
    monkeypatch.setattr(checkpoint_io, "_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for _ in range(2):  # the second time all is on the host
        (tmp_path / "x.ckpt").write_bytes(pack(fixed, tmp_path))
        assert_same(read(tmp_path / "x.ckpt"), tiny(3))
    assert calls == ["copied", "fetch", "arrived"]
    assert fixed.content is not on_gpu


def test_training_waits_for_no_disk_and_what_was_not_begun_when_a_newer_one_came_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, int]] = []
    begun, disk = threading.Event(), threading.Event()
    disk.set()

    def slow(content: bytes, path: Path) -> None:
        begun.set()
        assert disk.wait(60)
        commit(content, path)
        written.append((path.name, manifest(path).step))

    monkeypatch.setattr("src.checkpoint_io.commit", slow)
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    io = VerifiedCheckpointIO()
    io.save_checkpoint(tiny(1), last)
    io.wait()
    disk.clear()
    begun.clear()
    io.save_checkpoint(tiny(2), last)
    assert begun.wait(60)  # what is begun is written, whatever comes meanwhile
    io.save_again(last, best)
    io.save_checkpoint(tiny(3), last)
    io.save_again(last, best)
    io.save_checkpoint(tiny(4), last)
    io.save_checkpoint(tiny(5), last)
    assert manifest(last).step == 1
    disk.set()
    io.teardown()
    assert written == [("last.ckpt", 1), ("last.ckpt", 2), ("best.ckpt", 3), ("last.ckpt", 5)]
    assert_same(read(last), tiny(5))
    assert_same(read(best), tiny(3))


def test_the_first_checkpoint_of_a_name_is_waited_for(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO()
    io.save_checkpoint(tiny(1), tmp_path / "last.ckpt")
    io.save_checkpoint(tiny(2), tmp_path / "last.ckpt")
    assert manifest(tmp_path / "last.ckpt").step in (1, 2)
    io.teardown()


@pytest.mark.parametrize("late", [False, True])
def test_nothing_gets_the_name_of_a_checkpoint_that_could_not_be_written(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    io = VerifiedCheckpointIO()
    io.save_checkpoint(tiny(1), last)
    io.wait()
    begun, held = threading.Event(), threading.Event()

    def fail(_: bytes, path: Path) -> None:
        begun.set()
        assert held.wait(60)
        raise Failure(f"{path} could not be written (the disk is on strike)")

    with monkeypatch.context() as patch:
        patch.setattr("src.checkpoint_io.commit", fail)
        io.save_checkpoint(tiny(2), last)
        assert begun.wait(60)
        if not late:
            io.save_again(last, best)
        held.set()
        with pytest.raises(Failure, match="on strike"):
            io.wait()
    if late:
        io.save_again(last, best)
    io.wait()
    assert (manifest(best).step if best.exists() else None) == (2 if late else None), "by now it could be written"
    io.save_checkpoint(tiny(3), last)
    io.save_again(last, best)
    io.teardown()
    assert manifest(last).step == manifest(best).step == 3


def test_the_last_is_not_written_before_the_best_that_it_speaks_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    io = VerifiedCheckpointIO()
    io.save_checkpoint(tiny(1), best)
    io.save_checkpoint(tiny(1), last)
    io.wait()

    def fail(content: bytes, path: Path) -> None:
        if path == best:
            raise Failure(f"{path} could not be written (the disk is on strike)")
        commit(content, path)

    with monkeypatch.context() as patch:
        patch.setattr("src.checkpoint_io.commit", fail)
        io.save_checkpoint(tiny(2), best)
        with pytest.raises(Failure, match="on strike"):
            io.wait()
        io.save_checkpoint(tiny(3), last)
        with pytest.raises(Failure, match="on strike"):
            io.wait()
    assert manifest(last).step == manifest(best).step == 1
    io.save_checkpoint(tiny(4), last)
    io.wait()
    assert (manifest(last).step, manifest(best).step) == (4, 2)


def test_on_a_slow_disk_no_name_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    turns = threading.Semaphore(2)
    written: list[tuple[str, int]] = []

    def slow(content: bytes, path: Path) -> None:
        assert turns.acquire(timeout=60)
        commit(content, path)
        written.append((path.name, manifest(path).step))

    monkeypatch.setattr("src.checkpoint_io.commit", slow)
    io = VerifiedCheckpointIO()
    io.save_checkpoint(tiny(1), best)
    io.save_checkpoint(tiny(1), last)
    io.wait()
    for step in range(2, 20):
        io.save_checkpoint(tiny(step), best)
        io.save_checkpoint(tiny(step), last)
        count = len(written)
        turns.release()
        while len(written) == count:
            time.sleep(0.001)
    steps = [step for name, step in written if name == "last.ckpt"]
    assert len(steps) >= 5
    assert all(dict(written[:i]).get("best.ckpt", 0) >= step for i, (_, step) in enumerate(written, 1) if i > 1)
    turns.release(100)
    io.teardown()
    assert manifest(last).step == manifest(best).step == 19


def test_what_a_killed_process_left_is_no_way_into_another_checkpoint(tmp_path: Path) -> None:
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    io = VerifiedCheckpointIO()
    io.save_checkpoint(tiny(1), last)
    for _ in range(2):  # the second time both are the same already
        io.save_again(last, best)
        io.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    (tmp_path / ".best.ckpt.partial").hardlink_to(last)
    before = last.read_bytes()
    io.save_checkpoint(tiny(2), best)
    io.teardown()
    assert last.read_bytes() == before
    assert manifest(best).step == 2
