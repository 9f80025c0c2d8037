"""In a terminal there is a progress bar with what a person wants to see."""

import fcntl
import gc
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from src.callbacks.console import LiveBar
from src.callbacks.curves import Curves
from tests.conftest import REPOSITORY, TINY


def test_the_bar_shows_epoch_loss_accuracy_speed_and_lr(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "CI")}
    env |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "src", "fit", *TINY]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=theirs, stderr=theirs, close_fds=True) as process:
        os.close(theirs)
        output = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the other end is closed: the process is over
                break
            if not chunk:
                break
            output += chunk
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())
    last = [line for line in re.split(r"[\r\n]+", text) if line.startswith("Epoch 2/2")][-1]
    assert re.search(r"6/6 .*train/loss: \d\.\d{4}  val/acc: \d\.\d{4}  images/s: [\d,]+  lr: [\d.]+", last), last


def test_no_epoch_waits_until_the_thread_that_draws_has_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep, awake = threading.Event(), threading.Event()

    def sleep(_: float) -> None:
        asleep.set()
        awake.wait(20)

    place = "lightning.pytorch.callbacks.progress.rich_progress.time"
    monkeypatch.setattr(place, SimpleNamespace(sleep=sleep))
    bar: Any = LiveBar(Curves())
    bar._init_progress(None)
    assert asleep.wait(20)
    thread = bar.progress.live._refresh_thread
    bar._stop_progress()
    assert thread.is_alive(), "it still sleeps"
    drawn = weakref.ref(bar.progress)
    del bar
    gc.collect()
    assert drawn() is None, "and keeps nothing alive"
    awake.set()
    thread.join(20)
    assert not thread.is_alive()


def test_the_bar_of_a_fit_that_is_fed_shows_what_arrived_waits_and_was_refused() -> None:
    curves = Curves()
    bar: Any = LiveBar(curves)
    curves.latest = {"train/loss": 1.0}
    assert bar.get_metrics(None, None) == {"train/loss": "1.0000"}
    curves.latest |= {"feed/images": 36000.0, "feed/waiting": 12.0, "feed/refused": 3.0}
    assert bar.get_metrics(None, None)["fed"] == "36,000, 12 waiting, 3 refused"
