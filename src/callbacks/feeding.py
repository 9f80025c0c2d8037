"""Live data: what is put into a folder joins the data of a fit, between two of its steps.

    python -m src fit --config configs/cifar10.yaml --data.feed incoming
    python -m src feed incoming cat.png --label cat

The folder is read, and pictures are decoded, by a process of its own (`src.live.intake`). Here what has come is scored
by the network before it learns from it ("test, then train"; Gama et al., On evaluating stream learning algorithms,
2013), joins the data, and is journaled with the step.
"""

import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name)

from src.callbacks.controls import recount
from src.callbacks.resume import data_of
from src.classifier import ImageClassifier
from src.data import Batch, ResidentLoader
from src.data.growth import Growth
from src.errors import Failure
from src.live.feed import CLASSES, announce
from src.live.feeder import Correction, Feeder, Refused
from src.live.journal import REFUSED, Journal
from src.live.replay import Intervention, fed_facts
from src.live.segments import Segment, Source, digests, read_segment, segment_path

WINDOW = 1000
"""Images of the sliding window of the prequential curves."""

_AT_ONCE = 100  # refusals and corrections that are dealt with between two steps
_MOST_REFUSALS = 100_000  # that are journaled
_ENDLESS = 2**40  # images
_PATIENCE = 5.0  # seconds until a segment that could not be journaled is tried again

Item = Segment | Correction | Refused


class Record(Protocol):
    """Journals what is done, unless it is in the journal, and remembers that it is done."""

    def __call__(self, kind: str, lines: list[dict[str, Any]], actor: str, id: str) -> None:
        """Journal lines of a kind."""


class Prequential:
    """How well images were told before they were learned: over all of them, and over the last `WINDOW`."""

    def __init__(self) -> None:
        self.images = self.hits = 0
        self.loss = 0.0
        self._last: deque[tuple[float, bool]] = deque(maxlen=WINDOW)

    def add(self, losses: Tensor, hits: Tensor) -> None:
        """Add images: their losses, float64 ``[n]``, and whether the network was right, bool ``[n]``, on the CPU."""
        self.images += len(losses)
        self.hits += int(hits.sum())
        self.loss += float(losses.sum())
        self._last.extend(zip(losses.tolist(), hits.tolist(), strict=True))

    def values(self) -> dict[str, float]:
        """Return the points of the curves, by name."""
        if not self.images:
            return {}
        losses, hits = zip(*self._last, strict=True)
        return {
            "feed/prequential_acc": self.hits / self.images,
            "feed/prequential_loss": self.loss / self.images,
            "feed/prequential_acc_window": sum(hits) / len(hits),
            "feed/prequential_loss_window": math.fsum(losses) / len(losses),
        }

    def pack(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        losses = torch.tensor([loss for loss, _ in self._last], dtype=torch.float64)
        right = torch.tensor([hit for _, hit in self._last], dtype=torch.bool)
        return {"images": self.images, "hits": self.hits, "loss": self.loss, "losses": losses, "right": right}

    def unpack(self, packed: dict[str, Any]) -> None:
        """Undo `pack`."""
        self.images, self.hits, self.loss = packed["images"], packed["hits"], packed["loss"]
        self._last = deque(zip(packed["losses"].tolist(), packed["right"].tolist(), strict=True), maxlen=WINDOW)


class Feeding(pl.Callback):
    """Feeds a fit, if ``data.feed`` names a folder; `src.callbacks.steering` calls it between two steps.

    Args:
        source: The folder of the run that is gone on with; none for a new one.
        replay: The folder of a run that is done again; then nothing else is taken.
        latest: The newest values of the curves by name; what a person sees of the feed is put there.
    """

    between_chunks = True

    def __init__(self, source: Path | None, replay: Path | None, latest: Callable[[], dict[str, float]]) -> None:
        self.source, self.replay = source, replay
        self._latest = latest
        self._prequential = Prequential()
        self._feeder: Feeder | None = None
        self._journal: Journal | None = None
        self._store: Path | None = None
        self._refused = 0
        self._not_before = 0.0
        self._feeds = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say where the segments are that a fit goes on with."""
        data = data_of(trainer)
        self._feeds = stage == "fit" and data.feed is not None
        if self._feeds and self.source is not None:
            data.store = self.source / "live" / "segments"

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the sums in progress; what joined before reaches the disk before the checkpoint does."""
        if data_of(trainer).feed is None:
            return
        if self._journal is not None:
            self._journal.sync()
        checkpoint["prequential"] = self._prequential.pack()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the sums in progress."""
        if "prequential" in checkpoint and trainer.state.fn == "fit":
            self._prequential.unpack(checkpoint["prequential"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to look at the folder."""
        data, folder = data_of(trainer), trainer.log_dir  # asked for on all ranks: it is broadcast
        if data.feed is None or not trainer.is_global_zero:
            return
        if not trainer.loggers or folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined] # set outside of __init__
            raise Failure("data.feed: a run that is fed needs a folder of its own: trainer.logger must not be false")
        live = Path(folder) / "live"
        self._store, self._journal = live / "segments", Journal(live / "journal.jsonl")
        try:
            self._store.mkdir(parents=True, exist_ok=True)
            self._bring_over(trainer)
        except OSError as error:
            raise Failure(f"{error.filename or self._store} cannot be used ({error.strerror})") from error
        if self.replay is not None:
            sys.stdout.write(f"note: {data.feed} is not looked at: what {self.replay} was fed joins again\n")
            return
        with suppress(OSError):  # who feeds is then not told of a wrong label, but the journal is
            # A checkpoint, which may be a stranger's, is not to say where a file or folder is made.
            if trainer.ckpt_path is None or (data.feed / CLASSES).is_file():
                announce(data.feed, data.classes)
        lines, loader = self._journal.read(), _loader(trainer)
        segments = self._segments(trainer, lines)
        pixels = loader.pixels.index_select(0, torch.cat(data.split()).to(loader.pixels.device))
        known = b"".join(digests(part) for part in (pixels.cpu().numpy(), *(s.pixels for s in segments)))
        taken = [source for line in lines if (source := _refused_source(line)) is not None]
        fed = sum(len(segment.names) for segment in segments)
        self._refused = sum(line["kind"] in REFUSED and bool(line["name"]) for line in lines)  # a command has no name
        self._feeder = Feeder(
            data.feed,
            self._store,
            data.classes,
            loader.pixels.shape[1],
            first=max((segment.number + 1 for segment in segments), default=0),
            room=_ENDLESS if data.replay_only is not None else data.feed_room - fed,
            taken=[*taken, *(source for segment in segments for source in segment.sources)],
            corrections=[line["id"] for line in lines if line["kind"] in ("relabel", "drop", "refused")],
            digests=known,
            told=partial(self.show, trainer),
        )
        self._feeder.open()
        self.show(trainer)

    def _bring_over(self, trainer: pl.Trainer) -> None:
        """Let a run that goes on in a folder of its own have the segments that it was fed before."""
        store = data_of(trainer).store
        if store is None or self._store is None or store.resolve() == self._store.resolve():
            return
        for event in _growth(trainer).events:
            if event.kind == "segment":
                _copy(segment_path(store, event.number), segment_path(self._store, event.number))

    def _segments(self, trainer: pl.Trainer, lines: list[dict[str, Any]]) -> list[Segment]:
        """Return all segments that have joined, or are to join again as the journal says, oldest first."""
        assert self._store is not None
        found = {event.number: event.sha256 for event in _growth(trainer).events if event.kind == "segment"}
        facts = [fed_facts(line) for line in lines if line["kind"] == "segment"]
        found |= {fact["number"]: fact["sha256"] for fact in facts}
        return [read_segment(segment_path(self._store, number), found[number]) for number in sorted(found)]

    @property
    def waiting(self) -> bool:
        """Whether something has come that can be taken."""
        return self._feeder is not None and bool(self._feeder.ready) and time.monotonic() >= self._not_before

    def starves(self, trainer: pl.Trainer) -> bool:
        """Return whether there are too few images to learn from, one for each rank, until others are fed."""
        if not self._feeds:
            return False
        loader = _loader(trainer)
        if loader.count - loader.drawn >= loader.world_size:
            return False
        if trainer.is_global_zero and self._feeder is None:
            raise Failure("data.train_fraction: 0 leaves nothing to train on, and nothing is fed")
        return True

    def wait(self, seconds: float) -> None:
        """Wait until something has come, at most so long."""
        if self._feeder is not None:
            self._feeder.wait(seconds)

    def items(self) -> list[Item]:
        """Return what is to be dealt with now: one segment at most, so that no step is held up for long."""
        items: list[Item] = []
        while self.waiting and len(items) < _AT_ONCE and not (items and isinstance(items[-1], Segment)):
            assert self._feeder is not None
            items.append(self._feeder.ready.popleft())
        return items

    def take(self, trainer: pl.Trainer, module: ImageClassifier, items: list[Item], record: Record) -> bool:
        """Deal with what has come, all ranks alike; return whether there are other images to draw than before."""
        before = len(_growth(trainer).events)
        refusals = [item for item in items if isinstance(item, Refused)]
        if refusals and self._journal is not None and self._refused < _MOST_REFUSALS:
            lines = [{"name": r.name, "requested": list(r.source), "effective": r.reason} for r in refusals]
            with suppress(OSError):  # a full disk must not end a run over a refusal
                self._journal.extend(trainer.global_step, "refused", lines, actor="feed", sync=False)
        self._refused += len(refusals)
        for item in items:
            if isinstance(item, Correction):
                self._correct(trainer, item, record)
            elif isinstance(item, Segment):
                try:
                    self.join(trainer, module, item, record)
                except OSError as error:
                    self._not_before = time.monotonic() + _PATIENCE
                    if self._feeder is not None:
                        self._feeder.ready.appendleft(item)
                        sys.stderr.write(f"warning: what was fed waits: it cannot be journaled ({error.strerror})\n")
                    continue
                if self._feeder is not None:
                    self._feeder.joined(item)
        self.show(trainer)
        return len(_growth(trainer).events) > before

    def join(self, trainer: pl.Trainer, module: ImageClassifier, segment: Segment, record: Record) -> None:
        """Score images, and let them join the data.

        Raises:
            OSError: If that cannot be journaled; nothing has been done.
        """
        loader, growth = _loader(trainer), _growth(trainer)
        facts = {"number": segment.number, "images": len(segment.names), "sha256": segment.sha256}
        facts["first_id"] = growth.first + growth.joined
        record(
            "segment", [{"name": f"{segment.number:06}.npz", "effective": facts}], "feed", f"segment-{segment.number}"
        )
        self._prequential.add(*score(trainer, module, segment))
        loader.join(segment)
        recount(trainer, module)
        values = {**self._prequential.values(), "feed/images": float(growth.joined)}
        self._latest().update(values)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)

    def redo(self, trainer: pl.Trainer, module: ImageClassifier, done: Intervention, record: Record) -> None:
        """Do again what a journal says.

        Raises:
            Failure: If the segment is missing or has been changed, the config has no feed, or the data are others.
        """
        if data_of(trainer).feed is None:
            raise Failure(
                f"data.feed: the journal says that images were fed at step {done.step:,}; name the folder again"
            )
        growth, facts = _growth(trainer), done.effective
        if done.kind == "segment":
            if facts["first_id"] != growth.first + growth.joined:
                raise Failure(f"journal: what was fed at step {done.step:,} joined other images than there are now")
            store = Path(trainer.log_dir or ".") / "live" / "segments"
            segment = None
            if trainer.is_global_zero:
                if not done.own:
                    assert self.replay is not None
                    other = segment_path(self.replay / "live" / "segments", facts["number"])
                    store.mkdir(parents=True, exist_ok=True)
                    _copy(other, segment_path(store, facts["number"]))
                segment = read_segment(segment_path(store, facts["number"]), facts["sha256"])
            if trainer.world_size > 1:
                segment = trainer.strategy.broadcast(segment)
            assert segment is not None
            _growth(trainer).check(segment)
            self.join(trainer, module, segment, record)
        else:
            id, label = facts["id"], facts["label"]
            known = bool((_loader(trainer).ids == id).any())
            if not known or not (label is None or 0 <= label < len(data_of(trainer).classes)):
                raise Failure(
                    f"journal: what was put right at step {done.step:,} is no image, or no class, of these data"
                )
            self._apply(trainer, Correction(done.id, id, label, done.actor), id, record)
        self.show(trainer)

    def _correct(self, trainer: pl.Trainer, correction: Correction, record: Record) -> None:
        """Put an image right, or journal why not."""
        growth, sample = _growth(trainer), correction.sample
        id = growth.names.get(sample) if isinstance(sample, str) else sample
        if id is not None and bool((_loader(trainer).ids == id).any()):
            with suppress(OSError):  # it cannot be journaled, and is not done
                self._apply(trainer, correction, id, record)
        elif self._journal is not None:
            reason = f"no image that is trained on is called {sample!r} or has this id"
            line = {"name": str(sample), "effective": reason}
            self._refused += 1
            with suppress(OSError):
                self._journal.extend(
                    trainer.global_step, "refused", [line], actor=correction.actor, id=correction.id, sync=False
                )

    def _apply(self, trainer: pl.Trainer, correction: Correction, id: int, record: Record) -> None:
        loader, growth, label = _loader(trainer), _growth(trainer), correction.label
        classes = data_of(trainer).classes
        line = {
            "name": str(id),
            "before": classes[growth.label(id)],
            "requested": correction.sample,
            "effective": {"id": id, "label": label, "class": None if label is None else classes[label]},
        }
        record("drop" if label is None else "relabel", [line], correction.actor, correction.id)
        loader.correct(id, label)
        if label is None:
            module = trainer.lightning_module
            assert isinstance(module, ImageClassifier)
            recount(trainer, module)

    def show(self, trainer: pl.Trainer) -> None:
        """Put what arrived, waits and was refused where a person sees it; called by the feeder's thread as well."""
        if isinstance(loader := trainer.train_dataloader, ResidentLoader) and loader.growth is not None:
            waits = self._feeder.waiting if self._feeder is not None else 0
            shown = {"feed/images": loader.growth.joined, "feed/waiting": waits, "feed/refused": self._refused}
            self._latest().update({name: float(value) for name, value in shown.items()})

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look at the folder no more."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Look at the folder no more."""
        self._close()

    def _close(self) -> None:
        if self._feeder is not None:
            self._feeder.close()
            self._feeder = None


@torch.no_grad()
def score(trainer: pl.Trainer, module: ImageClassifier, segment: Segment) -> tuple[Tensor, Tensor]:
    """Score images that the network has not seen, as a validation would.

    Returns:
        The loss of each, float64 ``[n]``, and whether it was told right, bool ``[n]``; both on the CPU.
    """
    loader, size = _loader(trainer), data_of(trainer).eval_batch_size
    device = loader.pixels.device
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    losses, hits = [], []
    try:
        with trainer.precision_plugin.forward_context():
            for start in range(0, len(segment.names), size):
                pixels = torch.from_numpy(segment.pixels[start : start + size]).to(device)
                labels = torch.from_numpy(segment.labels[start : start + size]).to(device)
                logits = module.logits(Batch(loader.normalize(pixels), labels, labels, len(labels)))
                losses.append(F.cross_entropy(logits, labels, reduction="none"))
                hits.append(logits.argmax(1) == labels)
    finally:
        for part, training in modes:
            part.training = training
    return torch.cat(losses).double().cpu(), torch.cat(hits).cpu()


def _refused_source(line: dict[str, Any]) -> Source | None:
    """Return the file that a line of the journal says was refused, if it is one that says so."""
    found = line["requested"]
    if line["kind"] not in REFUSED or not isinstance(found, list) or [type(v) for v in found] != [str, int, int]:
        return None
    return found[0], found[1], found[2]


def _copy(path: Path, other: Path) -> None:
    """Give a segment, which nobody changes, a second name, or copy it."""
    if other.exists():
        return
    try:
        other.hardlink_to(path)
    except OSError:
        try:
            shutil.copyfile(path, other)
        except OSError as error:
            raise Failure(f"{path}: the images that were fed cannot be read ({error.strerror})") from error


def _loader(trainer: pl.Trainer) -> ResidentLoader:
    loader = trainer.train_dataloader
    assert isinstance(loader, ResidentLoader)
    return loader


def _growth(trainer: pl.Trainer) -> Growth:
    growth = _loader(trainer).growth
    assert growth is not None
    return growth
