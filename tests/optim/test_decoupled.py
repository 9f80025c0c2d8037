"""Decoupled SGD: the steps of torch's Nesterov SGD, in the units of the speed-runs."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the field's name)

from src.optim import DecoupledSGD


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5, bias=False))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, batch: int, reduction: str) -> None:
    draws = torch.Generator().manual_seed(1)
    for _ in range(4):
        x, y = torch.randn(batch, 3, 4, 4, generator=draws), torch.randint(5, (batch,), generator=draws)
        optimizer.zero_grad()
        loss: Any = F.cross_entropy(net(x), y, reduction=reduction)
        loss.backward()
        optimizer.step()


def split(net: nn.Module) -> list[list[nn.Parameter]]:
    return [[p for p in net.parameters() if (p.ndim < 2) == vectors] for vectors in (False, True)]


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch", [8, 64])
def test_it_takes_the_steps_of_the_speed_runs_which_learn_by_the_summed_loss(batch: int) -> None:
    lr, momentum, decay, factor = 40.0, 0.85, 3.0, 16.0
    ours, theirs = network(), network()
    unit = 1024 * (1 + 1 / 0.15)
    lr_of_one, taken = lr / unit, decay * batch / unit
    weights, biases = split(theirs)
    sgd = torch.optim.SGD(
        [
            {"params": weights, "lr": lr_of_one, "weight_decay": taken / lr_of_one},
            {"params": biases, "lr": factor * lr_of_one, "weight_decay": taken / (factor * lr_of_one)},
        ],
        momentum=momentum,
        nesterov=True,
    )
    train(theirs, sgd, batch, "sum")
    own = DecoupledSGD(ours.parameters(), lr, momentum, decay, bias_factor=factor, batch_size=batch)
    train(ours, own, batch, "mean")
    assert_same(ours, theirs)
    before = next(network().parameters())
    assert not torch.allclose(next(ours.parameters()), before, rtol=0.01), "it has learned something"


def test_in_the_words_of_torch() -> None:
    ours, theirs = network(), network()
    optimizer = DecoupledSGD(ours.parameters())
    found = [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    lr = 9 / (1 + 1 / 0.15)
    assert found == [("weights", *close(lr, 0.012 / 9)), ("biases", *close(64 * lr, 0.012 / 9 / 64))]
    weights, biases = split(theirs)
    groups = [{"params": weights, "lr": lr, "weight_decay": 0.012 / 9},
              {"params": biases, "lr": 64 * lr, "weight_decay": 0.012 / 9 / 64}]  # fmt: skip
    sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
    for net, of in ((ours, optimizer), (theirs, sgd)):
        train(net, of, 8, "mean")
    assert_same(ours, theirs)


def close(*values: float) -> Iterable[Any]:
    return map(pytest.approx, values)


def test_a_group_keeps_its_name_and_its_lr() -> None:
    net = network()
    groups = [
        {"params": list(net[3].parameters())},
        {"params": [net[0].weight], "lr": 3.0, "name": "backbone"},
        {"params": [net[0].bias], "lr": 3.0, "name": "backbone", "weight_decay": 0.0},
    ]
    found = DecoupledSGD(groups, lr=9.0, momentum=0.5, weight_decay=0.03, bias_factor=2.0, batch_size=512).param_groups
    assert [group["name"] for group in found] == ["weights", "backbone_weights", "backbone_biases"]
    assert [group["lr"] for group in found] == pytest.approx([9 / 6, 3 / 6, 6 / 6])
    assert [group["lr"] * group["weight_decay"] for group in found] == pytest.approx([0.03 / 6] * 3)


def test_an_lr_of_zero_leaves_all_as_it_is() -> None:
    for momentum in (0.85, 0.0):
        net = network()
        train(net, DecoupledSGD(net.parameters(), lr=0.0, momentum=momentum), 8, "mean")
        assert_same(net, network())


@pytest.mark.parametrize(
    "argument",
    [{"lr": -1.0}, {"lr": float("nan")}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"bias_factor": -1.0},
     {"bias_factor": float("inf")}, {"batch_size": 0}],
)  # fmt: skip
def test_what_is_out_of_range_is_named(argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(argument))}: .* is out of range: at least "):
        DecoupledSGD(network().parameters(), **argument)


def test_the_fused_kernel_takes_the_same_steps() -> None:
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        optimizer = DecoupledSGD(net.parameters(), lr=1.0, fused=fused)
        assert bool(optimizer.param_groups[0]["fused"]) == fused
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
        found.append(net.weight.detach())
    torch.testing.assert_close(found[0], found[1])
