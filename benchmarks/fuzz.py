"""Fuzzing of all that is read from outside: configs, checkpoints, CIFAR-10 files and images.

    python -m benchmarks.fuzz
    python -m benchmarks.fuzz --only config --case 123

A case is a function of (seed, kind, number): a valid input, mutated, and given to `src.cli.main` in a worker process.
A finding is a traceback, an exit status other than 0 to 2, anything but one ``error:`` line where that is not 0, a
hang, a crash, code of the input's that ran, a half-written file, or a run's folder that a refused input left behind.
"""

import argparse
import contextlib
import copy
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import socket
import struct
import sys
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from PIL import Image

from src.checkpoint_io import FORMAT
from src.classifier import ImageClassifier
from src.cli import main
from src.data import CIFAR10, Shapes10
from src.data.cifar10 import parse_batch
from src.errors import Failure
from src.networks import CNN

COUNTS = {"config": 2000, "checkpoint": 2000, "data": 1000, "image": 100}
TIMEOUT = 60.0
"""Seconds that a case may take; a valid one takes one or two."""
MEMORY = 12 << 30
"""Bytes of address space of a worker: what asks for more is refused by the system, and not at others' expense."""

CONFIG: dict[str, Any] = {
    "seed_everything": 1,
    "trainer": {
        "accelerator": "cpu",
        "precision": "32-true",
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.EarlyStopping",
                "init_args": {"monitor": "train/loss", "patience": 3},
            }
        ],
    },
    "checkpoint": {"monitor": "val/acc", "mode": "max", "every_n_steps": 1, "every_n_minutes": 5.0},
    "guard": {"on_nonfinite": "stop", "lr_factor": 0.5},
    "model": {
        "network": {
            "class_path": "src.networks.CNN",
            "init_args": {"norm": "batch", "dropout": 0.1, "conv": "separable", "weights": None},
        },
        "optimizer": {
            "class_path": "torch.optim.SGD",
            "init_args": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0005},
        },
        "lr_scheduler": {
            "class_path": "src.optim.OneCycle",
            "init_args": {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4, "anneal_strategy": "cos"},
        },
        "label_smoothing": 0.1,
        "freeze_backbone": 0,
        "backbone_lr": None,
        "channels_last": True,
        "selection": {
            "class_path": "src.selection.Selection",
            "init_args": {"network": {"class_path": "src.networks.CNN"}, "share": 0.5, "every": 4},
        },
    },
    "data": {
        "class_path": "src.data.Shapes10",
        "init_args": {
            "train_images": 60,
            "test_images": 20,
            "val_size": 20,
            "batch_size": 20,
            "eval_batch_size": 20,
            "train_fraction": 1.0,
            "split_seed": 0,
            "augment": [
                {"class_path": "src.data.RandomFlip", "init_args": {"mode": "random"}},
                {"class_path": "src.data.RandomCrop", "init_args": {"padding": 4}},
            ],
            "mix": {"class_path": "src.data.MixUp", "init_args": {"alpha": 0.2}},
        },
    },
}
SHORT = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"]

EVIL = """
import pathlib
here = pathlib.Path(__file__).parent
here.joinpath("imported").touch()
def call(*args, **kwargs):
    here.joinpath("called").touch()
    return 1.0
class Evil:
    def __init__(self, *args, **kwargs):
        call()
"""
"""Lies in the working directory, from where Python imports, and leaves a marker when it is imported or called."""

IMPORTS = [
    *("evil_module.Evil", "evil_module.call", "evil_module", "os.system", "os._exit", "builtins.exec", "sys.exit"),
    *("src.cli.os._exit", "src.cli.main", "src.cli.CLI", "src.data.CIFAR10", "src.data.ImageData", "src.networks"),
    *("torch.nn.Linear", "torch.optim.AdamW", "torch.optim.LBFGS", "torch.optim.SparseAdam", "torch.optim.Optimizer"),
    *("torch.optim.lr_scheduler.StepLR", "torch.optim.lr_scheduler.ReduceLROnPlateau", "src.optim.OneCycle"),
    *("lightning.pytorch.callbacks.ModelCheckpoint", "lightning.pytorch.loggers.CSVLogger", "src.networks.ResNet"),
    *("lightning.pytorch.Trainer", "no.such.Thing", "src.networks.CNNN", "CNN", "pathlib.Path", "time.sleep"),
    *("src.", ".", "a..b", "src..networks", "torch", "torch.optim.swa_utils.SWALR", "src.networks.cnn.Path"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 1.5, -0.0, 0.1, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(math.inf, -math.inf, math.nan, 1e308, -1e308, 1e-320),
    *("", " ", "null", "nan", "1e3", "0x10", "ünïcødé ☃", "\u202eabc", "a\0b", "\n", "x" * 5000, "../x", "{}", "["),
    *("${oc.env:HOME}", "--help", "max", "cpu", "bf16-mixed", "simple", "best", "no/such/file", ".", "évil.yaml"),
    *([], [[]], [None], [1, "a"], ["evil_module.Evil"], {}, {"a": 1}, {"": None}, {1: 2}, {"class_path": 3}),
    *({"class_path": None}, {"init_args": {}}, {"class_path": "CNN", "init_args": 3}, {"class_path": "CNN", "x": 1}),
]
TENSORS: list[Callable[[], torch.Tensor]] = [
    *(lambda: torch.empty(0), lambda: torch.tensor(math.nan), lambda: torch.zeros(3, 3), lambda: torch.tensor(1)),
    *(lambda: torch.full((10, 512), math.inf), lambda: torch.zeros(2, dtype=torch.complex64)),
    *(lambda: torch.zeros(1).expand(2**20, 2**20), lambda: torch.zeros(5).to_sparse(), lambda: torch.ones(4).bool()),
]


class Case(NamedTuple):
    """A mutated input: the command that reads it, what was done to it in words, and how many images it has."""

    args: list[str]
    note: str
    images: int = 0


class Result(NamedTuple):
    """What came of a case: how it ended, what it said, and what is wrong with that, if anything."""

    kind: str
    number: int
    outcome: str
    note: str = ""
    finding: str = ""
    detail: str = ""
    seconds: float = 0.0


# --- Mutations -----------------------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Flip, cut, insert, repeat or overwrite bytes, at one place or several; more often near the two ends."""
    data, notes = bytearray(content), []
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        size = len(data)
        near = rng.choice((rng.randrange(size + 1), rng.randrange(200), size - rng.randrange(400)))
        at = max(0, min(size, near))
        length = rng.choice((1, 1, 2, 4, 16, 1000))
        how = rng.choice(("flip", "flip", "flip", "cut", "insert", "repeat", "zero", "ones", "end"))
        if how == "flip" and at < size:
            data[at] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del data[at : at + length]
        elif how == "insert":
            data[at:at] = rng.randbytes(length)
        elif how == "repeat":
            data[at:at] = data[at : at + length]
        elif how in ("zero", "ones"):
            data[at : at + length] = (b"\0" if how == "zero" else b"\xff") * len(data[at : at + length])
        elif how == "end" and rng.random() < 0.2:
            del data[at:]
        notes.append(f"{how} {length}@{at}")
    return bytes(data), ", ".join(notes[:5])


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield container and key of every value in nested dicts and lists."""
    pairs = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    for key, value in pairs:
        yield tree, key
        yield from places(value)


def misspell(rng: random.Random, word: str) -> str:
    """Return a word with a letter dropped, doubled, swapped or changed."""
    i = rng.randrange(max(1, len(word)))
    head, letter, tail = word[:i], word[i : i + 1], word[i + 1 :]
    return rng.choice((head + tail, head + 2 * letter + tail, head + "é" + tail, word.upper(), word + " ",
                       f"{word}.{word}", word + "+"))  # fmt: skip


def mutate_tree(rng: random.Random, tree: dict[Any, Any], values: list[Any]) -> str:
    """Change one place of nested dicts and lists; return what was done."""
    if not tree:
        tree["x"] = None
    container, key = rng.choice(list(places(tree)))
    if rng.random() < 0.7:  # of the same kind as before: it gets further in
        kinds = (int, float) if isinstance(container[key], (int, float)) else (type(container[key]),)
        values = [v for v in values if isinstance(v, kinds)] or values
    value = copy.deepcopy(rng.choice(values))
    how = rng.choice(("replace",) * 6 + ("delete", "rename", "add", "trainer", "move", "wrap"))
    if how == "delete":
        del container[key]
        return f"delete {key!r}"
    if how == "rename" and isinstance(container, dict) and isinstance(key, str):
        name = misspell(rng, key)
        container[name] = container.pop(key)
        return f"rename {key!r} to {name!r}"
    if how == "add" and isinstance(container, dict):
        key = rng.choice(KEYS)
    elif how == "trainer" and isinstance(tree.get("trainer"), dict):
        container, key = tree["trainer"], rng.choice(TRAINER)
    elif how == "move":
        other, source = rng.choice(list(places(tree)))
        value = copy.deepcopy(other[source])
    elif how == "wrap":
        value = rng.choice(([container[key]], {"class_path": container[key]}, {key: container[key]}))
    container[key] = value
    return f"{how} {str(key)[:60]!r}: {tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)[:80]}"


def parameters(*owners: Any) -> list[str]:
    """Return the names of what constructors take."""
    names = {name for owner in owners for name in inspect.signature(owner.__init__).parameters}
    return sorted(names - {"self", "kwargs"})


TRAINER = parameters(pl.Trainer)
KEYS = [*TRAINER, *parameters(Shapes10, CNN, CIFAR10, torch.optim.SGD, ImageClassifier), "class_path", "init_args",
        "dict_kwargs", "config", "nonsense", "ckpt_path", "a.b", "model"]  # fmt: skip


def nest(rng: random.Random) -> str:
    """Return YAML that is nested deeply, or that refers to itself."""
    depth = rng.choice((5, 50, 400, 3000))
    return rng.choice((
        "[" * depth + "]" * depth,
        "{a: " * depth + "1" + "}" * depth,
        "&a [*a]",
        "&a {b: *a}",
        "[&a [1, 1, 1], &b [*a, *a, *a], &c [*b, *b, *b], &d [*c, *c, *c], &e [*d, *d, *d], [*e, *e, *e]]",
        "!!python/object/apply:evil_module.call []",
        "!!python/name:evil_module.call",
        "!!binary aGFsbG8=", "!!set {a, b}", "2001-12-14", "0o17", "1_000", "!!timestamp x", "? [a]\n: b", "!x y",
    ))  # fmt: skip


def make_config(rng: random.Random, folder: Path) -> Case:
    """A config with other values, keys and classes, or with damaged text; or one spoilt on the command line."""
    pool = VALUES + [{"class_path": name} for name in IMPORTS] + IMPORTS
    text, option = yaml.safe_dump(CONFIG, sort_keys=False), list[str]()
    content, style = text.encode(), rng.random()
    if style < 0.6:
        tree = copy.deepcopy(CONFIG)
        note = "; ".join(mutate_tree(rng, tree, pool) for _ in range(rng.choice((1, 1, 1, 2, 3))))
        content = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()
    elif style < 0.7:
        lines = text.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = lines[i].split(":")[0] + ": " + nest(rng)
        content, note = "\n".join(lines).encode(), f"line {i}: {lines[i][:60]}"
    elif style < 0.8:
        content, note = mutate_bytes(rng, content)
    elif style < 0.83:
        whole = [b"", b"# nothing", b"3", b"[]", b"null", b"text", b"\xef\xbb\xbf" + content, text.encode("utf-16")]
        whole += [content.replace(b"\n", b"\r\n"), b"---\n" + content + b"---\n" + content, rng.randbytes(500)]
        content = rng.choice(whole)
        note = f"whole file: {content[:20]!r}"
    else:
        key, value = rng.choice(list(dotted_keys(CONFIG))), rng.choice(pool)
        word = value if isinstance(value, str) else json.dumps(value)
        option = [f"--{misspell(rng, key) if rng.random() < 0.2 else key}={word.replace(chr(0), '')}"]
        note = option[0][:100]
    (folder / "fuzzed.yaml").write_bytes(content)
    return Case(["fit", "--config", "fuzzed.yaml", *option, *SHORT], note)


def dotted_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a config as the command line takes them."""
    for key, value in tree.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        if key not in ("class_path", "init_args"):
            yield name
        if isinstance(value, dict):
            yield from dotted_keys(value, name)


def seal(checkpoint: Any, *, manifest: bool = True) -> bytes:
    """Return a checkpoint's bytes with a manifest that is right, whatever it holds."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    content = bytearray(buffer.getbuffer())
    if manifest:
        head = f'{{"format": {FORMAT}, "epoch": 1, "step": 2, "sha256": "'
        content[-2:] = struct.pack("<H", len(head) + 64 + 2)
        content += head.encode()
        content += f'{hashlib.sha256(content).hexdigest()}"}}'.encode()
    return bytes(content)


class Gadget:
    """Pickles as a call of any function on any arguments."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the call."""
        return self.call


def gadgets(folder: Path) -> list[tuple[str, Callable[[], Any]]]:
    """Return objects whose unpickling would leave a marker, or exhaust the machine."""
    marker = str(folder / "called")
    return [
        ("open", lambda: Gadget(open, marker, "w")),
        ("system", lambda: Gadget(os.system, f"touch {marker}")),
        ("exec", lambda: Gadget(exec, f"open({marker!r}, 'w')")),
        ("exit", lambda: Gadget(os._exit, 3)),
        ("import", lambda: Gadget(__import__, "evil_module")),
        ("getattr", lambda: Gadget(getattr, "x", "upper")),
        ("module", lambda: CNN()),
        ("path", lambda: Path("x")),
        ("failure", lambda: Failure("x")),
        ("function", lambda: main),
        ("class", lambda: CNN),
        ("storage", lambda: Gadget(torch.UntypedStorage, 1 << 50)),
        ("zeros", lambda: Gadget(torch.zeros, 1 << 50)),
        ("load", lambda: Gadget(torch.load, marker)),
        ("array", lambda: np.zeros(3)),
    ]


_CALLBACK = "lightning.pytorch.callbacks.LambdaCallback"
_LAMBDA = "torch.optim.lr_scheduler.LambdaLR"
HOSTILE: list[tuple[str, Any]] = [
    ("trainer.callbacks", [{"class_path": _CALLBACK, "init_args": {"setup": "evil_module.call"}}]),
    ("trainer.callbacks", [{"class_path": f"src.cli.{_CALLBACK[10:]}", "init_args": {"setup": "evil_module.call"}}]),
    ("trainer.callbacks", {"class_path": _CALLBACK, "dict_kwargs": {"setup": "evil_module.call"}}),
    ("trainer.callbacks", ["evil_module.Evil"]),
    ("trainer.callbacks+", ["evil_module.Evil"]),
    ("trainer.callbacks+", "evil_module.Evil"),
    ("trainer.logger", {"class_path": "evil_module.Evil"}),
    ("trainer.strategy", "evil_module.Evil"),
    ("trainer.plugins", ["evil_module.Evil"]),
    ("trainer.profiler", {"class_path": "evil_module.Evil"}),
    ("model.lr_scheduler", {"class_path": _LAMBDA, "init_args": {"lr_lambda": "evil_module.call"}}),
    ("model.lr_scheduler", {"class_path": _LAMBDA, "init_args": {"lr_lambda": ["evil_module.call"]}}),
    ("model.lr_scheduler", {"class_path": _LAMBDA, "init_args": {"lr_lambda": "src.cli.os._exit"}}),
    ("model.lr_scheduler", {"class_path": _LAMBDA, "dict_kwargs": {"lr_lambda": "evil_module.call"}}),
    ("model.lr_scheduler", "evil_module.call"),
    ("model.optimizer", "evil_module.call"),
    ("model.optimizer", {"class_path": "evil_module.Evil"}),
    ("model.optimizer", {"class_path": "src.cli.os._exit"}),
    ("model.network", {"class_path": "evil_module.Evil"}),
    ("model.network", {"class_path": "src.evil_module.Evil"}),
    ("model.network", "evil_module.Evil"),
    ("model.network", "netfile"),
    ("model.network", "src.net.yaml"),
    ("model.network", "./netfile"),
    ("model.network", {"class_path": "netfile"}),
    ("model.network", "file://$CWD/netfile"),
    ("model.network", "~/netfile"),
    ("model.network", "$CWD/netfile"),
    ("trainer.callbacks", ["file://$CWD/netfile"]),
    ("data.init_args", "file://$CWD/netfile"),
    ("model.network.init_args", "netfile"),
    ("model.network.init_args.weights", "evil_module.py"),
    ("model", "netfile"),
    ("trainer", "netfile"),
    ("data", "netfile"),
    ("data.init_args.augment", "netfile"),
    ("data.init_args.augment", ["netfile"]),
    ("data.init_args.augment+", [{"class_path": "evil_module.Evil"}]),
    ("data.init_args.mix", "evil_module.Evil"),
    ("data.init_args.images", ["/dev/zero"]),
    ("config", "netfile"),
    ("trainer.default_root_dir", "a\0b"),
    ("$model.network", "evil_module.Evil"),
    ("$model.network.class_path", "evil_module.Evil"),
    ("$model.network.init_args", "netfile"),
    ("$trainer.callbacks", ["evil_module.Evil"]),
    ("$data", {"class_path": "evil_module.Evil"}),
    ("model.$network.class_path", "evil_module.Evil"),
    ("trainer.max_steps", 10**30),
    ("trainer.devices", 10**9),
]
"""What a checkpoint's config may try: by key (from ``$`` on a key that has dots in it), the value."""


def mutate_stored_config(rng: random.Random, text: str) -> tuple[Any, str]:
    """Change the config that a checkpoint carries."""
    config = yaml.safe_load(text)
    if rng.random() < 0.5:
        key, value = rng.choice(HOSTILE)
        dotted, _, whole = key.partition("$")
        section = config
        *path, last = [*(p for p in dotted.split(".") if p), *([whole] if whole else [])]
        for name in path:
            section = section.setdefault(name, {}) if isinstance(section.get(name), dict | None) else section
            if section is None:
                return text, "nothing"
        section[last] = json.loads(json.dumps(value).replace("$CWD", str(Path.cwd())))
        return yaml.safe_dump(config), f"config {key}: {str(value)[:100]}"
    if rng.random() < 0.7:
        note = mutate_tree(rng, config, VALUES + [{"class_path": name} for name in IMPORTS] + IMPORTS)
        return yaml.safe_dump(config), f"config {note}"
    if rng.random() < 0.5:
        lines = text.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = lines[i].split(":")[0] + ": " + nest(rng)
        return "\n".join(lines), f"config line {i}: {lines[i][:60]}"
    content, note = mutate_bytes(rng, text.encode())
    return content.decode(errors="replace"), f"config {note}"


def make_checkpoint(rng: random.Random, folder: Path) -> Case:
    """A checkpoint with damaged bytes, or one whose manifest is right and whose content is not."""
    original = BASE.read_bytes()
    style = rng.random()
    if style < 0.45:
        content, note = mutate_bytes(rng, original)
    else:
        checkpoint = torch.load(BASE, weights_only=True)
        if style < 0.62:
            checkpoint["config"], note = mutate_stored_config(rng, checkpoint["config"])
        elif style < 0.72:
            name, make = rng.choice(gadgets(folder))
            container, key = rng.choice(list(places(checkpoint)))
            container[key] = make()
            note = f"gadget {name} at {key!r}"
        elif style < 0.75:
            weights = checkpoint["state_dict"]
            checkpoint = rng.choice(
                [{}, [], None, 3, "x", {"state_dict": weights}, [[[]]] * 3, torch.zeros(3), weights]
            )
            note = f"other content: {type(checkpoint).__name__}"
        else:
            # Each part as often as another, however many leaves it has.
            part = rng.choice([None, *checkpoint])
            section = checkpoint[part] if isinstance(checkpoint.get(part), dict) and checkpoint[part] else checkpoint
            section = {"x": section} if isinstance(section, list) else section
            pool = VALUES + [make() for make in TENSORS] * 2
            note = f"{part}: {mutate_tree(rng, section, pool)}"
        content = seal(checkpoint)
    (folder / "fuzzed.ckpt").write_bytes(content)
    (folder / "netfile").write_text("class_path: evil_module.Evil\n")
    (folder / "src.net.yaml").write_text("class_path: evil_module.Evil\n")
    fit, predict = ["fit", "--trainer.max_epochs", "2"], ["predict", "--data.images", str(IMAGE)]
    command = rng.choice((fit, fit, ["validate"], ["test"], predict))
    return Case([command[0], "--ckpt_path", "fuzzed.ckpt", *command[1:]], note)


class Python2(pickle._Pickler):
    """Pickles bytes as Python 2 did its strings: the official files are like that."""

    dispatch: ClassVar[dict[type, Any]] = {**pickle._Pickler.dispatch}

    def save_bytes(self: Any, value: bytes) -> None:
        """Write a string of Python 2."""
        head = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        self.write(head + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def dumps(value: Any, protocol: int) -> bytes:
    """Pickle; protocol 2 as Python 2 did."""
    buffer = io.BytesIO()
    (Python2 if protocol == 2 else pickle.Pickler)(buffer, protocol).dump(value)
    return buffer.getvalue()


def batch_pickle(rng: random.Random, folder: Path) -> tuple[bytes, str]:
    """Return a small CIFAR-10 batch, its pickle or its content mutated."""
    count = 5
    pixels = np.frombuffer(rng.randbytes(count * 3072), np.uint8).reshape(count, 3072)
    batch: Any = {b"batch_label": b"fuzz", b"labels": [rng.randrange(10) for _ in range(count)], b"data": pixels.copy(),
                  b"filenames": [b"a.png"] * count}  # fmt: skip
    protocol = rng.choice((0, 2, 2, 2, 2, 4, 5))
    if rng.random() < 0.55:
        return mutate_bytes(rng, dumps(batch, protocol))
    arrays: list[tuple[str, Callable[[], Any]]] = [
        ("float", lambda: pixels.astype(np.float32)),
        ("object", lambda: np.array([object] * 3072 * count, dtype=object).reshape(count, 3072)),
        ("shape", lambda: pixels[:, :3071].copy()),
        ("flat", lambda: pixels.ravel().copy()),
        ("empty", lambda: pixels[:0].copy()),
        ("record", lambda: np.zeros(count, dtype=[("a", "u1"), ("b", "O")])),
        ("dates", lambda: np.zeros((count, 3072), dtype="M8[s]")),
        ("text", lambda: np.zeros((count, 3072), dtype="U3")),
        ("fortran", lambda: np.asfortranarray(pixels)),
        ("0-d", lambda: np.array(3, dtype=np.uint8)),
        ("scalar", lambda: np.uint8(3)),
        ("huge", lambda: Gadget(np.empty(0).__reduce__()[0], np.ndarray, (1 << 40,), b"u1")),  # type: ignore[arg-type]
        ("many dims", lambda: np.zeros([1] * 32, np.uint8)),
        *gadgets(folder),
    ]
    labels: list[Any] = [
        *(
            None,
            [],
            [10] * count,
            [-1] * count,
            [2**70] * count,
            [1.5] * count,
            ["a"] * count,
            [[1]] * count,
            3,
            [None],
        ),
        *([True] * count, {0: 1}, np.arange(count), [math.nan] * count, [1] * (count + 1), b"abcde", np.eye(count)),
    ]
    how = rng.choice(("data", "data", "labels", "labels", "key", "whole"))
    if how == "data":
        name, make = rng.choice(arrays)
        batch[b"data"], note = make(), f"data: {name}"
    elif how == "labels":
        value = rng.choice(labels)
        batch[b"labels"], note = value, f"labels: {value!r}"
    elif how == "key":
        note = repr(key := rng.choice(list(batch)))
        del batch[key]
    else:
        batch = rng.choice([None, 3, [], {}, b"x", {"data": pixels, "labels": []}, pixels.copy(), [batch]])
        note = f"whole: {type(batch).__name__}"
    content = dumps(batch, protocol)
    if rng.random() < 0.2:
        content, more = mutate_bytes(rng, content)
        note += f", {more}"
    return content, note


def make_data(rng: random.Random, folder: Path) -> Case:
    """A CIFAR-10 batch that nothing vouches for, parsed directly; or a folder or an archive of them with other MD5s."""
    content, note = batch_pickle(rng, folder)
    if rng.random() < 0.85:
        (folder / "batch").write_bytes(content)
        return Case([], note)
    if rng.random() < 0.5:
        (folder / "cifar-10-batches-py").mkdir()
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            if rng.random() < 0.95:
                (folder / "cifar-10-batches-py" / name).write_bytes(content)
    else:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for i in range(1, 6):
                name = rng.choice(("cifar-10-batches-py/",) * 8 + ("../../", "/"))
                info = tarfile.TarInfo(f"{name}data_batch_{i}")
                info.size = len(content)
                info.type = rng.choice((tarfile.REGTYPE,) * 5 + (tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE))
                tar.addfile(info, io.BytesIO(content))
        archive = buffer.getvalue()
        if rng.random() < 0.7:
            archive, more = mutate_bytes(rng, archive)
            note = f"archive: {more}"
        (folder / "cifar-10-python.tar.gz").write_bytes(archive)
    data = ["--data=CIFAR10", "--data.root=.", "--data.download=false"]
    return Case(["fit", *data, *SHORT], f"by the command line; {note}")


FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")


IMAGES = 5
"""Image files in a case: they are read one by one, and a run takes a second however few there are."""


def make_images(rng: random.Random, folder: Path) -> Case:
    """Image files with damaged bytes."""
    made = [make_image(rng, folder / str(number)) for number in range(IMAGES)]
    names = [path.name for path, _ in made]
    return Case(["predict", "--ckpt_path", "base.ckpt", "--data.images", *names], "; ".join(n for _, n in made), IMAGES)


def make_image(rng: random.Random, stem: Path) -> tuple[Path, str]:
    """Write an image file with damaged bytes; return it, and what was done."""
    name = rng.choice(FORMATS)
    modes = {
        "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
        "JPEG": ("RGB", "L", "CMYK"),
        "GIF": ("P", "L", "RGB"),
        "WEBP": ("RGB", "RGBA"),
        "TIFF": ("RGB", "L", "I;16", "F", "CMYK", "1"),
        "BMP": ("RGB", "L", "P", "1"),
    }
    mode = rng.choice(modes[name])
    width, height = rng.randint(1, 70), rng.randint(1, 70)
    bands = {"RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4}.get(mode, 1)
    if mode in ("I;16", "F", "1"):
        values = np.frombuffer(rng.randbytes(width * height), np.uint8).reshape(height, width)
        image = Image.fromarray(values.astype(np.float32))
        image = image.convert(mode) if mode != "I;16" else image.convert("I").convert("I;16")
    else:
        image = Image.frombytes(mode, (width, height), rng.randbytes(width * height * bands))
    options: dict[str, Any] = {}
    if name in ("GIF", "WEBP", "TIFF") and rng.random() < 0.3 and mode in ("RGB", "L", "P"):
        options = {"save_all": True, "append_images": [image.copy(), image.copy()]}
    if name == "TIFF" and mode in ("RGB", "L"):
        options["compression"] = rng.choice((None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg"))
    if name in ("JPEG", "PNG", "WEBP", "TIFF") and rng.random() < 0.4:
        exif = Image.Exif()
        exif[0x0112] = rng.randrange(9)
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    content, note = mutate_bytes(rng, buffer.getvalue())
    path = stem.with_suffix(f".{rng.choice((name.lower(), 'png', 'jpg', 'xyz'))}")
    path.write_bytes(content)
    return path, f"{name} {mode}: {note}"


MAKERS = {"config": make_config, "checkpoint": make_checkpoint, "data": make_data, "image": make_images}
BASE = IMAGE = Path()
"""A checkpoint of `CONFIG` and an image, made once by a worker."""


# --- Running a case ------------------------------------------------------------------------------------------------


class MoreProcesses(BaseException):
    """A config asks for several processes: right or not, none is started here."""


def fence() -> None:
    """Keep a worker from starting processes, from the network, and from taking all memory."""

    def refuse(*_: Any, **__: Any) -> None:
        raise MoreProcesses

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("there is no network here")

    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

    for launcher in (_MultiProcessingLauncher, _SubprocessScriptLauncher):
        launcher.launch = refuse  # type: ignore[method-assign]
    torch.distributed.init_process_group = refuse
    socket.socket.connect = socket.create_connection = socket.getaddrinfo = offline  # type: ignore[assignment, method-assign]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def execute(args: list[str]) -> tuple[int | None, str, str]:
    """Run a command in this process; return its exit status, stderr, and the traceback if it let one out."""
    out, err = io.StringIO(), io.StringIO()
    status: int | None = None
    trace = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if args:
                status = main(args)
            else:
                try:
                    rows, classes = parse_batch("batch", Path("batch").read_bytes())
                    assert rows.dtype == torch.uint8 and rows.shape == (len(classes), 3072)
                    assert all(0 <= label < 10 for label in classes.tolist()) and int(rows.sum()) >= 0
                    status = 0
                except Failure as failure:
                    status = 1
                    sys.stderr.write(f"error: {' '.join(str(failure).split())}\n")
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else None
        except MoreProcesses:
            status = -1
        except BaseException:
            trace = traceback.format_exc()
    return status, err.getvalue(), trace


def run_case(kind: str, number: int, seed: int, folder: Path) -> Result:
    """Make a case, run it, and look at what it left behind."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    (folder / "evil_module.py").write_text(EVIL)
    sys.modules.pop("evil_module", None)
    os.link(BASE, folder / "base.ckpt")
    begun = time.monotonic()
    case = MAKERS[kind](random.Random(f"{seed}/{kind}/{number}"), folder)
    kept = {path.name for path in folder.iterdir()}
    status, stderr, trace = execute(case.args)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    marks = {path.name for path in folder.iterdir()} - kept
    begun_run = next((folder / "lightning_logs").glob("version_*"), None)
    ends = {-1: "asks for processes", 0: "valid", 1: "exit 1", 2: "exit 2", None: "no status"}
    outcome = "traceback" if trace else ends.get(status, f"exit {status}")
    finding = ""
    if trace:
        finding = f"traceback: {_cause(trace)}"
    elif status not in (-1, 0, 1, 2):
        finding = f"exit status {status}"
    elif case.images:
        table = folder / "predictions.csv"
        rows = len(table.read_text().splitlines()) - 1 if table.is_file() else -1
        outcome = f"{rows} of {case.images} read"
        if rows + len(errors) != case.images or status != (len(errors) > 0):
            finding = f"exit {status}, {rows} predictions and {len(errors)} errors for {case.images} images"
    elif status in (1, 2) and len(errors) != 1:
        finding = f"{len(errors)} error lines"
    if not finding and errors and (len(errors[0]) > 1100 or len(errors[0]) < 15):
        finding = f"an error line of {len(errors[0])} characters"
    if "called" in marks or (kind != "config" and "imported" in marks):
        finding = "code of the input ran" if "called" in marks else "a module that the input names was imported"
    elif not finding and (partial := [*folder.rglob("*.partial"), *folder.rglob("*.part")]):
        finding = f"left {partial[0].name}"
    elif not finding and status == 2 and begun_run:
        finding = "exit 2, and a run was left"
    elif not finding and status == 1 and begun_run and "non-finite" not in stderr:
        finding = "exit 1, and a run was left"
    note = f"{case.note} | {' '.join(case.args)[:200]}"
    return Result(kind, number, outcome, note, finding, (trace or stderr)[-3000:], time.monotonic() - begun)


def _cause(trace: str) -> str:
    """Return exception and innermost frame within the project, by which findings are grouped."""
    lines = trace.strip().splitlines()
    frames = [line.strip() for line in lines if line.strip().startswith("File ")]
    own = [f for f in frames if f"{os.sep}src{os.sep}" in f and "site-packages" not in f] or frames
    last = next((line for line in reversed(lines) if line and not line.startswith(" ")), "")
    place = Path(own[-1].replace('"', "")).name if own else ""
    return re.sub(r"0x[0-9a-f]+|'.*'|\".*\"|\d{2,}", "…", last)[:120] + f" ({place})"


def work(pipe: Connection, folder: Path, seed: int) -> None:
    """Run the cases that come through a pipe until it is closed."""
    global BASE, IMAGE
    log = os.open(folder / "worker.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    sys.path.insert(0, str(folder / "case"))
    os.environ["HOME"] = str(folder / "case")
    os.environ.pop("LIVE_CIFAR10_TRACEBACK", None)
    BASE, IMAGE = folder / "base.ckpt", folder / "image.png"
    os.chdir(folder)
    if not BASE.is_file():
        Path("base.yaml").write_text(yaml.safe_dump(CONFIG))
        status, stderr, trace = execute(["fit", "--config", "base.yaml", *SHORT])
        if status != 0:
            raise SystemExit(f"the config that is mutated is not valid: {stderr}{trace}")
        shutil.copy("lightning_logs/version_0/checkpoints/last.ckpt", BASE)
        Image.new("RGB", (40, 30), "red").save(IMAGE)
    fence()
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            kind, number = pipe.recv()
            try:
                result = run_case(kind, number, seed, folder / "case")
            except Exception:  # a mistake of this file
                result = Result(kind, number, "not run", "", "the fuzzer itself failed", traceback.format_exc())
            pipe.send(result)


class Pool:
    """One worker, replaced when it hangs, crashes, or has run long enough.

    Args:
        folder: Where it works.
        seed: Of the cases.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.left = 0

    def __enter__(self) -> "Pool":
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the worker."""
        self.stop()

    def start(self) -> None:
        """Start a new worker."""
        self.stop()
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.folder, self.seed), daemon=True)
        self.process.start()
        theirs.close()
        if not self.pipe.poll(300):
            raise SystemExit("the worker does not start")
        try:
            self.pipe.recv()
        except EOFError:
            raise SystemExit((self.folder / "worker.log").read_text()[-3000:]) from None
        self.left = 250

    def stop(self) -> None:
        """End the worker, if there is one."""
        if self.left or hasattr(self, "process"):
            self.process.kill()
            self.process.join()
            self.pipe.close()
            del self.process
        self.left = 0

    def run(self, kind: str, number: int) -> Result:
        """Run one case."""
        if not self.left:
            self.start()
        self.left -= 1
        self.pipe.send((kind, number))
        try:
            if self.pipe.poll(TIMEOUT):
                result: Result = self.pipe.recv()
                return result
            what = f"hangs for {TIMEOUT:.0f} s"
        except (EOFError, ConnectionError):
            self.process.join()
            what = f"crash: exit code {self.process.exitcode}"
        log = (self.folder / "worker.log").read_text(errors="replace")[-1500:]
        self.stop()
        return Result(kind, number, what.split(":")[0], "", what, log)


def fuzz(counts: dict[str, int], seed: int, folder: Path, show: Callable[[str], None] = print) -> list[Result]:
    """Run the first cases of each kind; return all results."""
    results = []
    with Pool(folder, seed) as pool:
        for kind, count in counts.items():
            begun = time.monotonic()
            for number in range(count):
                results.append(pool.run(kind, number))
                if results[-1].finding:
                    show(f"{kind} {number}: {results[-1].finding}\n    {results[-1].note}")
                if number % 200 == 199:
                    show(f"# {kind}: {number + 1} of {count}, {time.monotonic() - begun:.0f} s")
    return results


def summary(results: list[Result]) -> dict[str, Any]:
    """Count outcomes by kind, and list the cases of each finding."""
    found: dict[str, list[str]] = {}
    for r in results:
        if r.finding:
            found.setdefault(f"{r.kind}: {r.finding}", []).append(str(r.number))
    kinds = dict.fromkeys(r.kind for r in results)
    outcomes = {kind: dict(Counter(r.outcome for r in results if r.kind == kind).most_common()) for kind in kinds}
    most = sorted(found.items(), key=lambda item: -len(item[1]))
    return {"outcomes": outcomes, "findings": {what: " ".join(numbers) for what, numbers in most}}


def command() -> int:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COUNTS)
    parser.add_argument("--case", type=int, help="run this case alone, and keep its files")
    parser.add_argument("--count", type=int, help="so many cases of each kind")
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if options.case is not None:
        with Pool(folder, options.seed) as pool:
            result = pool.run(options.only, options.case)
        print(f"{result.note}\n{result.outcome}: {result.finding or 'nothing found'}\n{result.detail}")
        print(f"files: {folder / 'case'}")
        return bool(result.finding)
    counts = {k: options.count or n for k, n in COUNTS.items() if options.only in (None, k)}
    results = fuzz(counts, options.seed, folder, lambda line: print(line, flush=True))
    (folder / "results.json").write_text(json.dumps([r._asdict() for r in results], indent=1))
    print(json.dumps(summary(results), indent=2, ensure_ascii=False))
    return any(r.finding for r in results)


if __name__ == "__main__":
    sys.exit(command())
