"""What the command line needs beyond its parser: paths gathered, checkpoints found by their names."""

import inspect
import json
import pydoc
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from src.errors import Failure, UsageError


def join_paths(args: Sequence[str], option: str = "--data.images") -> list[str]:
    """Gather the words behind an option, up to the next option, into the list that the parser takes.

    >>> join_paths(["predict", "--data.images", "a.png", "b.png", "--trainer.devices", "1"])
    ['predict', '--data.images=["a.png", "b.png"]', '--trainer.devices', '1']
    >>> join_paths(["predict", "--data.images=a.png"])
    ['predict', '--data.images=["a.png"]']
    """
    joined, words = [], list(args)
    while words:
        word = words.pop(0)
        name, _, first = word.partition("=")
        if name != option or (first or next(iter(words), "")).startswith("["):  # a list already
            joined.append(word)
            continue
        paths = [first] if first else []
        while words and not words[0].startswith("--"):
            paths.append(words.pop(0))
        joined.append(f"{option}={json.dumps(paths)}")
    return joined


def only(args: Sequence[str], options: Iterable[str]) -> list[str]:
    """Return a command line with none but the named options.

    >>> only(["fit", "--data.root", "data", "--ckpt_path", "last"], ["--ckpt_path"])
    ['fit', '--ckpt_path', 'last']
    """
    kept, keep = [], True
    for word in args:
        if word.startswith("-"):
            keep = word.partition("=")[0] in options
        if keep:
            kept.append(word)
    return kept


def config_texts(args: Sequence[str]) -> list[str]:
    """Return the contents of the configs named on a command line, as far as they can be read.

    Raises:
        UsageError: If one is not UTF-8, or of a kind of YAML that is no config.
    """
    texts = []
    for i, word in enumerate(args):
        name = word.partition("=")[2] if word.startswith("--config=") else ""
        if word in ("--config", "-c") and i + 1 < len(args):
            name = args[i + 1]
        try:
            texts.append(Path(name).read_text(encoding="utf-8") if name else "")
            check_nesting(yaml.safe_load(texts[-1]), name)
        except UnicodeDecodeError as error:
            raise UsageError(f"config: {name} is not text in UTF-8") from error
        except (OSError, yaml.YAMLError):  # said better by the parser
            texts[-1:] = []
        except (ValueError, AttributeError, TypeError, RecursionError) as error:  # from a tag such as !!timestamp
            raise UsageError(f"config: {name} cannot be read as YAML ({error})") from error
    return texts


def check_nesting(value: Any, name: str, deepest: int = 30, most: int = 100_000) -> None:
    """See that a config has an end: by its anchors YAML can say endless things in a few bytes.

    Raises:
        UsageError: If it is nested deeper than `deepest`, or holds more than `most` values.
    """
    level, count = [value], 0
    for _ in range(deepest):
        level = [item for v in level for item in _items(v)]
        count += len(level)
        if count > most:
            break
        if not level:
            return
    raise UsageError(f"config: {name} is nested too deeply, or refers to itself")


def misplaced_nulls(config: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted keys of arguments of classes that are null and must not be: the parser lets these pass."""
    if isinstance(config, list):
        for item in config:
            yield from misplaced_nulls(item, key)
    elif isinstance(config, dict):
        for name, value in config.items():
            dotted = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            yield from misplaced_nulls(value, dotted)
        arguments = config.get("init_args") if config.get("class_path") else None
        for name in [name for name, value in (arguments or {}).items() if value is None]:
            if not _may_be_null(str(config["class_path"]), name):
                yield f"{key}.{name}"


def _may_be_null(path: str, name: str) -> bool:
    """Return whether an argument of a class, or of a class it is derived from, may be null; so if it is not known."""
    found = pydoc.locate(path)
    for base in inspect.getmro(found) if isinstance(found, type) else ():
        try:
            parameter = inspect.signature(base).parameters.get(name)
        except ValueError:  # a class written in C
            continue
        if parameter is not None:
            kinds = str(parameter.annotation)
            unknown = parameter.annotation is parameter.empty
            return parameter.default is None or unknown or "None" in kinds or "Optional" in kinds
    return True


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def find_checkpoint(name: str, runs: Path) -> Path:
    """Return the checkpoint that ``--ckpt_path`` means.

    Args:
        name: A file, or ``best`` or ``last``: the newest run in `runs` that has one.
        runs: The folder of the runs.

    Raises:
        UsageError: If it is a URL.
        Failure: If there is none.
    """
    if "://" in name:
        raise UsageError(f"ckpt_path: {name} is a URL; download it first: checkpoints are read from files alone")
    if name not in ("best", "last"):
        if not Path(name).is_file():
            raise Failure(f"ckpt_path: there is no file {name}; give a checkpoint, or best, or last")
        return Path(name)
    found = list(runs.glob(f"*/checkpoints/{name}.ckpt"))
    if not found:
        raise Failure(f"ckpt_path: no run in {runs} has a {name}.ckpt yet; run fit first, or give a file")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to; for one on its own, the folder it is in."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
