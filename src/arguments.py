"""What the command line needs beyond its parser: checkpoints found by name, and the configs they carry."""

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from src.errors import Failure, UsageError

TRUSTED = ("src.", "torch.optim.", "lightning.pytorch.")
"""Classes that a checkpoint's own config may name; others must be named by the user, in a config or as an argument."""


_CLASS_KEYS = {
    *("model", "data", "trainer", "network", "optimizer", "lr_scheduler", "augment", "mix"),
    *("callbacks", "logger", "plugins", "strategy", "profiler", "accelerator", "checkpoint"),
}


def join_paths(args: Sequence[str], option: str = "--data.images") -> list[str]:
    """Gather the words behind an option, up to the next option, into the list that the parser takes.

    >>> join_paths(["predict", "--data.images", "a.png", "b.png", "--trainer.devices", "1"])
    ['predict', '--data.images=["a.png", "b.png"]', '--trainer.devices', '1']
    """
    joined, words = [], list(args)
    while words:
        word = words.pop(0)
        if word != option or (words and words[0].startswith("[")):  # a list already
            joined.append(word)
            continue
        paths = []
        while words and not words[0].startswith("--"):
            paths.append(words.pop(0))
        joined.append(f"{option}={json.dumps(paths)}")
    return joined


def config_texts(args: Sequence[str]) -> list[str]:
    """Return the contents of the configs named on a command line, as far as they can be read."""
    texts = []
    for i, word in enumerate(args):
        name = word.partition("=")[2] if word.startswith("--config=") else ""
        if word in ("--config", "-c") and i + 1 < len(args):
            name = args[i + 1]
        try:
            texts.append(Path(name).read_text(encoding="utf-8") if name else "")
            yaml.safe_load(texts[-1])
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            texts[-1:] = []
    return texts


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


def stored_config(checkpoint: Path, named_by_user: str) -> dict[str, Any]:
    """Return the config that a checkpoint carries.

    Args:
        checkpoint: The file. Nothing but plain values and tensors is unpickled.
        named_by_user: Text of the user's own configs and command line: classes named there are trusted.

    Raises:
        Failure: If the file is damaged, is not of this project, or names a class that is not trusted.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        config = yaml.safe_load(content["config"])
        if not isinstance(config, dict) or "state_dict" not in content:
            raise KeyError("config")
    except (KeyError, TypeError, IndexError, yaml.YAMLError) as error:
        raise Failure(f"{checkpoint} is not a checkpoint of this project: it carries no config") from error
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise Failure(f"{checkpoint} cannot be read as a checkpoint: it is damaged or cut short") from error
    except Exception as error:  # the unpickler's own error class is private
        raise Failure(f"{checkpoint} is not a checkpoint of plain values and tensors; nothing in it was run") from error
    words = set(re.findall(r"[\w.]+", named_by_user))
    for name in class_paths(config):
        if not name.startswith(TRUSTED) and name not in words:
            raise Failure(
                f"{checkpoint} asks for the class {name}, which is not of this project; if you trust it, "
                f"name it in a --config of your own"
            )
    return config


def class_paths(config: Any, key: str = "") -> Iterator[str]:
    """Yield every class that a config names, by ``class_path`` or, where a class is due, by its bare import path."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from class_paths(value, name)
    elif isinstance(config, list):
        for value in config:
            yield from class_paths(value, key)
    elif key == "class_path" or (key in _CLASS_KEYS and isinstance(config, str) and "." in config):
        yield str(config)
