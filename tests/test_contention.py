"""A fit that is slow because the machine is busy says so, once."""

import os
import time
from pathlib import Path

import pytest
import torch

from src.cli import main
from src.errors import Failure
from src.hardware import Used, contention, take_one_thread, used
from tests.conftest import TINY


@pytest.mark.parametrize(
    ("cores", "threads", "others", "better"),
    [(2, 2, 1.0, 1), (2, 2, 2.0, 1), (8, 8, 2.1, 6), (8, 4, 5.0, 3), (2, 2, 0.3, 0), (2, 1, 2.0, 0), (8, 4, 4.0, 0)],
)
def test_it_goes_by_the_cores_that_others_leave(
    cores: int, threads: int, others: float, better: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    said = contention(Used(100, 10, 50), Used(100 + 4 * others + 7, 10 + 7, 54), threads)
    assert (said is None) == (better == 0)
    if said is not None:
        assert f"keep {others:.1f} of {cores} cores busy" in said
        assert f"OMP_NUM_THREADS={better} " in said


def test_where_the_system_does_not_tell_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert used() is None
    assert contention(None, used(), 2) is None


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="this system does not tell")
def test_what_this_process_uses_is_counted() -> None:
    before = used()
    while time.process_time() < (before.by_this if before else 0) + 0.1:
        pass
    now = used()
    assert before
    assert now
    assert now.by_this - before.by_this >= 0.1
    assert now.by_all >= before.by_all


def test_what_the_host_does_for_a_gpu_takes_one_thread_unless_a_number_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    for given, due in (("3", []), ("", [1])):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        take_one_thread()
        assert (taken, os.environ["OMP_NUM_THREADS"]) == (due, given or "1")


def test_a_fit_on_a_gpu_takes_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken() -> None:
        raise Failure("it was taken")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("src.cli.take_one_thread", taken)
    monkeypatch.setattr("src.cli.check_config", lambda *_: "cuda")
    assert main(["fit", *TINY]) == 1
    assert capsys.readouterr().err == "error: it was taken\n"


def test_a_fit_says_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("src.callbacks.contention.contention", lambda *_: "it is busy here")
    monkeypatch.setattr("src.callbacks.contention._AFTER", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["fit", *TINY, "--trainer.accelerator=cpu"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("note: it is busy here\n") == 1
    assert main(["fit", *TINY, "--trainer.accelerator=cpu"]) == 0
    assert "note: " not in capsys.readouterr().out, "one thread shares a core as it can"
