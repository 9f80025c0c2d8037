"""The world around a fit fails: other processes, folders, clocks, memory. Each fault is real, and told in one line."""

import ctypes
import os
import re
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml

from src import checkpoint_io
from src.callbacks import memory
from src.checkpoint_io import Fixed, read
from src.cli import main
from tests.conftest import REPOSITORY
from tests.faults.breakers import SMALL, Child, refused

RUNS = Path("lightning_logs")
linux = pytest.mark.skipif(sys.platform != "linux", reason="privileges and memory are limited as in Linux")
HERE = "tests.faults.test_world"
OWN = "--model.network=tests.faults.breakers.Weak"  # a class that a checkpoint may not name by itself


class Waiter(pl.Callback):
    """Holds a fit up before its sixth step."""

    between_chunks = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == 5:
            Path("waiting").touch()
            signal.pause()


def wait_for(path: Path, child: Child) -> None:
    while not path.exists():
        assert child.process.is_alive(), child.wait()
        time.sleep(0.02)


def test_fits_that_start_at_once_in_one_folder_get_runs_of_their_own(tmp_path: Path) -> None:
    seeds = [1, 2, 3]
    children = [Child(main, ["fit", *SMALL, f"--seed_everything={seed}"], cwd=tmp_path) for seed in seeds]
    ends = [child.wait() for child in children]
    assert [(done.status, done.err) for done in ends] == [(0, "")] * 3
    folders = [re.findall(r"^run: +(\S+)$", done.out, re.MULTILINE)[0] for done in ends]
    assert sorted(folders) == [str(RUNS / f"version_{i}") for i in range(3)]
    assert {path.name for path in (tmp_path / RUNS).iterdir()} == {"version_0", "version_1", "version_2"}
    for seed, folder in zip(seeds, folders, strict=True):
        run = tmp_path / folder
        assert yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] == seed
        for name in ("best", "last"):
            assert yaml.safe_load(read(run / f"checkpoints/{name}.ckpt")["config"])["seed_everything"] == seed
        assert len(list(run.glob("events.*"))) == 1


def test_two_runs_without_a_logger_do_not_write_over_each_others_checkpoints(tmp_path: Path) -> None:
    plain = ["fit", *SMALL, "--trainer.logger=false"]
    first = Child(main, [*plain, f"--trainer.callbacks={HERE}.Waiter"], cwd=tmp_path)
    wait_for(tmp_path / "waiting", first)
    done = Child(main, plain, cwd=tmp_path).wait()
    assert f"{tmp_path}/checkpoints: another process keeps its checkpoints there; name another place" in refused(done)
    first.process.kill()
    assert Child(main, plain, cwd=tmp_path).wait().status == 0


def test_a_run_that_another_process_trains_is_not_resumed_until_that_has_ended(tmp_path: Path) -> None:
    always = "--checkpoint.every_n_steps=1"
    first = Child(main, ["fit", *SMALL, always, f"--trainer.callbacks={HERE}.Waiter"], cwd=tmp_path)
    wait_for(tmp_path / "waiting", first)
    run = tmp_path / RUNS / "version_0"
    while not (run / "checkpoints/last.ckpt").exists() or read(run / "checkpoints/last.ckpt")["global_step"] < 5:
        time.sleep(0.02)  # the disk may be a step behind
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    resume = ["fit", f"--config={run}/config.yaml", "--ckpt_path=last", "--trainer.callbacks=null"]
    done = Child(main, resume, cwd=tmp_path).wait()
    assert f"{RUNS}/version_0: another process is training this run; stop it first, or start a new one" in refused(done)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert Child(main, [*resume, "--new_run=true"], cwd=tmp_path).wait().status == 0
    assert read(tmp_path / RUNS / "version_1/checkpoints/last.ckpt")["global_step"] == 8

    assert first.process.pid
    os.kill(first.process.pid, signal.SIGKILL)
    assert first.wait().status == -signal.SIGKILL
    resume[2] = f"--ckpt_path={run}/checkpoints/last.ckpt"
    assert Child(main, resume, cwd=tmp_path).wait().status == 0
    assert read(run / "checkpoints/last.ckpt")["global_step"] == 8


class Capabilities(ctypes.Structure):
    """What capget(2) fills."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


def without_privileges(folder: Path, args: list[str]) -> int:
    """Run a command as somebody for whom the modes of files count; root's power is to write everywhere."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (Capabilities * 2)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, sets) == 0
    sets[0].effective &= ~0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    assert libc.capset(header, sets) == 0
    assert not os.access(folder, os.W_OK, effective_ids=True), "the folder can be written to"
    return main(args)


@linux
@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_that_cannot_be_written_to_stops_a_fit_before_its_first_step(tmp_path: Path, resumed: bool) -> None:
    folder, run, args = tmp_path, tmp_path / RUNS / "version_0", ["fit", *SMALL]
    if resumed:
        assert Child(main, args, cwd=tmp_path).wait().status == 0
        folder, args = run, ["fit", "--ckpt_path=last", OWN, "--trainer.max_epochs=3"]
        (run / ".lock").unlink()
    before = sorted(tmp_path.rglob("*"))
    folder.chmod(0o555)
    done = Child(without_privileges, folder, args, cwd=tmp_path).wait()
    folder.chmod(0o755)
    assert sorted(tmp_path.rglob("*")) == before
    named = re.escape(str(RUNS / "version_0"))
    assert re.fullmatch(
        rf"(\S+/)?{named} cannot be written to \(Permission denied\); "
        rf"name another place: --trainer.default_root_dir DIR",
        refused(done),
    )
    assert "epoch" not in done.out


@linux
@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_run_that_cannot_be_written_to_is_named_by_an_evaluation(tmp_path: Path, command: str) -> None:
    assert Child(main, ["fit", *SMALL], cwd=tmp_path).wait().status == 0
    run = tmp_path / RUNS / "version_0"
    pictures = ["--data.images", str(REPOSITORY / "docs")] if command == "predict" else []
    args = [command, "--ckpt_path=best", OWN, *pictures]
    run.chmod(0o555)
    done = Child(without_privileges, run, args, cwd=tmp_path).wait()
    run.chmod(0o755)
    line = refused(done)
    assert "Permission denied" in line
    assert str(RUNS / "version_0") in line
    assert not list(run.glob("test*")) + list(run.glob("predictions*"))


class Slow(pl.Callback):
    """Makes each step last longer than 60 ms."""

    between_chunks = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        end = time.monotonic() + 0.07
        while time.monotonic() < end:
            time.sleep(0.01)


def fit_while_the_clock_jumps(args: list[str]) -> int:
    """Run a fit while the wall clock jumps by two days, to and fro; print how often and what was saved."""
    day, now, real_fix = 86_400.0, time.time, checkpoint_io.fix
    jumps: Counter[int] = Counter()
    saved: Counter[str] = Counter()

    def jumping() -> float:
        jumps[0] += 1
        return now() + (day if jumps[0] % 2 else -day)

    def fix(checkpoint: dict[str, Any], path: Path) -> Fixed:
        saved[path.name] += 1
        return real_fix(checkpoint, path)

    time.time, checkpoint_io.fix = jumping, fix
    status = main(args)
    print(f"saved {saved['last.ckpt']}; {'jumped' if jumps[0] > 20 else 'did not jump'}")  # noqa: T201
    return status


@pytest.mark.parametrize(("minutes", "saved"), [("0.001", 8), ("60", 2), ("null", 2)])
def test_the_wall_clock_has_no_say_in_when_checkpoints_are_written(tmp_path: Path, minutes: str, saved: int) -> None:
    slow = [f"--checkpoint.every_n_minutes={minutes}", f"--trainer.callbacks={HERE}.Slow"]
    done = Child(fit_while_the_clock_jumps, ["fit", *SMALL, *slow], cwd=tmp_path).wait()
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[-1] == f"saved {saved}; jumped"


def limit_memory(megabytes: int) -> None:
    """Let this process have so much more address space than now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20,) * 2)


def with_little_memory(megabytes: int, args: list[str]) -> int:
    limit_memory(megabytes)
    return main(args)


BIG = [
    *(argument for argument in SMALL if "Weak" not in argument),
    "--publish_every_n_steps=null",  # its threads take room
    "--steering=false",
]


@linux
def test_a_batch_that_does_not_fit_into_memory_is_told_with_one_that_does(tmp_path: Path) -> None:
    megabytes = 360  # each image takes the CNN half a one
    fit = ["fit", *BIG, "--data.train_images=1044", "--trainer.max_epochs=1"]
    done = Child(with_little_memory, megabytes, [*fit, "--data.batch_size=1024"], cwd=tmp_path).wait()
    found = re.fullmatch(
        r"out of memory with data\.batch_size 1024; (\d+) fits: "
        r"(--data\.batch_size \1 --trainer\.accumulate_grad_batches (\d+)) takes the same steps",
        refused(done),
    )
    assert found, done.err
    assert int(found[1]) in (64, 128, 256, 512)
    assert int(found[1]) * int(found[3]) == 1024
    done = Child(with_little_memory, megabytes, [*fit, *found[2].split()], cwd=tmp_path).wait()
    assert (done.status, done.err) == (0, ""), done
    assert "epoch 1/1  step 1 " in done.out


def with_greedy_threads(megabytes: int, args: list[str]) -> int:
    memory._THREADS = megabytes * 2**20
    return with_little_memory(megabytes, args)


@linux
def test_a_batch_that_leaves_no_room_for_the_threads_that_save_is_not_said_to_fit(tmp_path: Path) -> None:
    fit = ["fit", *BIG, "--data.train_images=1044", "--trainer.max_epochs=1", "--data.batch_size=1024"]
    line = refused(Child(with_greedy_threads, 360, fit, cwd=tmp_path).wait())
    assert line == "out of memory with data.batch_size 1024, and with a single image too: the network is too large"


@linux
@pytest.mark.parametrize("more", [[], ["--trainer.num_sanity_val_steps=0"]], ids=["before", "after training"])
def test_a_validation_that_does_not_fit_into_memory_names_its_own_batch_size(tmp_path: Path, more: list[str]) -> None:
    fit = ["fit", *BIG, "--data.train_images=2020", "--data.val_size=2000", "--trainer.max_epochs=1"]
    done = Child(with_little_memory, 300, [*fit, "--data.eval_batch_size=2000", *more], cwd=tmp_path).wait()
    assert "out of memory with data.eval_batch_size 2000" in refused(done)


@linux
def test_a_network_that_leaves_no_memory_for_a_single_image_says_so(tmp_path: Path) -> None:
    args = ["fit", *BIG, "--model.network=ResNet", "--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0"]
    line = refused(Child(with_little_memory, 120, args, cwd=tmp_path).wait())
    assert line.startswith("out of memory with data.batch_size 10")


class Squeezer(pl.Callback):
    """Leaves a fit no memory for another copy of its weights once a step has been taken."""

    between_chunks = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        limit_memory(30)


@linux
def test_a_checkpoint_that_does_not_fit_into_memory_ends_the_fit_in_one_line(tmp_path: Path) -> None:
    network = ["--model.network=ResNet", "--model.network.stem=imagenet", "--trainer.max_steps=1"]
    squeezer = f"--trainer.callbacks={HERE}.Squeezer"
    done = Child(main, ["fit", *BIG, "--data.val_size=0", *network, squeezer], cwd=tmp_path).wait()
    assert "memory" in refused(done)
    assert list((tmp_path / RUNS).rglob("*ckpt*")) == []
