"""The LightningModule: what is learned and by which optimizer, for any network and any data set of images.

    python -m src fit --help

What the hot path measures (loss, hits) stays on the device; `src.callbacks.curves` reads and logs it.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name)
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from src.data.loader import Batch
from src.errors import Failure, UsageError
from src.mean_loss import MeanLoss
from src.networks import Network
from src.optim import OneCycle
from src.optim.bounds import build_checked
from src.selection import Selection, weighted_mean
from src.views import Views, average_views


class ImageClassifier(pl.LightningModule):
    """Trains a network to tell classes of images apart.

    Args:
        network: Maps images ``[b, 3, h, w]`` to logits ``[b, num_classes]``.
        optimizer: An optimizer of ``torch.optim`` or `src.optim`, or one of your own; it has to take several groups of
            parameters, of any shape, and its ``step(closure)`` to call the closure once, which finds the gradients.
            Weight decay is kept off biases and norms, but for Muon and DecoupledSGD, which say themselves what decays.
        lr_scheduler: A schedule, stepped once an optimizer step, ReduceLROnPlateau after each validation; null keeps
            the lr constant. `src.optim.OneCycle` knows the length of the run by itself.
        label_smoothing: Share of the target spread evenly over all classes while training, in [0, 1). The losses of
            val and test are plain cross entropy.
        num_classes: The number of classes; linked to the data set on the command line.
        freeze_backbone: Epochs, from the first, in which only the network's head trains; 0 trains all from the start.
        backbone_lr: Peak lr of all layers but the head, above 0; null gives them the optimizer's lr.
        tta: The views of an image that are averaged in validation, test and prediction: ``one``, the image itself;
            ``mirror``, also its mirror image; ``six``, also both shifted by a pixel to two sides; ``six_if_unsure``,
            these six where the first leaves a doubt.
        compile: Train a network that ``torch.compile`` has made faster, in this mode (``reduce-overhead``: by CUDA
            graphs); null does without. It pays in long runs on a GPU; the time is printed whenever torch compiles.
        selection: Learn the hardest images of each batch alone; null learns all. ``train/loss`` and ``train/acc`` are
            then those of the images that are learned.
        channels_last: Keep weights and activations in NHWC order, which convolutions on most devices are faster in.

    Attributes:
        confusion_matrix: Of the last validation or test: images by true class (row) and prediction (column), int64.
        follows_length: Whether the schedule is one that has to know the length of the run.
        lr_scale: What every lr has been multiplied by since the run began.
        schedule_lrs: The lr of each parameter group as the schedule has it, if `lr_scale` is not 1.
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
        tta: Views = "one",
        compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None,
        selection: Selection | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is out of range: at least 0, below 1")
        if freeze_backbone < 0:
            raise ValueError(f"freeze_backbone: {freeze_backbone} is out of range: 0 or more epochs")
        if backbone_lr is not None and not 0 < backbone_lr < math.inf:
            raise ValueError(f"backbone_lr: {backbone_lr} is out of range: above 0")
        for key, given in (("freeze_backbone", freeze_backbone), ("backbone_lr", backbone_lr)):
            if given and not hasattr(network, "head"):
                raise ValueError(f"{key}: {type(network).__name__} has no head, which its last layer is to be called")
        classes = getattr(getattr(selection and selection.network, "head", None), "out_features", num_classes)
        if classes != num_classes:
            raise ValueError(f"model.selection.network.num_classes: {classes}, but the data have {num_classes} classes")
        # On the command line, what is saved is the config of these, plain values; elsewhere it would be they.
        objects = [] if _given_hyperparameters.get() else ["network", "optimizer", "lr_scheduler", "selection"]
        self.save_hyperparameters(logger=False, ignore=objects)
        self.network, self.selection = network, selection
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.label_smoothing = label_smoothing
        self.freeze_backbone, self.backbone_lr = freeze_backbone, backbone_lr
        self.lr_scale = 1.0
        self.schedule_lrs: list[float] = []
        self.channels_last, self.tta = channels_last, tta
        # In a list, as it is no part of this module: its weights are those of the network.
        self._trained = [network if compile is None else torch.compile(network, mode=compile, dynamic=False)]
        if selection is not None and compile is not None:
            selection.network.compile(mode=compile, dynamic=False)
        if compile is not None:
            # Each size of images or batches and each frozen layer is compiled by itself, as for the proxy; by default
            # torch leaves a network as it is after eight.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            # Else torch 2.11 goes on as if what was frozen stayed so (PyTorch pull request 177158).
            torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False
        if channels_last:
            self.to(memory_format=torch.channels_last)
        # By name, and now: a sharding strategy will flatten the parameters.
        self._vectors = {name for name, p in self.parameters_by_name().items() if p.ndim < 2}
        backbone = {id(p) for p in network.backbone_parameters()} if backbone_lr is not None else set()
        self._backbone = {name for name, p in network.named_parameters() if id(p) in backbone}
        self.eval_loss = MeanLoss()
        self.eval_acc = MulticlassAccuracy(num_classes, average="micro")
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.confusion_matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        # A bad lr, momentum or schedule is refused now, not when a run has begun.
        trial = self._build_optimizer()
        schedule: Any = None if lr_scheduler is None else lr_scheduler(trial)
        self.follows_length = isinstance(schedule, OneCycle)
        self._monitor: str | None = None
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self._monitor = getattr(schedule, "monitor", "val/loss")  # of Lightning's own; torch's has none
            if self._monitor not in ("val/loss", "val/acc"):
                raise ValueError(f"monitor: {self._monitor!r} is not measured; there are val/loss, val/acc")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the weights, but not what builds optimizers: it leads to the command line, the Trainer and the data."""
        clone = self.__class__.__new__(self.__class__)
        memo |= {id(self): clone, id(self.optimizer): self.optimizer, id(self.lr_scheduler): self.lr_scheduler}
        clone.__setstate__(copy.deepcopy({**self.__getstate__(), "_trained": []}, memo))  # type: ignore[no-untyped-call]
        clone._trained = [clone.network]
        return clone

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[b, num_classes]``."""
        logits: Tensor = self.network(images)
        return logits

    def prepare_data(self) -> None:
        """Load pretrained weights when a fit starts from scratch; so early that a bad file leaves no run behind."""
        if self.trainer.state.fn != "fit":
            return
        if self.follows_length and self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            raise UsageError(
                "model.lr_scheduler: OneCycle needs the length of the run: give trainer.max_epochs or max_steps"
            )
        if self._monitor is not None and self.trainer.limit_val_batches == 0:
            raise UsageError(
                f"model.lr_scheduler: it goes by {self._monitor}, and nothing is validated; see data.val_size"
            )
        if self.trainer.ckpt_path is None:
            for prefix, network in self.networks.items():
                if type(network).initialize is not Network.initialize:
                    network.initialize(self.trainer.datamodule.sample(5000))  # type: ignore[attr-defined]
                try:
                    network.load_pretrained()
                except Failure as error:
                    if not str(error).startswith("weights: "):
                        raise
                    raise Failure(f"model.{prefix or 'network.'}{error}") from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the lr has been multiplied by, and the hyper-parameters that were asked for."""
        checkpoint["lr_scale"], checkpoint["schedule_lrs"] = self.lr_scale, self.schedule_lrs
        checkpoint["asked"] = self.asked()

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
        """Let hyper-parameters of the optimizer that are asked for anew beat those that the checkpoint brings back.

        What is asked for as before is left to the checkpoint: a schedule may have changed it since. A new lr scales
        what the schedule had made of the old one.
        """
        before, now = checkpoint["asked"], self.asked()
        scale, lrs = checkpoint["lr_scale"], checkpoint["schedule_lrs"]
        numbers = [scale, *lrs] if isinstance(lrs, list) else [None]
        if not all(isinstance(n, float) and 0 <= n < math.inf for n in numbers) or (scale != 1 and not lrs):
            raise Failure("ckpt_path: the checkpoint's lr_scale and schedule_lrs are not those of a schedule")
        self.lr_scale, self.schedule_lrs = scale, lrs
        ratios = []
        for state in checkpoint["optimizer_states"]:
            if not len(state["param_groups"]) == len(before) == len(now):
                raise Failure(
                    "ckpt_path: the checkpoint's optimizer has other parameter groups than the config asks for"
                )
            for found, was, wanted in zip(state["param_groups"], before, now, strict=True):
                found |= {k: v for k, v in wanted.items() if k != "lr" and (k not in was or was[k] != v)}
                ratios.append(wanted["lr"] / was["lr"] if was["lr"] else 1.0)
                for key in ("lr", "initial_lr"):
                    if key in found:
                        found[key] = found[key] * ratios[-1] if was["lr"] else wanted["lr"] * self.lr_scale
        if self.schedule_lrs:
            lrs = zip(self.schedule_lrs, before, now, ratios, strict=True)
            self.schedule_lrs = [lr * ratio if was["lr"] else wanted["lr"] for lr, was, wanted, ratio in lrs]
        for state in checkpoint["lr_schedulers"]:
            if "base_lrs" in state:
                state["base_lrs"] = [lr * ratio for lr, ratio in zip(state["base_lrs"], ratios, strict=True)]

    def asked(self) -> list[dict[str, Any]]:
        """Return the hyper-parameters of each parameter group as they are asked for."""
        groups = self._build_optimizer().param_groups
        return [{k: v for k, v in group.items() if k != "params"} for group in groups]

    def scale_lr(self, factor: float) -> None:
        """Multiply every lr by a factor, for the rest of the run; a schedule keeps its shape.

        A schedule goes on with the lrs that it has made itself (see `_step_schedule`), which is why it need not know.
        """
        for optimizer in self.trainer.optimizers:
            if self.lr_scale == 1:
                self.schedule_lrs = [float(group["lr"]) for group in optimizer.param_groups]
            self.lr_scale *= factor
            for group, lr in zip(optimizer.param_groups, self.schedule_lrs, strict=True):
                group["lr"] = lr * self.lr_scale

    def _step_schedule(self, step: Callable[[], None]) -> None:
        """Step a schedule: what it has made of the lr, times the scale, is the lr."""
        if self.lr_scale == 1:
            step()
            return
        groups = self.trainer.optimizers[0].param_groups
        for group, lr in zip(groups, self.schedule_lrs, strict=True):
            group["lr"] = lr
        step()
        self.schedule_lrs = [float(group["lr"]) for group in groups]
        for group, lr in zip(groups, self.schedule_lrs, strict=True):
            group["lr"] = lr * self.lr_scale

    def set_total_steps(self, total_steps: int) -> None:
        """Say, in the middle of a fit, how many optimizer steps it will take in all."""
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, OneCycle):
                config.scheduler.stretch(total_steps)

    def plan(self, total_steps: int, left: int) -> None:
        """Say, before a fit goes on, that it has another plan than it had until now; see `OneCycle.plan`."""
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, OneCycle):
                config.scheduler.plan(total_steps, left)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of a batch; of this rank's images, their mean loss and logits.

        With a selection these are of the images that were learned, and so are ``labels``, which are then returned too.
        """
        own = len(batch.ids)
        share = 1 if own == batch.total else own * self.trainer.world_size / batch.total
        if self.selection is not None:
            return self._learn_hardest(batch, self.selection, share)
        logits = self._trained[0](self._layout(batch.images)).float()
        if batch.weights is not None:
            losses = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing, reduction="none")
            loss = (losses * batch.weights).sum() * (self.trainer.world_size / batch.weight)
            return {"loss": loss, "mean": losses.detach().mean(), "logits": logits.detach()}
        mean = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        kept = logits.detach()
        if self._trained[0] is not self.network:
            kept = kept.clone()  # a CUDA graph writes its output over that of the step before
        return {"loss": mean if share == 1 else mean * share, "mean": mean.detach(), "logits": kept}

    def _learn_hardest(self, batch: Batch, selection: Selection, share: float) -> dict[str, Tensor]:
        given = self._layout(batch.images), batch.labels, batch.weights
        rows, of_proxy = selection(*given, label_smoothing=self.label_smoothing, learns=self.proxy_learns)
        # Row by row in the order that they lie in: chosen otherwise they would come in another layout.
        images = batch.images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
        labels = batch.labels.index_select(0, rows)
        logits = self._trained[0](self._layout(images)).float()
        losses = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
        weights = None if batch.weights is None else batch.weights.index_select(0, rows)
        loss = (
            weighted_mean(losses, weights) + of_proxy
        ) * share  # of a proxy that only chooses, a number: it may be nan
        measured = {"mean": losses.detach().mean(), "logits": logits.detach().clone(), "labels": labels}
        return {"loss": loss, **measured}

    @property
    def proxy_learns(self) -> bool:
        """Whether the step that is due trains the selection's proxy too."""
        return self.selection is not None and self.selection.learns(self.trainer.global_step)

    @property
    def networks(self) -> dict[str, Network]:
        """All that is trained: the network, and the selection's proxy; by what is put before the names of its parts."""
        proxy = {} if self.selection is None else {"selection.network.": self.selection.network}
        return {"": self.network, **proxy}

    def parameters_by_name(self) -> dict[str, torch.nn.Parameter]:
        """Return all that is trained; the names of the network's own parameters are as it gives them."""
        return {prefix + name: p for prefix, network in self.networks.items() for name, p in network.named_parameters()}

    def _layout(self, images: Tensor) -> Tensor:
        return images if self.channels_last else images.contiguous()

    def on_train_start(self) -> None:
        """Freeze or thaw the backbone also where a fit is resumed in the middle of an epoch."""
        self.on_train_epoch_start()
        if self.lr_scale != 1:  # a schedule that was restored may have set its own lr
            groups = self.trainer.optimizers[0].param_groups
            for config in self.trainer.lr_scheduler_configs:
                if isinstance(config.scheduler, OneCycle):
                    self.schedule_lrs = [float(lr) for lr in config.scheduler.get_lr()]
            for group, lr in zip(groups, self.schedule_lrs, strict=True):
                group["lr"] = lr * self.lr_scale

    def on_train_epoch_start(self) -> None:
        """Freeze or thaw the backbone: a function of the epoch alone."""
        for network in self.networks.values():
            network.begin_epoch(self.current_epoch)
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
        return self.logits(batch).softmax(1)

    def logits(self, batch: Batch) -> Tensor:
        """Return what is said of a batch in validation, test and prediction, float32 ``[b, num_classes]``."""
        return average_views(self.network, self._layout(batch.images), self.tta).float()

    def on_validation_epoch_end(self) -> None:
        """Sum the confusion matrix over all ranks, and step a schedule that goes by what the validation found."""
        self._sum_confusion()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            for config in self.trainer.lr_scheduler_configs:
                if config.reduce_on_plateau:
                    metric = self.eval_acc if self._monitor == "val/acc" else self.eval_loss
                    found: Any = float(metric.compute())
                    self._step_schedule(partial(config.scheduler.step, found))

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule; one that goes by a validation has been stepped by it, before anything is saved."""
        if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self._step_schedule(scheduler.step)

    def on_test_epoch_end(self) -> None:
        """Sum the confusion matrix over all ranks."""
        self._sum_confusion()

    def _sum_confusion(self) -> None:
        self.confusion_matrix = self.confusion.compute().cpu()
        self.confusion.reset()

    def _score(self, batch: Batch, stage: str) -> None:
        logits = self.logits(batch)
        self.eval_loss.update(F.cross_entropy(logits, batch.labels), len(batch.labels))
        self.eval_acc.update(logits, batch.labels)
        self.confusion.update(logits, batch.labels)
        # Where `src.callbacks.curves` writes them at the step, not to the logger: Lightning counts batches.
        ours = any(type(c).__module__.startswith("src.callbacks.") for c in self.trainer.callbacks)  # type: ignore[attr-defined] # set outside of __init__
        logger = bool(self.trainer.loggers) and not ours
        self.log(f"{stage}/loss", self.eval_loss, on_step=False, on_epoch=True, logger=logger)
        self.log(f"{stage}/acc", self.eval_acc, on_step=False, on_epoch=True, logger=logger)

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
            config = {"scheduler": scheduler, "interval": "epoch", "monitor": self._monitor}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _build_optimizer(self) -> torch.optim.Optimizer:
        """Group the parameters: head first, then backbone if its lr differs; each by whether it decays."""
        groups: dict[tuple[bool, bool], dict[str, Any]] = {}
        if not self.parameters_by_name():
            raise ValueError(f"network: {type(self.network).__name__} has nothing to learn: it has no parameters")
        for name, parameter in self.parameters_by_name().items():
            name = name.replace("_fsdp_wrapped_module.", "")
            key = (name in self._backbone, name in self._vectors)
            groups.setdefault(key, {"params": []})["params"].append(parameter)
        for (in_backbone, is_vector), group in groups.items():
            if in_backbone:
                group |= {"lr": self.backbone_lr, "name": "backbone"}
            if is_vector:
                group["weight_decay"] = 0.0
        return build_checked(lambda: self.optimizer([groups[key] for key in sorted(groups)]))
