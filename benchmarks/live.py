"""What live weights and steering promise, put to the test: one command for each claim.

    python -m benchmarks.live torn                           # a million reads; writer and readers killed at random
    python -m benchmarks.live staleness                      # no version is older than was asked for
    python -m benchmarks.live overhead --root data           # what they cost a step of configs/speed94.yaml
    python -m benchmarks.live overhead --root data --network small     # and of configs/cifar10.yaml, without a claim
    python -m benchmarks.live acknowledge                    # how long a command takes to be done
    python -m benchmarks.live hostile                        # garbage and 10,000 commands that are refused
    python -m benchmarks.live soak                           # steered, killed, resumed and replayed to the last bit

Figures and claims are printed and written to benchmarks/results/live_NAME.json, or into the folder $OUT; the exit
status is 1 if a claim does not hold. What is measured is said by each function. The options make it shorter, for a
try-out. The fits have the threads of ``OMP_NUM_THREADS``; without it, those of the cores that they may use.

2026-11-22, 2 cores of an Intel Xeon with AMX, torch 2.15.0, lightning 2.6.6, one run each; all claims held. ``torn``
(one thread): 1,001,450 reads in 6 minutes, 713 kills of the writer and 698 of readers. ``staleness`` (two threads, as
the rest): 100,000 reads. ``overhead --root data --steps 330``: 0.992 (p99 0.989). ``acknowledge``: 42 ms, at most 43 ms
above the longest step met. ``soak --steps 1300 --seed 1`` (one thread): 24 commands, 2 kills, three equal hashes.
``hostile`` (one thread, 2026-11-26, torch 2.14.1, others used the machine): 1.009, median of 103 bursts in 12 minutes.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.paired import CORES, ROOT, header, spread
from benchmarks.soak import digest
from src.callbacks.publish import Publish
from src.callbacks.steering import Steering
from src.cli import main
from src.errors import Failure, UsageError
from src.live.commands import LOCK, Command, new_command, send
from src.live.journal import Journal
from src.live.liveness import is_held, lives
from src.live.shared_memory import Clock, is_own, place, reclaim
from src.live.weights import EndedError, LiveWeights, Publisher, StaleError

THREADS = int(os.environ.get("OMP_NUM_THREADS") or CORES)
EVERY = 10
"""Optimizer steps from one publication to the next, as a fit has it by default."""
BURST = 100
"""Files that are dropped into a hostile inbox at once."""
SMALL = ("--data=Shapes10", "--data.train_images=20500", "--data.val_size=500", "--data.test_images=10",
         "--data.batch_size=64", "--trainer.max_epochs=100000", "--trainer.limit_val_batches=0",
         "--trainer.enable_progress_bar=false")  # fmt: skip
"""A fit of the small CNN that does not end by itself."""


class Steps(pl.Callback):
    """Appends a line for each batch: optimizer steps taken, nanoseconds, the loss to the last bit.

    Args:
        path: The file.
    """

    between_chunks = False  # so that the fit takes the steps it takes without this callback

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab", buffering=0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write it, by one write that no kill can tear."""
        line = f"{trainer.global_step} {time.monotonic_ns()} {float(outputs['loss']).hex()}\n"
        self.file.write(line.encode())


class Toggle(pl.Callback):
    """Turns publishing and steering off and on in blocks of steps, and writes down when each step began.

    A block has its publication in its middle, so that the thread that writes it is done before the block ends.

    Args:
        path: The file to write at the end: for each step its number, when it began, in seconds, whether they are on,
            and whether it begins an epoch.
    """

    between_chunks = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on = True
        self.begins: list[tuple[int, float, bool, bool]] = []
        self._kept: tuple[Any, Any] = (None, None)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Turn them off or on when a block begins; note the time when an optimizer step does."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        if step % EVERY == EVERY // 2:
            self._turn(trainer, step // EVERY % 2 == 1)
        self.begins.append((step, time.perf_counter(), self.on, batch_idx == 0))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turn them on, so that they end as they should, and write it all down."""
        self._turn(trainer, True)
        self.path.write_text(json.dumps(self.begins))

    def _turn(self, trainer: Any, on: bool) -> None:
        if on == self.on:
            return
        self.on = on
        callbacks = trainer.callbacks
        publish: Any = next(c for c in callbacks if isinstance(c, Publish))
        inbox: Any = next(c for c in callbacks if isinstance(c, Steering))._inbox
        loop = trainer.fit_loop.epoch_loop
        if on:
            publish.publisher, loop.boundary = self._kept
            publish._step = trainer.global_step  # nothing is to be made up for
            del inbox._next
        else:
            self._kept = publish.publisher, loop.boundary
            publish.publisher = loop.boundary = None
            inbox._next = lambda: None  # its thread sees an empty folder, without looking


class Fit:
    """A fit in a process of its own, which does not outlive the benchmark.

    Args:
        folder: Where its runs are; `run` is the first of them.
        words: The command line behind ``fit``.
    """

    def __init__(self, folder: Path, *words: str | Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run = folder / "lightning_logs" / "version_0"
        self.last = self.run / "checkpoints" / "last.ckpt"
        self.output = folder / "output.txt"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "src", "fit", *map(str, words)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Wait until something is so; the fit must not end before."""
        while not what():
            if self.process.poll() is not None:
                raise SystemExit(f"a fit ended too early: {self.output.read_text()[-3000:]}")
            time.sleep(0.005)

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        if self.process.wait() != 0:
            raise SystemExit(f"a fit failed: {self.output.read_text()[-3000:]}")

    def close(self) -> None:
        """Kill it, if it still runs."""
        self.process.kill()
        self.process.wait()


def steps_of(path: Path) -> list[tuple[int, int, str]]:
    """Read what `Steps` has written."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return [(int(step), int(ns), loss) for step, ns, loss in lines]


def with_callback(name: str, path: Path) -> str:
    """Return the option of a fit that adds a callback of this file."""
    callback = {"class_path": f"benchmarks.live.{name}", "init_args": {"path": str(path)}}
    return f"--trainer.callbacks={json.dumps([callback])}"


def start_small(folder: Path, *words: str) -> tuple[Fit, Path]:
    """Start a fit of the small CNN that does not end by itself; return it when it trains, and the file of `Steps`."""
    path = folder / "steps.txt"
    folder.mkdir()
    fit = Fit(folder, *SMALL, f"--trainer.default_root_dir={folder}", with_callback("Steps", path), *words)
    fit.wait_for(lambda: lives(fit.run / "live" / LOCK) and path.stat().st_size > 1000)
    return fit, path


def tell(name: str, what: Callable[..., Any], n: int, figures: dict[str, Any], claims: dict[str, bool]) -> bool:
    """Write and print what came out; return whether all claims hold."""
    record = {"header": header(" ".join((what.__doc__ or "").split()), THREADS, n), "claims": claims, **figures}
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    print(f"written: {folder / f'live_{name}.json'}", flush=True)
    return all(claims.values())


def percentile(values: Sequence[float], of: int) -> float:
    """Return a percentile."""
    return statistics.quantiles(values, n=100, method="inclusive")[of - 1]


def make_tensors() -> dict[str, Tensor]:
    """Return 196 kB of tensors; those with the largest elements first, as they lie in a version."""
    return {
        "counter": torch.zeros(2_000, dtype=torch.int64),
        "weight": torch.zeros(150, 150),
        "bias": torch.zeros(20_000),
        "mask": torch.zeros(10_000, dtype=torch.uint8),
    }


def fill(tensors: dict[str, Tensor], step: int) -> None:
    """Give every element the value of a step."""
    for tensor in tensors.values():
        tensor.fill_(_value(tensor, step))


def are_of(tensors: dict[str, Tensor], step: int) -> bool:
    """Return whether every element has the value of a step."""
    return all(bool((tensor == _value(tensor, step)).all()) for tensor in tensors.values())


def _value(tensor: Tensor, step: int) -> int:
    return step % 251 if tensor.dtype == torch.uint8 else step


def publish_forever(folder: Path, cells: Any, at: int) -> None:
    """Publish as fast as it goes; write each step and its hash, computed here, into ``log`` before.

    The first cell has the last step, from which the next process goes on; that at `at` counts publications.
    """
    tensors, publisher = make_tensors(), Publisher(folder / "live", {})
    with (folder / "log").open("ab", buffering=0) as log:
        while publisher.failure is None:
            cells[0] = step = cells[0] + 1
            fill(tensors, step)
            sha256 = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()
            log.write(f"{step} {sha256}\n".encode())
            publisher.tick(step)
            cells[at] += publisher.publish(tensors, step, 0)
    raise SystemExit(publisher.failure)


def read_forever(folder: Path, cells: Any, at: int) -> None:
    """Read as fast as it goes; write step and hash of each version into a file of this reader's own.

    The cells from `at` on count reads, and those that are torn or no version at all. Why it could not be opened, if not
    because no writer is there, goes into another file.
    """
    os.nice(5)  # so that there is much to read
    last = ""
    with (folder / f"seen{at}").open("ab", buffering=0) as seen:
        while True:
            try:
                reader = LiveWeights.open(folder)
            except EndedError:
                time.sleep(0.001)
                continue
            except Failure as error:
                with (folder / f"odd{at}").open("a") as file:
                    file.write(f"{error}\n".replace(str(folder), "RUN"))
                continue
            with reader, contextlib.suppress(EndedError):
                while random.random() < 0.999:
                    try:
                        version = reader.read(verify=True)
                    except EndedError:
                        raise
                    except Failure:
                        cells[at + 1] += 1
                    else:
                        cells[at + 1] += not are_of(version.state, version.step)
                        if (line := f"{version.step} {version.sha256}\n") != last:
                            seen.write(line.encode())
                            last = line
                    cells[at] += 1


def torn(o: argparse.Namespace) -> bool:
    """Reads of live weights while writer and readers are killed with SIGKILL at random moments: is one torn?

    The writer publishes 196 kB as fast as it can and writes a hash of its own into a log before; readers read, verify,
    and look at each value. The control is the same in plain shared memory, written in place.
    """
    reads, readers, rng = o.reads or 1_000_000, o.readers, random.Random(o.seed)
    context = multiprocessing.get_context("forkserver")  # a process is there at once: so it can be killed often
    context.set_forkserver_preload(["benchmarks.soak", "src.cli"])
    cells: Any = context.RawArray(ctypes.c_uint64, 2 + 2 * readers)
    kills: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def start(i: int) -> Any:
            what, at = (read_forever, 2 * i) if i else (publish_forever, 1)
            process = context.Process(target=what, args=(folder, cells, at), daemon=True)
            process.start()
            return process

        processes, begun = [start(i) for i in range(readers + 1)], time.monotonic()
        try:
            while sum(cells[2::2]) < reads:
                time.sleep(rng.uniform(0, 0.4))
                i = rng.choice([0, rng.randint(1, readers)])
                if any(process.exitcode is not None for process in processes):
                    raise SystemExit("a process ended by itself")
                processes[i].kill()
                processes[i].join()
                kills["reader" if i else "writer"] += 1
                kills["writer, in the middle of a version"] += not i and _is_cut_short()
                processes[i] = start(i)
        finally:
            for process in processes:
                process.kill()
                process.join()
        seconds = time.monotonic() - begun
        left_by_kill = len(_abandoned())
        reclaim()
        left = len(_abandoned())
        log = dict(line.split() for line in (folder / "log").read_text().splitlines())
        seen = {tuple(line.split()) for path in folder.glob("seen*") for line in path.read_text().splitlines()}
        odd = Counter(line for path in folder.glob("odd*") for line in path.read_text().splitlines())
        wrong = sum(log.get(step) != sha256 for step, sha256 in seen)
    in_place = _read_in_place(context, readers, seconds=4.0)
    figures = {
        "reads": sum(cells[2::2]),
        "torn": sum(cells[3::2]),
        "versions seen": len(seen),
        "versions seen with another hash than the log": wrong,
        "versions published": cells[1],
        "kills": dict(kills),
        "segments left before they are reclaimed": left_by_kill,
        "segments left": left,
        "not opened, for another reason than that no writer was there": dict(odd),
        "reads per second": round(sum(cells[2::2]) / seconds),
        "seconds": round(seconds, 1),
        "control, in place: reads, torn": in_place,
    }
    claims = {
        f"none of {figures['reads']:,} reads is torn": figures["torn"] == 0,
        f"each of {len(seen):,} versions has the hash that the writer has logged": wrong == 0 and len(seen) > 0,
        "no segment is left": left == 0,
        "each open that is refused says that no writer is there": not odd,
        "plain shared memory is torn, and that is noticed": in_place[1] > 0,
    }
    return tell("live_torn", torn, figures["reads"], figures, claims)


def _abandoned() -> list[Path]:
    """Return the segments that no living process holds."""
    found = []
    for path in place().glob("live-cifar10-*"):
        with contextlib.suppress(OSError):
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            if is_own(path) and not is_held(folder):
                found.append(path)
            os.close(folder)
    return found


def _is_cut_short() -> bool:
    """Return whether a writer that is no more has left half a version."""
    return any((segment / "partial").exists() for segment in _abandoned())


def _read_in_place(context: Any, readers: int, seconds: float) -> list[int]:
    """Return the reads of tensors that another process writes in place, and those of them that are torn."""
    shared = make_tensors()
    for tensor in shared.values():
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    cells = context.RawArray(ctypes.c_uint64, 2 * readers)
    parts = [(_copy_in_place, (shared, seconds, cells, 2 * i)) for i in range(readers)]
    processes = [context.Process(target=f, args=args) for f, args in [(_fill_in_place, (shared, seconds)), *parts]]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [sum(cells[0::2]), sum(cells[1::2])]


def _fill_in_place(shared: dict[str, Tensor], seconds: float) -> None:
    end = time.monotonic() + seconds
    for step in count():
        fill(shared, step)
        if time.monotonic() > end:
            return


def _copy_in_place(shared: dict[str, Tensor], seconds: float, cells: Any, at: int) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        copied = {name: tensor.clone() for name, tensor in shared.items()}
        cells[at] += 1
        cells[at + 1] += not are_of(copied, int(copied["counter"][0]))


def _train(folder: Path) -> None:
    """Take steps of 0.2 to 1 ms, and publish as a fit does."""
    rng, tensors, publisher = random.Random(0), make_tensors(), Publisher(folder / "live", {})
    for step in count(1):
        time.sleep(rng.uniform(2e-4, 1e-3))
        publisher.tick(step)
        if step % EVERY == 0:
            fill(tensors, step)
            publisher.publish(tensors, step, 0)


def staleness(o: argparse.Namespace) -> bool:
    """Reads with ``max_age_steps`` of 0 to 30, of a writer that publishes every 10 steps of 0.2 to 1 ms.

    The age is that by the writer's clock before the call: no version may be older. A refusal is wrong if the version
    that it names is not too old by the clock after the call; and neither may be older than one published before it.
    """
    reads, rng = o.reads or 100_000, random.Random(o.seed)
    context = multiprocessing.get_context("forkserver")
    found = dict.fromkeys(("versions", "versions too old", "refusals",
                           "refusals that are wrong", "older than one published before"), 0)  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = context.Process(target=_train, args=(folder,), daemon=True)
        process.start()
        while not (folder / "live" / "weights.json").exists():
            time.sleep(0.01)
        try:
            with LiveWeights.open(folder) as reader:
                clock = Clock(reader.segment / "clock", writes=False)
                reader.wait(EVERY, timeout=60)
                begun, first = time.monotonic(), reader.step
                for _ in range(reads):
                    most = rng.randint(0, 30)
                    known, before = clock.published or 0, reader.step
                    try:
                        version = reader.read(max_age_steps=most)
                    except StaleError as error:
                        match = re.search(r"of step ([\d,]+), ", str(error))
                        assert match is not None
                        step = int(match[1].replace(",", ""))
                        found["refusals"] += 1
                        found["refusals that are wrong"] += reader.step - step <= most
                    else:
                        step = version.step
                        found["versions"] += 1
                        found["versions too old"] += before - step > most
                    found["older than one published before"] += step < known
                seconds, steps = time.monotonic() - begun, reader.step - first
                clock.close()
        finally:
            process.kill()
            process.join()
    reclaim()
    figures = {**found, "reads": reads, "seconds": round(seconds, 1), "steps of the writer": steps}
    claims = {
        f"none of {found['versions']:,} versions is older than was asked for": found["versions too old"] == 0,
        "none is older than one published before the call": found["older than one published before"] == 0,
        f"none of {found['refusals']:,} refusals is wrong": found["refusals that are wrong"] == 0 < found["refusals"],
    }
    return tell("live_staleness", staleness, reads, figures, claims)


def overhead(o: argparse.Namespace) -> bool:
    """An optimizer step with publishing (every 10 steps) and steering, and without: blocks of 10 steps in one fit.

    Images are of full size; there is no validation, checkpoint or bar. Steps that begin or end an epoch are left out,
    and the first 20. Off are: publishing, the look between two steps, and that into the inbox; its thread goes on. The
    losses are those of two fits, one of which has neither.
    """
    config, steps = {"speed94": ("speed94", o.steps or 400), "small": ("cifar10", o.steps or 4000)}[o.network]
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [
            *(f"--config={ROOT / 'configs' / f'{config}.yaml'}", f"--data.root={o.root}", "--data.small_epochs=0"),
            *("--trainer.max_epochs=100000", "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0"),
            *("--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"),
        ]
        losses = []
        for case, more in (("with", ()), ("without", ("--publish_every_n_steps=null", "--steering=false"))):
            path = folder / f"{case}.txt"
            last = f"--trainer.max_steps={EVERY + 2}"
            root = f"--trainer.default_root_dir={folder / case}"
            with contextlib.closing(Fit(folder / case, *words, last, root, with_callback("Steps", path), *more)) as fit:
                fit.finish()
            losses.append([(step, loss) for step, _, loss in steps_of(path)])
        toggle = with_callback("Toggle", folder / "toggle.json")
        last = f"--trainer.max_steps={steps}"
        if status := main(["fit", *words, last, f"--trainer.default_root_dir={folder / 'toggled'}", toggle]):
            raise SystemExit(status)
        begins = json.loads((folder / "toggle.json").read_text())
    blocks: dict[int, tuple[bool, list[float]]] = {}
    for (step, begin, on, first), (_, end, _, last) in pairwise(begins):
        if step >= 2 * EVERY and not first and not last:
            blocks.setdefault((step - EVERY // 2) // EVERY, (on, []))[1].append(1e3 * (end - begin))
    with_both = [ms for on, block in blocks.values() if on for ms in block]
    without = [ms for on, block in blocks.values() if not on for ms in block]
    medians = {number: (on, statistics.median(block)) for number, (on, block) in blocks.items()}
    neighbours = [(medians[i], medians[i + 1]) for i in medians if i + 1 in medians]
    pairs = [a / b if on else b / a for (on, a), (_, b) in neighbours]
    median = statistics.median(with_both) / statistics.median(without)
    p99s = [percentile(values, 99) for values in (with_both, without)]
    p99 = p99s[0] / p99s[1]
    figures = {
        "config": config,
        "ms a step, with": spread(with_both),
        "ms a step, without": spread(without),
        "p99 ms, with and without": [round(value, 3) for value in p99s],
        "ratio of medians": round(median, 4),
        "ratio of p99": round(p99, 4),
        "ratios of neighbouring blocks": spread(pairs),
        "losses compared": len(losses[0]),
    }
    same = losses[0] == losses[1] and len(losses[0]) > EVERY
    claims = {f"{len(losses[0])} losses are the same, to the last bit": same}
    if o.network == "speed94":
        claims |= {"median at most 1.01": median <= 1.01, "p99 at most 1.03": p99 <= 1.03}
    return tell(
        "live_overhead" if o.network == "speed94" else "overhead_small", overhead, len(without), figures, claims
    )


def acknowledge(o: argparse.Namespace) -> bool:
    """From sending a command to its answer: a new lr for the small CNN at batch 64, one after another.

    The claim is the longest step that the command has met, and 100 ms. The journal is on the disk before the answer.
    """
    commands, rng = o.commands or 100, random.Random(o.seed)
    with tempfile.TemporaryDirectory() as name:
        fit, path = start_small(Path(name) / "run")
        with contextlib.closing(fit):
            spans = []
            for _ in range(commands):
                time.sleep(rng.uniform(0, 0.1))
                begun = time.monotonic_ns()
                send(fit.run, new_command(lr=rng.uniform(0.001, 0.02)))
                spans.append((begun, time.monotonic_ns()))
            send(fit.run, new_command("stop"))
            fit.finish()
        ends = [ns for _, ns, _ in steps_of(path)]
    lengths = [b - a for a, b in pairwise(ends)]
    latencies = [(end - begun) / 1e6 for begun, end in spans]
    met = []
    for begun, end in spans:
        first, last = bisect_left(ends, begun), bisect_left(ends, end)
        met.append(max(lengths[first - 1 : last]) / 1e6)
    above = [latency - longest for latency, longest in zip(latencies, met, strict=True)]
    figures = {
        "ms to the answer": spread(latencies),
        "p50, p95, max": [
            round(v, 1) for v in (statistics.median(latencies), percentile(latencies, 95), max(latencies))
        ],
        "ms above the longest step met": spread(above),
        "ms a step": spread([length / 1e6 for length in lengths]),
        "p99 of a step": round(percentile(lengths, 99) / 1e6, 2),
    }
    claims = {f"each of {commands} is answered within a step and 100 ms": max(above) <= 100}
    return tell("live_acknowledge", acknowledge, commands, figures, claims)


def bad_commands(rng: random.Random, flood: int) -> list[bytes | str]:
    """Return contents of files that are to be refused, in random order; a text names what is no plain file."""
    names = ("lr", "momentum", "weight_decay", "batch_size", "label_smoothing", "log_every_n_steps")
    values = ("NaN", "Infinity", "-Infinity", "1e999", "-1", "1e300", "1" * 400, '"0.1"', "null", "true", "[0.1]", "{}")
    texts = [f'{{"set": {{"{name}": {value}}}}}' for name in names for value in values]
    unknown = ("__class__", "learning_rate", "../../lr", "x" * 60_000, "lr\\ud800", "")
    texts += [f'{{"set": {{"{name}": 0.1}}}}' for name in unknown]
    texts += [f'{{"set": {{"lr": {"[" * depth}{"]" * depth}}}}}' for depth in (50, *range(900, 1000), 5_000, 30_000)]
    texts += [
        *('{"do": "explode"}', '{"do": 3}', '{"do": "resume"}', '{"do": "stop", "set": {"lr": 0.1}}', '{"set": {}}'),
        *("{}", "[]", "3", "null", '"stop"', "", " ", '{"set": [0.1]}', '{"set": {"lr": 0.1}, "pickle": "x"}'),
        *('{"id": "../../x", "set": {"lr": 0.1}}', '{"id": 7, "set": {"lr": 0.1}}', '{"set": {"lr": 0.1, "lr": -1}}'),
        *(f'{{"actor": "{"x" * 300}", "set": {{"lr": 0.1}}}}', f'{{"set": {{"lr": 1{"0" * 60_000}}}}}'),
        *('{"set": {"lr": 0.1}', '{"set": {"lr": 0.', '{"set": {"lr": 0.1}}{"set": {"lr": 0.1}}', "[" * 60_000),
        *('{"set": ' * 8_000, f'{" " * 66_000}{{"set": {{"lr": 0.1}}}}', '{"set": {"momentum": 0.5, "lr": -1}}'),
    ]
    contents: list[bytes | str] = [text.encode() for text in texts]
    contents += [rng.randbytes(rng.randint(1, 70_000)) for _ in range(20)]
    contents += [pickle.dumps({"set": {"lr": 0.1}}), bytes(1000), b'\xff\xfe{"set": {"lr": 0.1}}']
    contents += ["link to ../command", "link to /dev/zero", "link to nothing", "folder", "pipe", "1 GB", "two writes"]
    contents += [b'{"set": {"lr": -1}}'] * flood
    rng.shuffle(contents)
    return contents


def drop(path: Path, content: bytes | str) -> None:
    """Put what is no command into an inbox."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content.startswith("link to "):
        path.symlink_to(content.removeprefix("link to "))
    elif content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "1 GB":
        with path.open("wb") as file:
            file.truncate(2**30)
    else:
        with path.open("wb", buffering=0) as file:
            file.write(b'{"set": {"lr"')
            time.sleep(0.1)
            file.write(b": -1}}")


def be_hostile(run: Path, contents: list[bytes | str]) -> tuple[Counter[str], list[tuple[int, int, int]]]:
    """Fill the inbox of a run with what is to be refused, and collect the answers; then send some ids again.

    Returns:
        How often each was answered; and for each burst, in nanoseconds, when it began, when the last answer to it was
        there, and when the quiet after it ended.
    """
    inbox, answers = run / "live" / "inbox", run / "live" / "answers"
    answered: Counter[str] = Counter()
    spans = []

    def collect(total: int) -> None:
        deadline = time.monotonic() + 60 + total / 10
        while answered.total() < total and time.monotonic() < deadline:
            time.sleep(0.1)
            for path in list(answers.iterdir()):
                if not path.name.startswith("."):
                    answered[path.stem if "error" in json.loads(path.read_bytes()) else "accepted"] += 1
                    path.unlink()

    (run / "live" / "command").write_text('{"set": {"lr": 0.1}}')
    (inbox / "garbage").write_bytes(bytes(1000))  # such names are not looked at
    (inbox / ".hidden.json").write_text("{}")
    for first in range(0, len(contents), BURST):
        begun = time.monotonic_ns()
        for i, content in enumerate(contents[first : first + BURST], first):
            drop(inbox / f"{i:06}.json", content)
        collect(min(first + BURST, len(contents)))
        end = time.monotonic_ns()
        time.sleep((end - begun) / 2e9)
        spans.append((begun, end, time.monotonic_ns()))
    again = [i for i, content in enumerate(contents) if content == b'{"set": {"lr": -1}}'][:20]
    for i in again:
        drop(inbox / f"{i:06}.json", b'{"set": {"lr": 0.001}}')  # the id counts: it is not done
    collect(len(contents) + len(again))
    return answered, spans


def hostile(o: argparse.Namespace) -> bool:
    """The small CNN at batch 64, with an inbox that another process fills with what is to be refused.

    Garbage, half-written files, numbers that cannot be, unknown names, links, a file of 1 GB, 10,000 commands, and ids
    sent again. It comes in bursts of 100 files: the steps while one is being refused are compared with those of the
    quiet after it, half as long. The losses are compared with those of a fit that is left alone.
    """
    contents = bad_commands(random.Random(o.seed), o.commands or 10_000)
    with tempfile.TemporaryDirectory() as name:
        fit, path = start_small(Path(name) / "hostile")
        with contextlib.closing(fit):
            answered, spans = be_hostile(fit.run, contents)
            try:
                send(fit.run, new_command("stop"))
            except TimeoutError:  # it takes no commands any more
                fit.process.kill()
            well = fit.process.wait() == 0
        theirs, journal = steps_of(path), Journal(fit.run / "live" / "journal.jsonl").read()
        fit, path = start_small(Path(name) / "quiet", f"--trainer.max_steps={min(theirs[-1][0], 2000)}")
        with contextlib.closing(fit):
            fit.finish()
        ours = steps_of(path)
    pairs = [(_steps_within(theirs, begun, end), _steps_within(theirs, end, quiet)) for begun, end, quiet in spans]
    noisy, quiet = ([ms for pair in pairs for ms in pair[i]] for i in (0, 1))
    ratios = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    ids = Counter(f"{i:06}" for i in range(len(contents)))
    refused = Counter(line["id"] for line in journal if line["kind"] == "refused")
    other = Counter(line["kind"] for line in journal if line["kind"] != "refused")
    again = answered - ids
    differ = sum(a[::2] != b[::2] for a, b in zip(theirs, ours, strict=False))
    figures = {
        "dropped": len(contents),
        "answered": answered.total() - again.total(),
        "sent again and answered again": again.total(),
        "lines of kind refused": refused.total(),
        "other lines": dict(other),
        "not journaled": [str(contents[int(id)])[:80] for id in sorted(ids.keys() - refused.keys())[:10]],
        "refused a second": round(len(contents) / sum((end - begun) / 1e9 for begun, end, _ in spans), 1),
        "losses compared": len(ours),
        "losses that differ": differ,
        "ms a step, hostile": spread(noisy),
        "ms a step, quiet": spread(quiet),
        "ratio of p99": round(percentile(noisy, 99) / percentile(quiet, 99), 4),
        "ratio of means": round(statistics.fmean(noisy) / statistics.fmean(quiet), 4),
        "ratios of medians, of each burst and the quiet after it": spread(ratios),
    }
    claims = {
        "the fit ends well, as it is asked to": well,
        "the losses are those of a fit that is left alone, to the last bit": len(ours) > 0 == differ,
        "each refusal is answered once": (
            ids - answered == Counter() and set(again.values()) == {1} and again.keys() < ids.keys()
        ),
        "each refusal is journaled once": refused == ids,
        "nothing else is in the journal": other == {"stop": 1},
        "the median step takes at most 1.03 of the time": statistics.median(ratios) <= 1.03,
    }
    return tell("live_hostile", hostile, len(ratios), figures, claims)


def _steps_within(steps: list[tuple[int, int, str]], begun: int, end: int) -> list[float]:
    """Return the milliseconds of the steps that were taken between two moments."""
    return [(b[1] - a[1]) / 1e6 for a, b in pairwise(steps) if begun <= a[1] and b[1] <= end]


def mixed_commands(rng: random.Random, least: int) -> list[Command]:
    """Return commands of all kinds in random order; a pause is followed by a change, and that by going on."""
    groups: list[list[Command]] = []
    while sum(map(len, groups)) < least:
        groups += [
            [new_command(lr=rng.uniform(0.005, 0.05))],
            [new_command(momentum=rng.choice([0.8, 0.85, 0.95]))],
            [new_command(weight_decay=rng.choice([0.0, 0.0001, 0.01]))],
            [new_command(label_smoothing=rng.choice([0.0, 0.1, 0.2]))],
            [new_command(log_every_n_steps=rng.randint(1, 7))],
            [new_command(batch_size=rng.choice([8, 12, 24, 31]))],
            [new_command(lr=rng.uniform(0.005, 0.05), batch_size=16, momentum=0.9)],
            [new_command("evaluate")],
            [new_command("checkpoint")],
            [new_command("pause"), new_command(lr=rng.uniform(0.005, 0.05)), new_command("resume")],
        ]
    rng.shuffle(groups)
    return [command for group in groups for command in group]


def soak(o: argparse.Namespace) -> bool:
    """A run that is steered at random moments, killed twice with SIGKILL and resumed; and two replays from scratch.

    The CNN with batch norm and dropout at batch 16, OneCycle, a checkpoint every 7 steps. A command that a kill has
    left unanswered is sent again with its id. The second replay is killed once and resumed.
    """
    rng = random.Random(o.seed)
    commands, epochs = mixed_commands(rng, o.commands or 24), -(-(o.steps or 3000) // 100)
    augment = [{"class_path": "src.data.RandomCrop"}, {"class_path": "src.data.RandomFlip"}]
    words = [
        *("--data=Shapes10", "--data.train_images=1650", "--data.val_size=50", "--data.test_images=10"),
        *("--data.batch_size=16", f"--data.augment={json.dumps(augment)}", f"--trainer.max_epochs={epochs}"),
        *("--model.network.norm=batch", "--model.network.dropout=0.2", "--model.lr_scheduler=OneCycle"),
        *("--checkpoint.every_n_steps=7", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=3"),
    ]
    kill_at = {rng.randrange(len(commands) // 4, len(commands) // 2),
               rng.randrange(len(commands) // 2, len(commands) - 3)}  # fmt: skip
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as fits:
        folder = Path(name)

        def start(case: str, *words: str | Path) -> Fit:
            fit = fits.enter_context(contextlib.closing(Fit(folder / case, *words)))
            fit.wait_for(lambda: lives(fit.run / "live" / LOCK))
            return fit

        def go_on(killed: Fit) -> Fit:
            if killed.process.returncode != -signal.SIGKILL:
                killed.finish()
            outcomes["kills"] += 1
            return start("steered", "--ckpt_path", killed.last)

        fit = start("steered", *words, f"--trainer.default_root_dir={folder / 'steered'}")
        fit.wait_for(fit.last.is_file)
        timers = []
        for i, command in enumerate(commands):
            time.sleep(rng.uniform(0, 0.4))
            if i in kill_at:
                timers.append(threading.Timer(rng.uniform(0, 0.5), fit.process.kill))
                timers[-1].start()
            while True:
                try:
                    send(fit.run, command)
                    outcomes["done"] += 1
                except UsageError:
                    outcomes["refused"] += 1
                except Failure:
                    if fit.process.wait(timeout=60) == 0:
                        outcomes["sent too late"] += 1
                        break
                    fit = go_on(fit)
                    continue
                break
        for timer in timers:
            timer.join()
        if fit.process.wait() != 0:
            fit = go_on(fit)
        fit.finish()
        run, states = fit.run, [_state(fit)]
        kinds = Counter(line["kind"] for line in Journal(run / "live" / "journal.jsonl").read())
        seconds = 0.0
        for case in ("replayed", "replayed and killed"):
            root = folder / case
            again = [f"--config={run / 'config.yaml'}", f"--replay={run}", f"--trainer.default_root_dir={root}"]
            fit = start(case, *again)
            begun = time.monotonic()
            if case == "replayed and killed":
                fit.wait_for(fit.last.is_file)
                time.sleep(rng.uniform(0.1, 0.8) * seconds)
                fit.process.kill()
                outcomes["kills of the replay"] += fit.process.wait() < 0
                outcomes["step of that kill's checkpoint"] = _state(fit)["step"]
                fit = start(case, "--ckpt_path", fit.last)
            fit.finish()
            seconds = time.monotonic() - begun
            states.append(_state(fit))
            outcomes["warnings of the replays"] += fit.output.read_text().count("warning:")
    figures = {
        "commands": len(commands),
        **outcomes,
        "lines of the journal": dict(kinds),
        "steps": states[0]["step"],
        "state_dict, SHA-256": [state["weights"] for state in states],
        "optimizer, SHA-256": [state["optimizer"] for state in states],
    }
    claims = {
        f"{outcomes['done'] + outcomes['refused']} commands, at least 20, all sent before the end": (
            outcomes["done"] + outcomes["refused"] == len(commands) >= 20
        ),
        "killed twice, and the replay once": outcomes["kills"] == 2 and outcomes["kills of the replay"] == 1,
        "the weights of all three are the same, to the last bit": all(s == states[0] for s in states),
        "the replays warn of nothing": outcomes["warnings of the replays"] == 0,
    }
    return tell("live_soak", soak, 1, figures, claims)


def _state(fit: Fit) -> dict[str, Any]:
    checkpoint = torch.load(fit.last, weights_only=True)
    weights, optimizer = digest(checkpoint["state_dict"]), digest(checkpoint["optimizer_states"])
    return {"step": checkpoint["global_step"], "weights": weights, "optimizer": optimizer}


MEASUREMENTS = {f.__name__: f for f in (torn, staleness, overhead, acknowledge, hostile, soak)}


def command() -> int:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=MEASUREMENTS, metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--reads", type=int, help="of torn (default: 1,000,000) and staleness (100,000)")
    parser.add_argument("--readers", type=int, default=4, help="of torn")
    parser.add_argument("--root", type=lambda p: Path(p).resolve(), default=Path("data").resolve(), help="of CIFAR-10")
    parser.add_argument("--network", choices=("speed94", "small"), default="speed94", help="of overhead")
    parser.add_argument("--steps", type=int, help="of overhead (400; small: 4000), of soak (3000, at batch 16)")
    parser.add_argument("--commands", type=int, help="of acknowledge (100), hostile (10,000), soak (at least 24)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    o = parser.parse_args()
    return 1 if False in [MEASUREMENTS[name](o) for name in o.names] else 0


if __name__ == "__main__":
    sys.exit(command())
