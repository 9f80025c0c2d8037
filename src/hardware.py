"""Which number format suits the device: chosen by default, checked when asked for, never silent."""

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch

Precision = Literal["bf16-mixed", "32-true"]


def device_type(accelerator: str) -> str:
    """Return ``cuda``, ``mps`` or ``cpu``, as Lightning will choose for the value of ``trainer.accelerator``."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def has_fast_bf16(device: str) -> bool:
    """Return whether the device multiplies bf16 matrices in hardware (Ampere and later; AMX, AVX512-BF16)."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "cpu":
        return bool(_cpu_units())
    return False


def default_precision(device: str) -> Precision:
    """Return what is fastest on the device at no loss of accuracy to speak of."""
    return "bf16-mixed" if has_fast_bf16(device) else "32-true"


def refuse_precision(precision: str, device: str) -> str | None:
    """Return why a device cannot do what ``trainer.precision`` asks for, or none if it can."""
    if precision in ("16-mixed", "16", "16-true") and device == "cpu":
        return "a CPU computes in float16 by emulation, if at all; use bf16-mixed, bf16-true or 32-true"
    if precision.startswith("bf16") and device == "cuda" and not has_fast_bf16("cuda"):
        return "this GPU has no bf16 units; use 16-mixed or 32-true"
    if precision in ("64-true", "64", "bf16-true", "bf16-mixed", "bf16") and device == "mps":
        return "this device computes in float32 and float16; use 32-true or 16-mixed"
    return None


def keep_pages() -> None:
    """Let the C library keep the memory that is freed: a step asks for the same large blocks as the one before.

    By default glibc gives blocks of more than 32 MB back to the system, and each new one costs a page fault for every
    4 KB: up to a third of a step. Where the library is another one, nothing is done.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 64 << 20)  # M_MMAP_THRESHOLD: what is larger still goes back, and leaves no gaps
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def give_pages_back() -> None:
    """Give back to the system what is free: the opposite of `keep_pages`, once."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def take_one_thread() -> None:
    """Let one thread do what the host computes for a GPU, unless ``OMP_NUM_THREADS`` says how many.

    It is little: random numbers for each image, the order of an epoch. Shared out to 16 threads each operation took
    8 ms, as it waits for the slowest of them to wake up, and a GPU waited for these 30 ms in every epoch.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = "1"  # Lightning would give each of several processes its share of the cores
        torch.set_num_threads(1)


class Used(NamedTuple):
    """What has been used of the processor until a moment, in seconds: by all processes, by this one; and the time."""

    by_all: float
    by_this: float
    at: float


def used() -> Used | None:
    """Return what has been used of the processor until now; none where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
        user, nice, system, _idle, _waiting, *interrupts = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields)
    except (OSError, ValueError):
        return None
    return Used(user + nice + system + sum(interrupts[:2]), time.process_time(), time.monotonic())


def contention(before: Used | None, now: Used | None, threads: int) -> str | None:
    """Return what is to be said if other processes want the cores that this one's threads are to run on.

    A step is a few hundred pieces of work, each shared out to all threads: if one of them has no core to itself, all
    wait for it in each piece, and steps take many times as long as by fewer threads.

    Args:
        before: What had been used of the processor a while ago.
        now: What has been used since.
        threads: Of torch.
    """
    cores = os.cpu_count() or 1
    if before is None or now is None or threads == 1:
        return None
    others = (now.by_all - before.by_all - now.by_this + before.by_this) / (now.at - before.at)
    if others + threads < cores + 0.4:
        return None
    free = max(1, int(cores - others + 0.25))
    return (
        f"other processes keep {others:.1f} of {cores} cores busy, and each step waits for the slowest of {threads} "
        f"threads; the environment variable OMP_NUM_THREADS={free} may make it many times faster"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory, of a GPU or of this machine, is used up."""
    said = ("can't allocate memory", "could not create a primitive", "CUDA error: out of memory")  # torch, oneDNN, CUDA
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


def describe(device: str) -> str:
    """Return a device in a few words."""
    if device == "cuda":
        return f"cuda ({torch.cuda.get_device_name()})"
    if device == "cpu":
        threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
        return f"cpu ({', '.join([*_cpu_units(), threads])})"
    return device


def _cpu_units() -> list[str]:
    """Return the processor's units that multiply bf16, by their names."""
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return []
    able = cast(dict[str, object], torch.cpu.get_capabilities())
    return [label for key, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if able.get(key)]
