"""The LightningModule: what is learned and by which optimizer, for any network and any data set of images.

    python -m src fit --help

What the hot path measures (loss, hits) stays on the device; `src.callbacks.curves` reads and logs it.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name)
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from src.data.loader import Batch
from src.errors import Failure, UsageError
from src.networks import Network
from src.optim import OneCycle
from src.optim.bounds import build_checked


class ImageClassifier(pl.LightningModule):
    """Trains a network to tell classes of images apart.

    Args:
        network: Maps images ``[b, 3, h, w]`` to logits ``[b, num_classes]``.
        optimizer: Any optimizer of ``torch.optim``, or one of your own. Weight decay is kept off biases and norms.
        lr_scheduler: A schedule, stepped once an optimizer step; null keeps the lr constant. `src.optim.OneCycle`
            knows the length of the run by itself.
        label_smoothing: Share of the target spread evenly over all classes while training, in [0, 1). The losses of
            val and test are plain cross entropy.
        num_classes: The number of classes; linked to the data set on the command line.
        freeze_backbone: Epochs, from the first, in which only the network's head trains; 0 trains all from the start.
        backbone_lr: Peak lr of all layers but the head, above 0; null gives them the optimizer's lr.
        channels_last: Keep weights and activations in NHWC order, which convolutions on most devices are faster in.

    Attributes:
        confusion_matrix: Of the last validation or test: images by true class (row) and prediction (column), int64.
    """

    def __init__(
        self,
        network: Network,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        num_classes: int = 10,
        freeze_backbone: int = 0,
        backbone_lr: float | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is out of range: at least 0, below 1")
        if freeze_backbone < 0:
            raise ValueError(f"freeze_backbone: {freeze_backbone} is out of range: 0 or more epochs")
        if backbone_lr is not None and not backbone_lr > 0:
            raise ValueError(f"backbone_lr: {backbone_lr} is out of range: above 0")
        # On the command line, what is saved is the config of these three, plain values; elsewhere it would be they.
        objects = [] if _given_hyperparameters.get() else ["network", "optimizer", "lr_scheduler"]
        self.save_hyperparameters(logger=False, ignore=objects)
        self.network = network
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.label_smoothing = label_smoothing
        self.freeze_backbone, self.backbone_lr = freeze_backbone, backbone_lr
        self.channels_last = channels_last
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        # By name, and now: a sharding strategy will flatten the parameters.
        self._vectors = {name for name, p in network.named_parameters() if p.ndim < 2}
        backbone = {id(p) for p in network.backbone_parameters()} if backbone_lr is not None else set()
        self._backbone = {name for name, p in network.named_parameters() if id(p) in backbone}
        self.eval_loss = MeanMetric(nan_strategy="disable")
        self.eval_acc = MulticlassAccuracy(num_classes, average="micro")
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.confusion_matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        # A bad lr, momentum or schedule is refused now, not when a run has begun.
        trial = self._build_optimizer()
        self._follows_length = lr_scheduler is not None and isinstance(lr_scheduler(trial), OneCycle)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[b, num_classes]``."""
        logits: Tensor = self.network(images)
        return logits

    def prepare_data(self) -> None:
        """Load pretrained weights when a fit starts from scratch; so early that a bad file leaves no run behind."""
        if self.trainer.state.fn != "fit":
            return
        if self._follows_length and self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            raise UsageError(
                "model.lr_scheduler: OneCycle needs the length of the run: give trainer.max_epochs or max_steps"
            )
        if self.trainer.ckpt_path is None:
            self.network.load_pretrained()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another network, by the name of a tensor that differs."""
        found, own = checkpoint["state_dict"], self.state_dict()
        for name in sorted(own.keys() | found.keys()):
            shapes = [list(state[name].shape) if name in state else "missing" for state in (found, own)]
            if shapes[0] != shapes[1]:
                raise Failure(
                    f"ckpt_path: the checkpoint holds another network than the config asks for: "
                    f"{name} is {shapes[0]} there and {shapes[1]} here"
                )
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self._keep_what_is_asked_for(checkpoint)

    def _keep_what_is_asked_for(self, checkpoint: dict[str, Any]) -> None:
        """Let the optimizer's hyper-parameters of the config beat those that the checkpoint would bring back.

        A schedule goes on from where it was: its lr is scaled by how much the optimizer's lr has changed.
        """
        asked = self._build_optimizer().param_groups
        for state in checkpoint["optimizer_states"]:
            if len(state["param_groups"]) != len(asked):
                raise Failure(
                    "ckpt_path: the checkpoint's optimizer has other parameter groups than the config asks for"
                )
            for found, wanted in zip(state["param_groups"], asked, strict=True):
                base = found.get("initial_lr", found["lr"])
                scheduled = found["lr"] if base == wanted["lr"] else found["lr"] * wanted["lr"] / base if base else 0.0
                found |= {key: value for key, value in wanted.items() if key != "params"} | {"lr": scheduled}
                if "initial_lr" in found:
                    found["initial_lr"] = wanted["lr"]
        for state in checkpoint["lr_schedulers"]:
            if "base_lrs" in state:
                state["base_lrs"] = [group["lr"] for group in asked]

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of a batch; of this rank's images, the summed loss and how many were classified right."""
        logits = self._logits(batch)
        summed = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing, reduction="sum")
        target = batch.labels.argmax(1) if batch.labels.is_floating_point() else batch.labels
        with torch.no_grad():
            correct = (logits.argmax(1) == target).sum()
        loss = summed * (self.trainer.world_size / batch.total)
        return {"loss": loss, "summed": summed.detach(), "correct": correct}

    def on_train_epoch_start(self) -> None:
        """Freeze or thaw the backbone: a function of the epoch alone."""
        if self.freeze_backbone:
            frozen = self.current_epoch < self.freeze_backbone
            for parameter in self.network.backbone_parameters():
                parameter.requires_grad_(not frozen)
            for module in self.network.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.train(not frozen)  # its running statistics are part of what is frozen

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch of the val split."""
        self._score(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch of the test set."""
        self._score(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probability of each class, float32 ``[b, num_classes]``."""
        return self._logits(batch).softmax(1)

    def _logits(self, batch: Batch) -> Tensor:
        images = batch.images if self.channels_last else batch.images.contiguous()
        logits: Tensor = self.network(images)
        return logits.float()

    def on_validation_epoch_end(self) -> None:
        """Sum the confusion matrix over all ranks."""
        self._sum_confusion()

    def on_test_epoch_end(self) -> None:
        """Sum the confusion matrix over all ranks."""
        self._sum_confusion()

    def _sum_confusion(self) -> None:
        self.confusion_matrix = self.confusion.compute().cpu()
        self.confusion.reset()

    def _score(self, batch: Batch, stage: str) -> None:
        logits = self._logits(batch)
        self.eval_loss.update(F.cross_entropy(logits, batch.labels), len(batch.labels))
        self.eval_acc.update(logits, batch.labels)
        self.confusion.update(logits, batch.labels)
        # Not to the logger: Lightning would write them at a count of batches; `src.callbacks.curves` writes the step.
        self.log(f"{stage}/loss", self.eval_loss, on_step=False, on_epoch=True, logger=False)
        self.log(f"{stage}/acc", self.eval_acc, on_step=False, on_epoch=True, logger=False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, and the schedule that is stepped with it."""
        optimizer = self._build_optimizer()
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, OneCycle):
            scheduler.set_total_steps(int(self.trainer.estimated_stepping_batches))
        config: Any = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config = {"scheduler": scheduler, "interval": "epoch", "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _build_optimizer(self) -> torch.optim.Optimizer:
        """Group the parameters: head first, then backbone if its lr differs; each by whether it decays."""
        groups: dict[tuple[bool, bool], dict[str, Any]] = {}
        for name, parameter in self.network.named_parameters():
            name = name.replace("_fsdp_wrapped_module.", "")
            key = (name in self._backbone, name in self._vectors)
            groups.setdefault(key, {"params": []})["params"].append(parameter)
        for (in_backbone, is_vector), group in groups.items():
            if in_backbone:
                group |= {"lr": self.backbone_lr, "name": "backbone"}
            if is_vector:
                group["weight_decay"] = 0.0
        return build_checked(lambda: self.optimizer([groups[key] for key in sorted(groups)]))
