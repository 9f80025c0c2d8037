"""Lookahead: weights that follow the trained ones slowly, and that these go back to every few steps.

    python -m src fit --trainer.callbacks+=src.callbacks.lookahead.Lookahead

After M. Zhang et al., Lookahead optimizer: k steps forward, 1 step back (arXiv 1907.08610), with the decay of K.
Jordan's speed-runs (arXiv 2404.00498), which grows to that of a moving average by the end of the run.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from src.errors import UsageError


class Lookahead(pl.Callback):
    """Every few steps moves slow weights towards the trained ones, and sets these to the slow ones.

    At step t of T the slow weights keep the share ``decay**every * (t / T)**power`` of themselves: at first they follow
    at once, and nothing is changed. After the last step they take the place of the trained ones. BatchNorm's running
    statistics take part; the optimizer's momentum does not. What happens at a step depends on t and T alone.

    Args:
        every: Optimizer steps from one meeting to the next, at least 1.
        decay: Share that the slow weights keep of themselves by the end of the run, for each step; from 0 to 1.
        power: How late in the run the share grows, at least 0; 0 keeps it the same from the start.
    """

    def __init__(self, every: int = 5, decay: float = 0.95, power: float = 3.0) -> None:
        if every < 1:
            raise ValueError(f"every: {every} is out of range: at least 1 step")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: {decay} is out of range: from 0 to 1")
        if not power >= 0:
            raise ValueError(f"power: {power} is out of range: at least 0")
        self.every, self.decay, self.power = every, decay, power
        self._slow: dict[str, Tensor] = {}
        self._step = 0
        self._total = 1.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a run without an end, and forget the weights of an earlier fit."""
        if stage == "fit" and trainer.max_epochs == -1 and trainer.max_steps == -1:
            raise UsageError(
                "trainer.callbacks: Lookahead needs the length of the run: give trainer.max_epochs or max_steps"
            )
        self._slow = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the weights as they are, or go on where the run was stopped."""
        self._step, self._total = trainer.global_step, trainer.estimated_stepping_batches
        if not self._slow:
            self._slow = {name: tensor.clone() for name, tensor in _weights(pl_module).items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, do what is due; checkpoints are written afterwards."""
        before, step = self._step, trainer.global_step
        if step == before:  # gradients are being accumulated
            return
        self._step = step
        meets, ends = step // self.every > before // self.every, step >= self._total
        if meets or ends:
            self._meet(_weights(pl_module), self.share(step) if meets else 1.0)

    def set_total_steps(self, total_steps: int) -> None:
        """Say, in the middle of a run, how many optimizer steps it will take in all."""
        self._total = total_steps

    def share(self, step: int) -> float:
        """Return the share that the slow weights keep of themselves at a step."""
        return float(self.decay**self.every * min(step / self._total, 1.0) ** self.power)

    @torch.no_grad()
    def _meet(self, weights: dict[str, Tensor], share: float) -> None:
        # What comes from a checkpoint lies on the CPU.
        self._slow = {name: self._slow[name].to(tensor.device) for name, tensor in weights.items()}
        fast, slow = list(weights.values()), list(self._slow.values())
        torch._foreach_lerp_(slow, fast, 1 - share)
        torch._foreach_copy_(fast, slow)

    def state_dict(self) -> dict[str, Any]:
        """Return the slow weights."""
        return {"slow": dict(self._slow)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the slow weights of a checkpoint."""
        self._slow = {name: tensor.clone() for name, tensor in state_dict["slow"].items()}

    def roll_back(self, checkpoint: dict[str, Any]) -> None:
        """In the middle of a fit, take the slow weights of a checkpoint, or its weights if it has no slow ones."""
        slow = checkpoint["callbacks"].get(self.state_key, {}).get("slow")
        self.load_state_dict({"slow": slow or checkpoint["state_dict"]})


def _weights(module: pl.LightningModule) -> dict[str, Tensor]:
    """Return all floating-point weights and buffers by name, not copied; not those of a network that only selects."""
    state: dict[str, Tensor] = module.state_dict()
    return {k: t for k, t in state.items() if t.is_floating_point() and not k.startswith("selection.")}
