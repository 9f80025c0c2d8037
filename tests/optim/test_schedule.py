"""Properties of src/optim/schedule.py: the lr is a pure function of the step."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from src.optim import OneCycle

Strategy = Literal["cos", "linear"]
each_strategy = pytest.mark.parametrize("strategy", ["cos", "linear"])


def sgd(*lrs: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs or (0.4,)])


def one_cycle(total_steps: int, lrs: Sequence[float] = (0.4,), **kwargs: Any) -> OneCycle:
    schedule = OneCycle(sgd(*lrs), **kwargs)
    schedule.set_total_steps(total_steps)
    return schedule


def run(schedule: OneCycle | OneCycleLR, steps: int) -> list[list[float]]:
    """Take so many steps and return the lr of each group at each of them."""
    lrs = []
    for _ in range(steps):
        lrs.append([float(group["lr"]) for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return lrs


@each_strategy
@pytest.mark.parametrize(("total_steps", "pct_start"), [(10, 0.3), (40, 0.25), (1000, 0.3), (100, 0.0)])
def test_the_lr_rises_to_its_peak_and_falls_to_its_end(total_steps: int, pct_start: float, strategy: Strategy) -> None:
    schedule = one_cycle(total_steps, pct_start=pct_start, div_factor=20, final_div_factor=50, anneal_strategy=strategy)
    lrs = [lr for (lr,) in run(schedule, total_steps)]
    peak = round(pct_start * total_steps)
    assert lrs[0] == pytest.approx(0.4 if pct_start == 0 else 0.4 / 20)
    assert lrs[peak] == max(lrs) == 0.4
    assert lrs[-1] == pytest.approx(0.4 / 20 / 50)
    assert all(a < b for a, b in pairwise(lrs[: peak + 1]))
    assert all(a > b for a, b in pairwise(lrs[peak:]))


def test_slopes_are_straight_or_half_a_cosine() -> None:
    linear, cos = (one_cycle(41, pct_start=20 / 41, div_factor=5, anneal_strategy=s) for s in ("linear", "cos"))
    assert [linear.factor(step) for step in (0, 5, 10, 20, 30)] == pytest.approx([0.2, 0.4, 0.6, 1.0, 0.5], abs=1e-4)
    assert [cos.factor(step) for step in (0, 5, 10, 20, 30)] == pytest.approx(
        [0.2, 0.2 + 0.8 * 0.1464466, 0.6, 1.0, 0.5], abs=1e-4
    )


@settings(max_examples=50, deadline=None)
@given(
    total_steps=st.integers(2, 80),
    share=st.floats(0, 1),
    strategy=st.sampled_from(["cos", "linear"]),
    div_factor=st.floats(1, 100),
    final_div_factor=st.floats(1, 1e6),
)
def test_the_lr_stays_between_its_end_and_its_peak_and_depends_on_the_step_only(
    total_steps: int, share: float, strategy: Strategy, div_factor: float, final_div_factor: float
) -> None:
    schedule = one_cycle(
        total_steps,
        pct_start=share * (total_steps - 1) / total_steps,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
        anneal_strategy=strategy,
    )
    expected = [0.4 * schedule.factor(step) for step in range(total_steps)]
    lrs = [lr for (lr,) in run(schedule, total_steps)]
    assert lrs == expected
    end = 0.4 / div_factor / final_div_factor
    assert all(end * (1 - 1e-9) - 1e-12 <= lr <= 0.4 * (1 + 1e-9) for lr in lrs)
    if share < 0.99:
        assert lrs[-1] == pytest.approx(end, abs=1e-9)


def test_after_the_last_step_the_lr_stays_where_it_is() -> None:
    lrs = run(one_cycle(10), 15)
    assert lrs[9:] == [lrs[9]] * 6


@each_strategy
@pytest.mark.parametrize("done", [0, 1, 7, 12, 29])
def test_a_resumed_schedule_goes_on_to_the_same_bits(done: int, strategy: Strategy) -> None:
    whole = run(one_cycle(30, (0.4, 0.1), anneal_strategy=strategy), 30)
    stopped = one_cycle(30, (0.4, 0.1), anneal_strategy=strategy)
    run(stopped, done)
    state, optimizer_state = stopped.state_dict(), stopped.optimizer.state_dict()

    resumed = one_cycle(30, (0.4, 0.1), anneal_strategy=strategy)
    resumed.optimizer.load_state_dict(optimizer_state)
    resumed.load_state_dict(state)
    assert run(resumed, 30 - done) == whole[done:]


@each_strategy
def test_it_has_the_shape_of_the_one_of_torch(strategy: Strategy) -> None:
    ours = run(one_cycle(1000, anneal_strategy=strategy), 1000)
    theirs = OneCycleLR(
        sgd(), max_lr=0.4, total_steps=1000, pct_start=0.3, anneal_strategy=strategy, cycle_momentum=False
    )
    expected = [[float(group["lr"]) for group in theirs.optimizer.param_groups]]
    for _ in range(999):
        theirs.optimizer.step()
        theirs.step()
        expected.append([float(group["lr"]) for group in theirs.optimizer.param_groups])
    # Torch's peak is one step earlier: they differ by at most a step of the steeper slope, a half-cosine's pi/2.
    tolerance = 0.4 / 300 * (1.5708 if strategy == "cos" else 1.0)
    assert torch.allclose(torch.tensor(ours), torch.tensor(expected), rtol=0, atol=tolerance)
    assert ours[0] == pytest.approx(expected[0])
    assert ours[-1] == pytest.approx(expected[-1])


def test_parameter_groups_keep_their_ratio() -> None:
    schedule = one_cycle(50, (0.4, 0.1, 0.0))
    for first, second, third in run(schedule, 50):
        assert second == pytest.approx(first / 4, rel=1e-12)
        assert third == 0


def test_the_lr_of_the_first_step_is_set_before_it() -> None:
    schedule = one_cycle(50, div_factor=10)
    assert schedule.optimizer.param_groups[0]["lr"] == pytest.approx(0.04)
    assert schedule.get_last_lr() == [schedule.optimizer.param_groups[0]["lr"]]


def test_momentum_is_left_alone() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    schedule = OneCycle(optimizer)
    schedule.set_total_steps(10)
    run(schedule, 10)
    assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pct_start", -0.1),
        ("pct_start", 1.0),
        ("pct_start", float("nan")),
        ("div_factor", 0.9),
        ("div_factor", float("nan")),
        ("final_div_factor", 0.0),
        ("final_div_factor", -3.0),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: {value} is out of range: at least "):
        OneCycle(sgd(), **{name: value})  # type: ignore[arg-type]
