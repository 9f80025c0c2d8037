"""What the tests of small fits in this process share; they name it: ``usefixtures("fast_and_in_order", "here")``."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.summary.writer.event_file_writer import AtomicCounter

from src.callbacks.pictures import Pictures


@pytest.fixture(scope="module")
def fast_and_in_order() -> Iterator[None]:
    """Leave out what takes long and has no part in it, and let TensorBoard read files in the order of their writing."""
    # The confusion matrix as a picture takes half of the time of such small fits.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pictures, "on_validation_end", lambda *_: None)
        # TensorBoard reads the files of a run in the order of their names: the second, the process, and this number,
        # as text. Two runs of one process within a second are in order if it has as many digits in both.
        patch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(10**6))
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
