"""What a class takes over from the one that it replaces.

    python -m src fit --config configs/cifar10.yaml --model.optimizer torch.optim.AdamW

The parser leaves it all arguments that both have: here the lr of SGD, fifty times that of AdamW. So it is told. The
optimizer that trains where no config names one is replaced in the same way.
"""

import contextlib
import copy
import inspect
import io
import json
import pydoc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

KEYS = ("data", "model.network", "model.optimizer", "model.lr_scheduler")
_OF_DEFAULT = {"lr", "momentum", "nesterov", "weight_decay"}
"""What the optimizer that nobody names is given, see `ImageClassifier`: it leaves that to one that somebody does."""
_EMPTY = inspect.Parameter.empty

Config = dict[str, Any]


class Source(NamedTuple):
    """A place on a command line that says something of a class.

    Attributes:
        place: The number of its word.
        class_path: The class that it names, if it does.
        names: The arguments that it gives.
    """

    place: int
    class_path: str | None
    names: set[str]


def leftovers(args: Sequence[str], config: Config, parse: Callable[[list[str]], Config]) -> dict[str, str]:
    """Find what classes have from those they replace, if their own would be something else.

    Args:
        args: A command line.
        config: What the parser makes of it.
        parse: Makes the same of another command line.

    Returns:
        A sentence for each such class, with the options that give it its own, by the key it is given under.
    """
    options = [word.partition("=")[0] for word in args]
    values = [word.partition("=")[2] if "=" in word else next(iter(args[i + 1 :]), "") for i, word in enumerate(args)]
    configs = {i: _config(values[i]) for i, option in enumerate(options) if option in ("--config", "-c")}
    found = {}
    for key in KEYS:
        sources = [
            source
            for i, option in enumerate(options)
            if (source := _source(i, option, values[i], configs.get(i), key)) is not None
        ]
        named = [source for source in sources if source.class_path is not None]
        classes = {str(source.class_path).rpartition(".")[2] for source in named}
        default = set() if not named or key != "model.optimizer" else {"SGD"}
        if len(classes | default) < 2:
            continue
        last = named[-1].place
        given = {name for source in sources if source.place >= last for name in source.names}
        given |= {option.rpartition(".")[2] for option in options if option.startswith(f"--{key}.")}
        if len(classes) < 2 and not (_names(config, key) & _OF_DEFAULT) - given:
            continue  # to parse it once more takes time
        # Should there be no command line without it, that is no reason to refuse this one.
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            before = parse(list(_without(args, key, {i: config for i, config in configs.items() if i >= last})))
            if sentence := _told(key, _section(before, key), _section(config, key), given):
                found[key] = sentence
    return found


def _names(config: Config, key: str) -> set[str]:
    """Return the arguments of the class of a key."""
    return set((_section(config, key) or {}).get("init_args") or {})


def _source(place: int, option: str, value: str, config: Any, key: str) -> Source | None:
    """Return what an option says of the class of a key, or the config that it gives; none if that is nothing."""
    section = _section(config, key)
    if option in (f"--{key}", f"--{key}.class_path"):
        section = _config(value) if value.startswith("{") else value
    if isinstance(section, str):
        return Source(place, section, set())
    if not isinstance(section, dict):
        return None
    return Source(place, section.get("class_path"), set(section.get("init_args") or {}))


def _config(value: str) -> Any:
    """Return the config that is given by its file, or itself; none if it is none, which the parser says."""
    with contextlib.suppress(OSError, ValueError):
        value = Path(value).read_text(encoding="utf-8")
    with contextlib.suppress(yaml.YAMLError, ValueError):
        return yaml.safe_load(value)
    return None


def _section(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _without(args: Sequence[str], key: str, configs: dict[int, Any]) -> Iterable[str]:
    """Yield a command line without a key, but for what other configs than these, by their places, say of it."""
    keep = True
    for i, word in enumerate(args):
        if word.startswith("--") or word == "-c":
            keep = i not in configs and not f"{word.partition('=')[0]}.".startswith(f"--{key}.")
        if i in configs:
            config = copy.deepcopy(configs[i])
            section, _, name = key.rpartition(".")
            parent = _section(config, section) if section else config
            if isinstance(parent, dict):
                parent.pop(name, None)
            yield f"--config={yaml.safe_dump(config)}"
        if keep:
            yield word


def _told(key: str, before: Config | None, now: Config | None, given: set[str]) -> str:
    if before is None or now is None or before["class_path"] == now["class_path"]:
        return ""
    found = pydoc.locate(now["class_path"])
    own = {name: p.default for name, p in inspect.signature(found).parameters.items()} if callable(found) else {}
    old, new = before.get("init_args", {}), now.get("init_args", {})
    names = [n for n in new if n in old and own.get(n, _EMPTY) is not _EMPTY and n not in given]
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
