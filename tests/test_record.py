"""What is logged reaches the disk while the run goes on."""

import errno
import time
from pathlib import Path

import pytest
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.callbacks.record import RunLogger, flatten


def test_a_point_is_on_disk_within_about_a_second_though_nobody_flushes(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger.log_metrics({"train/loss": 1.5}, 3)
    deadline = time.monotonic() + 5  # a busy machine may be late
    found: list[tuple[int, float]] = []
    while not found and time.monotonic() < deadline:
        time.sleep(0.2)
        events = EventAccumulator(logger.log_dir).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert found == [(3, 1.5)]


@pytest.mark.parametrize("status", ["success", "failed"])
def test_points_that_cannot_be_written_at_the_end_are_told_of_unless_something_else_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    logger = RunLogger(tmp_path)
    logger.log_metrics({"train/loss": 1.5}, 3)

    def full(_: float) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logger, "_write", full)
    if status == "failed":
        logger.finalize(status)
    else:
        with pytest.raises(OSError, match="No space left"):
            logger.finalize(status)
    FileLock(Path(logger.log_dir) / ".lock").acquire(blocking=False)


def test_a_config_is_flattened_to_the_keys_that_are_typed() -> None:
    config = {
        "model": {"network": {"class_path": "src.networks.CNN", "init_args": {"dropout": 0.5, "weights": None}}},
        "data": {"init_args": {"root": Path("data"), "augment": [1, 2]}},
    }
    assert flatten(config) == {
        "model.network": "src.networks.CNN",
        "model.network.dropout": 0.5,
        "data.root": "data",
    }


def test_the_events_of_a_run_that_goes_on_come_after_those_before(tmp_path: Path) -> None:
    first = tmp_path / f"events.out.tfevents.{int(time.time())}.zzz.99999.0"
    first.touch()
    logger = RunLogger(tmp_path, resumed=tmp_path, step=3)
    logger.log_metrics({"train/loss": 1.5}, 4)
    names = sorted(path.name for path in tmp_path.glob("events.out.tfevents.*"))
    assert len(names) == 2
    assert names[0] == first.name
