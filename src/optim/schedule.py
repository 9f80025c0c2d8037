"""Learning-rate schedules that know how long the run is, as a pure function of the step.

python -m src fit --config configs/cifar10_regularized.yaml --model.lr_scheduler.init_args.pct_start 0.2
"""

import math
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class OneCycle(LRScheduler):
    """Warm-up to the optimizer's lr, then decay to nearly 0, over the whole run (Smith and Topin, arXiv 1708.07120).

    Unlike ``torch.optim.lr_scheduler.OneCycleLR`` it leaves the momentum alone and needs no ``total_steps``: the
    classifier tells it the length of the run. The lr of the optimizer is the peak.

    Args:
        optimizer: The optimizer whose lr is scheduled.
        pct_start: Share of the run spent warming up, in [0, 1); 0 starts at the peak.
        div_factor: The first lr is the peak divided by this, at least 1.
        final_div_factor: The last lr is the first one divided by this, at least 1.
        anneal_strategy: Shape of both slopes: ``cos``, or ``linear``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        pct_start: float = 0.3,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        anneal_strategy: Literal["cos", "linear"] = "cos",
    ) -> None:
        if not 0 <= pct_start < 1:
            raise ValueError(f"pct_start: {pct_start} is out of range: at least 0, below 1")
        for name, value in (("div_factor", div_factor), ("final_div_factor", final_div_factor)):
            if not value >= 1:
                raise ValueError(f"{name}: {value} is out of range: at least 1")
        self.pct_start, self.anneal_strategy = pct_start, anneal_strategy
        self.first, self.last = 1 / div_factor, 1 / (div_factor * final_div_factor)
        self.total_steps = 1
        self._bend: tuple[float, float, float] | None = None
        super().__init__(optimizer)

    def set_total_steps(self, total_steps: int) -> None:
        """Say how many optimizer steps the run will take, before the first of them."""
        self.total_steps = total_steps
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def stretch(self, total_steps: int) -> None:
        """Say, in the middle of a run, that it will take another number of steps in all than was thought until now.

        What is left of the schedule is stretched over what is left of the run: the lr does not leap.
        """
        if self._bend is not None and self._bend[2] == total_steps:
            return
        now = float(self.last_epoch)
        self._bend = now, self._place(now), float(total_steps)

    def plan(self, total_steps: int, left: int) -> None:
        """Say, before a run goes on, that it has another plan than it had until now.

        The lr is then that of this plan where as much of the run is left.

        Args:
            total_steps: Steps of a run that has this plan from its start.
            left: Steps that this run has left.
        """
        now, place = float(self.last_epoch), float(max(total_steps - left, 0))
        self._bend = None if place == now else (now, place, now + left)
        self.set_total_steps(total_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule is. What it looks like comes from its arguments, which may change on resume."""
        state = {"last_epoch": self.last_epoch, "_step_count": self._step_count}
        return state if self._bend is None else state | {"bend": list(self._bend), "total_steps": self.total_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a step, with the lr that this schedule has there."""
        bend = state_dict.get("bend")
        total_steps = self.total_steps if bend is None else state_dict["total_steps"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in ("bend", "total_steps")})
        self._bend = None if bend is None else (bend[0], bend[1], bend[2])
        self.set_total_steps(total_steps)

    def factor(self, step: int) -> float:
        """Return lr / peak at a step; the last step of the run has the last lr."""
        return self._factor(self._place(step))

    def _place(self, step: float) -> float:
        """Map a step of a run that was stretched to the step of a plain one that has the same lr."""
        if self._bend is None:
            return step
        begin, place, total = self._bend
        return place + (step - begin) * (self.total_steps - 1 - place) / max(total - 1 - begin, 1.0)

    def _factor(self, step: float) -> float:
        warm_up = self.pct_start * self.total_steps
        if step < warm_up:
            return self._slope(self.first, 1.0, step / warm_up)
        decay = max(self.total_steps - 1 - warm_up, 1e-9)
        return self._slope(1.0, self.last, min((step - warm_up) / decay, 1.0))

    def get_lr(self) -> list[float | Tensor]:
        """Return the lr of each parameter group at the current step."""
        return [float(base) * self.factor(self.last_epoch) for base in self.base_lrs]

    def _slope(self, start: float, end: float, share: float) -> float:
        if self.anneal_strategy == "cos":
            share = (1 - math.cos(math.pi * share)) / 2
        return start + (end - start) * share
