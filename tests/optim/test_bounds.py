"""Behaviour of src/optim/bounds.py: no optimizer is built with a hyper-parameter that is out of range."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adadelta, AdamW, Optimizer, RMSprop

from src.optim.bounds import Bound, build_checked


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(1))]


@pytest.mark.parametrize(
    ("optimizer", "name", "value", "said"),
    [
        (SGD, "lr", -0.1, "lr: -0.1 is out of range: at least 0"),
        (SGD, "lr", math.nan, "lr: nan is out of range: at least 0"),
        (SGD, "lr", math.inf, "lr: inf is out of range: at least 0"),
        (SGD, "momentum", -0.1, "momentum: -0.1 is out of range: at least 0, below 1"),
        (SGD, "momentum", 1.0, "momentum: 1.0 is out of range: at least 0, below 1"),
        (SGD, "momentum", 1.5, "momentum: 1.5 is out of range: at least 0, below 1"),
        (SGD, "momentum", math.nan, "momentum: nan is out of range: at least 0, below 1"),
        (SGD, "dampening", 1.5, "dampening: 1.5 is out of range: at least 0, below 1"),
        (SGD, "weight_decay", -1, "weight_decay: -1 is out of range: at least 0"),
        (SGD, "weight_decay", math.inf, "weight_decay: inf is out of range: at least 0"),
        (AdamW, "lr", -1, "lr: -1 is out of range: at least 0"),
        (AdamW, "lr", math.nan, "lr: nan is out of range: at least 0"),
        (AdamW, "lr", math.inf, "lr: inf is out of range: at least 0"),
        (AdamW, "betas", (0.9, 1.0), "betas: 1.0 is out of range: at least 0, below 1"),
        (AdamW, "betas", (-0.1, 0.9), "betas: -0.1 is out of range: at least 0, below 1"),
        (AdamW, "betas", (math.nan, 0.9), "betas: nan is out of range: at least 0, below 1"),
        (AdamW, "weight_decay", -1, "weight_decay: -1 is out of range: at least 0"),
        (AdamW, "weight_decay", math.nan, "weight_decay: nan is out of range: at least 0"),
        (AdamW, "eps", -1e-8, "eps: -1e-08 is out of range: at least 0"),
        (AdamW, "eps", math.inf, "eps: inf is out of range: at least 0"),
        (RMSprop, "alpha", 1.5, "alpha: 1.5 is out of range: at least 0, below 1"),
        (RMSprop, "momentum", 1.5, "momentum: 1.5 is out of range: at least 0, below 1"),
        (Adadelta, "rho", 3.0, "rho: 3.0 is not valid"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(optimizer: Any, name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        build_checked(lambda: optimizer(parameters(), **{name: value}))


def test_every_parameter_group_is_checked() -> None:
    groups = [{"params": parameters(), "lr": 0.1}, {"params": parameters(), "lr": math.inf}]
    with pytest.raises(ValueError, match=r"^lr: inf is out of range: at least 0$"):
        build_checked(lambda: SGD(groups))


@pytest.mark.parametrize(
    ("optimizer", "values"),
    [
        (SGD, {"lr": 0.0}),
        (SGD, {"lr": 10, "momentum": 0.99, "nesterov": True, "weight_decay": 0.0005}),
        (AdamW, {"lr": 1e-3, "betas": (0.0, 0.999), "weight_decay": 0.05, "eps": 1e-8}),
    ],
)
def test_values_in_range_are_kept(optimizer: Any, values: dict[str, Any]) -> None:
    built = build_checked(lambda: optimizer(parameters(), **values))
    assert isinstance(built, optimizer)
    assert {name: built.param_groups[0][name] for name in values} == values


def test_what_torch_refuses_for_another_reason_is_said_in_its_words() -> None:
    with pytest.raises(ValueError, match=r"^optimizer: Nesterov momentum requires a momentum"):
        build_checked(lambda: SGD(parameters(), nesterov=True))


def test_an_optimizer_without_known_names_is_built() -> None:
    class Own(Optimizer):
        pass

    assert build_checked(lambda: Own(parameters(), {"stride": -5})).param_groups[0]["stride"] == -5


def test_a_bound_includes_its_lower_end_only() -> None:
    bound = Bound(0, 1)
    assert [bound.holds(value) for value in (0, 0.5, 1, -1e-9, math.nan)] == [True, True, False, False, False]
    assert bound.holds((0.1, 0.2))
    assert not bound.holds([0.1, 1.0])
    assert not bound.holds("0.5")
    assert not Bound(0, math.inf).holds(math.inf)
