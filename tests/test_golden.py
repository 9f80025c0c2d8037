"""The recipes train to the last bit as they did when their curves were recorded; `tests.golden` records them."""

import copy

import pytest

from tests.golden import CLOSE_STEPS, RECIPES, Curve, differences, platform_key, recorded, train


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_as_recorded(recipe: str) -> None:
    assert not list(differences(train(recipe), recorded(recipe), platform_key()))


@pytest.fixture
def golden() -> dict[str, Curve]:
    return {"here": next(iter(recorded("quickstart").values()))}


def nudged(curve: Curve, name: str, index: int, factor: float) -> Curve:
    """Return a curve with one point changed."""
    changed = copy.deepcopy(curve)
    changed[name][index] = (float.fromhex(curve[name][index]) * factor).hex()
    return changed


@pytest.mark.parametrize(("name", "index"), [("train/loss", 0), ("train/loss", 29), ("val/loss", 2)])
def test_one_bit_is_seen_on_a_platform_that_is_recorded(golden: dict[str, Curve], name: str, index: int) -> None:
    (found,) = differences(nudged(golden["here"], name, index, 1 + 2**-23), golden, "here")
    assert f"point {index + 1} of {name}" in found


def test_other_weights_are_seen_where_no_loss_differs(golden: dict[str, Curve]) -> None:
    (found,) = differences(golden["here"] | {"weights": "0" * 64}, golden, "here")
    assert "final weights are not" in found


def test_another_platform_may_differ_by_rounding_and_by_no_more(golden: dict[str, Curve]) -> None:
    last = CLOSE_STEPS - 1
    assert not list(differences(nudged(golden["here"], "train/loss", last, 1.01), golden, "elsewhere"))
    (found,) = differences(nudged(golden["here"], "train/loss", last, 1.05), golden, "elsewhere")
    assert "no curve is recorded for elsewhere" in found
    assert "python -m tests.golden --write" in found
