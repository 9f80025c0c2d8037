"""Checkpoint files that can be trusted: each is there whole or not at all, and is verified before it is used.

    python -m src fit --ckpt_path last

A checkpoint is one file in torch's own format, so ``torch.load`` reads it; the comment at the end of that ZIP archive
holds a manifest in JSON: format, epoch, step, and the SHA-256 of all bytes before it.
"""

import hashlib
import io
import mmap
import os
import re
import struct
import sys
import threading
import zipfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from src.errors import Failure, UsageError
from src.hardware import is_out_of_memory
from src.trust import check_content, leaves

FORMAT = 2
"""What a checkpoint of this version of the project holds; raised whenever an older one cannot be gone on with."""

_MANIFEST = re.compile(
    rb'\{"format": (\d{1,9}), "epoch": (\d{1,18}), "step": (\d{1,18}), "sha256": "([0-9a-f]{64})"\}\Z'
)
_LONGEST = 200  # bytes of the manifest at most
_PLAIN = {str, int, float, bool, type(None), torch.Size, torch.dtype, torch.device, Tensor, torch.nn.Parameter}


class Manifest(NamedTuple):
    """What the end of a checkpoint says of it."""

    format: int
    epoch: int
    step: int
    sha256: str


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's seam: how the Trainer writes and reads checkpoints.

    What is saved is fixed before `save_checkpoint` returns, by a copy; on a GPU that has room, it stays there. Another
    thread brings it to the host, packs it, and waits for the disk. Training waits only if the first file of a name is
    not there yet when the second is saved: later, what is to be written when a newer one gets its name is left out.
    """

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: deque[Future[None]] = deque()
        self._lock = threading.Lock()
        self._due: dict[Path, Fixed | Path] = {}  # by its name; a path is that of a file that gets a second name
        self._begun: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Begin to write a checkpoint; a failure is raised by `wait`, or here when a later one is begun."""
        fixed = fix(checkpoint, Path(path))
        if Path(path) in self._begun and not Path(path).exists():
            self.wait()
        self._begun.add(Path(path))
        self._begin(Path(path), fixed)

    def save_again(self, path: Path, other: Path) -> None:
        """Let another file be the checkpoint that `path` is when all that has been begun is written.

        It is another name for the same bytes, until either is written anew, where the file system has such names.
        """
        self._begin(other, path)

    def _begin(self, path: Path, what: "Fixed | Path") -> None:
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        with self._lock:
            self._due.pop(path, None)
            self._due[path] = self._due.get(what, what) if isinstance(what, Path) else what
        self._pending.append(self._writer.submit(self._write))

    def _write(self) -> None:
        """Write all that is due; from what fails on, it is due again."""
        with self._lock:
            due, self._due = self._due, {}
        try:
            while due:
                # last.ckpt says how good the best is, which must be there before.
                last = next((path for path in due if path.name == "last.ckpt"), Path())
                path = min(due, key=lambda path: (due[path] is due.get(last), path != last))
                what = due[path]
                names = [name for name in due if due[name] is what and name != path]
                if isinstance(what, Path):
                    _link(what, path)
                else:
                    commit(pack(what, path), path)
                for name in names:
                    _link(path, name)
                for name in (path, *names):
                    del due[name]
                del what  # it takes memory
        except BaseException:
            with self._lock:
                waiting = {p: due.get(w, w) if isinstance(w, Path) else w for p, w in self._due.items()}
                self._due = due | waiting
            raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; see `read`. Nothing but plain values and tensors is ever unpickled."""
        self.wait()
        return read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        self.wait()
        Path(path).unlink(missing_ok=True)

    def wait(self) -> None:
        """Wait until all that has been begun is written.

        Raises:
            Failure: If one could not be written.
        """
        failures = [failure for future in self._pending if (failure := future.exception()) is not None]
        self._pending.clear()
        if failures:
            raise failures[0]

    def teardown(self) -> None:
        """Wait until all is written."""
        self.wait()


@dataclass(eq=False)
class Fixed:
    """A checkpoint as it was at one moment, whatever training does to it since.

    Attributes:
        content: Copies of all that it holds; the tensors of a GPU are still there, others on the host.
        gpu: Which GPU that is; none if it is none.
        copied: When the copies are there; none if they are.
    """

    content: dict[str, Any]
    gpu: torch.device | None = None
    copied: torch.cuda.Event | None = None


def serialize(checkpoint: dict[str, Any], path: Path) -> bytes:
    """Return the bytes of a checkpoint, manifest and all.

    Raises:
        Failure: If it holds more than plain values and tensors, or memory is used up.
    """
    return bytes(memoryview(pack(fix(checkpoint, path), path)))


def fix(checkpoint: dict[str, Any], path: Path) -> Fixed:
    """Copy a checkpoint; without waiting for a GPU that has room for several copies.

    Raises:
        Failure: If it holds more than plain values and tensors, or memory is used up.
    """
    gpus: list[torch.device] = []
    size = 0
    for key, value in leaves(checkpoint):
        if type(value) not in _PLAIN:
            raise Failure(
                f"{path} cannot keep {key.replace('/', '.')}, a {type(value).__name__}: "
                f"a checkpoint holds plain values and tensors only"
            )
        if isinstance(value, Tensor) and value.is_cuda:
            gpus.append(value.device)
            size += value.nbytes
    with torch.inference_mode(False):  # what a validation saves is to be a tensor like others
        if len(set(gpus)) == 1 and _has_room(gpus[0], 4 * size):  # one on its way, two that are due, and this
            with suppress(torch.OutOfMemoryError):
                content = _copied(checkpoint, lambda tensor: tensor.clone())
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record(torch.cuda.current_stream(gpus[0]))
                return Fixed(content, gpus[0], copied)
        try:
            return Fixed(_copied(checkpoint, lambda tensor: tensor.cpu() if tensor.is_cuda else tensor.clone()))
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise Failure(f"{path} could not be written: out of memory") from error
            raise


def pack(fixed: Fixed, path: Path) -> bytes | mmap.mmap:
    """Return the bytes of a checkpoint; of a GPU, it waits for the copy alone, not for training.

    Raises:
        Failure: If memory is used up.
    """
    if fixed.gpu is not None and fixed.copied is not None:
        stream = _stream(fixed.gpu)
        stream.wait_event(fixed.copied)
        with torch.cuda.stream(stream):
            fetched = _copied(fixed.content, _fetch)
            there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            there.record(stream)
        there.synchronize()
        fixed.content, fixed.copied = fetched, None  # only now is the GPU's memory free to be used for something else
    content = fixed.content
    head = f'{{"format": {FORMAT}, "epoch": {content["epoch"]}, "step": {content["global_step"]}, "sha256": "'
    try:
        with _archive(content) as file:
            file.seek(-2, os.SEEK_END)
            assert file.read() == b"\0\0", "torch writes archives without a comment"
            file.seek(-2, os.SEEK_END)
            file.write(struct.pack("<H", len(head) + 64 + 2) + head.encode())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0, os.SEEK_END)
            file.write(f'{digest}"}}'.encode())
            file.flush()
            return file.getvalue() if isinstance(file, io.BytesIO) else mmap.mmap(file.fileno(), 0)
    except (MemoryError, RuntimeError, OSError) as error:  # torch and mmap have words of their own for it
        raise Failure(f"{path} could not be written: out of memory") from error


def _archive(content: dict[str, Any]) -> io.BytesIO | io.BufferedRandom:
    """Return a file in memory with what torch makes of a checkpoint.

    To a file of the system's torch writes by itself. To one of Python's it writes tensor by tensor under the
    interpreter's lock, and training on a GPU, which is to be told what to do next, waits: for 123 MB 70 ms in all
    instead of 2.
    """
    if sys.platform == "linux":
        import fcntl

        with suppress(OSError, RuntimeError), os.fdopen(os.memfd_create("checkpoint"), "wb") as made:
            # The number becomes the name of the archive's folder: the same each time, so that equal checkpoints are
            # equal files.
            file = os.fdopen(fcntl.fcntl(made, fcntl.F_DUPFD_CLOEXEC, 1000), "w+b")
            try:
                torch.save(content, f"/proc/self/fd/{file.fileno()}")
            except BaseException:
                file.close()
                raise
            return file
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer


def _has_room(gpu: torch.device, size: int) -> bool:
    """Return whether a GPU has so many bytes to spare, in the middle of a step too, going by the steps until now."""
    free, _ = torch.cuda.mem_get_info(gpu)
    return free + torch.cuda.memory_reserved(gpu) - torch.cuda.max_memory_allocated(gpu) > size


@cache
def _stream(gpu: torch.device) -> torch.cuda.Stream:
    """Return the stream that checkpoints leave a GPU by; of another priority than those on which steps are recorded."""
    return torch.cuda.Stream(gpu, priority=-1)  # type: ignore[no-untyped-call]


def _copied(value: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    """Return nested dicts and lists anew, with copies of their tensors."""
    if isinstance(value, Tensor):
        tensor = copy(value.detach())
        if isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(tensor, value.requires_grad)
        return tensor.requires_grad_(value.requires_grad)
    if type(value) in (list, tuple):
        return type(value)(_copied(item, copy) for item in value)
    if not isinstance(value, dict):
        return value
    new = type(value)((key, _copied(item, copy)) for key, item in value.items())
    if hasattr(value, "__dict__"):  # a state_dict of torch carries the versions of its modules
        vars(new).update(vars(value))
    return new


def _fetch(tensor: Tensor) -> Tensor:
    """Begin to copy a tensor of a GPU to the host."""
    if not tensor.is_cuda:
        return tensor
    try:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError:  # no more memory can be pinned
        host = torch.empty_like(tensor, device="cpu")
    return host.copy_(tensor, non_blocking=True)


def commit(content: bytes | bytearray | mmap.mmap, path: Path) -> None:
    """Write a file beside its target, bring it to the disk, and only then put it in place of the old one.

    Whenever the process or the machine dies, `path` is the old file or the new one, whole.

    Raises:
        Failure: If it cannot be written; the old one is still there.
    """
    partial = path.with_name(f".{path.name}.partial")  # one name: what a killed process leaves is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # it may be a second name of another checkpoint, see _link
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        kept = ""
        if path.is_file():
            of = f"one of step {manifest(path).step:,}" if path.suffix == ".ckpt" else "old one"
            kept = f"; the {of} is still there"
        raise Failure(f"{path} could not be written ({error.strerror}){kept}") from error


def _link(path: Path, other: Path) -> None:
    partial = other.with_name(f".{other.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        partial.hardlink_to(path)
        partial.replace(other)
        partial.unlink(missing_ok=True)  # where both were the same already, nothing is replaced
        _sync_folder(other.parent)
    except OSError:  # the file system knows no second names
        try:
            content = path.read_bytes()
        except OSError as error:
            raise Failure(f"{path} cannot be read ({error.strerror})") from error
        commit(content, other)


def manifest(path: Path) -> Manifest:
    """Return what a checkpoint says of itself, without verifying it.

    Raises:
        Failure: If it says nothing: it is cut short, or not a checkpoint of this project.
    """
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LONGEST))
            found = _MANIFEST.search(file.read())
    except OSError as error:
        raise Failure(f"{path} cannot be read ({error.strerror})") from error
    if found is None:
        raise Failure(
            f"{path} is damaged or cut short, or is not a checkpoint of this project: no manifest is at its end"
        )
    return Manifest(int(found[1]), int(found[2]), int(found[3]), found[4].decode())


def verify(path: Path) -> bytes:
    """Return the bytes of a checkpoint that is whole.

    Raises:
        Failure: If it is not, or is of a format that this version does not read.
    """
    found = manifest(path)
    if found.format != FORMAT:
        raise Failure(f"{path} has format {found.format}; this version of the project reads format {FORMAT}")
    content = path.read_bytes()
    if hashlib.sha256(memoryview(content)[: -64 - 2]).hexdigest() != found.sha256:
        raise Failure(f"{path} is damaged: its bytes are not those that were written (SHA-256 differs)")
    return content


def read(path: Path) -> dict[str, Any]:
    """Return a checkpoint, after all its bytes were verified; those very bytes are parsed, and nothing is executed.

    Raises:
        Failure: If it is damaged, hostile, or not of this project. Another whole checkpoint of the run is named.
    """
    if "://" in str(path):
        raise UsageError(f"ckpt_path: {path} is a URL; download it first: checkpoints are read from files alone")
    try:
        content = verify(path)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise Failure(f"{path} is not a checkpoint: torch does not compress, and this is")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Failure as failure:
        raise Failure(f"{failure}{_offer(path)}") from failure
    except OSError as error:
        raise Failure(f"{path} cannot be read ({error.strerror})") from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise Failure(f"{path} cannot be read as a checkpoint: it is damaged{_offer(path)}") from error
    except Exception as error:  # the unpickler's own error class is private
        raise Failure(f"{path} is not a checkpoint of plain values and tensors; nothing in it was run") from error
    check_content(path, checkpoint)
    return checkpoint  # type: ignore[no-any-return] # checked


def _offer(path: Path) -> str:
    """Name the newest whole checkpoint beside a damaged one: to fall back on it is the user's choice."""
    whole: list[tuple[int, Path]] = []
    for other in path.parent.glob("*.ckpt"):
        with suppress(Failure, OSError):
            if other != path:
                verify(other)
                whole.append((manifest(other).step, other))
    if not whole:
        return ""
    step, other = max(whole)
    return f"; the newest whole one beside it is of step {step:,}: --ckpt_path {other}"


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
