"""Callbacks of the tests of feeding: one that feeds a fit at given steps, and one that scores what joins by itself."""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 (the field's name)

from src.callbacks.feeding import Feeding
from src.data import Batch, Shapes10
from src.live.feed import correct, offer_shard
from src.live.journal import Journal
from src.live.segments import segment_path
from tests.faults.probe import CrashError

FEED, PLAN = Path("feed"), Path("plan.json")
OWN = 115
"""Images of the data set's own; what is fed has the ids from there on."""


class Eater(pl.Callback):
    """Feeds the fit what ``plan.json`` says after given steps, and waits until it is there; dies where that says so."""

    between_chunks = False
    step = -1
    left = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.left = PLAN.is_file() and bool(json.loads(PLAN.read_text())["left"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, before = trainer.global_step, self.step
        self.step = step
        if not PLAN.is_file() or step == before:  # gradients are being accumulated
            return
        plan, feeder = json.loads(PLAN.read_text()), feeding_of(trainer)._feeder
        assert feeder is not None
        if self.left:  # by a crash
            wait_for(lambda: bool(feeder.ready))
            self.left = False
        for number, item in enumerate(plan["fed"].pop(str(step), [])):
            ready = len(feeder.ready)
            feed_now(f"{step:03}-{number}", item)
            wait_for(lambda ready=ready: len(feeder.ready) > ready)
        plan["left"] = bool(feeder.ready)
        crashes = step in plan["crashes"]
        if crashes:
            plan["crashes"].remove(step)
        PLAN.write_text(json.dumps(plan))
        if crashes:
            raise CrashError


def feed_now(name: str, item: Any) -> None:
    if isinstance(item, int):
        number = int(name.replace("-", ""))
        images = np.random.default_rng(number).integers(0, 256, (item, 32, 32, 3), dtype=np.uint8)
        offer_shard(FEED, images, [(number + i) % 10 for i in range(item)], name)
    else:
        correct(FEED, *item)


def feeding_of(trainer: Any) -> Feeding:
    return next(c for c in trainer.callbacks if isinstance(c, Feeding))


def wait_for(said: Any) -> None:
    deadline = time.monotonic() + 20
    while not said():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


class Oracle(pl.Callback):
    """Scores, before each batch, what the journal says has joined at this step; its losses and hits are in `scored`."""

    between_chunks = False
    scored: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # noqa: RUF012 (of the last fit in this process)
    drawn: set[int] = set()  # noqa: RUF012

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Oracle.scored, Oracle.drawn = [], set()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        run = Path(trainer.log_dir or "")
        lines = Journal(run / "live/journal.jsonl").read()
        for line in (line for line in lines if line["kind"] == "segment" and line["step"] == trainer.global_step):
            facts = line["effective"]
            first, count = facts["first_id"], facts["images"]
            assert not Oracle.drawn & {*range(first, first + count)}, "it was trained on before it was scored"
            with np.load(segment_path(run / "live/segments", facts["number"])) as parts:
                pixels, labels = torch.from_numpy(parts["pixels"]), torch.from_numpy(parts["labels"])
            images = (pixels.float() / 255 - torch.tensor(Shapes10.mean)) / torch.tensor(Shapes10.std)
            network = pl_module.network
            assert isinstance(network, torch.nn.Module)
            training = {name: module.training for name, module in network.named_modules()}
            network.eval()
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                logits = network(images.permute(0, 3, 1, 2)).float()
            for name, module in network.named_modules():
                module.training = training[name]
            losses = F.cross_entropy(logits, labels, reduction="none").double()
            Oracle.scored.append((trainer.global_step, losses, logits.argmax(1) == labels))
        Oracle.drawn |= set(batch.ids.tolist())
