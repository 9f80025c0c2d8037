"""The classifier: its parameter groups, its frozen backbone, its loss."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from src.callbacks.console import EpochLines
from src.callbacks.curves import Curves, Sums
from src.classifier import ImageClassifier
from src.data import Batch, CutMix, Shapes10
from src.mean_loss import MeanLoss
from src.networks import CNN, ResNet
from src.optim import Muon, OneCycle


def classifier(**arguments: object) -> ImageClassifier:
    """Return a classifier with a small CNN that has norms."""
    return ImageClassifier(CNN(norm="batch"), **arguments)  # type: ignore[arg-type]


def fit(model: ImageClassifier, *callbacks: pl.Callback, epochs: int = 2, **data: object) -> pl.Trainer:
    """Train for 4 steps an epoch, without the command line."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(model, datamodule=Shapes10(train_images=250, val_size=50, batch_size=50, **data))  # type: ignore[arg-type]
    return trainer


def test_weight_decay_is_kept_off_biases_and_norms() -> None:
    model = classifier()
    model._trainer = None
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    decayed, kept = optimizer.param_groups
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in kept["params"]} == {1}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (5e-4, 0)
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.network.parameters()))


def test_the_backbone_has_its_own_lr_and_every_parameter_one_group() -> None:
    model = classifier(backbone_lr=0.001)
    optimizer = model._build_optimizer()
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.02, 5e-4), (0.02, 0.0), (0.001, 5e-4), (0.001, 0.0),
    ]  # fmt: skip
    head = {id(p) for g in optimizer.param_groups[:2] for p in g["params"]}
    assert head == {id(p) for p in model.network.head.parameters()}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.network.parameters()))


def test_muon_takes_the_lr_of_the_backbone_for_its_filters_and_they_stand_first() -> None:
    model = classifier(optimizer=partial(Muon, lr=0.1, head_lr=20.0, bias_lr=30.0), backbone_lr=0.05)
    groups = model._build_optimizer().param_groups
    assert [(g["name"], g["lr"]) for g in groups] == [
        ("backbone_filters", 0.05), ("matrices", 20.0), ("backbone_matrices", 10.0),
        ("vectors", 30.0), ("backbone_vectors", 15.0),
    ]  # fmt: skip
    assert sum(len(g["params"]) for g in groups) == len(list(model.network.parameters()))


class Whitened(CNN):
    """Notes where the images are that it is initialized by."""

    def initialize(self, images: Tensor) -> None:
        self.initialized_on = images.device.type


def test_a_network_is_initialized_by_images_where_the_data_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Whitened()
    model = ImageClassifier(network)
    data = Shapes10(train_images=250, val_size=50, batch_size=50)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.state.fn = TrainerFn.FITTING
    model.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]
    monkeypatch.setattr(data, "sample", lambda count: torch.empty(count, 3, 32, 32, device="meta"))
    model.prepare_data()
    assert network.initialized_on == "meta", "the module, which is still on the CPU, has nothing to do with it"


class Snapshots(pl.Callback):
    """Copies a backbone's and the head's weights, and the running mean, at the end of each epoch."""

    def __init__(self) -> None:
        self.taken: list[tuple[torch.Tensor, ...]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy."""
        assert isinstance(pl_module, ImageClassifier)
        network = pl_module.network
        assert isinstance(network, CNN)
        norm = network.features[1]
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        values = (network.features[0].weight, network.head.weight, norm.running_mean)
        self.taken.append(tuple(torch.as_tensor(v).detach().clone() for v in values))


def test_a_frozen_backbone_stays_as_it_is_until_it_is_thawed() -> None:
    model, snapshots = classifier(freeze_backbone=1), Snapshots()
    assert isinstance(model.network, CNN)
    before = torch.as_tensor(model.network.features[0].weight).detach().clone()
    fit(model, snapshots, epochs=2)
    (first, first_head, first_mean), (second, second_head, _) = snapshots.taken
    assert torch.equal(before, first)
    assert torch.equal(first_mean, torch.zeros_like(first_mean)), "a frozen norm keeps its statistics"
    assert not torch.equal(first, second)
    assert not torch.equal(first_head, second_head)


def test_the_loss_is_the_mean_over_the_batch_with_smoothing_while_training_only() -> None:
    model = classifier(label_smoothing=0.2)
    model.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    logits = model(images)
    outputs = model.training_step(Batch(images, labels, labels, 6), 0)
    assert outputs["loss"].item() == pytest.approx(
        nn.CrossEntropyLoss(label_smoothing=0.2)(logits, labels).item(), rel=1e-5
    )
    assert torch.equal(outputs["logits"], logits)


def test_the_curves_are_the_means_over_the_images_since_the_last_point() -> None:
    class Recorder(Curves):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[float, float, int]] = []

        def on_train_batch_end(self, *args: object, **kwargs: object) -> None:
            outputs, batch = args[2], args[3]
            assert isinstance(outputs, dict)
            assert isinstance(batch, Batch)
            hits = (outputs["logits"].argmax(1) == batch.labels).sum().item()
            self.seen.append((outputs["loss"].item(), int(hits), len(batch.ids)))
            super().on_train_batch_end(*args, **kwargs)  # type: ignore[arg-type]

    curves = Recorder()
    trainer = fit(classifier(), curves, EpochLines(curves), epochs=1, train_fraction=0.9)
    images = sum(n for _, _, n in curves.seen)
    assert images == 180
    loss = sum(loss * n for loss, _, n in curves.seen) / images
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss, rel=1e-6)
    assert curves.latest["train/loss"] == pytest.approx(loss, rel=1e-6)
    assert curves.latest["train/acc"] == sum(hits for _, hits, _ in curves.seen) / images


def test_the_means_of_an_epoch_are_offered_without_a_wait_for_the_device() -> None:
    class Strict(Curves):
        def on_train_epoch_end(self, *args: object, **kwargs: object) -> None:
            with pytest.MonkeyPatch.context() as patch:
                for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
                    patch.setattr(Tensor, name, waits)
                super().on_train_epoch_end(*args, **kwargs)  # type: ignore[arg-type]

    def waits(*_: object) -> None:
        raise AssertionError("the host waits for the device")

    curves = Strict()
    trainer = fit(classifier(), curves, epochs=1)
    assert trainer.callback_metrics["train/acc"].item() == pytest.approx(curves.epoch()["train/acc"], rel=1e-6)


def test_mixed_labels_train() -> None:
    trainer = fit(classifier(), Curves(), mix=CutMix())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_a_schedule_is_stepped_with_the_optimizer_and_knows_the_length_of_the_run() -> None:
    model = classifier(lr_scheduler=lambda optimizer: OneCycle(optimizer, pct_start=0.25))
    trainer = fit(model, epochs=2)
    (scheduler,) = (config.scheduler for config in trainer.lr_scheduler_configs)
    assert isinstance(scheduler, OneCycle)
    assert (scheduler.total_steps, scheduler.last_epoch) == (8, 8)


def test_channels_last_changes_the_layout_and_not_the_result() -> None:
    torch.manual_seed(0)
    model = ImageClassifier(ResNet(), channels_last=True)
    assert model.network.resnet.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, index]
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    expected = model(images)
    model.to(memory_format=torch.contiguous_format)
    assert torch.allclose(model(images), expected, atol=1e-5)


def test_the_mean_loss_is_over_images_whatever_the_batches_and_the_precision_of_the_module() -> None:
    metric = MeanLoss()
    torch.nn.ModuleDict({"metric": metric}).to(torch.bfloat16)
    metric.update(torch.tensor(1.0), 10)
    metric.update(torch.tensor(2.0), 30)
    assert metric.compute() == 1.75
    metric.reset()
    for _ in range(300):
        metric.update(torch.tensor(1.001), 1)
    assert metric.compute() == torch.tensor(1.001)


def test_sums_of_a_checkpoint_from_before_selection_are_of_all_its_images() -> None:
    sums = Sums.unpack({"sums": torch.tensor([3.0, 1.0]), "images": 4}, torch.device("cpu"), keep=True)
    sums.add(torch.tensor([1.0, 1.0, 2.0]), 2)
    assert sums.sums is not None
    assert sums.sums.tolist() == [4.0, 2.0, 6.0]
