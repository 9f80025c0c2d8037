"""Nesterov SGD in the units of the speed-runs, in which lr, momentum and weight decay can be tuned one by one.

    python -m src fit --config configs/speed96.yaml --model.optimizer '{class_path: src.optim.DecoupledSGD,
        init_args: {lr: 9.0, momentum: 0.85, weight_decay: 0.024, batch_size: 500, fused: true}}'

After K. Jordan, 94% on CIFAR-10 in 3.29 seconds on a single GPU (arXiv 2404.00498), whose hyper-parameters are those of
D. Page, How to train your ResNet (2018).
"""

from collections.abc import Iterable
from typing import Any

import torch

from src.optim.bounds import BOUNDS
from src.optim.groups import as_groups


class DecoupledSGD(torch.optim.SGD):
    """SGD whose lr and weight decay are per 1,024 images and do not depend on momentum or on each other.

    With c = 1024 * (1 + 1 / (1 - momentum)) a step of the speed-runs takes lr / c times the gradient of the loss summed
    over a batch, and batch_size * weight_decay / c times the weight. Of the loss's mean over the batch, which this
    project learns by, the gradient is batch_size times smaller. So in the words of ``torch.optim.SGD`` the lr is
    batch_size * lr / c, and the weight decay is weight_decay / lr.

    Args:
        params: Parameters or groups of them, as every optimizer takes them. A group may have an lr of its own, in these
            units; its weight decay is not looked at: biases and norms decay as all else does.
        lr: Of the loss summed over 1,024 images, at least 0; 9 suits `src.networks.WhitenedCNN` with wide blocks.
        momentum: Nesterov momentum, in [0, 1).
        weight_decay: What 1,024 images take from a weight at full lr, before it is divided as the lr is; at least 0.
        bias_factor: What the lr of vectors (biases and norms) is multiplied by, but not their decay; at least 0.
        batch_size: Images in an optimizer step, accumulated batches included, at least 1. The lr of torch grows with
            it, as the number of steps in an epoch falls.
        fused: Take a step by torch's fused kernel.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 9.0,
        momentum: float = 0.85,
        weight_decay: float = 0.012,
        bias_factor: float = 64.0,
        batch_size: int = 1024,
        fused: bool = False,
    ) -> None:
        bounds = {**BOUNDS, "bias_factor": BOUNDS["lr"]}
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "bias_factor": bias_factor}
        for name, value in own.items():
            if not bounds[name].holds(value):
                raise ValueError(f"{name}: {value} is out of range: {bounds[name]}")
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is out of range: at least 1 image")
        scale = batch_size / (1024 * (1 + 1 / (1 - momentum)))
        groups = []
        for given in as_groups(params):
            for kind, factor in (("weights", 1.0), ("biases", bias_factor)):
                members = [p for p in given["params"] if (p.ndim < 2) == (kind == "biases")]
                group_lr = factor * given.get("lr", lr)
                if members:
                    groups.append(
                        {
                            **given,
                            "params": members,
                            "name": f"{given['name']}_{kind}" if "name" in given else kind,
                            "lr": scale * group_lr,
                            "weight_decay": weight_decay / group_lr if group_lr else 0.0,
                        }
                    )
        super().__init__(groups, lr=scale * lr, momentum=momentum, nesterov=momentum > 0, fused=fused or None)
