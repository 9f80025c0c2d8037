"""The steps of one recipe, timed: in a loop by hand, in Lightning as it is usually used, and as `python -m src fit`.

    python -m benchmarks.steps floor --config configs/speed94.yaml --steps 12 --block 1 --root data
    python -m benchmarks.steps ours --config configs/speed94.yaml --steps 12 --block 1 --root data
    python -m benchmarks.steps bare --network benchmarks.steps.Trivial --steps 2000 --root data
    python -m benchmarks.steps usual --workers 2 --steps 300 --root data
    python -m benchmarks.steps recipe --config configs/speed94.yaml --seed 0 --root data

Each is one process that prints one line of JSON. All loops take network, optimizer, schedule, batch size, augmentation
and accumulation from the same config, train on all 50,000 images (no val split), and in the precision that our command
line would choose. ``floor`` is a plain loop in one function; ``bare`` is a Trainer with ``barebones=True``; ``usual``
is a stock Trainer and ``self.log(…, prog_bar=True)`` in every step. These three draw from our loader, unless ``usual``
is given ``--workers``: then it is the usual script altogether, with torchvision's data set and transforms, a
DataLoader, and float32. ``ours`` is ``src.cli.main`` with everything on; options not known here are passed on to it.

A time is taken after every block of steps, in Lightning where the Trainer's loop has done a batch: hooks, logging and
the bar are in. What is reported is the median block, so that the end of an epoch is not. The processor's time, of all
threads of the process, does not see what else the machine is doing.

``recipe`` is a whole fit by the clock of the speed-runs, which adds up whitening, the Trainer's loop from its start to
the last optimizer step (augmentation, logging, checkpoints in between), and the evaluation of the test set with the
config's test-time augmentation; CUDA events on a GPU. Parsing, imports, loading the data, building objects, warm-up are
out.
"""

import argparse
import gc
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torchvision
import yaml
from lightning.pytorch.loops.fit_loop import _FitLoop
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)

from benchmarks.paired import my_turn
from src.classifier import ImageClassifier
from src.cli import main
from src.data import CIFAR10, Augmentation, ResidentLoader
from src.data.loader import Normalize
from src.hardware import default_precision, device_type, keep_pages
from src.networks import Network
from src.step_loop import StepLoop
from src.views import Views, average_views

DEVICE = torch.device(device_type("auto"))
PRECISION = default_precision(DEVICE.type)


class Trivial(Network):
    """One linear layer: what is left of a step is what the loop costs.

    Args:
        num_classes: The number of classes.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[b, num_classes]``."""
        logits: Tensor = self.head(images.flatten(1))
        return logits


class Plan(NamedTuple):
    """What a config asks for."""

    network: Network
    optimizer: torch.optim.Optimizer
    schedule: Any
    loader: ResidentLoader
    accumulate: int
    smoothing: float


class Marks:
    """Notes the time whenever a block of optimizer steps is done, from step `skip` on; waits for a GPU there."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.skip, self.block = o.skip, o.block
        self.found: list[tuple[int, float, float]] = []

    def note(self, step: int) -> None:
        """Take the time if it is due."""
        if step >= (self.found[-1][0] + self.block if self.found else self.skip):
            _wait()
            self.found.append((step, time.perf_counter(), time.process_time()))

    def report(self, images: int) -> dict[str, Any]:
        """Return the milliseconds of an optimizer step, by the clock and of the processor; images/s.

        The 99th percentile is that of the blocks: with blocks of one step, of the steps.
        """
        blocks = [[1e3 * (y - x) / (b[0] - a[0]) for x, y in zip(a, b, strict=True)] for a, b in pairwise(self.found)]
        _, clock, processor = map(statistics.median, zip(*blocks, strict=True))
        return {
            "ms a step": clock,
            "p99 ms a step": sorted(x for _, x, _ in blocks)[(99 * len(blocks) - 1) // 100],
            "processor ms a step": processor,
            "images/s": 1e3 * images / clock,
            "blocks": len(blocks),
        }


def floor(o: argparse.Namespace) -> dict[str, Any]:
    """Train in a loop by hand; also say where the time went, in ms a step (on a CPU)."""
    keep_pages()
    torch.manual_seed(0)
    plan = read_plan(o)
    spent = dict.fromkeys(("data", "augment", "forward", "backward", "optimizer"), 0.0)
    network, optimizer, schedule, loader = plan.network, plan.optimizer, plan.schedule, plan.loader
    loader.augment = [_Timed(augmentation, spent) for augmentation in loader.augment]
    marks, steps, last = Marks(o), 0, time.perf_counter()

    def lap(section: str) -> None:
        nonlocal last
        now = time.perf_counter()
        spent[section] += now - last
        last = now

    network.train()
    for epoch in count():
        loader.set_epoch(epoch)
        network.begin_epoch(epoch)
        for i, batch in enumerate(loader, start=1):
            lap("data")
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=PRECISION == "bf16-mixed"):
                logits = network(batch.images)
                loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=plan.smoothing)
            lap("forward")
            (loss / plan.accumulate).backward()  # type: ignore[no-untyped-call]
            lap("backward")
            if i % plan.accumulate and i < len(loader):
                continue
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
            lap("optimizer")
            steps += 1
            marks.note(steps)
            if steps == o.skip:
                spent |= dict.fromkeys(spent, 0.0)
            if steps == o.steps:
                spent["data"] -= spent["augment"]
                sections = {f"{name}, ms": 1e3 * seconds / (steps - o.skip) for name, seconds in spent.items()}
                return marks.report(_images_a_step(o)) | sections
    raise AssertionError


def in_lightning(o: argparse.Namespace) -> dict[str, Any]:
    """Train in a Trainer, bare or as it is usually used."""
    plan = read_plan(o)
    loader: Any = plan.loader
    if o.workers:
        normalize = torchvision.transforms.Normalize(CIFAR10.mean, CIFAR10.std)
        transform = torchvision.transforms.Compose([torchvision.transforms.ToTensor(), normalize])
        data = torchvision.datasets.CIFAR10(o.root, transform=transform)
        loader = torch.utils.data.DataLoader(
            data, plan.loader.batch_size, shuffle=True, num_workers=o.workers, persistent_workers=True
        )
    options: dict[str, Any] = {"barebones": True} if o.loop == "bare" else {}
    if not o.workers:
        options["precision"] = PRECISION
    marks = Marks(o)
    with tempfile.TemporaryDirectory() as folder, _watched(marks.note):
        trainer = pl.Trainer(
            max_steps=o.steps,
            accumulate_grad_batches=plan.accumulate,
            default_root_dir=None if o.loop == "bare" else folder,
            **options,
        )
        trainer.fit(_Usual(plan, logs=o.loop == "usual"), loader)
    return marks.report(_images_a_step(o))


def ours(o: argparse.Namespace) -> dict[str, Any]:
    """Train as the command line does."""
    marks = Marks(o)
    alone: dict[str, Any] = {}

    def begun() -> None:
        if not o.sync_error:  # which takes no times
            alone.update(my_turn())

    strict_from = o.skip if o.sync_error else None
    with tempfile.TemporaryDirectory() as folder, _watched(marks.note, begun, strict_from):
        _fit(o, folder, f"--trainer.max_steps={o.steps}")
    return marks.report(_images_a_step(o)) | alone


def recipe(o: argparse.Namespace) -> dict[str, Any]:
    """Train by the config, once for each seed, and test; time it by the clock of the speed-runs.

    Two runs to warm up: in the first torch compiles, in the second, when it is its turn (see
    `benchmarks.paired.my_turn`), cuDNN tries its algorithms if it is told to. It would keep those that it took in the
    first, which go by heuristics: it is asked for other ones there, without TF32, which comes to the same in bfloat16.
    """
    cudnn: Any = torch.backends.cudnn
    pixels, labels = (t[: None if o.steps is None else 500].to(DEVICE) for t in CIFAR10(root=o.root).load("test"))
    test = ResidentLoader(
        pixels, labels, torch.arange(len(labels)), o.eval_batch_size, Normalize(CIFAR10.mean, CIFAR10.std, DEVICE)
    )
    clock: dict[str, Any] = {}
    found: dict[str, Any] = {}
    prepare, load = ImageClassifier.prepare_data, CIFAR10.load
    parts: dict[Any, tuple[Tensor, Tensor]] = {}
    digests: dict[Any, str] = {}

    def loaded(data: CIFAR10, part: Any) -> tuple[Tensor, Tensor]:
        if part not in parts:
            parts[part] = load(data, part)
            digests.update(data.digests)
        data.digests |= digests
        return parts[part]  # by all runs: loading is not in the clock

    def prepared(module: ImageClassifier) -> None:
        module.trainer.datamodule.sample(1)  # type: ignore[attr-defined] # the data are on the device before the clock runs
        clock["whitening"] = _now()
        prepare(module)
        clock["whitened"], clock["module"] = _now(), module

    def begun() -> None:
        clock["begun"] = _now()

    def stepped(step: int) -> None:
        clock["ended"], clock["steps"] = _now(), step

    ImageClassifier.prepare_data = prepared  # type: ignore[assignment, method-assign]
    CIFAR10.load = loaded  # type: ignore[assignment, method-assign]
    warm_ups = 2 if o.warm_up else 0
    alone: dict[str, Any] = {}
    cut = [] if o.steps is None else [f"--trainer.max_steps={o.steps}"]
    runs: list[dict[str, Any]] = []
    for number in [o.seed] * warm_ups + [o.seed + i for i in range(o.runs)]:
        warm_up = _warm_up(o) if len(runs) < warm_ups else []
        cudnn.allow_tf32 = bool(runs) or not warm_up
        if cudnn.allow_tf32:
            alone |= my_turn()
        else:
            warm_up += ["--trainer.benchmark=false"]
        gc.unfreeze()
        gc.collect()  # what earlier runs have left: else it may be looked for while the clock runs
        gc.freeze()
        with tempfile.TemporaryDirectory() as folder, _watched(stepped, begun):
            _fit(o, folder, f"--seed_everything={number}", *cut, last=warm_up)
        network, views = clock["module"].network.to(DEVICE).eval(), clock["module"].tta
        if warm_up:
            cudnn.benchmark = False  # for the sizes of unsure images it would take longer than it can gain
            _meet_sizes(network, test)
        tested = _now()
        with_views = _accuracy(network, test, views)
        done = _now()
        without = _accuracy(network, test, "one")
        spans = [("whitening", "whitened"), ("begun", "ended")]
        training = sum(_span(clock[a], clock[b]) for a, b in spans)
        runs.append({
            "seed": number, "steps": clock["steps"], "seconds": training + _span(tested, done),
            "training seconds": training, "acc tta": with_views, "acc": without,
        })  # fmt: skip
        del network
        clock.clear()  # a run's recordings hold some GB
        counted = runs[warm_ups:]
        if counted:  # told after each, as there may be no time for all
            means = {
                k: statistics.mean(r[k] for r in counted) for k in ("seconds", "training seconds", "acc tta", "acc")
            }
            found = means | alone | {"runs": counted, "device": str(DEVICE)}
            print(json.dumps(found), flush=True)
    return found


def read_plan(o: argparse.Namespace) -> Plan:
    """Build what a config asks for."""
    config = yaml.safe_load(o.config.read_text())
    model, data = config["model"], config["data"]["init_args"]
    data |= {"root": o.root, "val_size": 0, "augment": [_build(a) for a in data.get("augment") or []]}
    data |= {"batch_size": o.batch_size or data["batch_size"]} | ({"small_epochs": 0} if o.full_size else {})
    images = CIFAR10(**data)
    loader = images.train_dataloader()
    loader.pixels, loader.labels = loader.pixels.to(DEVICE), loader.labels.to(DEVICE)
    loader.normalize = Normalize(images.mean, images.std, DEVICE)
    network: Network = _build({"class_path": o.network} if o.network else model["network"])
    network.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.initialize(images.sample(5000).to(DEVICE))
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1]},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = _build(model["optimizer"], groups)
    schedule = _build(model["lr_scheduler"], optimizer) if model.get("lr_scheduler") else None
    if schedule is not None:
        schedule.set_total_steps(o.steps or 1)
    accumulate = config["trainer"].get("accumulate_grad_batches", 1)
    return Plan(network, optimizer, schedule, loader, accumulate, model.get("label_smoothing", 0.0))


def _images_a_step(o: argparse.Namespace) -> int:
    config = yaml.safe_load(o.config.read_text())
    batch_size: int = o.batch_size or config["data"]["init_args"]["batch_size"]
    return batch_size * int(config["trainer"].get("accumulate_grad_batches", 1))


class _Timed(Augmentation):
    def __init__(self, inner: Augmentation, spent: dict[str, float]) -> None:
        self.inner, self.spent = inner, spent

    def draw(self, count: int, seed: int, epoch: int) -> Tensor:
        return self.inner.draw(count, seed, epoch)

    def apply(self, pixels: Tensor, draws: Tensor) -> Tensor:
        begun = time.perf_counter()
        pixels = self.inner.apply(pixels, draws)
        self.spent["augment"] += time.perf_counter() - begun
        return pixels


class _Usual(pl.LightningModule):
    def __init__(self, plan: Plan, logs: bool) -> None:
        super().__init__()
        self.plan, self.logs, self.network = plan, logs, plan.network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch[0], batch[1]
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.plan.smoothing)
        if self.logs:
            self.log("train_loss", loss, prog_bar=True)
            self.log("train_acc", (logits.argmax(1) == labels).float().mean(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return {
            "optimizer": self.plan.optimizer,
            "lr_scheduler": {"scheduler": self.plan.schedule, "interval": "step"},
        }


@contextmanager
def _watched(
    note: Callable[[int], None], begin: Callable[[], None] = lambda: None, strict_from: int | None = None
) -> Iterator[None]:
    """Watch the Trainer's loop from outside: a callback, even an idle one, would cost time in every step.

    Args:
        note: Called with the number of optimizer steps after each batch.
        begin: Called at the start of the loop.
        strict_from: On a GPU, make every wait of the host an error within a batch, from this step on.
    """
    run = _FitLoop.run

    def watched(fit_loop: Any) -> None:
        loop = fit_loop.epoch_loop
        name = "_take" if isinstance(loop, StepLoop) else "advance"
        advance = getattr(loop, name)

        def batch(*arguments: Any) -> Any:
            strict = strict_from is not None and DEVICE.type == "cuda" and loop.global_step >= strict_from
            if strict:
                torch.cuda.set_sync_debug_mode("error")
            try:
                result = advance(*arguments)
            finally:
                if strict:
                    torch.cuda.set_sync_debug_mode("default")
            note(loop.global_step)
            return result

        setattr(loop, name, batch)
        begin()
        run(fit_loop)

    _FitLoop.run = watched  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        _FitLoop.run = run  # type: ignore[method-assign]


def _fit(o: argparse.Namespace, folder: str, *options: str, last: Sequence[str] = ()) -> None:
    given = [f"--data.root={o.root}", "--data.val_size=0", f"--trainer.default_root_dir={folder}"]
    given += [f"--data.batch_size={o.batch_size}"] if o.batch_size else []
    given += [f"--model.network={o.network}"] if o.network else []
    given += ["--data.small_epochs=0"] if o.full_size else []
    if status := main(["fit", f"--config={o.config}", *given, *options, *o.more, *last]):
        raise SystemExit(status)


def _warm_up(o: argparse.Namespace) -> list[str]:
    """Return the options of a fit that meets all kinds of steps of a recipe: a layer freezes, images grow."""
    small = [yaml.safe_load(o.config.read_text())["data"]["init_args"].get("small_epochs", 0)] + [0] * o.full_size
    small += [int(word.partition("=")[2]) for word in o.more if word.startswith("--data.small_epochs=")]
    return ["--trainer.max_epochs=5", f"--data.small_epochs={min(4, small[-1])}"]


@torch.inference_mode()
def _meet_sizes(network: Network, loader: ResidentLoader) -> None:
    """Let libraries prepare for all sizes in which `average_views` may look at unsure images again."""
    images = next(iter(loader)).images
    eighth = -(-len(images) // 8)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=PRECISION == "bf16-mixed"):
        for eighths in range(1, 9):
            network(images[: eighths * eighth])


@torch.inference_mode()
def _accuracy(network: Network, loader: ResidentLoader, views: Views) -> float:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=PRECISION == "bf16-mixed"):
        hits = [(average_views(network, b.images, views).argmax(1) == b.labels).sum() for b in loader]
    return int(torch.stack(hits).sum()) / len(loader.labels)


def _build(spec: dict[str, Any], *arguments: Any) -> Any:
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(*arguments, **(spec.get("init_args") or {}))


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _now() -> Any:
    if DEVICE.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _span(begun: Any, ended: Any) -> float:
    if DEVICE.type != "cuda":
        return float(ended - begun)
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3


def command() -> None:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=("floor", "bare", "usual", "ours", "recipe"))
    parser.add_argument("--config", type=Path, default=Path("configs/cifar10.yaml"))
    parser.add_argument("--root", type=Path, default=Path("data"), help="a folder with cifar-10-batches-py")
    parser.add_argument("--steps", type=int, help="by default 1000; of recipe all; if it is cut, 500 test images")
    parser.add_argument("--skip", type=int, default=3, help="steps that are not timed, for warming up")
    parser.add_argument("--block", type=int, default=100, help="steps between two looks at the clock")
    parser.add_argument("--batch_size", type=int, help="instead of the config's")
    parser.add_argument("--network", help="instead of the config's, by its class path")
    parser.add_argument("--full_size", action="store_true", help="no small images in the first epochs")
    parser.add_argument("--workers", type=int, default=0, help="of usual: see above")
    parser.add_argument("--sync_error", action="store_true", help="of ours, on a GPU: a wait of the host is an error")
    parser.add_argument("--seed", type=int, default=0, help="of recipe: the first")
    parser.add_argument("--runs", type=int, default=1, help="of recipe")
    parser.add_argument("--warm_up", action="store_true", help="first, two runs of 5 epochs that do not count")
    parser.add_argument("--eval_batch_size", type=int, default=500, help="of recipe: images in a batch of the test")
    o, more = parser.parse_known_args()
    o.more = more
    if o.steps is None and o.loop != "recipe":
        o.steps = 1000
    loops = {"floor": floor, "bare": in_lightning, "usual": in_lightning, "ours": ours, "recipe": recipe}
    print(json.dumps(loops[o.loop](o)))


if __name__ == "__main__":
    command()
