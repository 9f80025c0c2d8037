"""Parameters as an optimizer is given them."""

from collections.abc import Iterable
from typing import Any


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Return groups of parameters, be they given as such or as parameters alone."""
    given = list(params)
    return given if given and isinstance(given[0], dict) else [{"params": given}]
