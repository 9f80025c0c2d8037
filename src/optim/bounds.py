"""What values the hyper-parameters of an optimizer may have, whichever optimizer it is."""

import inspect
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from torch.optim import Optimizer

_LARGEST = 3.4e38  # of float32


class Bound(NamedTuple):
    """A range that includes its lower end and not its upper one."""

    low: float
    high: float

    def __str__(self) -> str:
        """Say the range as a person would."""
        return f"at least {self.low:g}" + ("" if self.high >= _LARGEST else f", below {self.high:g}")

    def limits(self, value: object) -> str:
        """Say the range to who has given a value outside of it; what float32 cannot hold is known to who exceeds it."""
        above = isinstance(value, (int, float)) and self.high <= value < math.inf
        return f"at least {self.low:g}, below {self.high:g}" if above else str(self)

    def holds(self, value: object) -> bool:
        """Return whether a number, or each of several, lies in the range; NaN and infinity never do."""
        if isinstance(value, (tuple, list)):
            return all(v is None or self.holds(v) for v in value)
        return isinstance(value, (int, float)) and self.low <= value < self.high


BOUNDS = {
    "lr": Bound(0, _LARGEST),
    "momentum": Bound(0, 1),
    "dampening": Bound(0, 1),
    "weight_decay": Bound(0, _LARGEST),
    "betas": Bound(0, 1),
    "eps": Bound(0, math.inf),
    "alpha": Bound(0, 1),
}
"""The ranges by the names that ``torch.optim`` uses."""

# What torch calls them when it refuses a value itself.
_TORCH_WORDS = {"learning rate": "lr", "momentum": "momentum", "weight_decay": "weight_decay", "beta": "betas",
                "epsilon": "eps", "alpha": "alpha"}  # fmt: skip


def build_checked(build: Callable[[], Optimizer]) -> Optimizer:
    """Build an optimizer whose hyper-parameters are in their bounds.

    Raises:
        ValueError: If one is not, as ``name: value is out of range: …``, or ``name: value is not valid`` where only the
            optimizer knows the range; what else the optimizer refuses, as ``optimizer: …`` in its words.
    """
    try:
        optimizer = build()
    except ValueError as error:
        match = re.match(r"Invalid (\D+?)(?: value| parameter.*?)?: (.+)", str(error))
        name = next((n for words, n in _TORCH_WORDS.items() if match and match[1].startswith(words)), None)
        if match is None:
            raise ValueError(f"optimizer: {error}") from error
        if name is None:
            raise ValueError(f"{match[1].replace(' ', '_')}: {match[2]} is not valid") from error
        raise ValueError(f"{name}: {match[2]} is out of range: {BOUNDS[name]}") from error
    try:
        inspect.signature(optimizer.step).bind(None)
    except TypeError as error:
        raise ValueError(f"optimizer: {type(optimizer).__name__}.step takes no closure; it is to call one") from error
    for group in optimizer.param_groups:
        for name, bound in BOUNDS.items():
            if name in group and not bound.holds(group[name]):
                raise ValueError(f"{name}: {group[name]} is out of range: {bound.limits(group[name])}")
    return optimizer
