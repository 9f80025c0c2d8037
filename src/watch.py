"""Score the weights of a run on its val split, again and again while it trains, from a process of its own.

    python -m src watch lightning_logs/version_0

It reads the live weights (see `src.live.weights`) and hardly disturbs the run: it has a low priority and one thread.
The curves live/val_acc and live/val_loss stand beside the run's own in TensorBoard, as its part ``live``.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.report import class_scores, scores_table
from src.cli import CLI, age_text
from src.cli import main as run
from src.errors import Failure, Interrupted, OneLineParser, UsageError, refuse
from src.hardware import device_type
from src.live.commands import LOCK
from src.live.files import open_lock
from src.live.liveness import lives, try_hold
from src.live.weights import LiveWeights, Version

_NICE = 10
"""A tenth of a core that the run keeps busy. With 19, the least, one look at the small CNN took minutes there."""


def main(args: Sequence[str]) -> int:
    """Run ``watch``.

    Args:
        args: The command line behind ``watch``.

    Returns:
        The exit status: 0 when the run has ended, 1 for a failure, 2 for a command that cannot be.
    """
    parser = OneLineParser(prog="python -m src watch", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of the run, e.g. lightning_logs/version_0")
    parser.add_argument("--once", action="store_true", help="score the newest weights, and end")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="RUN/config.yaml, if you trust it: the classes of your own that it names are imported",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, or one of several: cuda:1")
    try:
        options = parser.parse_args(args)
        kind, _, index = options.device.partition(":")
        if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
            raise UsageError(f"device: {options.device!r} is none of cpu, cuda, cuda:1, mps")
        if device_type(kind) != kind:
            raise Failure(f"device: {options.device}: torch finds none on this machine; use cpu")
        if not options.run.is_dir():
            raise Failure(f"{options.run}: there is no such folder; give that of a run")
        if not (options.run / "config.yaml").is_file():
            raise Failure(f"{options.run} is not the folder of a run: it has no config.yaml")
    except (UsageError, Failure) as error:
        return refuse(error)
    if kind == "cpu":
        torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(_NICE)
    words = ["validate", *(f"--config={name}" for name in options.config)]
    words += ["--live", str(options.run), "--trainer.accelerator", kind]
    words += ["--trainer.devices", f"[{index}]" if index else "1"]
    words += ["--trainer.enable_progress_bar", "false"]
    return run(words, partial(Watch, once=options.once))


class Watch(CLI):
    """`validate --live`, for each new version of the weights.

    Args:
        args: Its command line.
        once: Whether to end after the first.
    """

    def __init__(self, args: list[str], *, once: bool) -> None:
        self.once = once
        self._writer: SummaryWriter | None = None
        super().__init__(args)

    def after_instantiate_classes(self) -> None:
        """Refuse a run that has nothing to be scored on."""
        if self.datamodule.val_size == 0:
            raise UsageError(
                f"{self.live}: this run trains on all of its images (data.val_size 0): none is left to score"
            )
        super().after_instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        assert self.live is not None
        self.trainer.callbacks = []  # type: ignore[attr-defined] # set outside of __init__
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        # Of two files in a folder TensorBoard does not go back to the older one: what is written there is never shown.
        lock = open_lock(self.live / "live" / ".watch")
        if not try_hold(lock):
            sys.stdout.write("note: another watch writes the curves of this run into TensorBoard\n")
        with (
            LiveWeights.open(self.live) as reader,
            _screen() as show,
            suppress(Interrupted, KeyboardInterrupt, SystemExit),
        ):
            for version in reader:
                self.take(version)
                self.trainer.validate(self.model, self.datamodule, verbose=False)
                metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
                if try_hold(lock):
                    self._write(metrics, version.step)
                show(self._line(version, metrics), self._table())
                if self.once:
                    return
            ended = not lives(self.live / "live" / LOCK)
            sys.stdout.write(f"the run {'has ended' if ended else 'publishes no more weights'}\n")

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        assert self.live is not None
        self._writer = self._writer or SummaryWriter(self.live / "live")
        for name in ("acc", "loss"):
            self._writer.add_scalar(f"live/val_{name}", metrics[f"val/{name}"], step)
        self._writer.flush()

    def _line(self, version: Version, metrics: Any) -> str:
        return f"live/val_acc {metrics['val/acc']:.4f}  live/val_loss {metrics['val/loss']:.4f}  {age_text(version)}"

    def _table(self) -> Any:
        return scores_table(class_scores(self.model.confusion_matrix, self.datamodule.classes))


@contextmanager
def _screen() -> Iterator[Any]:
    """Give what shows a line and a table: in place in a terminal; elsewhere the lines, and the last table."""
    console = Console()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda line, table: live.update(Group(table, line), refresh=True)
        return
    last: list[Any] = []

    def show(line: str, table: Any) -> None:
        last[:] = [table]
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    try:
        yield show
    finally:
        for table in last:
            console.print(table)
