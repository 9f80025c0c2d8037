"""How fast this project is, against the loops it is to be measured by: one command for each claim.

    python -m benchmarks.speed cifar10 --root data --rounds 3      # whole runs: configs/cifar10.yaml against the seed
    python -m benchmarks.speed step94 --root data --rounds 5       # a step of speed94 against a loop by hand
    python -m benchmarks.speed time94 --root data --rounds 3       # time to 94 % against the published recipe
    python -m benchmarks.speed overhead --root data --threads 1    # what the Trainer and our callbacks cost a step
    python -m benchmarks.speed startup memory --root data
    python -m benchmarks.speed breakdown scaling --root data

Every measurement is a process of its own, in turn A B A B; the ratio is that of medians. Results go to
benchmarks/results/NAME.json and NAME.png, or to the folder $OUT. Whatever else the machine does is in the figures: look
at the load average in the header, and pin all of it to the cores that are free (``taskset -c 0,1``).

``ours`` runs in a terminal, so with its progress bar, and with TensorBoard, metrics and checkpoints: as a user has it.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.paired import CORES, Case, Sample, alternate, compare, process, write

TRIVIAL = "--network=benchmarks.steps.Trivial"

# Ends the process at its first optimizer step, without the tidying up of Python, which takes seconds after Lightning.
FIRST_STEP = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
try:
    runpy.run_module("src", run_name="__main__", alter_sys=True)
finally:
    os._exit(3)
"""
IMPORTS = "import torch, torchvision, lightning.pytorch.cli"
EMPTY_FIT = """
import sys
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel
pl.Trainer(max_steps=10, limit_val_batches=0, default_root_dir=sys.argv[1]).fit(BoringModel())
"""


def cifar10(o: argparse.Namespace) -> None:
    """Whole processes that train the small CNN at batch 64 and test it: the seed's loop, and configs/cifar10.yaml.

    The seed's loop trains on 50,000 images. Ours is a fit and a test, two processes; it trains on 45,000 images and
    validates on 5,000 in every epoch.
    """
    seed = ["-m", "benchmarks.loops", "seed", f"--root={o.root}", *([f"--steps={o.steps}"] if o.steps else [])]
    cut = [f"--trainer.max_steps={o.steps}"] if o.steps else []

    def ours(number: int) -> Sample:
        with tempfile.TemporaryDirectory() as folder:
            where = [f"--data.root={o.root}", f"--trainer.default_root_dir={folder}"]
            words = ["fit", "--config=configs/cifar10.yaml", f"--seed_everything={number}", *where, *cut]
            fit = _python(o, "-m", "src", *words, terminal=True)
            run = Path(folder) / "lightning_logs" / "version_0"
            checkpoint = f"--ckpt_path={run / 'checkpoints' / ('last.ckpt' if o.steps else 'best.ckpt')}"
            test = _python(o, "-m", "src", "test", checkpoint, f"--data.root={o.root}")
            accuracy = _test_accuracy(run / "test.json")
        seconds = fit["process seconds"] + test["process seconds"]
        return {"process seconds": seconds, "of the fit": fit["process seconds"], "test acc": accuracy}

    cases: dict[str, Case] = {
        "the seed's loop": lambda number: _python(o, *seed, f"--seed={number}"),
        "ours": ours,
    }
    found = alternate(cases, o.rounds)
    pairs = [("process seconds", "ours", "the seed's loop"), ("test acc", "ours", "the seed's loop")]
    write("cifar10", _what(cifar10), "process seconds", found, pairs, threads=o.threads)


def step94(o: argparse.Namespace) -> None:
    """An optimizer step (2,000 images) of configs/speed94.yaml: as a fit takes it, and in a plain loop.

    The loop has the same network, optimizer, schedule, data and augmentation. Small are the images of the first epochs.
    A sample is the median of a process.
    """
    options = ("--config=configs/speed94.yaml", f"--steps={o.steps or 14}", "--skip=2", "--block=1")
    cases = {
        "small, by hand": _steps(o, "floor", *options),
        "small, ours": _steps(o, "ours", *options),
        "by hand": _steps(o, "floor", *options, "--full_size"),
        "ours": _steps(o, "ours", *options, "--full_size"),
    }
    found = alternate(cases, o.rounds)
    pairs = [
        (key, f"{size}ours", f"{size}by hand")
        for size in ("", "small, ")
        for key in ("ms a step", "processor ms a step")
    ]
    write("step94", _what(step94), "ms a step", found, pairs, threads=o.threads)


def time94(o: argparse.Namespace) -> None:
    """All of configs/speed94.yaml on all 50,000 images, against a plain port of the published 94 % recipe.

    The port is airbench94_muon: eager, bf16 autocast, batches of 2,000, six views of each image at test time; ours has
    them of the images of which one leaves a doubt. Seconds by the clock of the speed-runs and of the whole process;
    accuracies of the test set; a seed a round.
    """
    cut = [f"--steps={o.steps}"] if o.steps else []
    recipe = ["recipe", "--config=configs/speed94.yaml", *cut]
    port = ["-m", "benchmarks.loops", "port94", f"--root={o.root}", *cut]
    cases: dict[str, Case] = {
        "published recipe": lambda number: _python(o, *port, f"--seed={o.seed + number}"),
        "ours": lambda number: _steps(o, *recipe, f"--seed={o.seed + number}")(number),
    }
    pairs = [(key, "ours", "published recipe") for key in ("seconds", "process seconds", "acc tta", "acc")]
    write("time94", _what(time94), "seconds", alternate(cases, o.rounds), pairs, threads=o.threads)


def overhead(o: argparse.Namespace) -> None:
    """An optimizer step of one linear layer at batch 64, CIFAR-10 from our loader in every case: what a loop costs.

    The usual script logs loss and accuracy with prog_bar=True in every step, and has the stock bar, TensorBoard and
    checkpoints; ours has all that a fit has. The difference to the loop by hand is the overhead.
    """
    options = (TRIVIAL, f"--steps={o.steps or 2200}", f"--skip={200 if not o.steps else 50}", "--block=50")
    cases = {
        "by hand": _steps(o, "floor", *options),
        "bare Trainer": _steps(o, "bare", *options),
        "usual script": _steps(o, "usual", *options),
        "ours": _steps(o, "ours", *options),
        "ours, chunks of 10 steps": _steps(o, "ours", *options, "--chunk_size=10"),
    }
    keys = ("ms a step", "processor ms a step")
    pairs = [(key, case, "by hand") for key in keys for case in cases if case != "by hand"]
    write("overhead", _what(overhead), "ms a step", alternate(cases, o.rounds), pairs, threads=o.threads)


def startup(o: argparse.Namespace) -> None:
    """From the start of a process to its first optimizer step, or to the help, against importing what is used.

    The first step of configs/quickstart.yaml, data set and all; it is compared with the imports alone, without and with
    the time that Python takes to end after them, and the former is the fair one: the fit has not ended. ``python -m src
    --help`` is compared with imports that end as well.
    """
    with tempfile.TemporaryDirectory() as folder:
        fit = ["fit", "--config=configs/quickstart.yaml", f"--trainer.default_root_dir={folder}"]
        cases: dict[str, Case] = {
            "imports": lambda _: _python(o, "-c", f"{IMPORTS}, os; os._exit(0)"),
            "first step of quickstart": lambda _: _python(o, "-c", FIRST_STEP, *fit, terminal=True),
            "imports, to exit": lambda _: _python(o, "-c", IMPORTS),
            "--help, to exit": lambda _: _python(o, "-m", "src", "--help"),
        }
        found = alternate(cases, o.rounds)
    pairs = [
        ("process seconds", "first step of quickstart", "imports"),
        ("process seconds", "first step of quickstart", "imports, to exit"),
        ("process seconds", "--help, to exit", "imports, to exit"),
    ]
    write("startup", _what(startup), "process seconds", found, pairs, threads=o.threads)


def memory(o: argparse.Namespace) -> None:
    """The largest resident memory of a process: configs/cifar10.yaml, against a Trainer that fits next to nothing.

    800 steps: an epoch, its validation and a checkpoint, and some more. Against ten steps of Lightning's BoringModel.
    """
    with tempfile.TemporaryDirectory() as folder:
        fit = ["-m", "src", "fit", "--config=configs/cifar10.yaml", f"--data.root={o.root}"]
        where = [f"--trainer.default_root_dir={folder}", f"--trainer.max_steps={o.steps or 800}"]
        cases: dict[str, Case] = {
            "empty fit": lambda _: _python(o, "-c", EMPTY_FIT, folder),
            "ours": lambda _: _python(o, *fit, *where, terminal=True),
        }
        found = alternate(cases, o.rounds)
    write("memory", _what(memory), "peak MB", found, [("peak MB", "ours", "empty fit")], threads=o.threads)


def breakdown(o: argparse.Namespace) -> None:
    """Where an optimizer step of configs/cifar10.yaml and of configs/speed94.yaml (images of full size) goes.

    Data to optimizer: sections of a loop by hand, means. "Trainer, guard, metrics": a fit without bar, TensorBoard,
    checkpoints and live weights, less that loop. "Bar, logging, checkpoints, live weights": the whole fit less that
    one. Both are differences within a round, which noise may make negative.
    """
    quiet = ("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false")
    for config, steps, skip, block in (("cifar10", 600, 100, 50), ("speed94", 14, 2, 1)):
        steps, skip, block = (o.steps, 1, 1) if o.steps else (steps, skip, block)
        options = [f"--config=configs/{config}.yaml", f"--steps={steps}", f"--skip={skip}", f"--block={block}"]
        options.append("--full_size")
        cases = {
            "by hand": _steps(o, "floor", *options),
            "quiet": _steps(o, "ours", *options, *quiet),
            "ours": _steps(o, "ours", *options),
        }
        samples, missing = alternate(cases, o.rounds)
        parts: dict[str, list[Sample]] = {}
        for hand, still, full in zip(*(samples[case] for case in cases), strict=False):
            sections = {k.removesuffix(", ms"): v for k, v in hand.items() if k.endswith(", ms")}
            sections["Trainer, guard, metrics"] = still["ms a step"] - hand["ms a step"]
            sections["bar, logging, checkpoints, live weights"] = full["ms a step"] - still["ms a step"]
            for name, milliseconds in sections.items():
                parts.setdefault(name, []).append({"ms a step": milliseconds})
        whole = [compare(samples, "ms a step", case, "by hand") for case in ("quiet", "ours")]
        write(
            f"breakdown_{config}", _what(breakdown), "ms a step", (parts, missing), threads=o.threads, whole_steps=whole
        )


def scaling(o: argparse.Namespace) -> None:
    """Images/s of the small CNN in training, by batch size, data included.

    The seed's loop (PIL, no workers, float32); the usual Lightning script (2 workers, float32); a loop by hand on our
    loader, in the precision that our command line would choose; ours.
    """
    cases: dict[str, Case] = {}
    sizes = (16, 32, 64, 128, 256, 512, 1024, 2048) if not o.steps else (16, 64)
    labels = ("the seed's loop", "usual script", "by hand", "ours")
    for size in sizes:
        steps = o.steps or max(8, 6400 // size)
        skip = max(1, steps // 8)
        options = (f"--batch_size={size}", f"--steps={steps}", f"--skip={skip}", f"--block={max(1, steps // 8)}")
        seed = ["-m", "benchmarks.loops", "seed", f"--root={o.root}", *options[:3]]
        cases[f"the seed's loop, {size}"] = lambda _, seed=seed: _python(o, *seed)  # type: ignore[misc]
        cases[f"usual script, {size}"] = _steps(o, "usual", *options, "--workers=2")
        cases[f"by hand, {size}"] = _steps(o, "floor", *options)
        cases[f"ours, {size}"] = _steps(o, "ours", *options)
    pairs = [("images/s", f"ours, {n}", f"{label}, {n}") for n in sizes for label in labels[:-1]]
    lines = [(label, [(n, f"{label}, {n}") for n in sizes]) for label in labels]
    write("scaling", _what(scaling), "images/s", alternate(cases, o.rounds), pairs, threads=o.threads, lines=lines)


def _python(o: argparse.Namespace, *words: str, terminal: bool = False) -> Sample:
    return process([sys.executable, *words], threads=o.threads, terminal=terminal)


def _steps(o: argparse.Namespace, loop: str, *options: str) -> Case:
    words = ("-m", "benchmarks.steps", loop, f"--root={o.root}", *options)
    return lambda _: _python(o, *words, terminal=loop != "floor")


def _what(measurement: Callable[[argparse.Namespace], None]) -> str:
    return " ".join((measurement.__doc__ or "").split())


def _test_accuracy(path: Path) -> float:
    return float(json.loads(path.read_text())["test/acc"])


MEASUREMENTS = {f.__name__: f for f in (cifar10, step94, time94, overhead, startup, memory, breakdown, scaling)}


def command() -> None:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=MEASUREMENTS, metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--root", type=lambda p: Path(p).resolve(), default=Path("data").resolve())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=CORES, help="of each process; by default the cores it may use")
    parser.add_argument("--steps", type=int, help="fewer, for a try-out")
    parser.add_argument("--seed", type=int, default=0, help="of time94: the first")
    o = parser.parse_args()
    for name in o.names:
        MEASUREMENTS[name](o)


if __name__ == "__main__":
    command()
