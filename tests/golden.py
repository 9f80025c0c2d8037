"""Golden loss curves: 30 steps of three recipes, kept to the last bit for each platform that they were recorded on.

    python -m tests.golden            # compare
    python -m tests.golden --write    # record the curves of this platform; commit tests/golden/

What the last bits depend on, besides the code, is in the key of a platform: the processor and its units, torch, and the
number of threads. A platform that is not recorded is compared with the others to two digits.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.cli import main

FOLDER = Path(__file__).resolve().parent / "golden"
CONFIGS = FOLDER.parent.parent / "configs"
RECIPES = {"quickstart": "32-true", "cifar10_regularized": "bf16-mixed", "cifar10_separable": "32-true"}
"""The recipes, and the number format that each is kept in."""

DATA = ["--data=Shapes10", "--data.train_images=420", "--data.test_images=10", "--data.val_size=100"]
RUN = [
    "--data.batch_size=32",
    "--model.optimizer.lr=0.01",
    "--trainer.max_epochs=3",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
]
STEPS, CLOSE_STEPS, RTOL = 30, 10, 2e-2

Curve = dict[str, Any]
"""Losses as hexadecimal floats, by step, under ``train/loss`` and ``val/loss``; ``weights``: their SHA-256."""


def platform_key() -> str:
    """Return all that the last bits of a loss depend on, other than the code."""
    processor = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        processor = f" family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    units: Any = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    capability = torch.backends.cpu.get_cpu_capability() + ("+AMX" if units.get("amx_bf16") else "")
    threads = torch.get_num_threads()
    machine = f"{platform.system()} {platform.machine()}{processor} {capability}"
    return f"{machine}, torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}"


def train(recipe: str) -> Curve:
    """Train a recipe on a tiny data set, and return its curve."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = f"--config={CONFIGS / recipe}.yaml"
        options = [f"--trainer.precision={RECIPES[recipe]}", f"--trainer.default_root_dir={folder}"]
        status = main(["fit", config, *DATA, *RUN, *options])
        assert status == 0, f"the fit of {recipe} ended with exit status {status}"
        run = Path(folder) / "lightning_logs" / "version_0"
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        curve: Curve = {tag: [e.value.hex() for e in events.Scalars(tag)] for tag in ("train/loss", "val/loss")}
        weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert len(curve["train/loss"]) == STEPS
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return curve | {"weights": digest.hexdigest()}


def recorded(recipe: str) -> dict[str, Curve]:
    """Return the curves of a recipe by platform."""
    curves: dict[str, Curve] = json.loads((FOLDER / f"{recipe}.json").read_text())
    return curves


def differences(curve: Curve, golden: dict[str, Curve], key: str) -> Iterator[str]:
    """Yield what differs from the curve of this platform; where there is none, whether all others are far off."""
    if key not in golden:
        if not any(is_close(curve, other) for other in golden.values()):
            yield (
                f"no curve is recorded for {key}, and the first {CLOSE_STEPS} losses are not within {RTOL:.0%} of any "
                f"other platform's; if they are right, record them: python -m tests.golden --write"
            )
        return
    for name in ("train/loss", "val/loss"):
        for i, (one, other) in enumerate(zip(curve[name], golden[key][name], strict=True), 1):
            if one != other:
                found, due = float.fromhex(one), float.fromhex(other)
                yield f"point {i} of {name} is {found!r}, not {due!r}: by {abs(found - due):.1e} ({key})"
                return
    if curve["weights"] != golden[key]["weights"]:
        yield f"the losses are equal to the last bit, but the final weights are not ({key})"


def is_close(curve: Curve, other: Curve) -> bool:
    """Return whether two curves begin alike, as they do on two machines."""
    pairs = zip(*(c["train/loss"][:CLOSE_STEPS] for c in (curve, other)), strict=True)
    return all(math.isclose(float.fromhex(a), float.fromhex(b), rel_tol=RTOL) for a, b in pairs)


def write(recipe: str, curve: Curve, key: str) -> None:
    """Record a curve; those of other platforms stay unless the recipe has changed so much that they cannot be right."""
    path = FOLDER / f"{recipe}.json"
    others = recorded(recipe) if path.is_file() else {}
    curves = {name: other for name, other in others.items() if is_close(curve, other)} | {key: curve}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(sorted(curves.items())), indent=1) + "\n")


def command() -> int:
    """Compare, or record, all recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record the curves of this platform")
    options = parser.parse_args()
    torch.set_num_threads(1)
    key, failed = platform_key(), False
    for recipe in RECIPES:
        curve = train(recipe)
        if options.write:
            write(recipe, curve, key)
        found = [] if options.write else list(differences(curve, recorded(recipe), key))
        sys.stdout.write(f"{recipe}: {'recorded' if options.write else '; '.join(found) or 'equal'}\n")
        failed |= bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(command())
