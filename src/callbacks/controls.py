"""What can be steered in a fit, within which bounds, and how it is set.

python -m src steer lightning_logs/version_0 status
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl

from src.callbacks.lookahead import Lookahead
from src.callbacks.resume import count_batches, planned_steps, total_steps
from src.classifier import ImageClassifier
from src.data.loader import ResidentLoader
from src.data.order import batch_edges
from src.live.transaction import Control
from src.optim.bounds import BOUNDS, Bound

_BOUNDS = {
    **{name: bound for name, bound in BOUNDS.items() if name not in ("lr", "weight_decay")},
    "weight_decay": Bound(0, 10),
    "label_smoothing": Bound(0, 1),
    "log_every_n_steps": Bound(1, 1_000_001),
}
_LARGEST_LR = 100.0


def controls_of(trainer: pl.Trainer, module: ImageClassifier) -> dict[str, Control]:
    """Return what can be steered in this fit."""
    groups = trainer.optimizers[0].param_groups
    asked = module.asked()
    controls = {}
    if "lr" in groups[0]:
        controls["lr"] = Control(lambda: float(groups[0]["lr"]), partial(_set_lr, module, groups), _lr_problem(groups))
    if "weight_decay" in groups[0]:
        bases = [group["weight_decay"] for group in asked]
        first = next((i for i, base in enumerate(bases) if base), 0)
        controls["weight_decay"] = Control(
            lambda: float(groups[first]["weight_decay"]),
            partial(_set_weight_decay, groups, bases),
            partial(_problem, _BOUNDS["weight_decay"]),
        )
    fixed = {"dampening"} if groups[0].get("nesterov") else set()  # which goes without
    if any(getattr(config.scheduler, "cycle_momentum", False) for config in trainer.lr_scheduler_configs):
        fixed |= {"momentum", "betas"}  # the schedule sets them in every step
    for name in BOUNDS:
        if name in groups[0] and name not in controls and name not in fixed:
            controls[name] = Control(
                partial(_read_group, groups, name), partial(_set_group, groups, name), _like(groups[0][name], name)
            )
    controls["label_smoothing"] = Control(
        lambda: module.label_smoothing,
        partial(setattr, module, "label_smoothing"),
        partial(_problem, _BOUNDS["label_smoothing"]),
    )
    controls["log_every_n_steps"] = Control(
        lambda: trainer.log_every_n_steps,  # type: ignore[attr-defined] # set outside of __init__
        partial(setattr, trainer, "log_every_n_steps"),
        partial(_problem, _BOUNDS["log_every_n_steps"], whole=True),
    )
    if isinstance(loader := trainer.train_dataloader, ResidentLoader):
        controls["batch_size"] = Control(
            lambda: loader.batch_size,
            partial(_set_batch_size, trainer, module, loader),
            partial(_size_problem, trainer, loader),
        )
    return controls


def _problem(bound: Bound, value: Any, *, whole: bool = False) -> str | None:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        return f"is not a {'whole ' * whole}number"
    return None if bound.holds(value) else f"is out of range: {bound}"


def _lr_problem(groups: list[dict[str, Any]]) -> Callable[[Any], str | None]:
    def problem(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return "is not a number"
        if not 0 < value <= _LARGEST_LR:
            return f"is out of range: above 0, up to {_LARGEST_LR:g}"
        if not groups[0]["lr"]:
            return "cannot be: the schedule has the lr at 0 now, which no factor changes"
        return None

    return problem


def _size_problem(trainer: pl.Trainer, loader: ResidentLoader, value: Any) -> str | None:
    most = len(loader.ids) + (0 if loader.growth is None else loader.growth.room)
    if problem := _problem(Bound(trainer.world_size, most + 1), value, whole=True):
        return problem
    limit: Any = trainer.limit_train_batches
    if isinstance(limit, float) and limit < 1:
        return "cannot be: trainer.limit_train_batches is a share of the batches"
    interval = getattr(trainer, "val_check_interval", None)  # not there where it is a time
    batches = len(batch_edges(len(loader.ids), value, trainer.world_size)) - 1
    if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and batches < interval:
        return f"leaves {batches} batches of an epoch, fewer than trainer.val_check_interval, {interval}"
    return None


def _like(current: Any, name: str) -> Callable[[Any], str | None]:
    """Return what looks at values that are one number, or as many as the current one has."""
    if not isinstance(current, (tuple, list)):
        return partial(_problem, _BOUNDS[name])
    form = ",".join(f"{float(value):g}" for value in current)

    def problem(value: Any) -> str | None:
        if not isinstance(value, list) or len(value) != len(current):
            return f"is not a list of {len(current)} numbers, as in '{name}=[{form}]'"
        return next((p for v in value if (p := _problem(_BOUNDS[name], v))), None)

    return problem


def _set_lr(module: ImageClassifier, groups: list[dict[str, Any]], lr: float) -> None:
    """Multiply all lrs by what makes the first one this; the schedule keeps its shape."""
    if lr != groups[0]["lr"]:
        module.scale_lr(lr / groups[0]["lr"])


def _set_weight_decay(groups: list[dict[str, Any]], bases: list[float], value: float) -> None:
    """Give each group its share, as the config shares it out; if that has none, give it to all but vectors."""
    reference = next((base for base in bases if base), None)
    for group, base in zip(groups, bases, strict=True):
        if reference is None:
            group["weight_decay"] = 0.0 if all(p.ndim < 2 for p in group["params"]) else float(value)
        else:
            group["weight_decay"] = float(value) if base == reference else value * base / reference


def _read_group(groups: list[dict[str, Any]], name: str) -> Any:
    value = groups[0][name]
    return list(value) if isinstance(value, tuple) else value


def _set_group(groups: list[dict[str, Any]], name: str, value: Any) -> None:
    for group in groups:
        if name in group:
            group[name] = tuple(map(float, value)) if isinstance(value, list) else float(value)


def _set_batch_size(trainer: pl.Trainer, module: ImageClassifier, loader: ResidentLoader, value: int) -> None:
    """Cut what is left of the epoch into batches of another size, and tell all that go by the number of steps."""
    _cut(trainer, loader, value)
    set_total_steps(trainer, module)


def _cut(trainer: pl.Trainer, loader: ResidentLoader, batch_size: int) -> None:
    loader.batch_size = trainer.datamodule.batch_size = batch_size  # type: ignore[attr-defined] # set outside of __init__
    _recount(trainer, loader)


def _recount(trainer: pl.Trainer, loader: ResidentLoader) -> None:
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    count_batches(trainer, max(1, done + loader.batches_from(loader.drawn)))  # one that waits for images has one


def recount(trainer: pl.Trainer, module: ImageClassifier) -> None:
    """Tell all that go by the number of batches or steps that there are other images to be drawn than before."""
    loader = trainer.train_dataloader
    assert isinstance(loader, ResidentLoader)
    _recount(trainer, loader)
    set_total_steps(trainer, module)


def set_total_steps(trainer: pl.Trainer, module: ImageClassifier) -> None:
    """Tell all that go by the length of the run, in optimizer steps, how long it will be."""
    steps = total_steps(trainer)
    if steps is None:
        return
    module.set_total_steps(steps)
    _tell_lookaheads(trainer, steps)


def plan(trainer: pl.Trainer, module: ImageClassifier) -> None:
    """Tell all that go by the length of the run of another plan for it, as a run that goes on may have."""
    total, planned = total_steps(trainer), planned_steps(trainer)
    if total is None or planned is None:
        return
    module.plan(planned, total - trainer.global_step)
    _tell_lookaheads(trainer, total)


def _tell_lookaheads(trainer: pl.Trainer, steps: int) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # set outside of __init__
        if isinstance(callback, Lookahead):
            callback.set_total_steps(steps)


def snapshot(trainer: pl.Trainer, module: ImageClassifier) -> Callable[[], None]:
    """Return what brings back all that a transaction can change, to the bit."""
    groups = trainer.optimizers[0].param_groups
    lookaheads = [c for c in trainer.callbacks if isinstance(c, Lookahead)]  # type: ignore[attr-defined] # set outside of __init__
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    kept = [(vars(thing), dict(vars(thing))) for thing in (*lookaheads, *schedules)]
    kept += [(group, dict(group)) for group in groups]
    scale, lrs, smoothing = module.lr_scale, module.schedule_lrs, module.label_smoothing
    every = trainer.log_every_n_steps  # type: ignore[attr-defined] # set outside of __init__
    loader: Any = trainer.train_dataloader
    size = getattr(loader, "batch_size", None)

    def restore() -> None:
        if size is not None and loader.batch_size != size:
            _cut(trainer, loader, size)
        for thing, values in kept:
            thing.update(values)
        module.lr_scale, module.schedule_lrs, module.label_smoothing = scale, lrs, smoothing
        trainer.log_every_n_steps = every  # type: ignore[attr-defined] # set outside of __init__

    return restore
