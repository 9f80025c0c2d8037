"""Muon: momentum whose update is made orthogonal, for convolutions; plain SGD for all that is not a filter.

    python -m src fit --config configs/speed94.yaml

After K. Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024,
https://kellerjordan.github.io/posts/muon), as their CIFAR-10 speed-runs (airbench94_muon) use it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from src.optim.groups import as_groups

_MOST_FILLED_UP = 1 << 25
"""Numbers in all filter banks together, filled up to one shape, up to which they are taken together: 64 MB."""


class Muon(Optimizer):
    """Muon for the weights of convolutions; Nesterov SGD for the head's matrix and for vectors (biases).

    A filter bank is taken as a matrix ``[out, in*k*k]``. Its norm is kept at √out; the update is the nearest
    semi-orthogonal matrix to its Nesterov momentum, so its size is the lr alone, whatever the loss is scaled by.

    Args:
        params: Parameters or groups of them, as every optimizer takes them. A group may have an lr of its own, for its
            convolutions; the lrs of its matrices and vectors are changed in proportion.
        lr: For convolutions, at least 0.
        momentum: For convolutions, in [0, 1).
        head_lr: Lr of matrices (linear layers), of the mean loss, at least 0. It and `bias_lr` suit
            `src.networks.WhitenedCNN`, whose logits are divided by 256; for `src.networks.CNN` take some 0.02.
        bias_lr: Lr of vectors, of the mean loss, at least 0; for `src.networks.CNN` some 0.4.
        sgd_momentum: Momentum of matrices and vectors, in [0, 1).
        weight_decay: Of matrices and vectors, by what it takes from a weight at full lr: lr × weight decay in the words
            of torch. In [0, 1).
        ns_steps: Newton-Schulz iterations that make the update orthogonal, at least 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.24,
        momentum: float = 0.6,
        head_lr: float = 1340.0,
        bias_lr: float = 106.0,
        sgd_momentum: float = 0.85,
        weight_decay: float = 0.004,
        ns_steps: int = 3,
    ) -> None:
        if ns_steps < 1:
            raise ValueError(f"ns_steps: {ns_steps} is out of range: at least 1")
        for name, value in (("head_lr", head_lr), ("bias_lr", bias_lr)):
            if not value >= 0:
                raise ValueError(f"{name}: {value} is out of range: at least 0")
        groups = []  # filters first: the lr of the first group is what is shown and steered as the lr
        given_groups = as_groups(params)
        for kind, kind_lr in (("filters", lr), ("matrices", head_lr), ("vectors", bias_lr)):
            for given in given_groups:
                members = [p for p in given["params"] if _kind(p) == kind]
                muon = kind == "filters"
                group_lr = given.get("lr", lr)
                own_lr = group_lr if muon else kind_lr * (group_lr / lr if lr else 1.0)
                if members:
                    groups.append(
                        {
                            "params": members,
                            "name": f"{given['name']}_{kind}" if "name" in given else kind,
                            "lr": own_lr,
                            "momentum": momentum if muon else sgd_momentum,
                            "weight_decay": 0.0 if muon or not own_lr else weight_decay / own_lr,
                        }
                    )
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "ns_steps": ns_steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            if not members:
                continue
            for p in members:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in members]
            gradients = [p.grad for p in members]
            if group["weight_decay"]:
                gradients = list(torch._foreach_add(gradients, members, alpha=group["weight_decay"]))
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            updates = list(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))
            if group["name"].endswith("filters"):
                scales = torch._foreach_reciprocal(torch._foreach_norm(members))
                torch._foreach_mul_(scales, [len(p) ** 0.5 for p in members])
                for p, scale in zip(members, scales, strict=True):
                    p.mul_(scale)
                updates = _directions(updates, group["ns_steps"])
            _descend(members, updates, group["lr"])
        return loss


def _directions(updates: list[Tensor], steps: int) -> list[Tensor]:
    """Return what `orthogonalize` makes of filter banks."""
    if updates[0].is_cuda:
        return orthogonalize_together(updates, steps)
    return [orthogonalize(u.reshape(len(u), -1), steps).view_as(u).to(u.dtype) for u in updates]


def orthogonalize_together(banks: list[Tensor], steps: int) -> list[Tensor]:
    """Return what `orthogonalize` makes of filter banks, in few pieces of work, which a GPU likes better.

    Banks of all shapes are filled up with zeros to that of one matrix, if that does not make them very large: zeros
    stay what they are, and change nothing.

    Args:
        banks: Filters ``[out, in, ...]``.
        steps: Iterations.

    Returns:
        The same shapes and types, laid out as they were.
    """
    # In the order in which they lie in memory, which only swaps columns.
    orders = [(0, 2, 3, 1) if _is_channels_last(bank) else tuple(range(bank.ndim)) for bank in banks]
    laid_out = [bank.permute(order) for bank, order in zip(banks, orders, strict=True)]
    matrices = [bank.reshape(len(bank), -1) for bank in laid_out]
    matrices = [m.mT if len(m) > m.shape[1] else m for m in matrices]
    rows, columns = (max(m.shape[i] for m in matrices) for i in (0, 1))
    shapes = {m.shape for m in matrices} if len(matrices) * rows * columns > _MOST_FILLED_UP else {(rows, columns)}
    found: dict[int, Tensor] = {}
    for shape in shapes:
        places = [i for i, m in enumerate(matrices) if len(shapes) == 1 or m.shape == shape]
        filled = matrices[0].new_zeros((len(places), *shape), dtype=torch.bfloat16)
        for i, part in zip(places, filled, strict=True):
            part[: len(matrices[i]), : matrices[i].shape[1]] = matrices[i]
        for i, part in zip(places, orthogonalize(filled, steps), strict=True):
            found[i] = part[: len(matrices[i]), : matrices[i].shape[1]]
    results = []
    for i, (bank, order) in enumerate(zip(laid_out, orders, strict=True)):
        matrix = found[i] if len(bank) == len(found[i]) else found[i].mT
        result = matrix.to(bank.dtype).contiguous().reshape(bank.shape)
        results.append(result.permute([order.index(axis) for axis in range(bank.ndim)]))
    return results


def _is_channels_last(bank: Tensor) -> bool:
    return bank.ndim == 4 and bank.is_contiguous(memory_format=torch.channels_last)


def _descend(parameters: list[Tensor], updates: list[Tensor], lr: float | Tensor) -> None:
    """Take lr times the updates from the parameters; an lr on the device is not waited for."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(parameters, torch._foreach_mul(updates, lr))
    else:
        torch._foreach_add_(parameters, updates, alpha=-lr)


def _kind(parameter: Tensor) -> str:
    return "filters" if parameter.ndim > 2 else "matrices" if parameter.ndim == 2 else "vectors"


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Return about the nearest semi-orthogonal matrix: all singular values of the result are near 1.

    A quintic Newton-Schulz iteration in bfloat16; its coefficients trade exactness for speed, so the singular values
    come out between about 0.7 and 1.2 (Jordan et al., 2024).

    Args:
        matrix: ``[m, n]``, or several, ``[k, m, n]``, each of which is made orthogonal by itself.
        steps: Iterations.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    multiply = torch.addmm if x.ndim == 2 else torch.baddbmm  # and add, rounding once: faster, and half the error
    for _ in range(steps):
        gram = x @ x.mT
        gram = multiply(gram, gram, gram, beta=b, alpha=c)
        x = multiply(x, gram, x, beta=a)
    return x.mT if tall else x
