"""Muon: orthogonal steps for convolutions, plain SGD for the rest."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.optim import Muon, muon
from src.optim.muon import orthogonalize, orthogonalize_together


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 5))


def backward(net: nn.Module, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    net(torch.randn(6, 3, 4, 4, generator=draws)).square().mean().backward()


@pytest.mark.parametrize("shape", [(8, 27), (27, 8), (64, 64), (256, 2304)])
def test_an_orthogonal_update_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), steps=5).float())
    assert values.min() > 0.5
    assert values.max() < 1.35


@pytest.mark.parametrize("shape", [(8, 27), (27, 8), (64, 64), (256, 576)])
def test_an_update_is_what_the_iteration_makes_of_it_but_for_little_rounding(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrix.double() / matrix.norm(), full_matrices=False)
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    exact = left * values @ right
    for found in (orthogonalize(matrix, steps=3), orthogonalize(matrix[None], steps=3)[0]):
        assert (found - exact).norm() < 0.75 * (_rounding_each_time(matrix) - exact).norm()


def _rounding_each_time(matrix: Tensor) -> Tensor:
    x: Tensor = matrix.bfloat16() / matrix.bfloat16().norm()
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(8, 27), (27, 8), (64, 64)])
def test_many_updates_at_once_are_each_as_orthogonal_as_alone(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrices = torch.randn(3, *shape)
    together = orthogonalize(matrices, steps=3).float()
    for matrix, found in zip(matrices, together, strict=True):
        torch.testing.assert_close(found, orthogonalize(matrix, steps=3).float(), rtol=0.05, atol=0.03)


@pytest.mark.parametrize("most", [0, 1 << 25])
def test_filter_banks_of_all_shapes_at_once_are_each_as_orthogonal_as_alone(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "_MOST_FILLED_UP", most)
    torch.manual_seed(1)
    shapes = [(8, 3, 3, 3), (24, 8, 3, 3), (30, 3, 2, 2), (24, 24, 3, 3), (24, 24, 3, 3), (9, 4, 5), (9, 36, 1, 1)]
    for layout in (torch.contiguous_format, torch.channels_last):
        banks = [torch.randn(s).to(memory_format=layout if len(s) == 4 else torch.preserve_format) for s in shapes]
        for bank, found in zip(banks, orthogonalize_together(banks, steps=3), strict=True):
            assert (found.shape, found.dtype) == (bank.shape, torch.float32)
            lies = [[step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1] for t in (found, bank)]
            assert lies[0] == lies[1], "what is added to it must lie as it does: else it is slow"
            alone = orthogonalize(bank.reshape(len(bank), -1), steps=3).float()
            torch.testing.assert_close(found.reshape(len(bank), -1), alone, rtol=0.05, atol=0.03)


def test_the_size_of_a_step_is_the_lr_whatever_the_loss_is_scaled_by() -> None:
    steps: list[Tensor] = []
    for scale in (1.0, 1e4):
        net = network()
        optimizer = Muon(net.parameters(), lr=0.1, head_lr=0.0, bias_lr=0.0, ns_steps=5)
        before = net[0].weight.detach().clone()
        before *= len(before) ** 0.5 / before.norm()
        backward(net, 0)
        net[0].weight.grad *= scale
        optimizer.step()
        steps.append(net[0].weight.detach() - before)
    torch.testing.assert_close(steps[0], steps[1], rtol=0.02, atol=5e-3)
    size = torch.linalg.svdvals(steps[0].flatten(1))
    assert 0.05 < size.min() < size.max() < 0.14


def test_matrices_and_vectors_take_the_steps_of_nesterov_sgd() -> None:
    ours, theirs = network(), network()
    muon = Muon(ours.parameters(), lr=0.0, head_lr=0.2, bias_lr=0.1, sgd_momentum=0.85, weight_decay=0.004)
    groups = [
        {"params": [theirs[2].weight], "lr": 0.2, "weight_decay": 0.004 / 0.2},
        {"params": [theirs[0].bias, theirs[2].bias], "lr": 0.1, "weight_decay": 0.004 / 0.1},
    ]
    sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
    with torch.no_grad():  # the filters are rescaled even at an lr of 0
        theirs[0].weight *= len(theirs[0].weight) ** 0.5 / theirs[0].weight.norm()
        ours[0].weight.copy_(theirs[0].weight)
    for seed in range(3):
        for net, optimizer in ((ours, muon), (theirs, sgd)):
            optimizer.zero_grad()
            backward(net, seed)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    net = network()
    net[0].requires_grad_(False)
    optimizer = Muon(net.parameters())
    before = net[0].weight.clone()
    backward(net, 0)
    optimizer.step()
    assert torch.equal(net[0].weight, before)


def test_its_state_goes_on_after_it_was_saved() -> None:
    nets = [network(), network()]
    optimizers = [Muon(net.parameters(), head_lr=0.1, bias_lr=0.1) for net in nets]
    for seed in range(4):
        if seed == 2:
            nets[1].load_state_dict(nets[0].state_dict())
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for i in range(1 if seed < 2 else 2):
            optimizers[i].zero_grad()
            backward(nets[i], seed)
            optimizers[i].step()
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)


def test_a_group_with_an_lr_of_its_own_has_all_its_lrs_in_proportion() -> None:
    net = network()
    given = [
        {"params": [net[2].weight, net[2].bias]},
        {"params": [net[0].weight, net[0].bias], "lr": 0.05, "name": "backbone"},
    ]
    groups = Muon(given, lr=0.5, head_lr=30.0, bias_lr=20.0, weight_decay=0.01).param_groups
    found = [(group["name"], group["lr"], round(group["lr"] * group["weight_decay"], 9)) for group in groups]
    assert found == [
        ("backbone_filters", 0.05, 0.0), ("matrices", 30.0, 0.01),
        ("vectors", 20.0, 0.01), ("backbone_vectors", 2.0, 0.01),
    ]  # fmt: skip
    before = net[0].weight.detach() * len(net[0].weight) ** 0.5 / net[0].weight.detach().norm()
    optimizer = Muon(given, lr=0.5, head_lr=0.0, bias_lr=0.0, ns_steps=5)
    backward(net, 0)
    optimizer.step()
    size = torch.linalg.svdvals((net[0].weight.detach() - before).flatten(1))
    assert 0.025 < size.min() < size.max() < 0.07, "an orthogonal step of the group's lr"


@pytest.mark.parametrize("argument", [{"ns_steps": 0}, {"head_lr": -1.0}, {"bias_lr": float("nan")}])
def test_what_is_out_of_range_is_named(argument: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(argument))}: .* is out of range"):
        Muon(network().parameters(), **argument)  # type: ignore[arg-type]


def test_parameters_may_be_given_in_any_way_that_torch_takes() -> None:
    net = network()
    names = [group["name"] for group in Muon(net.parameters()).param_groups]
    assert names == ["filters", "matrices", "vectors"]
    for params in ([{"params": net.parameters()}], iter([{"params": tuple(net.parameters())}])):
        assert [group["name"] for group in Muon(params).param_groups] == names
    assert [group["name"] for group in Muon([{"params": net[2].weight}]).param_groups] == ["matrices"]
