"""Live weights: a network's state in shared memory, whole at every moment, read by other processes as it trains.

    from src.live.weights import LiveWeights

    for version in LiveWeights.open("lightning_logs/version_0"):
        network.load_state_dict(version.state)

A version is a file in the layout of safetensors. It is written beside its place and renamed into it: who opens it has
a whole version, in any language and without a lock, and keeps it although newer ones take its place. See
`src.live.shared_memory` for the folder it is in.
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from src.errors import Failure
from src.live import shared_memory
from src.live.files import read_bounded, write_all, write_whole
from src.live.liveness import is_held
from src.live.safetensors import Layout, parse
from src.live.shared_memory import Clock

_EMA = "ema/"
_FILE = "weights.safetensors"
_LARGEST_ABOUT = 65536
"""Bytes of ``weights.json`` at most."""
_POLL = 0.002
"""Seconds between two looks at the clock of a reader that waits."""


class StaleError(Failure):
    """The newest version is older than was asked for."""


class EndedError(Failure):
    """The trainer has ended, or publishes nothing."""


class Version(NamedTuple):
    """The weights of one step.

    Attributes:
        state: Parameters and buffers by name. They lie in memory of this process's own and may be written to.
        ema: Their moving averages by name, if the run has such; else empty.
        step: Optimizer steps that the weights have seen.
        epoch: The epoch they are from, counted from 0.
        age_steps: Steps that the trainer had taken since, when they were read.
        age_seconds: Seconds since they were copied, likewise.
        sha256: The hash of all tensors' bytes, in the order they lie in.
        metadata: All that is published beside the tensors: ``run``, ``config_sha256``, …
    """

    state: dict[str, Tensor]
    ema: dict[str, Tensor]
    step: int
    epoch: int
    age_steps: int
    age_seconds: float
    sha256: str
    metadata: dict[str, str]

    @property
    def best(self) -> dict[str, Tensor]:
        """What to predict with: the moving averages if there are any, as the validation does."""
        return self.ema or self.state


class Publisher:
    """The trainer's side: publishes versions without holding up training.

    The tensors are copied at once, which is all that takes the training thread's time; another thread hashes the copy
    and writes it. While it does, a publication is skipped, never waited for. From a GPU the copy goes by a stream of
    its own into pinned memory. If the shared memory is full or gone, publishing ends; training does not.

    Args:
        folder: The ``live`` folder of the run: ``weights.json`` in it will say where the weights are.
        facts: What is published beside the tensors, e.g. ``run`` and ``config_sha256``.

    Attributes:
        failure: Why publishing has ended; none while it has not.
        published: Step and hash of the newest version; none before the first.
        skipped: Publications that were left out as the one before was still under way.

    Raises:
        OSError: If there is no shared memory, or no room in it.
    """

    def __init__(self, folder: Path, facts: Mapping[str, str]) -> None:
        self.failure: str | None = None
        self.published: tuple[int, str] | None = None
        self.skipped = 0
        self._facts, self._folder = dict(facts), folder
        shared_memory.reclaim()
        self.segment, self._lock = shared_memory.create()
        try:
            self._clock = Clock(self.segment / "clock", writes=True)
            folder.mkdir(parents=True, exist_ok=True)
            about = {"segment": str(self.segment), "pid": os.getpid(), "since": time.time(), **self._facts}
            write_whole(folder / "weights.json", json.dumps(about).encode() + b"\n")
        except OSError:
            self._let_go()
            raise
        self._layout = Layout(())
        self._block = torch.empty(0, dtype=torch.uint8)
        self._places: list[Tensor] = []
        self._device_block: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._wake = threading.Condition()
        self._job: tuple[int, int, torch.cuda.Event | None, int] | None = None
        self._busy = self._ending = False
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        self._thread.start()

    def tick(self, step: int) -> None:
        """Say which step the trainer is at: readers tell the age of a version by it."""
        self._clock.step = step

    def publish(
        self, state: Mapping[str, Tensor], step: int, epoch: int, ema: Mapping[str, Tensor] | None = None
    ) -> bool:
        """Publish a version.

        Args:
            state: Parameters and buffers by name, all on one device.
            step: Optimizer steps that they have seen.
            epoch: The epoch they are from.
            ema: Their moving averages by name.

        Returns:
            Whether it will be there: not while the last one is under way, nor after a failure.
        """
        if self.failure is not None:
            return False
        with self._wake:
            if self._busy:
                self.skipped += 1
                return False
            self._busy = True
        try:
            copied = self._copy({**state, **{_EMA + name: tensor for name, tensor in (ema or {}).items()}})
        except (KeyError, RuntimeError) as error:  # a dtype that has no name there, or no memory for the copy
            self.failure = f"they cannot be copied ({type(error).__name__}: {error})"
            with self._wake:
                self._busy = False
                self._wake.notify_all()
            return False
        with self._wake:
            self._job = step, epoch, copied, time.monotonic_ns()
            self._wake.notify_all()
        return True

    def wait(self) -> None:
        """Wait until nothing is under way."""
        with self._wake:
            self._wake.wait_for(lambda: not self._busy)

    def close(self) -> None:
        """End publishing, and leave nothing behind."""
        with self._wake:
            if self._ending:
                return
            self._ending = True
            self._wake.notify_all()
        self._thread.join()
        self._clock.close()
        with contextlib.suppress(OSError, ValueError):
            if str(self.segment).encode() in read_bounded(self._folder / "weights.json", _LARGEST_ABOUT):
                (self._folder / "weights.json").unlink()  # else it is that of another process, which came after
        self._let_go()

    def _let_go(self) -> None:
        shutil.rmtree(self.segment, ignore_errors=True)
        os.close(self._lock)

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
        """Copy the tensors, one behind the other, to where the thread will find them."""
        given = [tensor.detach() for tensor in tensors.values()]
        kinds = tuple((name, t.dtype, t.shape) for name, t in zip(tensors, given, strict=True))
        on_gpu = given[0].is_cuda
        if kinds != self._layout.kinds:
            self._layout = Layout(kinds)
            self._block = torch.empty(self._layout.size, dtype=torch.uint8, pin_memory=on_gpu)
            self._device_block = torch.empty_like(self._block, device=given[0].device) if on_gpu else None
            self._places = self._layout.views(self._block if self._device_block is None else self._device_block)
        torch._foreach_copy_(self._places, given)
        if self._device_block is None:
            return None
        self._stream = self._stream or torch.cuda.Stream(self._device_block.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device_block.device))
        with torch.cuda.stream(self._stream):
            self._block.copy_(self._device_block, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        return copied

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._job is not None or self._ending)
                if self._job is None:
                    return
                job, self._job = self._job, None
            try:
                self._write(*job)
            except Exception as error:  # whatever it is: training goes on
                self.failure = f"{self.segment} cannot be written to ({getattr(error, 'strerror', error)})"
                with contextlib.suppress(OSError):
                    (self.segment / "partial").unlink()
            finally:
                with self._wake:
                    self._busy = False
                    self._wake.notify_all()

    def _write(self, step: int, epoch: int, copied: torch.cuda.Event | None, at: int) -> None:
        if copied is not None:
            copied.synchronize()
        data = self._block.numpy().data
        digest = hashlib.sha256(data).hexdigest()
        facts = {"step": str(step), "epoch": str(epoch), "sha256": digest, "monotonic_ns": str(at), **self._facts}
        partial = self.segment / "partial"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(partial, flags, 0o600)
        try:
            write_all(file, self._layout.head(facts))
            write_all(file, data)
        finally:
            os.close(file)
        partial.replace(self.segment / _FILE)
        self.published = step, digest
        self._clock.published = step


class LiveWeights:
    """The reader's side: the newest version, as often as one likes.

    Args:
        segment: The folder of shared memory; `open` finds that of a run.

    Raises:
        EndedError: If it is gone.
    """

    def __init__(self, segment: Path) -> None:
        self.segment = segment
        try:
            self._lock = os.open(segment, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise EndedError(_ENDED) from error
        try:
            self._clock = Clock(segment / "clock", writes=False)
        except (OSError, ValueError) as error:
            os.close(self._lock)
            raise EndedError(_ENDED) from error

    @classmethod
    def open(cls, run: str | Path) -> Self:
        """Open the weights of a run by its folder.

        Raises:
            EndedError: If it does not publish any, or does no more.
            Failure: If there is no such run, or its folder says what cannot be.
        """
        path = Path(run) / "live" / "weights.json"
        try:
            segment = Path(json.loads(read_bounded(path, _LARGEST_ABOUT))["segment"])
        except FileNotFoundError as error:
            if not Path(run).is_dir():
                raise Failure(f"{run}: there is no such folder; give that of a run") from error
            raise EndedError(f"{run}: {_ENDED}") from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Failure(f"{path} cannot be read") from error
        # Looked at twice, as it may be deleted in between.
        if "\0" in str(segment) or not (shared_memory.is_own(segment) or not segment.exists()):
            raise Failure(f"{path} does not lead to shared memory of this project and user")
        try:
            return cls(segment)
        except EndedError as error:
            raise EndedError(f"{run}: {_ENDED}") from error

    @property
    def alive(self) -> bool:
        """Whether the trainer lives, however long it has published nothing."""
        return is_held(self._lock)

    @property
    def step(self) -> int:
        """Optimizer steps that the trainer has taken."""
        return self._clock.step

    def read(self, max_age_steps: int | None = None, *, verify: bool = False) -> Version:
        """Return the newest version; of a trainer that was killed, its last.

        Args:
            max_age_steps: Refuse one since which the trainer has taken more steps.
            verify: Compute the hash of its bytes, and compare.

        Raises:
            StaleError: If the newest is too old.
            EndedError: If nothing is published, or the trainer has ended.
            Failure: If what is there is not a version.
        """
        try:
            file = os.open(self.segment / _FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise EndedError("nothing has been published yet" if self.alive else _ENDED) from error
        try:
            memory = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)  # what a reader writes stays with it
        finally:
            os.close(file)
        tensors, facts = parse(memory, verify=verify)
        try:
            step, epoch, at, sha256 = (int(facts["step"]), int(facts["epoch"]), int(facts["monotonic_ns"]),
                                       str(facts["sha256"]))  # fmt: skip
        except (KeyError, ValueError, TypeError) as error:
            raise Failure(f"{self.segment}: these weights carry no step") from error
        age = max(0, self.step - step)  # asked after the version was opened: never too low
        if max_age_steps is not None and age > max_age_steps:
            raise StaleError(
                f"the newest weights, of step {step:,}, are {age:,} steps old: more than {max_age_steps:,}"
            )
        ema = {name.removeprefix(_EMA): tensors.pop(name) for name in list(tensors) if name.startswith(_EMA)}
        return Version(tensors, ema, step, epoch, age, (time.monotonic_ns() - at) / 1e9, sha256, facts)

    def wait(self, step: int, timeout: float | None = None) -> Version:
        """Return the newest version, as soon as it is of at least a step.

        Args:
            step: The step.
            timeout: Seconds to wait at most; none waits for as long as the trainer lives.

        Raises:
            TimeoutError: If none comes in time.
            EndedError: If the trainer ends before.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            alive = self.alive  # asked first: what it published last counts
            for _ in range(50):
                newest = self._clock.published
                if newest is not None and newest >= step:
                    return self.read()
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"step {step:,} was not published within {timeout:g} s")
                if not alive:
                    raise EndedError(f"the run ended before step {step:,} was published")
                time.sleep(_POLL)

    def __iter__(self) -> Iterator[Version]:
        """Yield the newest version whenever there is a newer one, until the trainer ends."""
        step = -1
        while True:
            try:
                version = self.wait(step + 1)
            except EndedError:
                return
            step = version.step
            yield version

    def close(self) -> None:
        """Let go of the run; versions that have been read stay as they are."""
        self._clock.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        """Return this reader."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        """Let go of the run."""
        self.close()


_ENDED = "the run publishes no weights: it has ended, or has not begun to train"
