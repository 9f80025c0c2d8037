"""Feeds a fit of configs/cifar10_fed.yaml what it was not given: four fifths of CIFAR-10, one class after the other.

    python -m src fit --config configs/cifar10_fed.yaml        # in one terminal; in another, meanwhile:
    python examples/feed_cifar10.py

It goes by the steps of the run, which it reads from the run's live weights, so that it does the same on any machine.
"""

import argparse
import sys
import time
from pathlib import Path

from src.data import CIFAR10
from src.errors import Failure
from src.live.feed import offer_shard
from src.live.weights import LiveWeights


def main() -> None:
    """Read the command line, and feed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of the run; by default the newest in lightning_logs")
    parser.add_argument("--feed", type=Path, default=Path("incoming"), help="what the run has as data.feed")
    parser.add_argument("--root", type=Path, default=Path("data"), help="the folder with CIFAR-10")
    parser.add_argument("--every", type=int, default=300, help="steps of the run from one class to the next")
    options = parser.parse_args()
    try:
        run = options.run or newest(Path("lightning_logs"))
        feed(run, options.feed, options.root, options.every)
    except Failure as error:
        sys.exit(f"error: {error}")


def newest(logs: Path) -> Path:
    """Return the folder of the newest run."""
    runs = sorted(logs.glob("version_*"), key=lambda run: run.stat().st_mtime)
    if not runs:
        raise Failure(f"there is no run in {logs}: start python -m src fit --config configs/cifar10_fed.yaml first")
    return runs[-1]


def feed(run: Path, folder: Path, root: Path, every: int) -> None:
    """Feed a run that was given a fifth of the train split the other four.

    Args:
        run: Its folder.
        folder: What it has as ``data.feed``.
        root: The folder with CIFAR-10.
        every: Optimizer steps from one class to the next.
    """
    pixels, labels = CIFAR10(root=root).load("train")
    everything = set(CIFAR10(root=root).split()[0].tolist())
    given = set(CIFAR10(root=root, feed=folder, train_fraction=0.2).split()[0].tolist())
    rest = sorted(everything - given)
    with LiveWeights.open(run) as weights:
        for number, name in enumerate(CIFAR10.classes):
            weights.wait(step=(number + 1) * every, timeout=3600)
            members = [i for i in rest if labels[i] == number]
            offer_shard(folder, pixels[members].numpy(), labels[members].numpy())
            print(f"{time.strftime('%H:%M:%S')} fed {len(members):,} images of class {name}")


if __name__ == "__main__":
    main()
