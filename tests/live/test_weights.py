"""Live weights: whole at every moment, owned by one, gone with their trainer."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from src.errors import Failure
from src.live import shared_memory
from src.live.safetensors import Layout, parse
from src.live.weights import EndedError, LiveWeights, Publisher, StaleError
from tests.conftest import REPOSITORY

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    publisher = Publisher(tmp_path / "live", {"run": "here"})
    yield publisher
    publisher.close()


def publish(publisher: Publisher, state: dict[str, Tensor], step: int, **more: Any) -> None:
    publisher.tick(step)
    assert publisher.publish(state, step, epoch=step // 10, **more)
    publisher.wait()


def test_a_reader_gets_what_was_published_with_its_step_and_age(publisher: Publisher, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    state = network.state_dict()
    publish(publisher, state, 20, ema={name: 2 * tensor for name, tensor in state.items()})
    publisher.tick(23)
    with LiveWeights.open(tmp_path) as reader:
        version = reader.read(verify=True)
        assert (version.step, version.epoch, version.age_steps, reader.step) == (20, 2, 3, 23)
        assert 0 <= version.age_seconds < 10
        assert version.metadata["run"] == "here"
        assert publisher.published == (20, version.sha256)
        assert version.state.keys() == version.ema.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(version.state[name], tensor)
            assert torch.equal(version.ema[name], 2 * tensor)
        network.load_state_dict(version.best)
        version.state["0.bias"].zero_()
        assert torch.equal(reader.read().state["0.bias"], state["0.bias"] / 2) or reader.read().state["0.bias"].any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)), min_size=1, max_size=8))
def test_tensors_of_any_kind_come_back_as_they_were(kinds: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = {f"t{i}": (torch.rand(shape) * 9).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    layout = Layout(tuple((name, t.dtype, t.shape) for name, t in tensors.items()))
    block = torch.empty(layout.size, dtype=torch.uint8)
    for place, tensor in zip(layout.views(block), tensors.values(), strict=True):
        place.copy_(tensor)
    digest = hashlib.sha256(block.numpy().data).hexdigest()
    content = bytearray(layout.head({"sha256": digest}) + block.numpy().tobytes())
    found, metadata = parse(content, verify=True)
    assert metadata == {"sha256": digest}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_holds_tensors_that_fit(data: st.DataObject) -> None:
    layout = Layout((("a", torch.float32, torch.Size([3])), ("b", torch.int64, torch.Size([2, 2]))))
    content = bytearray(layout.head({"step": "3"}) + bytes(layout.size))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        tensors, _ = parse(content)
    except Failure as failure:
        assert str(failure).startswith("these are no whole weights: ")
        return
    for tensor in tensors.values():
        tensor.clone()


def test_one_byte_that_differs_is_noticed_when_asked_for(publisher: Publisher, tmp_path: Path) -> None:
    publish(publisher, {"a": torch.arange(5)}, 1)
    path = publisher.segment / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with LiveWeights.open(tmp_path) as reader:
        reader.read()
        with pytest.raises(Failure, match="SHA-256 differs"):
            reader.read(verify=True)


def test_only_the_owner_can_enter_the_shared_memory(publisher: Publisher) -> None:
    publish(publisher, {"a": torch.zeros(1)}, 0)
    assert stat.S_IMODE(publisher.segment.stat().st_mode) == 0o700
    for path in publisher.segment.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_version_that_is_too_old_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    publish(publisher, {"a": torch.zeros(1)}, 5)
    publisher.tick(8)
    with LiveWeights.open(tmp_path) as reader:
        assert reader.read(max_age_steps=3).age_steps == 3
        with pytest.raises(StaleError, match=r"of step 5, are 3 steps old: more than 2"):
            reader.read(max_age_steps=2)


def test_waiting_ends_with_the_step_or_the_time(publisher: Publisher, tmp_path: Path) -> None:
    with LiveWeights.open(tmp_path) as reader:
        with pytest.raises(EndedError, match="nothing has been published yet"):
            reader.read()
        publish(publisher, {"a": torch.zeros(1)}, 5)
        assert reader.wait(step=4).step == 5
        with pytest.raises(TimeoutError, match=r"step 6 was not published within 0\.05 s"):
            reader.wait(step=6, timeout=0.05)


def test_each_new_version_is_seen_and_the_last_is_followed_by_the_end(publisher: Publisher, tmp_path: Path) -> None:
    seen = []
    publish(publisher, {"a": torch.zeros(1)}, 0)
    with LiveWeights.open(tmp_path) as reader:
        for version in reader:
            seen.append((version.step, float(version.state["a"])))
            if len(seen) == 4:
                publisher.close()
            elif len(seen) < 4:
                publish(publisher, {"a": torch.full((1,), float(len(seen)))}, len(seen))
    assert seen == [(i, float(i)) for i in range(4)]
    publisher.__init__(tmp_path / "again", {})  # type: ignore[misc] # for the fixture to close


def test_when_the_trainer_is_done_nothing_is_left(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "live", {})
    publish(publisher, {"a": torch.zeros(1)}, 0)
    with LiveWeights.open(tmp_path) as reader:
        assert reader.alive
        publisher.close()
        assert not reader.alive
        with pytest.raises(EndedError):
            reader.read()
    assert not publisher.segment.exists()
    with pytest.raises(EndedError, match="it has ended, or has not begun to train"):
        LiveWeights.open(tmp_path)


WRITER = """
import sys, time, torch
from pathlib import Path
from src.live.weights import Publisher
publisher = Publisher(Path(sys.argv[1]) / "live", {})
publisher.tick(3)
publisher.publish({"a": torch.ones(4)}, 3, 0)
publisher.wait()
print("ready", flush=True)
time.sleep(100)
"""


def test_a_trainer_that_was_killed_is_told_from_a_quiet_one_and_its_leftovers_are_deleted(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with LiveWeights.open(tmp_path) as reader:
            time.sleep(0.2)
            assert reader.alive, "it is quiet, not dead"
            process.send_signal(signal.SIGKILL)
            process.wait()
            began = time.monotonic()
            with pytest.raises(EndedError, match="ended before step 4"):
                reader.wait(step=4)
            assert time.monotonic() - began < 2
            with contextlib.suppress(EndedError):  # the test of another worker may have deleted it
                assert reader.read().step == 3, "its last version can still be read"
            shared_memory.reclaim()
            assert not reader.segment.exists()


def test_what_a_stranger_writes_into_the_run_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()
    for text in ("", "[]", "{}", '{"segment": 3}', '{"segment": "/etc"}', json.dumps({"segment": str(tmp_path)})):
        (tmp_path / "live/weights.json").write_text(text)
        with pytest.raises(Failure, match=r"weights\.json"):
            LiveWeights.open(tmp_path)
    with pytest.raises(Failure, match="there is no such folder"):
        LiveWeights.open(tmp_path / "nothing")


def test_full_shared_memory_ends_publishing_and_nothing_else(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(publisher, {"a": torch.zeros(1)}, 1)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        publish(publisher, {"a": torch.ones(1)}, 2)
    assert publisher.failure == f"{publisher.segment} cannot be written to (No space left on device)"
    assert not publisher.publish({"a": torch.ones(1)}, 3, 0)
    with LiveWeights.open(tmp_path) as reader:
        assert reader.read(verify=True).step == 1, "the last whole version stays"
    assert sorted(path.name for path in publisher.segment.iterdir()) == ["clock", "weights.safetensors"]


def _write(folder: str, naive: Any, seconds: float) -> None:
    """Publish numbered weights as fast as it goes; the same ones, in place, into `naive`."""
    publisher = Publisher(Path(folder) / "live", {})
    weights = [torch.empty(20_000) for _ in range(4)]
    end = time.monotonic() + seconds
    step = 0
    while time.monotonic() < end:
        step += 1
        for tensor, shared in zip(weights, naive, strict=True):
            tensor.fill_(step)
            shared.copy_(tensor)
        publisher.tick(step)
        publisher.publish({str(i): tensor for i, tensor in enumerate(weights)}, step, 0)
    os._exit(0)  # as a process that is killed: its shared memory is left


def _read(folder: str, naive: Any, results: Any, seconds: float) -> None:
    reads = torn = naively_torn = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        first = [float(tensor[0]) for tensor in naive] + [float(tensor[-1]) for tensor in naive]
        naively_torn += len(set(first)) > 1
        try:
            with LiveWeights.open(folder) as reader:
                for _ in range(20):
                    version = reader.read(verify=True)
                    reads += 1
                    torn += {float(t.min()) for t in version.state.values()} | {
                        float(t.max()) for t in version.state.values()
                    } != {float(version.step)}
                    if random.random() < 0.01:
                        break
        except EndedError:
            time.sleep(0.001)
    results.put((reads, torn, naively_torn))


def test_no_read_is_torn_where_plain_shared_memory_is(tmp_path: Path) -> None:
    """A short one; `python -m benchmarks.live torn` does a million."""
    context = multiprocessing.get_context("spawn")
    naive = [torch.zeros(20_000).share_memory_() for _ in range(4)]  # type: ignore[no-untyped-call]
    results = context.Queue()
    readers = [context.Process(target=_read, args=(str(tmp_path), naive, results, 4.0)) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(2):
        writer = context.Process(target=_write, args=(str(tmp_path), naive, 2.5))
        writer.start()
        writer.join()
    reads, torn, naively_torn = (sum(column) for column in zip(*(results.get() for _ in readers), strict=True))
    for reader in readers:
        reader.join()
    shared_memory.reclaim()
    assert reads > 100
    assert torn == 0
    assert naively_torn > 0, "the test would not notice"
