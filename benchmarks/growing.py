"""What it costs to learn a data set that grows: fed class by class while it trains, against all of it from the start.

    python -m benchmarks.growing --root data --rounds 1

Both are configs/cifar10_fed.yaml with the same seed and the same number of steps, so of images seen. One is given all
of the train split (45,000 images) at once. The other is given a fifth, and the rest is fed by examples/feed_cifar10.py,
class by class, from a process of its own. Both are tested on their last weights. The picture in the READMEs,
docs/fed.png, is of the fed run of the first round.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.paired import CORES, ROOT, Case, MissingError, alternate, write
from src.live.journal import Journal


def fit(o: argparse.Namespace, number: int, *, fed: bool) -> dict[str, Any]:
    """Run one fit, feed it, and test it."""
    with tempfile.TemporaryDirectory() as folder:
        run, feed = Path(folder) / "lightning_logs" / "version_0", Path(folder) / "incoming"
        words = ["fit", "--config=configs/cifar10_fed.yaml", f"--data.root={o.root}", f"--data.feed={feed}", *o.more]
        words += [f"--seed_everything={42 + number}", f"--trainer.default_root_dir={folder}"]
        fitting = _start("-m", "src", *words, *([] if fed else ["--data.train_fraction=1.0"]))
        feeding = None
        try:
            if fed:
                while not (run / "live" / "weights.json").exists() and fitting.poll() is None:
                    time.sleep(0.1)
                options = [f"--run={run}", f"--feed={feed}", f"--root={o.root}", f"--every={o.every}"]
                feeding = _start("examples/feed_cifar10.py", *options)
            if fitting.wait() or (feeding is not None and feeding.wait()):
                raise MissingError("the fit, or what feeds it, failed")
        finally:
            for process in (fitting, feeding):
                if process is not None and process.poll() is None:
                    process.kill()
        if _start("-m", "src", "test", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}").wait():
            raise MissingError("the test failed")
        joined = [line for line in Journal(run / "live" / "journal.jsonl").read() if line["kind"] == "segment"]
        if fed and number == 0:
            _draw(run, joined, ROOT / "docs" / "fed.png")
        acc = json.loads((run / "test.json").read_text())["test/acc"]
        return {"test acc": acc, "images that joined": sum(line["effective"]["images"] for line in joined)}


def _start(*words: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def _draw(run: Path, joined: list[dict[str, Any]], path: Path) -> None:
    """Draw val/acc and how well images were told before they were learned, and when each class arrived."""
    import numpy as np
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from src.data import CIFAR10

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("feed/prequential_acc_window", "."), ("val/acc", "-")):  # the one is there where images arrive
        points = events.Scalars(name)
        axes.plot([p.step for p in points], [p.value for p in points], style, markersize=4, label=name)
    seen: set[int] = set()
    for line in joined:
        labels = np.load(run / "live" / "segments" / line["name"])["labels"]
        for label in sorted(set(labels.tolist()) - seen):
            axes.axvline(line["step"], color="0.7", linewidth=0.8, zorder=0)
            axes.text(
                line["step"], 0.02, f" {CIFAR10.classes[label]}", rotation=90, color="0.4", fontsize=8, va="bottom"
            )
            seen.add(label)
    axes.set(
        xlabel="step", ylim=(0, 1), title="CIFAR-10, a fifth at first, the rest fed class by class while it trains"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def command() -> None:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=lambda p: Path(p).resolve(), default=Path("data").resolve())
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--every", type=int, default=300, help="steps from one class to the next")
    o, more = parser.parse_known_args()
    o.more = more
    cases: dict[str, Case] = {
        "fed class by class": lambda number: fit(o, number, fed=True),
        "all from the start": lambda number: fit(o, number, fed=False),
    }
    found = alternate(cases, o.rounds)
    what = " ".join((__doc__ or "").split("\n\n")[2].split())
    pairs = [("test acc", "fed class by class", "all from the start")]
    write("growing", what, "test acc", found, pairs, threads=int(os.environ.get("OMP_NUM_THREADS", CORES)))


if __name__ == "__main__":
    command()
