"""What is refused before a run begins, by its key: what would hang, do nothing, or could not be gone on with."""

import os
import pydoc
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from src.arguments import misplaced_nulls
from src.classifier import ImageClassifier
from src.data import ImageData
from src.errors import Failure, UsageError
from src.hardware import device_type, refuse_precision
from src.live.replay import replayed
from src.messages import EXPECTED
from src.trust import leaves

# The least values of the Trainer's numbers that it does not check itself.
_LEAST = {"accumulate_grad_batches": 1, "log_every_n_steps": 0, "gradient_clip_val": 0, "check_val_every_n_epoch": 1,
          "max_epochs": -1, "max_steps": -1, "min_epochs": 0, "min_steps": 0, "num_nodes": 1,
          "num_sanity_val_steps": -1}  # fmt: skip

# Callbacks that change a fit behind its back, so that its checkpoints do not say how to go on.
_REFUSED: dict[type[pl.Callback], str] = {
    StochasticWeightAveraging: "take EMAWeightAveraging",
    LearningRateFinder: "give model.optimizer.lr",
    BatchSizeFinder: "give data.batch_size",
}


def check_config(command: str, config: Namespace) -> str:
    """Refuse values that the parser and the Trainer would take without a word.

    Args:
        command: The sub-command.
        config: What it is to do.

    Returns:
        The type of the device that it is to be done on.

    Raises:
        UsageError: If there is such a value.
        Failure: If there is no such device, or no run to replay.
    """
    values = config.as_dict()
    for key, value in leaves(values):
        if type(value) is int and abs(value) >= 2**63:
            dotted = key.replace("/init_args", "").replace("/", ".")
            raise UsageError(f"{dotted}: {float(value):.3g} is out of range: whole numbers are below 2**63")
    for key in misplaced_nulls(values):
        raise UsageError(f"{key}: null is not valid; leave it out to have the default")
    if command == "fit":
        if config.chunk_size < 1:
            raise UsageError(f"chunk_size: {config.chunk_size} is out of range: at least 1 step")
        every = config.publish_every_n_steps
        if every is not None and every < 1:
            raise UsageError(f"publish_every_n_steps: {every} is out of range: at least 1 step, or null")
        if config.replay is not None:
            replayed(config.replay)
    trainer = config.trainer
    for name, least in _LEAST.items():
        value = trainer[name]
        if value is not None and not value >= least:
            raise UsageError(f"trainer.{name}: {value} is out of range: at least {least}")
    interval = trainer.val_check_interval
    if isinstance(interval, (int, float)) and not interval > 0:
        raise UsageError(f"trainer.val_check_interval: {interval} is out of range: above 0")
    if trainer.reload_dataloaders_every_n_epochs:
        raise UsageError(
            "trainer.reload_dataloaders_every_n_epochs: leave it out: a loader draws each epoch anew by itself, and "
            "holds what has been fed and steered"
        )
    try:
        Timer(trainer.max_time)
    except (MisconfigurationException, TypeError, OverflowError) as error:
        expected = EXPECTED["trainer.max_time"]
        raise UsageError(f"trainer.max_time: {trainer.max_time!r} is not valid; expected {expected}") from error
    folder = str(trainer.default_root_dir)
    if "\0" in folder:
        raise UsageError("trainer.default_root_dir: no path has a NUL in it")
    if folder.encode("utf-8", "replace").decode() != folder:  # nor TensorBoard nor YAML could write it down
        raise UsageError(f"trainer.default_root_dir: {folder} is not text in UTF-8")
    accelerator = trainer.accelerator if isinstance(trainer.accelerator, str) else "auto"
    device = device_type(accelerator)
    if accelerator in ("gpu", "cuda", "mps") and device == "cpu":
        raise Failure(f"trainer.accelerator: {accelerator}: torch finds none on this machine; use cpu or auto")
    if trainer.precision is not None and (reason := refuse_precision(str(trainer.precision), device)):
        raise UsageError(f"trainer.precision: {trainer.precision}: {reason}")
    return device


def check_run(command: str, trainer: pl.Trainer, module: ImageClassifier, data: ImageData) -> None:
    """Refuse what has been built, where it would hang, do nothing, or leave checkpoints that cannot be gone on with.

    Raises:
        UsageError: If it would.
    """
    if command == "validate" and data.val_size == 0:
        raise UsageError("data.val_size: 0 leaves no val split to validate on; use test, or give another size")
    _check_rank(trainer)
    data.check(trainer.world_size)
    _check_callbacks(trainer, module)
    if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
        raise UsageError("trainer.strategy: what starts its processes out of this one is not supported; take ddp")
    if command == "fit":
        _try_sizes(module, data)
    if module.tta == "six_if_unsure" and not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise UsageError("model.tta: six_if_unsure is not for devices that share out the parameters; take six")
    # DDP waits for every gradient unless it is told that some parameters have none in some steps.
    kwargs = getattr(trainer.strategy, "_ddp_kwargs", {})
    selection = module.selection
    late = {"freeze_backbone": module.freeze_backbone, "selection": selection and selection.every > 1}
    if trainer.world_size > 1 and not kwargs.get("find_unused_parameters"):
        for key in (key for key, given in late.items() if given):
            raise UsageError(
                f"model.{key}: with several devices it needs --trainer.strategy ddp_find_unused_parameters_true"
            )


def check_classes(trained: dict[str, Any], data: ImageData) -> None:
    """Refuse to evaluate weights on other classes than they were trained to tell apart: the numbers would mean nothing.

    Args:
        trained: The config of the run that the weights are of.
        data: What they are to be evaluated on.

    Raises:
        UsageError: If its classes are others.
    """
    section = trained.get("data")
    path = section.get("class_path") if isinstance(section, dict) else None
    classes = getattr(pydoc.locate(path), "classes", None) if isinstance(path, str) else None
    if classes is not None and tuple(classes) != tuple(data.classes):
        raise UsageError(
            f"data: {type(data).__name__} has other classes than {path}, which the weights were trained on; "
            f"leave data away, or give a data set with the same classes"
        )


def _check_rank(trainer: pl.Trainer) -> None:
    """Refuse to be one of several processes that know nothing of each other: all but the first would write nothing."""
    rank = _get_rank()
    if trainer.world_size > 1 or rank is None or (rank == 0 and os.environ.get("WORLD_SIZE", "1") == "1"):
        return
    name = next(n for n in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK") if n in os.environ)
    raise UsageError(
        f"trainer.strategy: {name}={rank} in the environment makes this one of several processes, and all it is to do "
        f"is for one; give --trainer.strategy ddp and as many --trainer.devices, or unset {name}"
    )


def _check_callbacks(trainer: pl.Trainer, module: ImageClassifier) -> None:
    """Refuse callbacks whose fits could not be gone on with, or that wait for what nobody measures."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # set outside of __init__
    for callback in callbacks:
        for kind, instead in _REFUSED.items():
            if isinstance(callback, kind):
                raise UsageError(f"trainer.callbacks: {type(callback).__name__} is not supported: {instead}")
    if module.follows_length and any(isinstance(c, GradientAccumulationScheduler) for c in callbacks):
        raise UsageError(
            "trainer.callbacks: GradientAccumulationScheduler: OneCycle would not know the length of the run; "
            "take trainer.accumulate_grad_batches, or another schedule"
        )
    waiting = [c for c in callbacks if isinstance(c, (EarlyStopping, ModelCheckpoint)) and c.monitor is not None]
    if any(c not in waiting and not type(c).__module__.startswith("src.") for c in callbacks):
        return  # another callback may measure it
    stages = ("train", "val") if trainer.limit_val_batches else ("train",)
    known = [f"{stage}/{name}" for stage in stages for name in ("loss", "acc")]
    for callback in waiting:
        if isinstance(callback, ModelCheckpoint) and callback.monitor in ("epoch", "step"):
            continue
        if getattr(callback, "strict", True) and callback.monitor not in known:
            raise UsageError(
                f"trainer.callbacks.monitor: {callback.monitor!r} is not measured; there are {', '.join(known)}"
            )


def _try_sizes(module: ImageClassifier, data: ImageData) -> None:
    """Refuse images that the networks do not take, before there is a run."""
    sizes = {"": data.image_size}
    if data.small_epochs:
        sizes["data.small_size"] = data.small_size
    for of_size, size in sizes.items():
        for prefix, network in module.networks.items():
            key = of_size or f"model.{prefix or 'network.'}"[:-1]
            try:
                with torch.no_grad():
                    logits = network.eval().forward(torch.zeros(1, 3, size, size))  # not as it may be compiled
            except RuntimeError as error:
                raise UsageError(f"{key}: the network takes no images of {size} pixels ({error})") from error
            if list(getattr(logits, "shape", [])) != [1, data.num_classes]:
                found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
                raise UsageError(
                    f"{key}: {type(network).__name__} gives {found} for an image of {size} pixels; logits "
                    f"{[1, data.num_classes]} are due, one for each class"
                )
            network.train()
