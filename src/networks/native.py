"""Functions in C, for CPUs: the files ``*.c`` beside this one.

They are compiled at the first use, for this very processor, and kept in the user's cache.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

_SOURCES = sorted(Path(__file__).parent.glob("*.c"))
_FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]


@cache
def compiled() -> ctypes.CDLL | None:
    """Return the compiled functions, or none where there cannot be any."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    # A second OpenMP in the process would fight with torch's for the cores.
    openmp = _loaded_openmp()
    if sys.platform != "linux" or compiler is None or openmp is None:
        return None
    with contextlib.suppress(OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home
        sources = [path.read_bytes() for path in _SOURCES]
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
        key = hashlib.sha256(b"\0".join([*sources, version, " ".join(_FLAGS).encode(), _processor().encode()]))
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "live-cifar10"
        path = folder / f"native-{key.hexdigest()[:16]}.so"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                objects = [str(Path(work) / f"{source.stem}.o") for source in _SOURCES]
                linked = Path(work) / "native.so"
                compilations = [
                    [compiler, *_FLAGS, "-fPIC", "-c", str(source), "-o", object_]
                    for source, object_ in zip(_SOURCES, objects, strict=True)
                ]
                for command in (*compilations, [compiler, "-shared", *objects, "-lm", "-o", str(linked)]):
                    subprocess.run(command, capture_output=True, check=True, timeout=120)
                linked.replace(path)
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    return None


def _loaded_openmp() -> str | None:
    """Return the path of the OpenMP library that torch has loaded."""
    with contextlib.suppress(OSError):
        for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n"):  # names of files may be any bytes
            if "libgomp" in line:
                return line.split(maxsplit=5)[5]
    return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "".join(line for line in lines if line.startswith(("model name", "flags")))
    return platform.processor()


def call(function: Any, *arguments: Tensor | int | None) -> None:
    """Call a C function with pointers to tensors, a null pointer for none, and longs."""
    function(*(
        ctypes.c_long(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr())
        for a in arguments
    ))  # fmt: skip
