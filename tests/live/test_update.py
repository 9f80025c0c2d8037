"""LiveUpdate: the optimizer's own step, to the bit, or no change at all; readable by others as it goes."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from src.live.update import LiveUpdate
from src.live.weights import EndedError, LiveWeights
from src.networks import CNN
from src.optim import Muon

OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
    "muon": partial(Muon, lr=0.01, head_lr=0.1, bias_lr=0.1),
}


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return CNN(norm="batch")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients(network: nn.Module, images: Tensor) -> list[Tensor]:
    loss = F.cross_entropy(network(images), torch.arange(6))
    return list(torch.autograd.grad(loss, list(network.parameters())))


@pytest.fixture
def live(network: nn.Module, tmp_path: Path) -> Iterator[LiveUpdate]:
    with LiveUpdate(network, OPTIMIZERS["nesterov"], tmp_path) as live:
        yield live


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_updates_of_the_model_equal_the_optimizers_own_steps_to_the_bit(
    make: Callable[..., torch.optim.Optimizer], network: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    other = copy.deepcopy(network)
    optimizer = make(list(other.parameters()))
    with LiveUpdate(network, make, tmp_path) as live:
        for step in range(1, 5):
            assert live.update_model(gradients(live, images)) == step
            optimizer.zero_grad()
            F.cross_entropy(other(images), torch.arange(6)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for one, two in zip(network.state_dict().values(), other.state_dict().values(), strict=True):
                assert torch.equal(one, two)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_update_of_some_parameters_leaves_the_others_and_their_momentum_alone(
    make: Callable[..., torch.optim.Optimizer], network: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    other = copy.deepcopy(network)
    optimizer = make(list(other.parameters()))
    some = [0, 3]
    with LiveUpdate(network, make, tmp_path) as live:
        for turn in range(4):
            found = gradients(live, images)
            parameters, theirs = list(network.parameters()), list(other.parameters())
            gradients(other, images)  # BatchNorm's statistics go along
            chosen = some if turn % 2 else list(range(len(parameters)))
            live.update_parameters([parameters[i] for i in chosen], [found[i] for i in chosen])
            for i, parameter in enumerate(theirs):
                parameter.grad = found[i].clone() if i in chosen else None
            optimizer.step()
            for one, two in zip(parameters, theirs, strict=True):
                assert torch.equal(one, two)


def test_gradients_that_a_loop_has_gathered_itself_are_still_there(live: LiveUpdate, images: Tensor) -> None:
    F.cross_entropy(live(images), torch.arange(6)).backward()  # type: ignore[no-untyped-call]
    before = [parameter.grad for parameter in live.network.parameters()]
    live.update_model(gradients(live, images))
    assert all(p.grad is grad for p, grad in zip(live.network.parameters(), before, strict=True))


BAD: dict[str, tuple[Callable[[list[Tensor]], Any], str]] = {
    "too few": (lambda g: g[:-1], r"gradients: \d+ for \d+ parameters"),
    "shape": (lambda g: [g[0][:1], *g[1:]], r"gradients: that of \S+ has shape \[1, .*\], not \["),
    "dtype": (lambda g: [g[0].double(), *g[1:]], r"has dtype torch.float64, not torch.float32"),
    "device": (lambda g: [g[0].to("meta"), *g[1:]], r"has device meta, not cpu"),
    "nan": (lambda g: [*g[:-1], g[-1] * torch.nan], r"gradients: that of \S+ is not finite"),
    "infinite": (lambda g: [g[0] / 0, *g[1:]], r"is not finite"),
    "no tensor": (lambda g: [1.0, *g[1:]], r"is a float, not a tensor"),
    "none": (lambda g: [None, *g[1:]], r"is a NoneType, not a tensor"),
    "sparse": (lambda g: [g[0].to_sparse(), *g[1:]], r"is sparse"),
}


@pytest.mark.parametrize(("spoil", "said"), BAD.values(), ids=BAD)
def test_gradients_that_do_not_fit_are_refused_and_change_nothing(
    spoil: Callable[[list[Tensor]], Any], said: str, live: LiveUpdate, images: Tensor
) -> None:
    live.update_model(gradients(live, images))
    good = gradients(live, images)
    before = copy.deepcopy((live.network.state_dict(), live.optimizer.state_dict()))
    with pytest.raises(ValueError, match=said):
        live.update_model(spoil(good))
    after = (live.network.state_dict(), live.optimizer.state_dict())
    assert str(before) == str(after)
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name])
    assert live.step == 1


def test_parameters_of_another_network_or_given_twice_are_refused(live: LiveUpdate) -> None:
    parameter = next(live.network.parameters())
    gradient = torch.zeros_like(parameter)
    with pytest.raises(ValueError, match="parameters: one is given twice"):
        live.update_parameters([parameter, parameter], [gradient, gradient])
    with pytest.raises(ValueError, match="parameters: number 0 is none of the network's"):
        live.update_parameters([nn.Parameter(gradient)], [gradient])
    assert live.step == 0


def test_others_read_each_update_while_the_service_learns(live: LiveUpdate, images: Tensor, tmp_path: Path) -> None:
    with LiveWeights.open(tmp_path) as reader:
        assert reader.wait(0, timeout=5).step == 0
        for step in range(1, 4):
            live.update_model(gradients(live, images))
            version = reader.wait(step, timeout=5)
            assert (version.step, version.age_steps) == (step, 0)
            for name, tensor in live.network.state_dict().items():
                assert torch.equal(version.state[name], tensor)
    live.close()
    with pytest.raises(EndedError):
        LiveWeights.open(tmp_path)
    live.__init__(live.network, OPTIMIZERS["sgd"], tmp_path)  # type: ignore[misc] # for the fixture to close
