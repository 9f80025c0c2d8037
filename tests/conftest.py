"""What the tests share: the command line, run as a user runs it, and the real CIFAR-10 where it is at hand."""

import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs"
TINY = [
    "--data=Shapes10",
    "--data.train_images=400",
    "--data.test_images=100",
    "--data.val_size=100",
    "--data.batch_size=50",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
]
"""A fit of 12 steps, a second long."""

# Another number of threads sums in another order: tests in this process and in others are to agree to the last bit.
torch.set_num_threads(1)

# What is started with nohup, or in the background of a script, is deaf to some signals, and so are its children.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def run_src(*args: str | Path, cwd: Path, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m src`` in a process of its own and check its exit status."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    command = [sys.executable, "-m", "src", *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def help_of(*command: str) -> str:
    """Return the help of a sub-command, its words parted by single spaces; found in this process, which is faster."""
    from src.__main__ import _LIGHT

    run = import_module(_LIGHT.get(command[0] if command else "", "src.cli")).main
    words = command[1:] if command and command[0] in _LIGHT else command
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit) as end:
        run([*words, "--help"])
    assert not end.value.code
    return " ".join(said.getvalue().split())


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A tiny fit by the command line: the folder it ran in, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_src("fit", *TINY, cwd=folder)
    assert done.stderr == "", "a good run warns of nothing"
    return folder, done.stdout


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the official files of CIFAR-10, or the test is skipped."""
    unpack = REPOSITORY.parent / "shared" / "cifar10" / "unpack.py"
    if not unpack.is_file():
        pytest.skip("the real CIFAR-10 is not at hand")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, unpack, root], check=True, capture_output=True)
    return root
