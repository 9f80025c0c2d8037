"""Turns what the parser says of a bad command line into one line: the key, what is wrong, what would be right."""

import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import yaml

from src.data import Augmentation, ImageData, Mixing
from src.networks import Network

_BASES: dict[str, type] = {
    "ImageData": ImageData,
    "Network": Network,
    "Augmentation": Augmentation,
    "Mixing": Mixing,
}
_PACKAGES = ("torch.optim.lr_scheduler", "torch.optim", "lightning.pytorch.callbacks", "lightning.pytorch.loggers",
             "src.optim")  # fmt: skip
"""Where there are classes that need no import path, beside this project's."""

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "NoneType": "null",
}


EXPECTED = {
    "seed_everything": "a whole number",
    "trainer.max_time": "days:hours:minutes:seconds, such as 00:01:30:00",
}
"""What is right for keys whose types say something else, or too little."""


def explain(
    message: str, keys: Sequence[str], args: Sequence[str], configs: Sequence[str], classes: Mapping[str, str]
) -> str:
    """Return a parser's message as one line.

    Args:
        message: What jsonargparse says, often on many lines.
        keys: The dotted keys that exist, for a hint at misspelt ones.
        args: The command line.
        configs: The texts of the configs that were given.
        classes: Those of the keys for which nobody names one.
    """
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        option = found[1].split("=")[0]
        if not option.startswith("--"):
            return f"{option!r} is not an option: options begin with --"
        return f"unknown option {option}{_hint(option.removeprefix('--'), keys, args, configs, classes, '--')}"
    if found := re.search(r"(?:does not accept option|Option) '([^']+)'", message):
        key = _locate(found[1], args, configs).replace(".init_args", "")
        section = key.rpartition(".")[0]
        if section and message.endswith("' is not accepted"):  # a class says so, which does not know where it is
            keys = [f"{section}.{name}" for name in ("help", *keys)]
        return f"unknown key {key}{_hint(key, keys, args, configs, classes)}"
    if found := re.search(r"invalid choice: '([^']+)' \(choose from (.+)\)", message):
        return f"unknown sub-command {found[1]!r}; choose from {found[2].replace(chr(39), '')}, watch, steer, feed"
    if found := re.search(r"expected \"subcommand\" to be one of \{(.+)\}", message):
        return f"give a sub-command: {found[1].replace(',', ', ')}, watch, steer, feed"
    if found := re.search(r"Parser key \"config\": File does not exist: '(.+)'", message):
        return f"config: there is no file {found[1]}"
    if message.startswith("Problems parsing config"):  # one that is no file, but is given itself
        return f"config: not valid YAML: {_flat(message.split(':', 1)[1])}"
    if found := re.search(r"the following arguments are required: ([\w.]+)", message):
        return _missing(found[1], args, configs)
    if found := re.search(r"compute_fn of link .* failed: (.+)", message, re.DOTALL):
        return _flat(found[1])
    if found := re.match(r"Parser key \"([^\"]+)\":(.*)", message, re.DOTALL):
        return _bad_value(_locate(found[1], args, configs), found[2])
    return _flat(message)


def name_reason(message: str, config: dict[str, Any]) -> str:
    """Return why something could not be built, with its whole key.

    Args:
        message: Why; the parser wraps what a constructor raised.
        config: What was to be built.
    """
    reason = _deepest_reason(message)
    if made := re.match(r"Problem with given class_path '([^']+)': (.*)", reason):
        key = next((key for key, text in _texts(config, ()) if text == made[1]), "")
        return f"{key and f'{key}: '}{made[1]} could not be made: {made[2]}"
    name, colon, rest = reason.partition(": ")
    return f"{_full_key(name, config)}{colon}{rest}" if name.isidentifier() else reason


def _deepest_reason(message: str) -> str:
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    wrapping = ("Does not validate", "Subtypes:", "Errors:", "Expected a", "Given value", "")
    reasons = [line for line in lines if not line.startswith(wrapping[:-1]) and line]
    if not reasons or not message.startswith("Does not validate"):
        return _flat(message)
    return " ".join(reasons[:2]) if reasons[0].endswith(":") else reasons[0]


def _bad_value(key: str, detail: str) -> str:
    value = next(iter(re.findall(r"(?:Given value|Got value): (.*)", detail)), None)
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", detail):
        return f"{key}: {found[1]} is not a {found[2]}{_choices(found[2])}"
    if found := re.search(r"Multiple subclasses with name (\w+)\. .*: (.*?)\.$", detail, re.MULTILINE):
        return f"{key}: there are several classes {found[1]}; give the import path of one: {found[2]}"
    if found := re.search(r"Expected '([^']+)' to be a subclass of (?:Union\[)?([\w., |]+)", detail):
        return f"{key}: {found[1]} is not a {re.sub(', | [|] ', ' or ', found[2].rstrip('.'))}"
    if value is not None and "expects a function or a callable class" in detail:
        named = re.match(r"Namespace\(class_path='([^']*)'", value)
        return _no_class(key, named[1] if named else value, detail)
    if found := re.search(r"Problem with given class_path '([^']+)':\s*(?:No module named|module \S+ has no)", detail):
        return _no_class(key, found[1], detail)
    if found := re.search(r"Expected a dot import path string: (\S+)", detail):
        numbers = _expected(detail)
        if not _base(key, detail) and numbers not in ("", "null"):
            return f"{key}: {found[1]!r} is not valid; expected {numbers}"
        return _no_class(key, found[1], detail)
    expected = EXPECTED.get(key) or _expected(detail)
    if value is not None and expected == "null":  # all else that it may be is too long to tell
        return f"{key}: {value!r} is not valid; see --help"
    if value is None or not expected:
        return f"{key}: {_flat(detail)}"
    return f"{key}: {value!r} is not valid; expected {expected}"


def _no_class(key: str, name: str, detail: str) -> str:
    """Say that there is no class of a name; what there is, or what is missing."""
    missing = re.search(r"No module named '[^']+'", detail)
    return f"{key}: there is no class {name}{f': {missing[0]}' if missing else _choices(_base(key, detail), name)}"


def _base(key: str, detail: str) -> str:
    """Return of which of our classes something is to be a subclass, if of one."""
    of_keys = {"data": "ImageData", "network": "Network", "mix": "Mixing", "augment": "Augmentation"}
    base = next(iter(re.findall(r"<class '[\w.]*?(\w+)'>", detail)), "")
    return base if base in _BASES else of_keys.get(key.rsplit(".", 1)[-1], "")


def _expected(detail: str) -> str:
    """Return what types a message asks for, in words."""
    parts: list[str] = []
    for kind in re.findall(r"Expected an? (typing\.Literal\[[^\]]*\]|<class '[^']+'>)", detail):
        if kind.startswith("typing"):
            parts.append("one of " + kind[len("typing.Literal[") : -1].replace("'", ""))
        else:
            name = kind[len("<class '") : -2].rsplit(".", 1)[-1]
            if name != "Tensor":
                parts.append(_WORDS.get(name, f"a {name}"))
    return " or ".join(dict.fromkeys(parts))


def _missing(argument: str, args: Sequence[str], configs: Sequence[str]) -> str:
    """Say which class that was named needs an argument that was not given; the parser does not."""
    if "." in argument:  # one of our own, behind the sub-command
        return f"{argument.partition('.')[2]}: it has to be given"
    named = [pair for word in args for pair in [word.removeprefix("--").partition("=")[::2]] if word.startswith("--")]
    named += [(option.removeprefix("--"), value) for option, value in pairwise(args) if option.startswith("--")]
    for key, text in named:
        with suppress(yaml.YAMLError, ValueError):
            configs = [*configs, yaml.safe_dump({key.rstrip("+").removesuffix(".class_path"): yaml.safe_load(text)})]
    for config in configs:
        for key, name in _texts(yaml.safe_load(config), ()):
            if argument in _required(name):
                return f"{key}: {name.rsplit('.', 1)[-1]} needs {argument}; give {key}.{argument}"
    if argument == "network":  # of a class that needs no name, as there is but one
        return "model.selection: Selection needs network; give model.selection.network"
    return f"{argument} is missing: a class that was named needs it"


def _texts(config: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the dotted keys of all texts in a config, and the texts."""
    if isinstance(config, str):
        yield ".".join(path).removesuffix(".class_path"), config
    elif isinstance(config, dict):
        for key, value in config.items():
            yield from _texts(value, path if key == "init_args" else (*path, str(key)))
    elif isinstance(config, list):
        for value in config:
            yield from _texts(value, path)


def _required(name: str) -> list[str]:
    """Return the arguments that a class has no defaults for; none if there is no class of that name."""
    module, _, leaf = name.rpartition(".")
    found = [getattr(sys.modules.get(place), leaf, None) for place in ([module] if module else _PACKAGES)]
    found += [c for base in _BASES.values() for c in _subclasses(base) if c.__name__ == name]
    classes = [c for c in found if isinstance(c, type)]
    parameters = [p for c in classes[:1] for p in inspect.signature(c.__init__).parameters.values()]  # type: ignore[misc]
    return [p.name for p in parameters[1:] if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _choices(base: str, name: str = "") -> str:
    if base not in _BASES:
        known = {n for place in _PACKAGES for n, found in vars(sys.modules[place]).items() if isinstance(found, type)}
        near = difflib.get_close_matches(name.rsplit(".", 1)[-1], sorted(known), n=1)
        if near:
            return f"; did you mean {near[0]}?"
        return "" if "." in name else "; give its whole import path, such as torch.optim.SGD"
    names = sorted(c.__name__ for c in _subclasses(_BASES[base]) if not inspect.isabstract(c))
    return f"; there are {', '.join(names)}, or give the import path of one of yours"


def _subclasses(base: type) -> Iterator[type]:
    found: list[type] = type.__subclasses__(base)
    for sub in found:
        yield sub
        yield from _subclasses(sub)


def _parameter_names() -> set[str]:
    """Return the names of the parameters of every class that a config may name here."""
    classes: list[Any] = [torch.optim.SGD, torch.optim.AdamW]
    for base in _BASES.values():
        classes += [base, *_subclasses(base)]
    return {name for c in classes for name in inspect.signature(c.__init__).parameters} - {"self", "kwargs"}


def _hint(
    key: str,
    keys: Sequence[str],
    args: Sequence[str],
    configs: Sequence[str],
    classes: Mapping[str, str],
    prefix: str = "",
) -> str:
    """Say what a key that there is not was to be, or else what lists those that there are."""
    if near := _near(key, keys):
        return f"; did you mean {prefix}{near}?"
    section = key.rpartition(".")[0]
    if any(key.startswith(k.removesuffix("help")) for k in keys if k.endswith(".help")):
        name = _class_named(section, args, configs, classes)
        return f"; python -m src fit --{section}.help {name} lists what there is"
    return "; --help lists what there is"


def _near(key: str, keys: Sequence[str]) -> str:
    """Return the key that a misspelt one was to be, as far as that can be told; else nothing."""
    paths, parts = [k.split(".") for k in keys], key.split(".")
    close = partial(difflib.get_close_matches, n=1, cutoff=0.75)
    for i, part in enumerate(parts):
        there = {path[i] for path in paths if path[:i] == parts[:i] and len(path) > i} - {"help"}
        names = there or _parameter_names()  # of a class, which may be any
        if part not in names and (near := close(part, sorted(names))):
            parts[i] = near[0]
        elif part not in names and there:
            leaves = {path[-1]: ".".join(path) for path in paths}
            return leaves[close(part, leaves)[0]] if len(parts) == 1 and close(part, leaves) else ""
    return ".".join(parts) if parts != key.split(".") else ""


def _class_named(section: str, args: Sequence[str], configs: Sequence[str], classes: Mapping[str, str]) -> str:
    """Return the class that a section is given at last, or has if nobody names one; else CLASS."""
    values = [yaml.safe_load(text) for text in configs]
    for part in section.split("."):
        values = [value.get(part) if isinstance(value, dict) else None for value in values]
    for word, value in pairwise([*args, ""]):
        option, equals, given = word.partition("=")
        if option in (f"--{section}", f"--{section}.class_path"):
            with suppress(yaml.YAMLError, ValueError):
                values.append(yaml.safe_load(given if equals else value))
    names = [value.get("class_path") if isinstance(value, dict) else value for value in values]
    return next((name for name in reversed(names) if isinstance(name, str)), classes.get(section, "CLASS"))


def _locate(name: str, args: Sequence[str], configs: Sequence[str]) -> str:
    """Return the dotted key under which the user gave `name`: on the command line, or in a config."""
    for word in args:
        option = word.split("=")[0].rstrip("+")
        if option.startswith("--") and option.endswith(f".{name}"):
            return option.removeprefix("--").replace(".init_args", "")
    for option, value in pairwise(args):
        if option.startswith("--") and value.startswith(("[", "{")):
            with suppress(yaml.YAMLError):
                key = _full_key(name, {option.removeprefix("--").rstrip("+"): yaml.safe_load(value)})
                if key != name:
                    return key
    for text in configs:
        key = _full_key(name, yaml.safe_load(text))
        if key != name:
            return key
    return name


def _full_key(name: str, config: Any) -> str:
    """Return the dotted key, as it is typed, of the first setting called `name` in a config; `name` if there is none.

    >>> _full_key("dropout", {"model": {"network": {"class_path": "CNN", "init_args": {"dropout": 2}}}})
    'model.network.dropout'
    """

    def search(section: Any, prefix: tuple[str, ...]) -> Iterator[str]:
        if isinstance(section, dict):
            for key, value in section.items():
                path = prefix if key == "init_args" else (*prefix, str(key))
                if key == name:
                    yield ".".join(path)
                yield from search(value, path)
        elif isinstance(section, list):
            for value in section:
                yield from search(value, prefix)

    return next(search(config, ()), name)


def _flat(text: str) -> str:
    return " ".join(text.split())
