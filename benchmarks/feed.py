"""What a fit that is fed while it trains promises, put to the test: one command for each claim.

    python -m benchmarks.feed soak --root data        # 3 producers, 5 % of it bad, killed twice; and its replay
    python -m benchmarks.feed latency --root data     # from the rename of an image to the step at which it joins
    python -m benchmarks.feed overhead --root data    # what it costs a step while images come
    python -m benchmarks.feed idle --root data        # and while none does

All train configs/cifar10.yaml. Figures and claims are printed and written to benchmarks/results/feed_NAME.json, or into
the folder $OUT; the exit status is 1 if a claim does not hold. What is measured is said by each function. The fits have
the threads of ``OMP_NUM_THREADS``; without it, one, so that a second core is left to the process that decodes.

2026-11-26, 2 cores of an Intel Xeon with AMX that others used too (load 3.5), torch 2.14.1, lightning 2.6.6, one run
each, 23 to 33 ms a step. ``soak``: 10,467 images and 585 bad ones, 2 kills, 3,664 steps; all claims held. ``latency
--images 120``: p95 8 steps (0.31 s). ``idle --steps 5000``: 1.0036, after a run of 3,500 steps with 1.0073: noise is
as large as the bound. ``overhead``, ratio of medians (of means): ``--rate 100 --shard 100 --blocks 12`` 1.003 (1.010);
``--rate 4 --blocks 12`` 1.011 (1.038); ``--rate 100 --blocks 10``, files of one image, 1.095 (1.129), which fails. All
but ``latency`` and the last were measured before segments came a quarter of a second apart.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import lightning.pytorch as pl
import numpy as np
from PIL import Image

from benchmarks.live import Fit, percentile, tell
from benchmarks.paired import ROOT, spread
from benchmarks.soak import digest
from src.checkpoint_io import read
from src.live.commands import LOCK
from src.live.feed import offer, offer_shard
from src.live.journal import Journal
from src.live.liveness import lives
from src.live.segments import read_segment, segment_path
from src.live.shards import MAX_IMAGE_BYTES

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
REASONS = {
    "unknown class": r"there is no class ",
    "undecodable": r"it is not an image that can be read",
    "truncated": r"truncated|damaged",
    "too large": r"bytes; .* are the most|more than [\d,]+( pixels)?",
    "duplicate": r"its pixels are those of ",
}
"""What the journal says of files that are bad in some way."""


class Draws(pl.Callback):
    """Appends a line for each batch: optimizer steps taken before, epoch, nanoseconds, ids.

    Args:
        path: The file.
        ids: Whether to write the ids.
    """

    between_chunks = False  # so that the fit takes the steps it takes without this callback

    def __init__(self, path: Path, ids: bool = True) -> None:
        self.ids = ids
        self.file = path.open("ab", buffering=0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write it, by one write that no kill can tear."""
        ids = batch.ids.tolist() if self.ids else []
        line = json.dumps([trainer.global_step, trainer.current_epoch, time.monotonic_ns(), ids])
        self.file.write(line.encode() + b"\n")


class Toggle(pl.Callback):
    """Turns what is there of a feed off and on in blocks of steps, and writes down when each step began.

    Off are: what the loader and the look between two steps do because of it, and the process beside the fit, which is
    stopped.

    Args:
        path: The file to write at the end: for each step when it began, in seconds, those that the thread has had of a
            processor until then, whether it is on, and its block.
        every: Steps of a block.
    """

    between_chunks = False

    def __init__(self, path: Path, every: int = 50) -> None:
        self.path, self.every = path, every
        self.begins: list[tuple[float, float, bool, int]] = []
        self._kept: tuple[Any, Any] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Turn it off or on when a block begins."""
        block, place = divmod(trainer.global_step, self.every)
        if not place:
            self._turn(trainer, block % 2 == 1)
        counted = block if place > 1 and batch_idx > 1 else -1
        self.begins.append((time.perf_counter(), time.thread_time(), self._kept is None, counted))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turn it on, so that it ends as it should, and write it all down."""
        self._turn(trainer, True)
        self.path.write_text(json.dumps(self.begins))

    def _turn(self, trainer: Any, on: bool) -> None:
        if on == (self._kept is None):
            return
        from src.callbacks.feeding import Feeding

        loader, feeding = trainer.train_dataloader, next(c for c in trainer.callbacks if isinstance(c, Feeding))
        if self._kept is not None:
            loader.growth, feeding._feeder = self._kept
            os.kill(self._kept[1]._process.pid, signal.SIGCONT)
            self._kept = None
        elif feeding._feeder is not None and feeding._feeder._process is not None:
            self._kept = loader.growth, feeding._feeder
            os.kill(feeding._feeder._process.pid, signal.SIGSTOP)
            loader.growth = feeding._feeder = None


def with_callback(name: str, path: Path, **options: Any) -> str:
    """Return the option of a fit that adds a callback of this file."""
    callback = {"class_path": f"benchmarks.feed.{name}", "init_args": {"path": str(path), **options}}
    return f"--trainer.callbacks={json.dumps([callback])}"


def start(folder: Path, *words: str | Path) -> Fit:
    """Start a fit, and return when it trains."""
    fit = Fit(folder, *words)
    fit.wait_for(lambda: lives(fit.run / "live" / LOCK))
    return fit


def words_of(folder: Path, o: argparse.Namespace, *more: str) -> list[str]:
    """Return the command line of a fit of the small CNN, which is fed from ``feed`` in a folder."""
    return [
        *(f"--config={ROOT / 'configs' / 'cifar10.yaml'}", f"--data.root={o.root}", f"--data.feed={folder / 'feed'}"),
        *("--data.val_size=500", "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}", *more),
    ]


def journal(fit: Fit, kind: str) -> list[dict[str, Any]]:
    """Return the lines of a kind."""
    return [line for line in Journal(fit.run / "live" / "journal.jsonl").read() if line["kind"] == kind]


def joined(fit: Fit) -> int:
    """Return how many images have joined."""
    return sum(line["effective"]["images"] for line in journal(fit, "segment"))


def has_joined(fit: Fit, count: float) -> bool:
    """Return whether as many images have joined."""
    return joined(fit) >= count


def png(pixels: np.ndarray) -> bytes:
    """Return an image as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def put(path: Path, content: bytes, length: int | None = None) -> None:
    """Let a file appear as a whole; with zeros at its end, up to a length, that take no space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        if length is not None:
            file.truncate(length)
    partial.rename(path)


def sha(pixels: np.ndarray) -> str:
    """Return what an image is told by."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def produce(feed: Path, source: Path, which: int, out: Path, seconds: float, seed: int) -> None:
    """Put images into a feed, in shards and one by one, and 5 % beside them that are bad; say which is what.

    Args:
        feed: The folder.
        source: ``.npz`` with the images of this producer, and their labels.
        which: This producer, from 0.
        out: Where to write what was fed: the SHA-256 of the good images by name, and what is wrong with others by name.
        seconds: How long to take.
        seed: Of what is drawn.
    """
    rng = random.Random(f"{seed} {which}")
    with np.load(source) as parts:
        images, labels = parts["images"], parts["labels"]
    good: dict[str, str] = {}
    bad: dict[str, str] = {}
    huge = io.BytesIO()
    Image.new("1", (10_000, 6_000)).save(huge, "PNG")  # 60 million pixels in some kB
    place, begun, owed = 0, time.monotonic(), 0.0
    offered: deque[tuple[float, bytes]] = deque(maxlen=100)
    while place < len(images):
        time.sleep(max(0.0, seconds * place / len(images) - (time.monotonic() - begun)))
        if rng.random() < 0.004:
            count = min(rng.randint(20, 150), len(images) - place)
            own, names = images[place : place + count], [CLASSES[label] for label in labels[place : place + count]]
            wrong = rng.randrange(count)
            names[wrong] = "owl"
            name = offer_shard(feed, own, names)
            good |= {f"{name}#{i}": sha(own[i]) for i in range(count) if i != wrong}
            bad[f"{name}#{wrong}"] = "unknown class"
        else:
            count, label = 1, CLASSES[labels[place]]
            (name,) = offer(feed, [images[place]], label)
            good[name] = sha(images[place])
            offered.append((time.monotonic(), png(images[place])))
        place += count
        owed += 0.05 / 0.95 * count
        while owed >= 1 and offered and time.monotonic() - offered[0][0] > 0.1:  # a copy is to come after the first
            owed -= 1
            kind = rng.choice(list(REASONS))
            name, noise = f"{rng.choice(CLASSES)}/bad-{which}-{len(bad)}.png", png(rng_pixels(rng))
            if kind == "unknown class":
                name = f"owl/{name.split('/')[1]}"
                put(feed / name, noise)
            elif kind == "undecodable":
                put(feed / name, b"this is a text " * rng.randint(1, 100))
            elif kind == "truncated":
                put(feed / name, noise[: rng.randrange(200, len(noise) - 100)])
            elif kind == "duplicate":
                put(feed / name, offered.popleft()[1])
            elif rng.random() < 0.5:
                put(feed / name, noise, MAX_IMAGE_BYTES + 1)
            else:
                put(feed / name, huge.getvalue())
            bad[name] = kind
    out.write_text(json.dumps({"good": good, "bad": bad}))


def rng_pixels(rng: random.Random) -> np.ndarray:
    """Return an image of noise."""
    return np.frombuffer(rng.randbytes(32 * 32 * 3), dtype=np.uint8).reshape(32, 32, 3)


def left_out(root: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images of CIFAR-10 that a fit on 20 % of it does not train on, no two alike."""
    from src.data import CIFAR10

    data = CIFAR10(root=root, val_size=500, train_fraction=0.2)
    pixels, labels = (part.numpy() for part in data.load("train"))
    known = {sha(pixels[id]) for ids in data.split() for id in ids.tolist()}
    chosen: dict[str, int] = {}
    for id in np.random.default_rng(0).permutation(len(pixels)).tolist():
        if len(chosen) < count and (found := sha(pixels[id])) not in known:
            chosen.setdefault(found, id)
    ids = list(chosen.values())
    return pixels[ids], labels[ids]


def soak(o: argparse.Namespace) -> bool:
    """Three processes feed 10,500 images of CIFAR-10, and 5 % that are bad, to a fit on 20 % of it.

    The images come one by one and in shards of 20 to 150, each of which has one of an unknown class. The fit is killed
    with SIGKILL twice and resumed, and then replayed from scratch. All batches of both are compared: which images they
    held, and that none was drawn before it joined or twice in an epoch.
    """
    rng = random.Random(o.seed)
    count = (o.images or 10_500) // 3 * 3
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        images, labels = left_out(o.root, count)
        more = ("--data.train_fraction=0.2", "--checkpoint.every_n_steps=50", f"--trainer.max_epochs={o.epochs or 12}")
        drawn = folder / "drawn.txt"
        words = words_of(folder, o, *more)
        fit = stack.enter_context(contextlib.closing(start(folder, *words, with_callback("Draws", drawn))))
        fit.wait_for(fit.last.is_file)
        context = multiprocessing.get_context("spawn")
        producers = []
        for which in range(3):
            source = folder / f"source{which}.npz"
            np.savez(source, images=images[which::3], labels=labels[which::3])
            args = (folder / "feed", source, which, folder / f"out{which}.json", o.seconds, o.seed)
            producers.append(context.Process(target=produce, args=args, daemon=True))
            producers[-1].start()
        kills = []
        for share in (0.25, 0.6):
            fit.wait_for(partial(has_joined, fit, share * count))
            time.sleep(rng.uniform(0, 1))
            fit.close()
            kills.append({"joined": joined(fit), "lines": len(Journal(fit.run / "live" / "journal.jsonl").read())})
            fit = stack.enter_context(
                contextlib.closing(start(folder, "--ckpt_path", fit.last, with_callback("Draws", drawn)))
            )
        for producer in producers:
            producer.join()
        arrived = time.monotonic()
        fit.finish()
        slack = time.monotonic() - arrived
        said = [json.loads((folder / f"out{which}.json").read_text()) for which in range(3)]
        good = {name: value for one in said for name, value in one["good"].items()}
        bad = {name: value for one in said for name, value in one["bad"].items()}
        refused = [line for line in journal(fit, "refused") if line["actor"] == "feed"]
        reasons = {line["name"]: line["effective"] for line in refused}
        by_kind: dict[str, Counter[str]] = defaultdict(Counter)
        for name, kind in bad.items():
            by_kind[kind][re.sub(r"\d[\d,]*|'.*?'|those of .*", "…", reasons.get(name, "nothing"))] += 1
        found: Counter[str] = Counter()
        pixels: dict[str, str] = {}
        since: list[int] = []  # the step at which each id joined
        for line in journal(fit, "segment"):
            facts = line["effective"]
            segment = read_segment(segment_path(fit.run / "live" / "segments", facts["number"]), facts["sha256"])
            found.update(segment.names)
            pixels |= {name: sha(image) for name, image in zip(segment.names, segment.pixels, strict=True)}
            since += [line["step"]] * len(segment.names)
        draws = draws_of(drawn)
        run, states = fit.run, [_state(fit)]
        again = [f"--config={run / 'config.yaml'}", f"--replay={run}", f"--trainer.default_root_dir={folder / 'again'}"]
        replayed = folder / "replayed.txt"
        replay = Fit(folder / "again", *again, with_callback("Draws", replayed))
        stack.enter_context(contextlib.closing(replay))
        replay.finish()
        states.append(_state(replay))
        warnings = replay.output.read_text().count("warning:")
        redrawn = draws_of(replayed)
    first = 50_000  # ids below are the data set's own
    early = sum(id >= first and since[id - first] > step for step, (_, ids) in draws.items() for id in ids)
    by_epoch: dict[int, Counter[int]] = defaultdict(Counter)
    for epoch, ids in draws.values():
        by_epoch[epoch].update(ids)
    twice = sum(n > 1 for epoch in by_epoch.values() for n in epoch.values())
    missing = 0  # of all that had joined before an epoch's last step
    for epoch, ids_of_epoch in by_epoch.items():
        end = max(step for step, (of, _) in draws.items() if of == epoch)
        due = {first + i for i, step in enumerate(since) if step <= end}
        missing += len(due - ids_of_epoch.keys())
    figures = {
        "images fed": len(good),
        "bad": len(bad),
        "bad, by kind and what the journal says": {kind: dict(counts) for kind, counts in by_kind.items()},
        "killed when": kills,
        "steps": states[0]["step"],
        "seconds from the end of the producers to that of the fit": round(slack, 1),
        "state_dict, SHA-256": [state["weights"] for state in states],
        "optimizer, SHA-256": [state["optimizer"] for state in states],
        "batches compared": len(draws),
    }
    claims = {
        "at least 10,000 good images": len(good) >= 10_000,
        "every good image joined, with its pixels, exactly once": pixels == good and set(found.values()) == {1},
        "every bad one is in the journal once, with its reason, and nothing else is": (
            len(refused) == len(reasons) == len(bad)
            and all(re.search(REASONS[kind], reasons.get(name, "")) for name, kind in bad.items())
        ),
        "killed twice in mid-run": len(kills) == 2,
        "weights and optimizer of the replay are the same, to the last bit": states[0] == states[1],
        "the replay drew the same batches": draws == redrawn,
        "no image was drawn before it joined, twice in an epoch, or left out of one": not (early + twice + missing),
        "the replay warns of nothing": not warnings,
    }
    return tell("feed_soak", soak, 1, figures, claims)


def draws_of(path: Path) -> dict[int, tuple[int, list[int]]]:
    """Read what `Draws` has written: epoch and ids by step, as it was taken last."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {step: (epoch, ids) for step, epoch, _, ids in lines}


def _state(fit: Fit) -> dict[str, Any]:
    checkpoint = read(fit.last)
    weights, optimizer = digest(checkpoint["state_dict"]), digest(checkpoint["optimizer_states"])
    return {"step": checkpoint["global_step"], "weights": weights, "optimizer": optimizer}


def latency(o: argparse.Namespace) -> bool:
    """From the rename of an image to the step at which it joins, is scored and can be drawn from.

    Images come one at a time, 0.05 to 0.5 s apart, from two threads of a process. Steps are counted from the first that
    begins after the rename. An image that has joined is drawn at its place in what is left of the epoch, which the
    second figure tells: it depends on the length of the epoch, not on the feed.
    """
    n = o.images or 200
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        drawn = folder / "drawn.txt"
        words = words_of(folder, o, "--data.train_fraction=0.2", "--trainer.max_epochs=100000")
        fit = stack.enter_context(contextlib.closing(start(folder, *words, with_callback("Draws", drawn))))
        fit.wait_for(lambda: drawn.exists() and drawn.stat().st_size > 100_000)
        rng = random.Random(o.seed)
        renamed: dict[str, int] = {}
        for i in range(n):
            (name,) = offer(folder / "feed", [rng_pixels(rng)], CLASSES[i % 10])
            renamed[name] = time.monotonic_ns()
            time.sleep(rng.uniform(0.05, 0.5))
        fit.wait_for(lambda: joined(fit) == n)
        joined_at: dict[str, int] = {}
        ids: dict[int, str] = {}
        for line in journal(fit, "segment"):
            facts = line["effective"]
            segment = read_segment(segment_path(fit.run / "live" / "segments", facts["number"]), facts["sha256"])
            joined_at |= dict.fromkeys(segment.names, line["step"])
            ids |= dict(enumerate(segment.names, facts["first_id"]))
        fit.wait_for(lambda: all_drawn(drawn, ids.keys()))
        fit.close()
    lines = [json.loads(line) for line in drawn_lines]
    begins = [line[2] for line in lines]
    at = {line[0]: i for i, line in enumerate(lines)}
    first_drawn: dict[str, int] = {}
    for step, _, _, drawn_ids in lines:
        for id in drawn_ids:
            if id in ids:
                first_drawn.setdefault(ids[id], step)
    first_step = lines[0][0]
    after = {name: lines[0][0] + bisect_left(begins, ns) for name, ns in renamed.items()}
    assert at[first_step] == 0
    steps = [joined_at[name] - after[name] for name in renamed]
    seconds = [(begins[at[joined_at[name]]] - renamed[name]) / 1e9 for name in renamed]
    until_drawn = [first_drawn[name] - joined_at[name] for name in renamed]
    figures = {
        "steps until it joins": {**spread(steps), "p95": percentile(steps, 95)},
        "seconds until the step at which it joined": {**spread(seconds), "p95": round(percentile(seconds, 95), 3)},
        "steps from there to its first draw": {**spread(until_drawn), "p95": percentile(until_drawn, 95)},
        "ms a step": spread([(b - a) / 1e6 for a, b in pairwise(begins)]),
    }
    claims = {"p95 at most 20 steps until it joins": percentile(steps, 95) <= 20}
    return tell("feed_latency", latency, n, figures, claims)


drawn_lines: list[str] = []


def all_drawn(path: Path, ids: Iterable[int]) -> bool:
    """Return whether all of these have been drawn, and keep the lines."""
    time.sleep(0.5)
    drawn_lines[:] = path.read_text().splitlines()
    seen = {id for line in drawn_lines for id in json.loads(line)[3]}
    return set(ids) <= seen


def overhead(o: argparse.Namespace) -> bool:
    """The time of an optimizer step while images join at a steady rate, over that while none comes.

    Blocks of 6 s with and without alternate in one fit of one thread; PNG files, encoded before, or shards
    are put into the folder by a process beside it. The first second of a block is left out, and steps that begin
    an epoch. A step is the time from the start of its batch to that of the next: it holds the scoring of what joins.
    """
    blocks, seconds = o.blocks or 20, 6.0
    rng = random.Random(o.seed)
    files = [png(rng_pixels(rng)) for _ in range(0 if o.shard else int(o.rate * seconds * (blocks // 2 + 1)) + 100)]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        drawn = folder / "drawn.txt"
        more = ("--trainer.max_epochs=100000", "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0")
        words = [*words_of(folder, o, *more), with_callback("Draws", drawn, ids=False)]
        fit = stack.enter_context(contextlib.closing(start(folder, *words)))
        fit.wait_for(lambda: drawn.exists() and drawn.stat().st_size > 5_000)
        number, sent = 0, 0
        spans: list[tuple[float, bool, int]] = []
        offer(folder / "feed", [rng_pixels(rng)], "cat")  # so that in both, something has joined
        fit.wait_for(lambda: joined(fit) == 1)
        for block in range(blocks):
            begun, feeds, sent = time.monotonic(), block % 2 == 0, number
            while (now := time.monotonic()) < begun + seconds:
                while feeds and (now - begun) * o.rate > number - sent:
                    if o.shard:
                        noise = np.frombuffer(rng.randbytes(o.shard * 32 * 32 * 3), dtype=np.uint8)
                        offer_shard(folder / "feed", noise.reshape(-1, 32, 32, 3), [i % 10 for i in range(o.shard)])
                    else:
                        put(folder / "feed" / CLASSES[number % 10] / f"{number}.png", files[number])
                    number += o.shard or 1
                time.sleep(0.01)
            spans.append((begun, feeds, joined(fit)))
        fit.wait_for(lambda: joined(fit) == number + 1)
        times = len(journal(fit, "segment"))
        lines = [json.loads(line) for line in drawn.read_text().splitlines()]
        fit.close()
    ms: dict[int, list[float]] = defaultdict(list)
    for (_, epoch, ns, _), (_, after, end, _) in pairwise(lines):
        block = bisect_left([begun for begun, *_ in spans], ns / 1e9) - 1
        if block >= 0 and ns / 1e9 - spans[block][0] > 1 and end / 1e9 < spans[block][0] + seconds and epoch == after:
            ms[block].append((end - ns) / 1e6)
    busy = [value for block, values in ms.items() if block % 2 == 0 for value in values]
    idle = [value for block, values in ms.items() if block % 2 == 1 for value in values]
    neighbours = [
        statistics.median(ms[i]) / statistics.median(ms[i + 1]) for i in range(0, blocks - 1, 2) if ms[i] and ms[i + 1]
    ]
    median = statistics.median(busy) / statistics.median(idle)
    mean = statistics.fmean(busy) / statistics.fmean(idle)
    figures = {
        "images/s that were fed, and joined, while busy": o.rate,
        "images of a file": o.shard or 1,
        "images that joined": number + 1,
        "segments that joined in a second, while busy": round(times / (seconds * -(-blocks // 2)), 2),
        "joined at the end of each block": [count for *_, count in spans],
        "ms a step, busy": spread(busy),
        "ms a step, idle": spread(idle),
        "ratio of medians": round(median, 4),
        "ratio of means": round(mean, 4),
        "ratio of p95": round(percentile(busy, 95) / percentile(idle, 95), 4),
        "ratios of neighbouring blocks": spread(neighbours),
    }
    what = f"{o.rate:g} images/s in {f'shards of {o.shard}' if o.shard else 'files of one'}"
    claims = {f"median at most 1.03 at {what}": median <= 1.03}
    return tell(f"feed_overhead_{o.rate:g}{'_shards' if o.shard else ''}", overhead, len(idle), figures, claims)


def idle(o: argparse.Namespace) -> bool:
    """The time of an optimizer step with a feed into which nothing is put, over that without one.

    Blocks of 50 steps with and without alternate in one fit of one thread: see `Toggle`. The first two steps of a block
    and of an epoch are left out.
    """
    steps = o.steps or 6000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "feed").mkdir()
        more = (f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0")
        words = words_of(folder, o, "--trainer.max_epochs=100000", *more)
        with contextlib.closing(Fit(folder, *words, with_callback("Toggle", folder / "toggle.json"))) as fit:
            fit.finish()
        begins = json.loads((folder / "toggle.json").read_text())
    blocks: dict[int, tuple[bool, list[float]]] = {}
    own: dict[bool, list[float]] = {True: [], False: []}
    for (begin, had, on, block), (end, has, _, after) in pairwise(begins):
        if block >= 2 and after == block:
            own[on].append(1e3 * (has - had))
            blocks.setdefault(block, (on, []))[1].append(1e3 * (end - begin))
    with_feed = [ms for on, values in blocks.values() if on for ms in values]
    without = [ms for on, values in blocks.values() if not on for ms in values]
    medians = {block: (on, statistics.median(values)) for block, (on, values) in blocks.items()}
    neighbours = [(medians[i], medians[i + 1]) for i in medians if i + 1 in medians]
    pairs = [a / b if on else b / a for (on, a), (other, b) in neighbours if on != other]
    median = statistics.median(with_feed) / statistics.median(without)
    figures = {
        "ms a step, with": spread(with_feed),
        "ms a step, without": spread(without),
        "ratio of medians": round(median, 5),
        "ratio of means": round(statistics.fmean(with_feed) / statistics.fmean(without), 5),
        "ratios of neighbouring blocks": spread(pairs),
        "ms of a processor that the training thread takes for a step, with": spread(own[True]),
        "ms of a processor that the training thread takes for a step, without": spread(own[False]),
        "ratio of these medians": round(statistics.median(own[True]) / statistics.median(own[False]), 5),
    }
    return tell("feed_idle", idle, len(without), figures, {"median at most 1.005": median <= 1.005})


MEASUREMENTS = {f.__name__: f for f in (soak, latency, overhead, idle)}


def command() -> int:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=MEASUREMENTS, metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--root", type=lambda p: Path(p).resolve(), default=Path("data").resolve(), help="of CIFAR-10")
    parser.add_argument("--images", type=int, help="of soak (10,500) and latency (200)")
    parser.add_argument("--epochs", type=int, help="of soak (12)")
    parser.add_argument("--seconds", type=float, default=50.0, help="that the producers of soak take")
    parser.add_argument("--rate", type=float, default=50.0, help="of overhead, in images/s")
    parser.add_argument("--shard", type=int, default=0, help="of overhead: images of a shard; 0 for files of one")
    parser.add_argument("--blocks", type=int, help="of overhead (20), of 6 s each")
    parser.add_argument("--steps", type=int, help="of idle (6000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    o = parser.parse_args()
    return 1 if False in [MEASUREMENTS[name](o) for name in o.names] else 0


if __name__ == "__main__":
    sys.exit(command())
