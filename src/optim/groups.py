"""Parameters as an optimizer is given them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Return groups of lists of parameters, be they given as groups or as parameters alone, in lists or not."""
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    members = [group["params"] for group in groups]
    lists = [[some] if isinstance(some, Tensor) else list(some) for some in members]
    return [{**group, "params": some} for group, some in zip(groups, lists, strict=True)]
