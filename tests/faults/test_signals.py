"""What a signal does to a fit: the step ends, all is saved, one line tells how to go on. With several processes too.

A process that is killed takes the others of its run with it, and what was saved before stays good.
"""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from src.checkpoint_io import manifest, read
from tests.conftest import REPOSITORY, TINY, run_src
from tests.faults import breakers
from tests.faults.probe import SMALL, assert_same_run, batches, fit, probed

RUN = Path("lightning_logs/version_0")
LAST = RUN / "checkpoints/last.ckpt"
GO_ON = f"python -m src fit --config {RUN}/config.yaml --ckpt_path {LAST}"
DDP = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fit that nothing stopped."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fit(*SMALL, *probed(Path("log"))).status == 0
    return folder


@pytest.mark.parametrize(
    ("number", "at", "step", "status"),
    [
        ("SIGTERM", "train 3", 4, 143),
        ("SIGTERM", "val 6", 6, 143),
        ("SIGTERM", "sanity", 0, 143),
        ("SIGINT", "train 7", 8, 130),
        ("SIGHUP", "train 7", 8, 129),
        ("SIGUSR1", "train 11", 12, 138),
    ],
)
def test_a_signal_ends_the_step_saves_and_tells_how_to_go_on(
    number: str, at: str, step: int, status: int, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_src("fit", *SMALL, *probed(Path("log"), at, number=number), cwd=tmp_path, status=status)
    assert done.stderr == f"stopped by {number} at step {step}; go on with: {GO_ON}\n"
    monkeypatch.chdir(tmp_path)
    assert manifest(LAST).step == step
    time.sleep(1 - time.time() % 1)  # TensorBoard reads files of the same second in any order
    assert fit("--ckpt_path", LAST, *probed(Path("log"))).status == 0
    assert batches(Path("log")) == batches(reference / "log")
    assert_same_run(RUN, reference / RUN)


def test_a_signal_within_a_chunk_waits_for_its_end(tmp_path: Path) -> None:
    network = "--model.network=tests.faults.breakers.WeakOnce"
    whole = [*breakers.SMALL, "--trainer.val_check_interval=3", network]
    run_src("fit", *whole, "--trainer.default_root_dir=whole", cwd=tmp_path)
    done = run_src(
        "fit",
        *whole,
        "--chunk_size=4",
        "--model.network.at=5",
        "--model.network.what=SIGTERM",
        cwd=tmp_path,
        status=143,
    )
    assert done.stderr == f"stopped by SIGTERM at step 7; go on with: {GO_ON}\n"
    run_src("fit", "--ckpt_path", LAST, "--chunk_size=2", network, cwd=tmp_path)
    weights = [read(tmp_path / folder / LAST)["state_dict"] for folder in (".", "whole")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_second_sigint_ends_at_once_a_step_that_never_does(tmp_path: Path) -> None:
    probe = probed(Path("log"), "train 3", number="SIGINT", stuck=True)
    done = run_src("fit", *SMALL, *probe, cwd=tmp_path, status=130)
    assert done.stderr == ""
    assert len(batches(tmp_path / "log")) == 3
    assert not (tmp_path / LAST).exists(), "nothing is saved in the middle of a step"


def test_nohup_stays_what_it_is_and_a_printed_command_can_be_pasted(tmp_path: Path) -> None:
    root = "--trainer.default_root_dir=a b"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-m", "src", "fit"]
    deaf = [*command, *SMALL, root, *probed(Path("log"), "train 3", number="SIGHUP")]
    subprocess.run(deaf, cwd=tmp_path, env=env, check=True, capture_output=True)
    done = run_src("fit", *SMALL, root, *probed(Path("log"), "train 3"), cwd=tmp_path, status=143)
    assert done.stderr.endswith("--ckpt_path 'a b/lightning_logs/version_1/checkpoints/last.ckpt'\n")


def test_while_modules_are_loaded_ctrl_c_tells_nothing_of_their_insides(tmp_path: Path) -> None:
    code = """if True:
        import os, signal
        import src.__main__ as entry
        entry.import_module = lambda name: os.kill(os.getpid(), signal.SIGINT)
        entry.main()
    """
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_when_the_terminal_goes_away_all_is_saved(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
    code = (
        "import fcntl, runpy, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); sys.argv[0] = 'src'; "
        "runpy.run_module('src', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, "fit", *TINY, "--trainer.max_epochs=1000"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        seen = b""
        while b"Epoch 3/1000" not in seen:
            seen += os.read(ours, 65536)
        os.close(ours)
        assert process.wait(60) == 129
    assert manifest(tmp_path / LAST).step >= 12


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_where_nothing_can_be_saved_a_signal_ends_it_at_once(
    command: str, number: str, status: int, trained: tuple[Path, str], tmp_path: Path
) -> None:
    code = f"""if True:
        import os, signal, sys
        import src.classifier
        from src.cli import main

        def end(*_):
            os.kill(os.getpid(), signal.{number})

        for name in ("configure_optimizers", "test_step", "predict_step"):
            setattr(src.classifier.ImageClassifier, name, end)
        sys.exit(main(sys.argv[1:]))
    """
    words = [command]
    if command == "fit":
        words += TINY
    else:
        words += ["--ckpt_path", str(trained[0] / LAST)]
    if command == "predict":
        Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
        words += ["--data.images", "a.png"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    before = sorted(trained[0].rglob("*.csv")) + sorted(trained[0].rglob("*.json"))
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    when = "before the first step; nothing was saved" if command == "fit" else "before the end; nothing was written"
    assert (done.returncode, done.stderr) == (status, f"stopped by {number} {when}\n")
    assert not list(tmp_path.glob("lightning_logs/*"))
    assert before == sorted(trained[0].rglob("*.csv")) + sorted(trained[0].rglob("*.json"))


class Ended(NamedTuple):
    """How a fit of two processes ended."""

    status: int
    err: str
    left: list[int]


def fit_by_two(folder: Path, *args: str | Path) -> Ended:
    """Run a fit of two processes, and wait until both are gone, or for half a minute after the first is."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "src", "fit", *map(str, args), *DDP]
    with (folder / "err").open("w+") as err:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=err)
        try:
            status = process.wait(300)
            end = time.monotonic() + 30
            while processes(str(folder)) and time.monotonic() < end:
                time.sleep(0.1)
        finally:
            left = processes(str(folder))
            for number in left:
                os.kill(number, signal.SIGKILL)
        err.seek(0)
        return Ended(status, err.read(), left)


def processes(word: str) -> list[int]:
    """Return the processes that have a word in their command line, but for this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_text(errors="replace") and path.parent.name != str(os.getpid()):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has just ended
    return found


class Story(NamedTuple):
    """A run of two processes to which everything happens, and its twin that nothing stopped."""

    folder: Path
    undisturbed: Path
    stopped: Path
    terminated: Ended
    lost_second: Ended
    lost_first: Ended
    finished: Ended


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Each process takes seconds to start, so one run tells all."""
    if not Path("/proc/self/cmdline").is_file():
        pytest.skip("this system does not list its processes in /proc")
    undisturbed, folder = tmp_path_factory.mktemp("undisturbed"), tmp_path_factory.mktemp("two")
    stopped = folder / "stopped.ckpt"
    assert fit_by_two(undisturbed, *SMALL, *probed(undisturbed / "log")).status == 0
    often = ["--checkpoint.every_n_steps=2", "--ckpt_path", str(LAST)]
    terminated = fit_by_two(folder, *SMALL, *probed(folder / "log", "train 2"))
    shutil.copy(folder / LAST, stopped)
    lost_second = fit_by_two(folder, *often, *probed(folder / "log", "train 5", number="SIGKILL", rank=1))
    lost_first = fit_by_two(folder, *often, *probed(folder / "log", "val 12", number="SIGKILL"))
    finished = fit_by_two(folder, *often, *probed(folder / "log"))
    return Story(folder, undisturbed, stopped, terminated, lost_second, lost_first, finished)


def test_a_signal_to_one_of_two_processes_ends_both_at_the_same_step(story: Story) -> None:
    assert (story.terminated.status, story.terminated.left) == (143, []), story.terminated.err
    lines = [line for line in story.terminated.err.splitlines() if "stopped" in line]
    assert lines == [f"stopped by SIGTERM at step 3; go on with: {GO_ON}"]
    assert manifest(story.stopped).step == 3


def test_when_the_second_process_is_killed_the_first_says_so_and_ends(story: Story) -> None:
    assert story.lost_second.status, "1, or what Lightning's observer of processes kills with, if it is the faster one"
    assert story.lost_second.left == []
    lines = [line for line in story.lost_second.err.splitlines() if line.startswith("error: ")]
    assert lines == ["error: another process of this run has ended, so this one (rank 0) ends too"]
    assert "Traceback" not in story.lost_second.err


def test_when_the_first_process_is_killed_the_second_ends_too(story: Story) -> None:
    assert (story.lost_first.status, story.lost_first.left) == (-signal.SIGKILL, []), story.lost_first.err
    assert "Traceback" not in story.lost_first.err


def test_after_all_that_the_run_of_two_processes_equals_its_undisturbed_twin(story: Story) -> None:
    assert (story.finished.status, story.finished.left) == (0, []), story.finished.err
    for rank in (0, 1):
        log = batches(story.folder / "log", rank)
        once = [line for i, line in enumerate(log) if line not in log[:i]]
        assert len(once) < len(log), "steps after the last checkpoint are taken again"
        assert once == batches(story.undisturbed / "log", rank)
    assert_same_run(story.folder / RUN, story.undisturbed / RUN)


def test_one_process_goes_on_with_what_two_have_begun_and_leaves_out_no_image(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = ["--trainer.strategy=auto", "--trainer.devices=1", "--trainer.max_epochs=1"]
    done = fit("--ckpt_path", story.stopped, *alone, *probed(Path("log")))
    assert (done.status, done.err) == (0, "")
    assert "note: processes 2 before and 1 now: " in done.out
    begun = [batches(story.undisturbed / "log", rank)[:3] for rank in (0, 1)]
    drawn = [line[3] for line in (*begun[0], *begun[1], *batches(Path("log")))]
    ids = [id for line in drawn for id in line]
    assert len(ids) == len(set(ids)) == 55
