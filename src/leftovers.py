"""What a class that is named on the command line takes over from the one it replaces.

    python -m src fit --config configs/cifar10.yaml --model.optimizer torch.optim.AdamW

The parser leaves it all arguments that both have: here the lr of SGD, fifty times that of AdamW. So it is told.
"""

import inspect
import json
import pydoc
from collections.abc import Callable, Sequence
from typing import Any

_NAMES = ("network", "optimizer", "lr_scheduler")
_EMPTY = inspect.Parameter.empty


def leftovers(
    args: Sequence[str], model: dict[str, Any], parse: Callable[[list[str]], dict[str, Any]]
) -> dict[str, str]:
    """Find what classes have from those they replace, if their own would be something else.

    Args:
        args: A command line.
        model: Its section ``model``.
        parse: Returns that section of another command line.

    Returns:
        A sentence for each such class, with the options that give it its own, by the key it is given under.
    """
    names = [name for name in _NAMES if _is_named(args, f"model.{name}")]
    if not names:
        return {}
    before = parse(_without(args, [f"--model.{name}" for name in names]))
    options = {word.partition("=")[0].replace(".init_args.", ".") for word in args}
    found = {f"model.{name}": _told(f"model.{name}", before[name], model[name], options) for name in names}
    return {key: sentence for key, sentence in found.items() if sentence}


def _is_named(args: Sequence[str], key: str) -> bool:
    """Return whether a command line gives a class by its name alone."""
    for word, following in zip(args, [*args[1:], ""], strict=True):
        option, _, value = word.partition("=")
        if option in (f"--{key}", f"--{key}.class_path"):
            return not (value or following).startswith("{")
    return False


def _without(args: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return a command line without some options and what is below them.

    >>> _without(["fit", "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr=1"], ["--model.optimizer"])
    ['fit']
    """
    kept, keep = [], True
    for word in args:
        if word.startswith("--") or word == "-c":
            keep = not any(f"{word.partition('=')[0]}.".startswith(f"{option}.") for option in options)
        if keep:
            kept.append(word)
    return kept


def _told(key: str, before: dict[str, Any] | None, now: dict[str, Any] | None, options: set[str]) -> str:
    if before is None or now is None or before["class_path"] == now["class_path"]:
        return ""
    found = pydoc.locate(now["class_path"])
    own = {name: p.default for name, p in inspect.signature(found).parameters.items()} if callable(found) else {}
    old, new = before.get("init_args", {}), now.get("init_args", {})
    names = [n for n in new if n in old and own.get(n, _EMPTY) is not _EMPTY and f"--{key}.{n}" not in options]
    texts = {name: [_text(value) for value in (new[name], old[name], own[name])] for name in names}
    taken = {name: (now, its) for name, (now, then, its) in texts.items() if now == then != its}
    if not taken:
        return ""
    values = ", ".join(f"{name} {value}" for name, (value, _) in taken.items())
    its = " ".join(f"--{key}.{name} {value}" for name, (_, value) in taken.items())
    one, other = (config["class_path"].rpartition(".")[2] for config in (now, before))
    return f"{one} takes over {values} from {other}; its own: {its}"


def _text(value: Any) -> str:
    """Return a value as a command line has it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
