"""What is claimed about a GPU, measured; `benchmarks/gpu.sh` does all of it in one go.

    python -m benchmarks.gpu time94 time96 images sync user resume live --root data
    python -m benchmarks.gpu time94 images sync user resume live --root data --smoke    # on a CPU, tiny: does it run?
    python -m benchmarks.gpu time94 --runs 3 --trainer.benchmark=false   # options not known here are those of the fits

Results go to benchmarks/results/gpu_NAME.json and .png, or to the folder $OUT.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.paired import ROOT, Case, MissingError, Sample, Samples, alternate, prepares, process, write


def time94(o: argparse.Namespace) -> None:
    """Time to 94 % by the clock of the speed-runs: 25 runs of configs/speed94_gpu.yaml in one process, after a warm-up.

    CUDA events; whitening, augmentation, training, logging and the evaluation of the test set with the config's views
    are in; imports, loading the data, building objects and the warm-up are out, in which the network is compiled
    (``--model.compile default``) and cuDNN tries its algorithms (``--trainer.benchmark true``). All 50,000 images, a
    seed a run.
    """
    _recipe(o, "speed94_gpu", 25, _what(time94), turn_within=0.65)


def time96(o: argparse.Namespace) -> None:
    """Time to 96 % by the same clock: 3 runs of configs/speed96.yaml, compiled."""
    _recipe(o, "speed96", 3, _what(time96), turn_within=0.75, gives_way=1.0)  # after time94


def images(o: argparse.Namespace) -> None:
    """Images/s of the small CNN in training at batch 64: the seed's loop, and ours with everything on.

    Data included; ours also with ``--cuda_graph true``, and with ``--chunk_size 10`` as well.
    """
    steps, skip = (40, 10) if o.smoke else (2000, 500)
    seed_steps, seed_skip = (10, 2) if o.smoke else (500, 50)
    size = [f"--steps={steps}", f"--skip={skip}", f"--block={10 if o.smoke else 250}"]
    seed = ["seed", f"--steps={seed_steps}", f"--skip={seed_skip}"]
    cases: dict[str, Case] = {"the seed's loop": lambda _: _run(o, "-m", "benchmarks.loops", *seed)}
    ways = {
        "": [],
        ", recorded": ["--cuda_graph=true"],
        ", recorded, in chunks": ["--cuda_graph=true", "--chunk_size=10"],
    }
    for way, more in ways.items():
        name = "ours" + way
        cases[name] = lambda _, more=more: _run(o, "-m", "benchmarks.steps", "ours", *size, *more)  # type: ignore[misc]
    pairs = [("images/s", name, "the seed's loop") for name in cases]
    write("gpu_images", _what(images), "images/s", _at_once(cases, 1), pairs[1:], threads=None)


def sync(o: argparse.Namespace) -> None:
    """1,000 steps of configs/cifar10.yaml with everything on, in which each wait of the host for the GPU is an error.

    By ``torch.cuda.set_sync_debug_mode("error")`` around every batch of the Trainer's loop, after 20 steps; what is
    between batches is not under it: validation, checkpoints, the start of an epoch. Missing means that it failed.
    """
    size = ["--steps=30"] if o.smoke else ["--steps=1020"]
    more = ["--sync_error", "--skip=20", "--block=5"]
    ways = {"ours": [], "ours, recorded": ["--cuda_graph=true"]}
    cases: dict[str, Case] = {
        name: lambda _, way=way: _run(o, "-m", "benchmarks.steps", "ours", *size, *more, *way)  # type: ignore[misc]
        for name, way in ways.items()
    }
    found = _at_once(cases, 1)
    broken = found[1] or any("broken off" in sample for samples in found[0].values() for sample in samples)
    write("gpu_sync", _what(sync), "ms a step", found, threads=None, passes=not broken and not o.smoke)


def user(o: argparse.Namespace) -> None:
    """Time to 94 % and to 96 % by a user's clock: fits of configs/speed94_gpu.yaml and speed96.yaml, start to exit.

    As they stand, so not compiled.
    """
    cut = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1"] if o.smoke else []

    def fit(config: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            words = ["-m", "src", "fit", f"--config=configs/{config}.yaml", *cut]
            words += [f"--data.root={o.root}", f"--trainer.default_root_dir={folder}"]
            return process([sys.executable, *words], threads=None, terminal=True, timeout=_left(o))

    cases: dict[str, Case] = {name: lambda _, name=name: fit(name) for name in ("speed94_gpu", "speed96")}  # type: ignore[misc]
    write("gpu_user", _what(user), "process seconds", alternate(cases, 1), threads=None)


def resume(o: argparse.Namespace) -> None:
    """Whether a deterministic fit that is killed (SIGKILL) and resumed ends with the weights of one that was not.

    configs/cifar10_regularized.yaml (dropout, BatchNorm, OneCycle, flips, crops), 500 steps, killed when its first
    checkpoint, of step 100, is there. Weights are compared to the last bit. The second case is the same with fused SGD
    and ``--cuda_graph true``, its steps recorded.
    """
    steps, every = (12, 4) if o.smoke else (500, 100)
    options = ["--config=configs/cifar10_regularized.yaml", f"--data.root={o.root}", f"--trainer.max_steps={steps}"]
    options += [f"--checkpoint.every_n_steps={every}", "--trainer.deterministic=true", "--data.val_size=0"]

    def fit(*way: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            runs = [Path(folder) / name for name in ("whole", "killed")]
            lasts = [run / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt" for run in runs]
            command = [sys.executable, "-m", "src", "fit"]
            whole, killed = ([*command, *options, *way, f"--trainer.default_root_dir={run}"] for run in runs)
            took = process(whole, threads=None, timeout=_left(o))
            child = subprocess.Popen(killed, cwd=ROOT, stdout=subprocess.DEVNULL)
            while not lasts[1].is_file() and child.poll() is None and _left(o) > 1:
                time.sleep(0.001)
            child.kill()
            child.wait()
            if not lasts[1].is_file():
                raise MissingError("there was no checkpoint in time")
            import torch  # here: the time that it takes is not that of the others

            at = torch.load(lasts[1], weights_only=True)["global_step"]
            process([*command, f"--ckpt_path={lasts[1]}"], threads=None, timeout=_left(o))
            one, two = (torch.load(last, weights_only=True)["state_dict"] for last in lasts)
            differ = sum(not torch.equal(one[name], two[name]) for name in one)
            return took | {"killed after step": at, "tensors that differ": differ}

    recorded = ["--model.optimizer.fused=true", "--cuda_graph=true"]
    cases: dict[str, Case] = {"ours": lambda _: fit(), "ours, recorded": lambda _: fit(*recorded)}
    found = _at_once(cases, 1)
    write("gpu_resume", _what(resume), "tensors that differ", found, threads=None)


def live(o: argparse.Namespace) -> None:
    """A step of configs/speed94_gpu.yaml, of 2,000 images, with and without publishing every 10 steps and steering."""
    size = ["--steps=4", "--skip=1"] if o.smoke else ["--steps=400", "--skip=20"]
    block = [f"--block={1 if o.smoke else 10}"]  # with one publication each: the median of single steps would see none
    words = ["-m", "benchmarks.steps", "ours", "--config=configs/speed94_gpu.yaml", "--full_size", *block, *size]
    ways = {"off": ["--publish_every_n_steps=null", "--steering=false"], "on": ["--publish_every_n_steps=10"]}
    cases: dict[str, Case] = {name: lambda _, more=more: _run(o, *words, *more) for name, more in ways.items()}  # type: ignore[misc]
    found = _at_once(cases, 1 if o.smoke else 2)
    write("gpu_live", _what(live), "ms a step", found, [("ms a step", "on", "off")], threads=None)


def _recipe(o: argparse.Namespace, name: str, runs: int, what: str, turn_within: float, gives_way: float = 0.0) -> None:
    size = ["--runs=2", "--steps=1"] if o.smoke else [f"--runs={o.runs or runs}"]
    words = ["recipe", f"--config=configs/{name}.yaml", "--warm_up", "--eval_batch_size=2000"]
    words += ["--model.compile=default", "--trainer.benchmark=true"]
    words = ["-m", "benchmarks.steps", *words, *size, *o.more]
    cases: dict[str, Case] = {"ours": lambda _: _run(o, *words, turn_within=turn_within, gives_way=gives_way)}
    samples, missing = alternate(cases, 1)
    found: list[dict[str, Any]] = samples["ours"][0]["runs"] if samples.get("ours") else []
    if found and "broken off" in samples["ours"][0]:
        missing["further runs"] = samples["ours"][0]["broken off"]
    keys = ("seconds", "training seconds", "acc tta", "acc") if found else ()
    means = {k: statistics.mean(run[k] for run in found) for k in keys}
    stds = {k: statistics.stdev(run[k] for run in found) for k in keys if len(found) > 1}
    measured = {"ours": found}, missing
    figures: dict[str, Any] = {"means": means, "standard_deviations": stds}
    figures |= {"alone": "beside others" not in samples["ours"][0]} if found else {}
    write(f"gpu_time{name[5:7]}", what, "seconds", measured, threads=None, **figures)


def _at_once(cases: dict[str, Case], rounds: int) -> tuple[Samples, dict[str, str]]:
    """As `alternate`, but all of a round begin at once; they measure one by one, see `my_turn`, or take no times."""
    begun: dict[int, dict[str, Future[Sample]]] = {}

    def end(name: str, number: int) -> Sample:
        if number not in begun:
            begun[number] = {name: pool.submit(case, number) for name, case in cases.items()}
        return begun[number][name].result()

    with ThreadPoolExecutor(len(cases)) as pool:
        return alternate({name: partial(end, name) for name in cases}, rounds)


def _run(o: argparse.Namespace, *words: str, turn_within: float = 0.8, gives_way: float = 0.0) -> dict[str, Any]:
    """Run a process that waits for its turn, if it takes times, for at most this share of the time that is left."""
    command = [sys.executable, *words, f"--root={o.root}"]
    left, terminal = _left(o), "benchmarks.steps" in words
    return process(
        command, threads=None, terminal=terminal, timeout=left, turn_within=turn_within * left, gives_way=gives_way
    )


def _left(o: argparse.Namespace) -> float:
    return max(1.0, float(o.deadline - time.monotonic()))


def _what(measurement: Callable[[argparse.Namespace], None]) -> str:
    return " ".join((measurement.__doc__ or "").split())


def command() -> int:
    """Read the command line, and run."""
    measurements = {f.__name__: f for f in (time94, time96, images, sync, user, resume, live)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=measurements, metavar="NAME", help=", ".join(measurements))
    parser.add_argument("--root", type=lambda p: Path(p).resolve(), default=Path("data").resolve())
    parser.add_argument("--timeout", type=float, default=150, help="seconds for each; what is late is missing")
    parser.add_argument("--runs", type=int, help="of time94 and time96; by default 25 and 3")
    parser.add_argument("--smoke", action="store_true", help="tiny, and on a CPU too: the figures mean nothing")
    o, more = parser.parse_known_args()
    if more and not {"time94", "time96"}.issuperset(o.names):
        parser.error(f"only time94 and time96 take {' '.join(more)}")
    o.more = more
    if not o.smoke and shutil.which("nvidia-smi") is None:
        print("there is no GPU here; --smoke tries the script out on a CPU", file=sys.stderr)
        return 1
    os.environ["LIVE_CIFAR10_TRACEBACK"] = "1"  # where it was that the host waited
    with tempfile.NamedTemporaryFile() as file:
        os.environ.setdefault("TURN", file.name)
        _measure(o, measurements)
    return 0


def _measure(o: argparse.Namespace, measurements: Mapping[str, Callable[[argparse.Namespace], None]]) -> None:
    for name in o.names:
        o.deadline = time.monotonic() + o.timeout
        held = prepares() if name in ("sync", "resume") else None  # which take no times, and are to disturb none
        measurements[name](o)
        if held is not None:
            os.close(held)


if __name__ == "__main__":
    sys.exit(command())
