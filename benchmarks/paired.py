"""Measures several things in turn, A B A B, and writes what came out: figures with a header as JSON, and a plot.

    python -m benchmarks.speed startup --rounds 5         # one of its users

What is compared is the ratio of medians. Its spread is that of the ratios within a round: what the machine does slower
for a while, it does slower for both. This file loads neither torch nor Lightning, so that a process that it starts can
be measured by its peak memory (Linux counts that of the parent at the moment of the start).
"""

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import pty
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))
"""The cores that this process may use: what `taskset` has left of them."""

Sample = dict[str, Any]
Case = Callable[[int], Sample]
"""Measures once; is told the number of the round, from 0."""
Samples = dict[str, list[Sample]]

_TURN = "TURN_HELD"  # a process's own descriptor of the file $TURN, when it waits no longer, for how long it gives way


class MissingError(Exception):
    """A case that cannot be measured here, and why."""


def alternate(cases: Mapping[str, Case], rounds: int) -> tuple[Samples, dict[str, str]]:
    """Measure every case once in each round, in the order given.

    Returns:
        The samples of each case, and why those that are missing are so.
    """
    samples: Samples = {name: [] for name in cases}
    missing: dict[str, str] = {}
    for number in range(rounds):
        for name, case in cases.items():
            if name in missing:
                continue
            try:
                sample = case(number)
            except MissingError as reason:
                missing[name] = str(reason)
                print(f"# round {number + 1} of {rounds}, {name}: missing: {reason}", file=sys.stderr, flush=True)
                continue
            samples[name].append(sample)
            told = {k: round(v, 4) for k, v in sample.items() if isinstance(v, float)}
            print(f"# round {number + 1} of {rounds}, {name}: {told}", file=sys.stderr, flush=True)
    return samples, missing


def process(
    command: Sequence[str],
    *,
    threads: int | None,
    terminal: bool = False,
    timeout: float = 3600,
    turn_within: float = 3600,
    gives_way: float = 0.0,
) -> Sample:
    """Run a command to its end, in the root of the repository.

    Args:
        command: The program and its arguments.
        threads: What it finds in ``OMP_NUM_THREADS``; none: it finds nothing there.
        terminal: Let its standard output be a terminal: there is a progress bar only in one.
        timeout: Seconds after which it is killed, with all that it started.
        turn_within: Seconds within which `my_turn` returns in it, at the latest.
        gives_way: Seconds that `my_turn` leaves to others that wait already before it asks.

    Returns:
        ``process seconds`` from start to exit, ``processor seconds`` of all its threads, ``peak MB`` of memory, and
        what the last line in JSON of its output says, if there is one; also ``broken off``, and why, if it failed
        afterwards.

    Raises:
        MissingError: If it fails or takes too long, and has not told anything in JSON until then; says why in its own
            last line.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        ours = theirs = -1
        if terminal:
            ours, theirs = pty.openpty()
            termios.tcsetwinsize(theirs, (40, 140))
        hidden = ("COLUMNS", "NO_COLOR", "CI", "OMP_NUM_THREADS")
        turn = prepares()
        inherits = {} if turn is None else {_TURN: f"{turn} {time.monotonic() + turn_within} {gives_way}"}
        begun = time.perf_counter()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **{k: v for k, v in os.environ.items() if k not in hidden},
                **({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
                "TERM": "xterm-256color",
                **inherits,
            },
            pass_fds=() if turn is None else (turn,),
            stdin=subprocess.DEVNULL,
            stdout=theirs if terminal else output,
            stderr=errors,
            start_new_session=True,
        )
        if turn is not None:
            os.close(turn)  # the child's own keeps it
        _running.add(child.pid)
        timer = threading.Timer(timeout, os.killpg, (child.pid, signal.SIGKILL))
        timer.start()
        try:
            if terminal:
                os.close(theirs)
                _drain(ours, output)
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:  # we are to stop: so is what we measure
            os.killpg(child.pid, signal.SIGKILL)
            timer.cancel()
            raise
        _running.discard(child.pid)
        seconds = time.perf_counter() - begun
        late = not timer.is_alive()
        timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.read().decode(errors="replace")))
    told = list(_records(texts[0]))
    failure = {}
    if child.returncode != 0 and not (late and told):
        lines = [line.strip() for line in (texts[1] or texts[0]).splitlines() if line.strip()]
        print("\n".join(lines[-80:]), file=sys.stderr, flush=True)
        reason = f"took over {timeout:g} s" if late else lines[-1] if lines else f"exit {child.returncode}"
        if not told:
            raise MissingError(reason)
        failure = {"broken off": reason}
    return failure | {
        "process seconds": seconds,
        "processor seconds": usage.ru_utime + usage.ru_stime,
        "peak MB": usage.ru_maxrss / 1024,
        **(told[-1] if told else {}),
    }


def _records(text: str) -> Iterator[Sample]:
    """Yield what the lines in JSON say; one of a process that was killed may have no end."""
    for line in text.splitlines():
        if line.startswith("{"):
            with suppress(ValueError):
                yield json.loads(line)


def prepares() -> int | None:
    """Keep others from measuring, as the file $TURN has it; return the descriptor that does, none without that file.

    Some processes prepare (import, compile) at the same time, and measure one by one, when none prepares any more. It
    is a lock that is shared while they prepare, until the descriptor is closed, or, in a process that has inherited it,
    until `my_turn`.
    """
    if not os.environ.get("TURN"):
        return None
    descriptor = os.open(os.environ["TURN"], os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def my_turn() -> Sample:
    """Wait until no other process prepares or measures, and keep them waiting until this one ends.

    Returns:
        Nothing, or that others may have been at work, as they took too long.
    """
    if _TURN not in os.environ:
        return {}
    descriptor, end, gives_way = os.environ.pop(_TURN).split()
    os.set_inheritable(int(descriptor), False)
    fcntl.flock(int(descriptor), fcntl.LOCK_UN)
    time.sleep(float(gives_way))  # who prepares longest would else be first: the others ask every 20 ms
    while time.monotonic() < float(end):
        with suppress(BlockingIOError):
            fcntl.flock(int(descriptor), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return {}
        time.sleep(0.02)
    return {"beside others": True}


def _drain(terminal: int, output: Any) -> None:
    """Read what a process writes to its terminal, until it closes it."""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        output.write(chunk)
    os.close(terminal)


_running: set[int] = set()


def _stop(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice
    for pid in list(_running):  # other threads wait for some of them
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    sys.exit(143)


signal.signal(signal.SIGTERM, _stop)  # so that what is being measured is stopped too


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, quartiles, range and number of some values."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": _round(quartiles[1]),
        "quartiles": [_round(quartiles[0]), _round(quartiles[2])],
        "range": [_round(min(values)), _round(max(values))],
        "n": len(values),
    }


def compare(samples: Samples, key: str, case: str, base: str) -> dict[str, Any]:
    """Return by how much a case is above another: the ratio of medians, its spread, and the difference."""
    pairs = [(a[key], b[key]) for a, b in zip(samples[case], samples[base], strict=False)]
    if not pairs:
        return {"of": case, "over": base, "what": key, "ratio of medians": None}
    ones, others = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "of": case,
        "over": base,
        "what": key,
        "ratio of medians": _round(ones / others),
        "ratios within a round": spread([a / b for a, b in pairs]),
        "difference of medians": _round(ones - others),
    }


def write(
    name: str,
    what: str,
    key: str,
    measured: tuple[Samples, dict[str, str]],
    comparisons: Sequence[tuple[str, str, str]] = (),
    *,
    threads: int | None,
    lines: Sequence[tuple[str, Sequence[tuple[float, str]]]] = (),
    **more: Any,
) -> None:
    """Write ``NAME.json`` and ``NAME.png`` into the folder of results, and print what is asked for.

    Args:
        name: Of the files.
        what: What was measured, in a sentence or two.
        key: The figure that is plotted, with its unit; one of those in a sample.
        measured: What `alternate` returned.
        comparisons: Figure, case and the case that it is compared with.
        threads: The threads that each process was given; none: what it takes by itself.
        lines: Instead of a bar for each case, plot lines: a label, and points of x and the case whose median is y.
        more: Further figures.
    """
    samples, missing = measured
    samples = {case: values for case, values in samples.items() if values}
    figures = {
        case: {k: spread([v[k] for v in values]) for k, first in values[0].items() if isinstance(first, (int, float))}
        for case, values in samples.items()
    }
    record: dict[str, Any] = {
        "header": header(what, threads, max(map(len, samples.values()), default=0)),
        "comparisons": [
            compare(samples, k, case, base) for k, case, base in comparisons if case in samples and base in samples
        ],
        "figures": figures,
        "missing": missing,
        **more,
    }
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record | {"samples": samples}, indent=1) + "\n")
    _plot(folder / f"{name}.png", record["header"], key, samples, lines)
    for case in figures:
        print(f"{case}: {key} {figures[case][key]}")
    for case, reason in missing.items():
        print(f"{case}: missing: {reason}")
    for comparison in record["comparisons"]:
        print(json.dumps(comparison))
    print(json.dumps(record["header"] | more))
    print(f"written: {folder / name}.json, {name}.png")


def header(what: str, threads: int | None, n: int) -> dict[str, Any]:
    """Say what was measured, how, on what, with what, how often and when."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"^model name\s*: (.+)$", cpuinfo, re.M)
    flags = re.search(r"^flags\s*: (.+)$", cpuinfo, re.M)
    units = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
    gpu = "none: not measured on a GPU"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or gpu
    commit = ""
    if shutil.which("git"):
        query = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(query, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "src", "configs"], cwd=ROOT, check=False).returncode:
            commit += ", changed"
    packages = ("torch", "torchvision", "lightning", "numpy")
    return {
        "what": what,
        "how": " ".join(["python", *sys.orig_argv[1:]]),
        "n": n,
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
        "cpu": f"{model[1] if model else platform.processor()}, {CORES} of {os.cpu_count()} cores",
        "units": [unit for unit in units if flags and unit in flags[1].split()],
        "threads": threads or "default",
        "load average": round(os.getloadavg()[0], 2),
        "gpu": gpu,
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _plot(
    path: Path,
    head: Mapping[str, Any],
    key: str,
    samples: Samples,
    lines: Sequence[tuple[str, Sequence[tuple[float, str]]]],
) -> None:
    from matplotlib.figure import Figure  # here: it must not add to the memory from which processes are started

    figure = Figure(figsize=(8, 4.5 if lines else 1.6 + 0.45 * len(samples)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    medians = {case: statistics.median(s[key] for s in values) for case, values in samples.items()}
    if lines:
        for label, points in lines:
            known = [(x, medians[case]) for x, case in points if case in medians]
            axes.plot([x for x, _ in known], [y for _, y in known], marker="o", label=label)
        axes.set(xscale="log", yscale="log", ylabel=key, xlabel="batch size")
        axes.minorticks_off()
        axes.set_xticks([x for x, _ in lines[0][1]], [f"{x:g}" for x, _ in lines[0][1]])
        marks = sorted({medians[case] for _, points in lines for _, case in points if case in medians})
        ticks = [10**e * m for e in range(9) for m in (1, 2, 5) if marks and marks[0] / 2 < 10**e * m < 2 * marks[-1]]
        axes.set_yticks(ticks, [f"{y:,}" for y in ticks])
        axes.grid(alpha=0.3)
        axes.legend()
    else:
        for row, (case, values) in enumerate(samples.items()):
            axes.barh(row, medians[case], color="C0", alpha=0.4)
            axes.plot([s[key] for s in values], [row] * len(values), "k|", markersize=10)
        axes.set_yticks(range(len(samples)), [f"{case}: {medians[case]:.4g}" for case in samples])
        axes.invert_yaxis()
        axes.set(xlabel=f"{key} (bar: median; a stroke for each measurement)")
    axes.set_title(f"{head['cpu']}; {head['threads']} threads; {head['gpu']}; {head['date']}", fontsize=8)
    figure.savefig(path)
