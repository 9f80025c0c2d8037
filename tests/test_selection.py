"""Learning the hardest images of each batch alone."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)

from src.callbacks.curves import Curves
from src.callbacks.guard import first_nonfinite
from src.callbacks.lookahead import Lookahead
from src.classifier import ImageClassifier
from src.data import Batch, CutMix
from src.networks import CNN, Network
from src.selection import Selection
from tests.test_classifier import fit


class Told(Network):
    """Says of an image what its first pixels are."""

    def __init__(self) -> None:
        super().__init__()
        self.head: nn.Linear = nn.Linear(1, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return images[:, 0, 0, :10] * self.head.weight.squeeze(1)


def batch_of(count: int) -> Batch:
    """Return a batch of random images."""
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return Batch(
        images.contiguous(memory_format=torch.channels_last), torch.arange(count) % 10, torch.arange(count), count
    )


@pytest.mark.parametrize(
    ("count", "share", "chosen"), [(8, 0.5, 4), (7, 0.5, 4), (3, 0.01, 1), (10, 0.9, 9), (100, 0.55, 55)]
)
def test_the_images_whose_loss_is_highest_by_the_proxy_are_chosen(count: int, share: float, chosen: int) -> None:
    batch, proxy = batch_of(count), Told()
    losses = F.cross_entropy(proxy(batch.images), batch.labels, label_smoothing=0.1, reduction="none")
    given = batch.images, batch.labels, None
    rows, loss = Selection(proxy, share)(*given, label_smoothing=0.1, learns=True)
    assert sorted(rows.tolist()) == sorted(losses.argsort(descending=True)[:chosen].tolist())
    torch.testing.assert_close(loss, losses[rows].mean())
    assert loss.requires_grad
    assert not Selection(proxy, share)(*given, label_smoothing=0.1, learns=False)[1].requires_grad


def alone(model: ImageClassifier) -> ImageClassifier:
    """Give a classifier a Trainer that does nothing."""
    model.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return model


def test_the_network_learns_what_is_chosen_and_the_loss_is_the_sum_of_both_means() -> None:
    batch = batch_of(8)
    model = alone(ImageClassifier(CNN(), selection=Selection(Told(), 0.25)))
    assert model.selection is not None
    given = batch.images, batch.labels
    rows, of_proxy = model.selection(*given, None, label_smoothing=0.0, learns=True)
    logits = model(batch.images[rows])
    outputs = model.training_step(batch, 0)
    mean = F.cross_entropy(logits, batch.labels[rows])
    torch.testing.assert_close(outputs["loss"], mean + of_proxy)
    torch.testing.assert_close(outputs["mean"], mean.detach())
    torch.testing.assert_close(outputs["logits"], logits.detach())
    assert torch.equal(outputs["labels"], batch.labels[rows])
    weighed = model.training_step(batch._replace(weights=torch.full((8,), 3.0), weight=24.0), 0)
    torch.testing.assert_close(weighed["loss"], outputs["loss"])
    weights = torch.linspace(0.1, 9, 8)
    rows, of_proxy = model.selection(*given, weights, label_smoothing=0.0, learns=True)
    ranked = F.cross_entropy(model.selection.network(batch.images), batch.labels, reduction="none") * weights
    assert sorted(rows.tolist()) == sorted(ranked.argsort(descending=True)[:2].tolist())
    losses = F.cross_entropy(model(batch.images[rows]), batch.labels[rows], reduction="none")
    weighed = model.training_step(batch._replace(weights=weights, weight=float(weights.sum())), 0)
    torch.testing.assert_close(weighed["loss"], (losses * weights[rows]).sum() / weights[rows].sum() + of_proxy)
    torch.testing.assert_close(weighed["mean"], losses.detach().mean())
    half = model.training_step(batch._replace(total=16), 0)
    torch.testing.assert_close(half["loss"], outputs["loss"] / 2)


class Watch(Curves):
    """Curves that also note what each step learned, and the proxy after it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, float, int]] = []
        self.weights: list[Tensor] = []
        self.means: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Note it."""
        assert isinstance(outputs, dict) and isinstance(pl_module, ImageClassifier) and pl_module.selection is not None
        hits = (outputs["logits"].argmax(1) == outputs["labels"]).float().mean()
        assert len(outputs["labels"]) == math.ceil(0.3 * len(batch.ids))
        self.seen.append((float(outputs["mean"]), float(hits), len(batch.ids)))
        proxy = {name: tensor.clone() for name, tensor in pl_module.selection.network.state_dict().items()}
        self.weights.append(proxy["features.0.weight"])
        self.means.append(proxy["features.1.running_mean"])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def test_the_proxy_learns_every_few_steps_and_the_curves_are_of_what_is_learned() -> None:
    model, watch = ImageClassifier(CNN(norm="batch"), selection=Selection(CNN(norm="batch"), 0.3, every=3)), Watch()
    trainer = fit(model, watch, Lookahead(every=2), epochs=2, train_fraction=0.9)  # 50, 50, 50 and 30 images
    changed = [not torch.equal(one, two) for one, two in zip(watch.weights, watch.weights[1:], strict=False)]
    assert changed == [False, False, True, False, False, True, False], "it learns in the steps 0, 3 and 6"
    assert all(not torch.equal(one, two) for one, two in zip(watch.means, watch.means[1:], strict=False))
    last = watch.seen[4:]
    images = sum(n for _, _, n in last)
    assert images == 180
    for place, name in enumerate(("train/loss", "train/acc")):
        mean = sum(values[place] * values[2] for values in last) / images
        assert trainer.callback_metrics[name].item() == pytest.approx(mean, rel=1e-6)


def test_mixed_labels_are_chosen_from() -> None:
    trainer = fit(ImageClassifier(CNN(), selection=Selection(CNN())), Curves(), mix=CutMix())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_a_fault_of_the_proxy_is_named() -> None:
    model, batch = alone(ImageClassifier(CNN(), selection=Selection(CNN()))), batch_of(4)
    weights = model.parameters_by_name()
    with torch.no_grad():
        weights["selection.network.head.weight"].fill_(3e38)
        weights["selection.network.head.bias"].fill_(3e38)
    assert first_nonfinite(model, [batch])[0] == "layer selection.network.head gives a non-finite output"
    with torch.no_grad():
        weights["selection.network.features.0.weight"].fill_(float("nan"))
    assert first_nonfinite(model, [batch])[0] == "weight selection.network.features.0.weight is not finite"


def test_every_parameter_of_both_networks_is_trained_by_the_one_optimizer() -> None:
    model = ImageClassifier(CNN(norm="batch"), selection=Selection(CNN(norm="batch")), backbone_lr=0.001)
    groups = model._build_optimizer().param_groups
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    assert {p.ndim for g in groups if g["weight_decay"] == 0 for p in g["params"]} == {1}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"share": 1.0}, "share: 1.0 is out of range: above 0, below 1"),
        ({"share": 0.0}, "share: 0.0 is out of range: above 0, below 1"),
        ({"every": 0}, "every: 0 is out of range: at least 1 step"),
    ],
)
def test_what_would_select_nothing_or_all_is_refused(arguments: dict[str, float], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Selection(CNN(), **arguments)  # type: ignore[arg-type]


def test_a_proxy_for_other_classes_is_refused() -> None:
    line = "model.selection.network.num_classes: 7, but the data have 10 classes"
    with pytest.raises(ValueError, match=line):
        ImageClassifier(CNN(), selection=Selection(CNN(num_classes=7)))
