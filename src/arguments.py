"""What the command line needs beyond its parser: paths gathered, checkpoints found by their names."""

import inspect
import json
import os
import pydoc
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from src.errors import Failure, UsageError

_LINKED = {
    ("data", "seed"): "it is that of the whole run; give seed_everything",
    ("model", "network", "num_classes"): "it is that of the data set, and is not given",
}


def configs_first(args: Sequence[str], commands: Collection[str]) -> list[str]:
    """Put the configs right behind the sub-command, in their order: all else that the command line says beats them.

    >>> configs_first(["fit", "--data.root", "data", "-c", "a.yaml", "--config=b.yaml"], ["fit"])
    ['fit', '--config=a.yaml', '--config=b.yaml', '--data.root', 'data']
    """
    where = next((i + 1 for i, word in enumerate(args) if word in commands), len(args))
    configs, others, words = [], [], list(args[where:])
    while words:
        word = words.pop(0)
        if word in ("--config", "-c") and words and not words[0].startswith("--"):
            configs.append(f"--config={words.pop(0)}")
        elif found := re.match(r"(?:--config=|-c=?)(.+)", word, re.DOTALL):
            configs.append(f"--config={found[1]}")
        else:
            others.append(word)
    return [*args[:where], *configs, *others]


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
        text = first or next(iter(words), "")
        if name != option or (text.startswith("[") and not os.path.exists(text)):  # noqa: PTH110 # a list already
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


def read_pipes(args: Sequence[str]) -> list[str]:
    """Return a command line with the texts of configs that can be read only once, as from a pipe, for their names."""
    words: list[str | None] = list(args)
    for i, word in enumerate(args):
        place = i + 1 if word in ("--config", "-c") and i + 1 < len(args) else i
        name = args[place] if place > i else word.partition("=")[2] if word.startswith("--config=") else ""
        if name and os.path.exists(name) and not Path(name).is_file() and not Path(name).is_dir():  # noqa: PTH110
            try:
                text = Path(name).read_text(encoding="utf-8")
            except OSError as error:
                raise Failure(f"config: {name} cannot be read ({error.strerror})") from error
            except UnicodeDecodeError as error:
                raise UsageError(f"config: {name} is not text in UTF-8") from error
            words[place] = None
            words[i] = f"--config={text}\n"  # in one word, as it may begin with ---
    return [word for word in words if word is not None]


def config_texts(args: Sequence[str]) -> list[str]:
    """Return the contents of the configs named on a command line, as far as they can be read.

    Raises:
        UsageError: If one is not UTF-8, or no config.
    """
    texts = []
    for i, word in enumerate(args):
        name = word.partition("=")[2] if word.startswith("--config=") else ""
        if word in ("--config", "-c") and i + 1 < len(args):
            name = args[i + 1]
        try:
            text = Path(name).read_text(encoding="utf-8") if name else None
        except UnicodeDecodeError as error:
            raise UsageError(f"config: {name} is not text in UTF-8") from error
        except (OSError, ValueError):  # said better by the parser; or it is no file, but the config itself
            text, name = (name, "the text that is given") if "\n" in name else (None, name)
        if text is None:
            continue
        try:
            config = yaml.safe_load(text)
            check_nesting(config, name)
            check_shape(config, name)
            check_keys(text, name)
            texts.append(text)
        except yaml.MarkedYAMLError as error:
            where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise UsageError(f"config: {name} is not valid YAML: {error.problem}{where}") from error
        except yaml.YAMLError as error:
            raise UsageError(f"config: {name} is not valid YAML: {error}".split("\n")[0]) from error
        except (ValueError, AttributeError, TypeError, RecursionError) as error:  # from a tag such as !!timestamp
            raise UsageError(f"config: {name} cannot be read as YAML ({error})") from error
    return texts


def check_shape(config: Any, name: str) -> None:
    """See that a config, and what it says of the Trainer and of each class, are keys and values.

    Raises:
        UsageError: If not, with the key.
    """
    if not isinstance(config, dict):
        raise UsageError(f"config: {name} has no keys; give such as trainer: {{max_epochs: 10}}")
    for key, value in config.items():
        if not isinstance(key, str):
            raise UsageError(f"config: {name}: the key {key!r} is not a text")
        if key in ("trainer", "model", "checkpoint", "guard") and not isinstance(value, dict):
            raise UsageError(f"{key}: {value!r} is not valid; expected keys and values ({name})")
        if key == "config" and value is not None:
            raise UsageError(f"config: {name} names another config, which is not read; give --config for each")
        if key == "data" and not isinstance(value, (dict, str)):
            raise UsageError(f"data: {value!r} is not valid; expected a class, or class_path and init_args ({name})")
        for dotted, found in _classes(value, key):
            if not isinstance(found["class_path"], str):
                raise UsageError(f"{dotted}.class_path: {found['class_path']!r} is not the name of a class ({name})")
            if not isinstance(found.get("init_args", {}), dict):
                raise UsageError(f"{dotted}.init_args: {found['init_args']!r} is not valid; expected keys and values")
            for other in found.keys() - {"class_path", "init_args", "dict_kwargs"}:
                raise UsageError(f"{dotted}.{other}: arguments of a class are under init_args ({name})")


def _classes(value: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield all that names a class, with its dotted key."""
    if isinstance(value, list):
        for item in value:
            yield from _classes(item, key)
    elif isinstance(value, dict):
        if "class_path" in value:
            yield key, value
        for name, item in value.items():
            yield from _classes(item, key if name == "init_args" else f"{key}.{name}")


def empty_strays(config: Any, parsed: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted keys of empty sections that the parser has made nothing of: it lets these pass.

    >>> list(empty_strays({"trainer": {}, "modle": {"network": {}}}, {"trainer": {"max_epochs": 3}}))
    ['modle']
    """
    if isinstance(config, list) and isinstance(parsed, list):
        for item, found in zip(config, parsed, strict=False):
            yield from empty_strays(item, found, key)
    if not (isinstance(config, dict) and isinstance(parsed, dict)):
        return
    classes = [str(section["class_path"]).rpartition(".")[2] for section in (config, parsed) if "class_path" in section]
    if len(set(classes)) > 1:  # another has taken its place
        return
    there = {"init_args": {}, "class_path": "", "dict_kwargs": None, **(parsed.get("init_args") or {}), **parsed}
    for path, below in config.items():
        name, _, rest = (path, "", "") if path in there else str(path).partition(".")
        value = {rest: below} if rest else below
        dotted = key if name == "init_args" else f"{key}.{name}".lstrip(".")
        if name in there:
            yield from empty_strays(value, there[name], dotted)
        elif _is_empty(value):
            yield dotted


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_empty, value.values()))


def check_keys(text: str, name: str) -> None:
    """See that no key of a YAML text is given twice: the first would be forgotten.

    Raises:
        UsageError: If one is.
    """
    todo = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                todo.append(value)
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and key.value in lines:
                    raise UsageError(f"config: {name}: {key.value} is given twice, in lines {lines[key.value]}, {line}")
                lines[key.value if isinstance(key, yaml.ScalarNode) else ""] = line


def check_nesting(value: Any, name: str, deepest: int = 30, most: int = 100_000) -> None:
    """See that a config has an end: by its anchors YAML can say endless things in a few bytes.

    Raises:
        UsageError: If it is nested deeper than `deepest`, or holds more than `most` values.
    """
    level, count = [value], 0
    for _ in range(deepest):
        count += sum(len(_items(v)) for v in level)
        if count > most:  # before they are gathered: a list may be named as often as it is long
            break
        level = [item for v in level for item in _items(v)]
        if not level:
            return
    raise UsageError(f"config: {name} is nested too deeply, or refers to itself")


def refuse_linked(options: Iterable[str], configs: Iterable[str]) -> None:
    """Refuse arguments that are taken from elsewhere: the parser would let what is given for them go by.

    Args:
        options: Those of the command line.
        configs: The texts of the configs that were given.

    Raises:
        UsageError: If there is one, with what to give instead.
    """
    for (section, *path, name), instead in _LINKED.items():
        key = ".".join([section, *path, name])
        given = not {f"--{key}", f"--{'.'.join([section, *path, 'init_args', name])}"}.isdisjoint(options)
        for text in configs:
            value = yaml.safe_load(text)
            for part in (section, *path, "init_args"):
                value = value.get(part) if isinstance(value, dict) else None
            given = given or (isinstance(value, dict) and name in value)
        if given:
            raise UsageError(f"{key}: {instead}")


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


def _items(value: Any) -> Collection[Any]:
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
        if (Path(name) / "checkpoints").is_dir():
            best = Path(name) / "checkpoints" / "best.ckpt"
            raise Failure(f"ckpt_path: {name} is the folder of a run; give a file, such as {best}")
        if not Path(name).is_file():
            raise Failure(f"ckpt_path: there is no file {name}; give a checkpoint, or best, or last")
        return Path(name)
    found = list(runs.glob(f"*/checkpoints/{name}.ckpt"))
    if not found:
        raise Failure(f"ckpt_path: no run in {runs} has a {name}.ckpt yet; run fit first, or give a file")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def newer_run(checkpoint: Path, runs: Path) -> Path | None:
    """Return the newest run in a folder, if it began after a checkpoint was written and has none of that name."""
    begun = {path.parent: path.stat().st_mtime_ns for path in runs.glob("*/config.yaml")}
    newest = max(begun, key=lambda run: begun[run], default=None)
    if newest is None or begun[newest] <= checkpoint.stat().st_mtime_ns:
        return None
    return None if (newest / "checkpoints" / checkpoint.name).is_file() else newest


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to; for one on its own, the folder it is in."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def run_config(run: Path) -> dict[str, Any]:
    """Return the config of a run."""
    path = run / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        check_nesting(config, str(path))
    except OSError as error:
        raise Failure(f"live: {run} is not the folder of a run: it has no config.yaml") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise Failure(f"{path} cannot be read: it is not valid YAML") from error
    sections = [config.get(key, {}) for key in ("model", "data", "trainer")] if isinstance(config, dict) else [None]
    if not all(isinstance(section, dict) for section in sections):
        raise Failure(f"{path} is not the config of a run")
    return dict(config)
