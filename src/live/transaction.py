"""Values that are set all together or not at all, while something else uses them.

Validate, set, read back, journal; whatever fails, everything is as it was, to the last bit.
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from src.live.commands import Refusal


class Control(NamedTuple):
    """A value of a run that can be steered.

    Attributes:
        read: Returns it.
        write: Sets it.
        problem: Says what is wrong with a wanted value, e.g. ``must be at least 0``; none if nothing is.
    """

    read: Callable[[], Any]
    write: Callable[[Any], None]
    problem: Callable[[Any], str | None]


def transact(
    controls: Mapping[str, Control],
    wanted: Mapping[str, Any],
    snapshot: Callable[[], Callable[[], None]],
    commit: Callable[[Mapping[str, tuple[Any, Any]]], None],
) -> dict[str, tuple[Any, Any]]:
    """Set several values, all of them or none.

    Args:
        controls: What can be steered, by name.
        wanted: The new values, by name.
        snapshot: Returns what brings everything back to the very bits that it has now.
        commit: Called with what has been changed, before that counts; it may raise `OSError`.

    Returns:
        Each value before, and as it is read back now, by name.

    Raises:
        Refusal: If one is unknown, out of its bounds, or did not take effect. All are as before.
    """
    check(controls, wanted)
    before = {name: controls[name].read() for name in wanted}
    restore = snapshot()
    try:
        for name, value in wanted.items():
            controls[name].write(value)
        changes = {name: (before[name], controls[name].read()) for name in wanted}
        for name, value in wanted.items():
            if not _same(changes[name][1], value):
                raise Refusal(f"{name}: {value} did not take effect: it is {changes[name][1]}")
        commit(changes)
    except Refusal:
        restore()
        raise
    except OSError as error:
        restore()
        raise Refusal(f"it cannot be journaled ({error.strerror})") from error
    except Exception as error:
        restore()
        raise Refusal(f"{type(error).__name__}: {error}") from error
    return changes


def check(controls: Mapping[str, Control], wanted: Mapping[str, Any]) -> None:
    """Look at new values without setting them.

    Raises:
        Refusal: If one is unknown or out of its bounds.
    """
    for name, value in wanted.items():
        if name not in controls:
            near = difflib.get_close_matches(name, controls, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(controls))}"
            raise Refusal(f"{name}: this run has no such value to steer; {hint}")
        if problem := controls[name].problem(value):
            raise Refusal(f"{name}: {json.dumps(value)} {problem}")


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, (list, tuple)):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    return math.isclose(found, wanted, rel_tol=1e-6) if isinstance(wanted, float) else bool(found == wanted)
