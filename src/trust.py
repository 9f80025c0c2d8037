"""What a checkpoint may ask for: it comes from anywhere, and nothing that it names is imported unless it is trusted.

Trusted are classes of this project, torch's optimizers, Lightning's, and those that the user names as well.
"""

import importlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser

from src.arguments import check_nesting
from src.errors import Failure, UsageError

TRUSTED = ("src.", "torch.optim.", "lightning.pytorch.")
"""Classes that a checkpoint may name by itself; others must be named by the user, in a config or as an argument."""

_CONTAINERS = {dict, OrderedDict, list, tuple}
_PATH_KEYS = {"weights", "root", "default_root_dir", "images", "ckpt_path"}
_PLAIN = {str, int, float, bool, type(None), Path}
_CLASS_KEYS = {
    *("model", "data", "trainer", "network", "optimizer", "lr_scheduler", "selection", "augment", "mix"),
    *("callbacks", "logger", "plugins", "strategy", "profiler", "accelerator", "checkpoint"),
}


def stored_config(
    path: Path, checkpoint: dict[str, Any], named_by_user: str, sections: dict[str, type]
) -> dict[str, Any]:
    """Return the config that a checkpoint carries.

    Args:
        path: The file, for errors.
        checkpoint: What `read` returned of it.
        named_by_user: Text of the user's own configs and command line: classes named there are trusted.
        sections: The classes whose arguments are sections of a config, such as that of ``model``.

    Raises:
        Failure: If there is no config, or it names a class that is not trusted.
    """
    try:
        config = yaml.safe_load(checkpoint["config"])
        if not isinstance(config, dict):
            raise TypeError("config")
        check_nesting(config, str(path))
    except (TypeError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise Failure(f"{path} is not a checkpoint of this project: it carries no config") from error
    refuse_strangers(path, config, named_by_user, sections)
    for key in ("model", "data", "trainer"):
        if not isinstance(config.get(key, {}), dict):
            raise Failure(f"{path} is not a checkpoint of this project: its config has no section {key}")
    return config


def refuse_strangers(path: Path, config: dict[str, Any], named_by_user: str, sections: dict[str, type]) -> None:
    """Refuse a config that the user has not written if it names what is not trusted; see `stored_config`.

    Raises:
        Failure: If it does.
    """
    words = set(re.findall(r"[\w.]+", named_by_user))
    for key, value in leaves(config):
        named = isinstance(value, str) and (value in words or ("/" in value and value in named_by_user))
        if not named and (reason := _distrust(key, value)) and not _is_plain(config, key, value, sections):
            raise Failure(
                f"{path} asks for {value} as {key.replace('/', '.')}, {reason}; "
                f"if you trust it, name it in a --config of your own"
            )


def refuse_elsewhere(path: Path, config: dict[str, Any], named_by_user: str, inside: Sequence[Path]) -> None:
    """Refuse a checkpoint's config by which a fit would write where the user has not said that it may.

    Args:
        path: The checkpoint.
        config: What it carries.
        named_by_user: Text of the user's own configs and command line: what is named there may be written to.
        inside: Folders that may be written to.

    Raises:
        Failure: If it would.
    """
    for key, value in elsewhere(config, inside):
        # As a whole: who names /home/me/data has not named /home/me.
        if not re.search(rf"(?<![\w/.-]){re.escape(value)}(?![\w/.-])", named_by_user):
            raise Failure(
                f"{path} would have the fit write to {value}, by {key.replace('/init_args', '').replace('/', '.')}; "
                f"if you trust it, name that in a --config of your own"
            )


def elsewhere(config: dict[str, Any], inside: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield the texts of a Trainer's config, by their keys, that lead out of some folders, whatever they are for."""
    for key, value in leaves(config.get("trainer", {}), "trainer"):
        if not isinstance(value, (str, Path)):
            continue
        there = Path(os.path.expandvars(os.path.expanduser(value)))  # noqa: PTH111 # which takes unknown users
        if not there.is_absolute() and ".." not in there.parts:
            continue
        found = Path(os.path.realpath(str(there).replace("\0", "")))
        if not any(found.is_relative_to(os.path.realpath(folder)) for folder in inside):
            yield key, str(value)


def _distrust(key: str, value: Any) -> str | None:
    """Return why a value in the config of a checkpoint could run code of a stranger; none if it cannot.

    The parser imports what is named where a class or a function is due, and reads a file that is named instead of it.
    """
    if not re.fullmatch(r"\w+(/\w+)*", key) or key.split("/")[0].isdigit():
        return "a key that no config of this project has"
    name = next(part for part in reversed(key.split("/")) if not part.isdigit())
    if not isinstance(value, str | int | float | bool | None):
        return "which is not a plain value"
    if not isinstance(value, str) or name in _PATH_KEYS:
        return None
    if name == "class_path" or re.fullmatch(r"\s*[^\W\d]\w*(\.\w+)+\s*", value):
        return None if name == "class_path" and _own_class(value) else "which is not a class of this project"
    if "://" in value or (name in _CLASS_KEYS and not re.fullmatch(r"[\w-]*", value)):
        return "which is not a class of this project, but the place of one"
    with suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        if isinstance(yaml.safe_load(value), (dict, list)):
            return "which is a config inside a text"
        if Path(value).is_file():
            return "which is a file where none is due"
    return None


def _is_plain(config: dict[str, Any], key: str, value: Any, sections: dict[str, type]) -> bool:
    """Return whether a text is of an argument of a trusted class that is a text, a path or one of some words.

    The parser takes it as it is there, whatever it reads like, and imports and opens nothing.
    """
    *parts, name = key.split("/")
    if not isinstance(value, str) or not parts or "://" in value:
        return False
    owner = sections.get(parts[0]) if len(parts) == 1 else None
    if parts[-1] == "init_args":
        found: Any = config
        with suppress(KeyError, IndexError, TypeError, ValueError):
            for part in parts[:-1]:
                found = found[int(part) if isinstance(found, (list, tuple)) else part]
            owner = _own_class(found["class_path"])
    hint = None if owner is None else _hints(owner).get(name)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if not all(kind in _PLAIN or get_origin(kind) is Literal for kind in kinds):
        return False
    with suppress(ValueError, UsageError, RecursionError):
        with suppress(yaml.YAMLError):  # the parser tries to read it as YAML, and what it has read, it may print
            check_nesting(yaml.safe_load(value), key)
        return value in words or str in kinds or Path in kinds
    return False


@cache
def _hints(owner: type) -> dict[str, Any]:
    """Return what the parser sees the arguments of a class annotated with, by their names."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_class_arguments(owner, fail_untyped=False)
    except ValueError:  # it has arguments that the parser does not know what to do with
        return {}
    return {action.dest: getattr(action, "_typehint", None) for action in parser._actions}


def _own_class(name: Any) -> type | None:
    """Return the class that an import path leads to, if it was defined in a trusted package."""
    if not isinstance(name, str) or not name.startswith(TRUSTED):
        return None
    module, parts = name.split(".")[0], name.split(".")[1:]
    found: Any = importlib.import_module(module)
    for part in parts:
        module = f"{module}.{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(module)
            except ImportError:
                return None
        found = getattr(found, part)
    return found if isinstance(found, type) and f"{found.__module__}.".startswith(TRUSTED) else None


def class_paths(config: Any, key: str = "") -> Iterator[str]:
    """Yield every class that a config names, by ``class_path`` or, where a class is due, by its bare import path."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from class_paths(value, name)
    elif isinstance(config, list):
        for value in config:
            yield from class_paths(value, key)
    elif key in ("class_path", "_class_path", "_instantiator") or (
        key in _CLASS_KEYS and isinstance(config, str) and "." in config
    ):
        yield str(config)


def check_content(path: Path, checkpoint: Any) -> None:
    """Refuse what is not of this project, and what Lightning would import a class for."""
    version = "pytorch-lightning_version"
    if isinstance(checkpoint, dict) and "asked" in checkpoint and "config" not in checkpoint:
        raise Failure(f"{path} has weights alone, as of save_weights_only, and no config that says what they are of")
    parts = {"state_dict": dict, "config": str, "loops": dict, "epoch": int, "global_step": int, version: str}
    if (
        not isinstance(checkpoint, dict)
        or not all(isinstance(checkpoint.get(k), t) for k, t in parts.items())
        or not re.fullmatch(r"2(\.\d{1,4}){1,3}[\w.+]{0,40}", checkpoint[version])
    ):
        raise Failure(f"{path} is not a checkpoint of this project: it carries no config, weights and step")
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        stored = checkpoint.get(key, {})
        if not isinstance(stored, dict):
            raise Failure(f"{path} is not a checkpoint of this project: its {key} are none")
        for name in (stored[k] for k in ("_class_path", "_instantiator") if k in stored):
            if not isinstance(name, str):
                raise Failure(f"{path} is not a checkpoint of this project: a class in its {key} has no name")
            if not name.startswith(TRUSTED):
                raise Failure(f"{path} asks for {name}, which is not of this project; nothing in it was run")


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in nested dicts and lists, by its path: ``model/optimizer/class_path``."""
    if type(value) not in _CONTAINERS:
        yield key, value
        return
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        if type(name) not in (str, int, float, bool, type(None)):
            yield f"{key}/{name}", name
        yield from leaves(item, f"{key}/{name}" if key else str(name))
