"""Which images of a batch are learned: those that a small network, the proxy, finds hardest.

    python -m src fit --config configs/speed96.yaml

After C. Coleman et al., Selection via proxy (arXiv 1906.11829), in the form of K. Jordan's airbench96_faster (2024).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)

from src.networks import Network


class Selection(nn.Module):
    """Leaves out the images of each batch that are known well enough, so that a step takes less time.

    The proxy sees all images of a batch, and is trained beside the network, by the same optimizer, on what it chooses.
    It is for long runs: as long as little has been learned, the hardest images are not those that teach most. A network
    that sees only them may not begin to learn at all, above all where the proxy learns seldom.
    A batch whose images are shared out among devices is chosen from on each of them; so is the mean by their weights.

    Args:
        network: The proxy: maps images ``[b, 3, h, w]`` to logits ``[b, num_classes]``, and is small.
        share: Images of a batch that are learned, above 0 and below 1; rounded up to whole images.
        every: Optimizer steps from one in which the proxy learns to the next, at least 1; else it only chooses.
    """

    def __init__(self, network: Network, share: float = 0.5, every: int = 1) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise ValueError(f"share: {share} is out of range: above 0, below 1")
        if every < 1:
            raise ValueError(f"every: {every} is out of range: at least 1 step")
        self.network, self.share, self.every = network, share, every

    def learns(self, step: int) -> bool:
        """Return whether the proxy learns in a step: a function of the clock alone, true in the first."""
        return step % self.every == 0

    def count(self, images: int) -> int:
        """Return how many of some images are learned: at least one."""
        return max(1, math.ceil(round(self.share * images, 9)))  # 0.55 of 100 is 55, though not as floats

    def forward(
        self, images: Tensor, labels: Tensor, weights: Tensor | None, *, label_smoothing: float, learns: bool
    ) -> tuple[Tensor, Tensor]:
        """Choose among the images of a batch; nothing here waits for the device.

        Args:
            images: ``[b, 3, h, w]``.
            labels: Classes, int64 ``[b]``, or class weights, ``[b, classes]``.
            weights: What the loss of each image counts, also for the choice, ``[b]``; none: 1.
            label_smoothing: As the network learns with.
            learns: Whether the proxy's loss is to be learned from.

        Returns:
            The rows of the images to learn, int64 ``[ceil(share * b)]``, and the proxy's mean loss over them.
        """
        with torch.set_grad_enabled(learns):
            logits = self.network(images).float()
            losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
            ranked = losses.detach() if weights is None else losses.detach() * weights
            hardest = ranked.topk(self.count(len(losses)), sorted=False).indices
            chosen = None if weights is None else weights.index_select(0, hardest)
            return hardest, weighted_mean(losses.index_select(0, hardest), chosen)


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean of some losses ``[k]``, each by its weight if there are such."""
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()
