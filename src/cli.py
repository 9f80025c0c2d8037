"""The command line of everything that needs a Trainer: fit, validate, test, predict.

python -m src fit --config configs/cifar10.yaml --data.batch_size 128
python -m src test --ckpt_path best
"""

import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from src import __version__
from src.arguments import (
    config_texts,
    configs_first,
    empty_strays,
    find_checkpoint,
    join_paths,
    newer_run,
    only,
    read_pipes,
    refuse_linked,
    run_config,
    run_folder,
)
from src.callbacks.checkpoint import Checkpoint
from src.callbacks.compiling import Compiling
from src.callbacks.console import progress_callback
from src.callbacks.contention import Contention
from src.callbacks.curves import Curves
from src.callbacks.feeding import Feeding
from src.callbacks.guard import Guard
from src.callbacks.memory import Memory
from src.callbacks.pictures import Pictures
from src.callbacks.predictions import Predictions
from src.callbacks.publish import Publish
from src.callbacks.record import RunLogger, RunRecord, option_of_own
from src.callbacks.report import Report
from src.callbacks.resume import Resume
from src.callbacks.signals import Signals
from src.callbacks.steering import Steering
from src.checkpoint_io import VerifiedCheckpointIO, read
from src.checks import check_classes, check_config, check_run
from src.classifier import ImageClassifier
from src.data import ImageData
from src.errors import Failure, Interrupted, UsageError, refuse, visible
from src.hardware import default_precision, describe, is_out_of_memory, keep_pages, take_one_thread
from src.leftovers import leftovers
from src.live.journal import Journal
from src.live.replay import names_of
from src.live.weights import LiveWeights, Version
from src.messages import name_reason
from src.options import DEFAULTS, EPILOG, HELP, SUBCOMMANDS, Parser, add_options, describe_options
from src.step_loop import StepLoop
from src.trust import leaves, refuse_elsewhere, refuse_strangers, stored_config

# What Lightning tells in every run; each is said better by our own lines, or is advertising.
_NOISE = ("💡", "GPU available", "TPU available", "HPU available", "`Trainer.fit` stopped", "Restor", "Loaded model",
          "Loading `train_dataloader`", "Using bfloat16", "Using 16bit", "Seed set to",
          "Found current_model_state", "Received SIGTERM")  # fmt: skip
_NOISY = ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed",
          "pytorch.trainer.connectors.signal_connector")  # fmt: skip

_SECTIONS = {"model": ImageClassifier, "trainer": pl.Trainer, "checkpoint": Checkpoint, "guard": Guard}

_RANK = re.compile(r"^\[rank: \d+\] ")

# How gloo and NCCL say that the process at the other end is no more.
_PEER_IS_GONE = re.compile(r"Connection (?:reset|closed) by peer|Broken pipe|Connection refused|remote process exited")


class CLI(LightningCLI):
    """LightningCLI with the defaults, the callbacks and the order of precedence of this project.

    What the command line says beats what a config says, and that beats what a checkpoint carries.
    """

    def __init__(self, args: list[str]) -> None:
        self._words = args
        self.checkpoint: Path | None = None
        self.changes: dict[str, list[Any]] = {}
        self.said: set[str] = set()
        self.resumed: Path | None = None
        self.leftovers: dict[str, str] = {}
        self.step = 0
        self._weights_config: dict[str, Any] = {}
        self._newer: Path | None = None
        with _heard_by(self._stop):
            super().__init__(
                ImageClassifier,
                ImageData,
                subclass_mode_data=True,
                save_config_callback=RunRecord,
                seed_everything_default=42,
                auto_configure_optimizers=False,
                trainer_defaults={"max_epochs": 10, "log_every_n_steps": 10},
                parser_class=Parser,
                parser_kwargs={
                    "prog": "python -m src",
                    "version": __version__,
                    "description": "Live CIFAR-10: train, watch and evaluate image classifiers.",
                    "epilog": "While a fit trains: watch RUN scores its weights as they change, steer RUN lr=0.02 "
                    "changes how it trains, feed DIR cat.png --label cat gives it images; see python -m src watch "
                    "--help, steer --help and feed --help.",
                    **{name: {"description": text, "epilog": EPILOG} for name, text in HELP.items()},
                },
                args=args,
            )

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """End at once, where there is nothing to save: before and after training, and in all that is not a fit."""
        trainer = getattr(self, "trainer", None)
        if self._words[:1] != ["fit"]:
            raise Interrupted(number, "before the end; nothing was written")
        if trainer is not None and trainer.state.finished:
            raise Interrupted(number, "after the last step; all has been saved")
        raise Interrupted(number, "before the first step; nothing was saved")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Name the sub-commands."""
        return SUBCOMMANDS

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        assert parser._subcommands_action is not None
        for action in parser._subcommands_action._choices_actions:  # Lightning puts its own, longer texts there
            action.help = HELP[action.dest]

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        first = next(iter(self._words), "")
        if first in ("-h", "--help", *SUBCOMMANDS) and first != subcommand:
            return self.init_parser(**kwargs)  # its name will do: to tell its options takes a tenth of a second
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        describe_options(parser, subcommand)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of this project."""
        add_options(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, on top of what the checkpoint carries if one is named."""

        def parse(words: list[str]) -> Any:
            of_subcommand = bool(words) and words[0] in SUBCOMMANDS
            config = parser.parse_args([words[0], *DEFAULTS, *words[1:]] if of_subcommand else words)
            network = config[config.subcommand].model.network
            if "init_args" not in network:  # it takes none, but Lightning will want to note what it was linked to
                network.init_args = type(network)()
            return config

        args = read_pipes(join_paths(configs_first(args, SUBCOMMANDS)))
        Parser.command_line = args
        texts = config_texts(args)
        early = bool(args) and args[0].partition("=")[0] in ("--config", "-c")
        if early and not any(SUBCOMMANDS.keys() & yaml.safe_load(text).keys() for text in texts):
            raise UsageError("config: it is given behind the sub-command: python -m src fit --config FILE")
        # Which data set and network the other options are of is in the checkpoint.
        finds = ("--config", "-c", "--ckpt_path", "--live", "--trainer.default_root_dir")
        options = {word.partition("=")[0] for word in args}
        look = bool(options & {"--ckpt_path", "--live", "--print_config"}) and not options & {"--help", "-h"}
        self.config = parse(only(args, finds) if look else args)
        command = self.config.subcommand
        ckpt_path = self.config[command].ckpt_path
        for config in map(yaml.safe_load, texts):
            section = config.get(command, config) if early else config
            for key in empty_strays(section, self.config[command].as_dict()):
                self._parser(command).error(f"it does not accept option '{key}'")
        refuse_linked(options, texts)
        self.said = {option.removeprefix("--").rstrip("+").replace(".init_args", "") for option in options}
        where = args.index(command) + 1 if command in args else 0
        self.live = self.config[command].get("live")
        if look and ckpt_path is None and self.live is None:
            self.config = parse(args)
        if self.live is not None:
            if ckpt_path is not None:
                raise UsageError("ckpt_path and live exclude each other: give one of them")
            config = _inherited(run_config(self.live), command)
            said = [w for w in args if Path(w.removeprefix("--live=")) != self.live]  # its name is no trust in it
            self._weights_config = config
            refuse_strangers(self.live / "config.yaml", config, "\n".join([*said, *texts]), _SECTIONS)
            base = yaml.safe_dump(config, sort_keys=False)
            Parser.command_line = args = [*args[:where], f"--config={base}", *args[where:]]
            self.config = parse(args)
        elif ckpt_path is None:
            if command != "fit":
                raise UsageError(
                    f"{command} needs weights: give --ckpt_path best, last, or a file, or --live and a run that trains"
                )
        else:
            runs = Path(self.config[command].trainer.default_root_dir or ".") / "lightning_logs"
            self.checkpoint = find_checkpoint(str(ckpt_path), runs)
            self._newer = newer_run(self.checkpoint, runs) if str(ckpt_path) in ("best", "last") else None
            content = read(self.checkpoint)
            said = [word for word in args if not word.endswith(str(ckpt_path))]  # a file's name is no trust in it
            stored = stored_config(self.checkpoint, content, "\n".join([*said, *texts]), _SECTIONS)
            base = yaml.safe_dump(_inherited(stored, command), sort_keys=False)
            Parser.command_line = args = [*args[:where], f"--config={base}", *args[where:]]
            self.config = parse(args)
            self.config[command].ckpt_path = str(self.checkpoint)
            self._weights_config = stored
            self._note_changes(stored, content["global_step"])
            if command == "fit":
                if self.resumed is not None:  # it goes on in that folder, wherever it has been moved to
                    stored["trainer"].pop("default_root_dir", None)
                refuse_elsewhere(self.checkpoint, stored, "\n".join([*said, *texts]), _own_places(self.checkpoint))
        if command == "fit":
            now = self.config[command].as_dict()
            self.leftovers = leftovers(args, now, lambda words: parse(words)[command].as_dict())
        self.device = check_config(command, self.config[command])
        if self.device == "cpu":
            keep_pages()
        elif self.device == "cuda" and command == "fit":
            take_one_thread()
        trainer = self.config[command].trainer
        self.chosen = trainer.precision is None
        if self.chosen:
            trainer.precision = default_precision(self.device)

    def _note_changes(self, stored: dict[str, Any], step: int) -> None:
        """Find what a resumed fit does otherwise than its run did, and whether it goes on in its run's folder.

        What had been steered, and is said on the command line, is otherwise too, even if the config has it so.
        """
        config = self.config[self.config.subcommand]
        resolved = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))[self.config.subcommand]
        before, now = dict(leaves(stored)), dict(leaves(resolved))
        keys = [key for key in {**before, **now} if key not in ("ckpt_path", "new_run")]
        assert self.checkpoint is not None
        folder = run_folder(self.checkpoint)
        lines = Journal(folder / "live" / "journal.jsonl").read()
        steered = {line["name"] for line in lines if line["kind"] == "set"}
        dotted = {k: k.replace("/init_args", "").replace("/", ".") for k in keys}
        undone = {k for k in keys if dotted[k] in self.said and names_of([dotted[k]]) & steered}
        changes = {k: [before.get(k), now.get(k)] for k in keys if before.get(k) != now.get(k) or k in undone}
        self.changes = {dotted[k]: v for k, v in changes.items()}
        self.step = step
        elsewhere = config.trainer.default_root_dir != stored.get("trainer", {}).get("default_root_dir")
        if (folder / "config.yaml").is_file() and not (elsewhere or config.new_run):
            self.resumed = folder

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint beat the command line."""

    def instantiate_classes(self) -> None:
        """Build data, model and Trainer; what they refuse is named by its key."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise UsageError(name_reason(str(error), self.config[self.subcommand].as_dict())) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the Trainer with the callbacks and the logger of the sub-command."""
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        checkpoint = self._get(self.config_init, "checkpoint")
        if self.datamodule.val_size == 0:
            config["limit_val_batches"] = 0
        callbacks: list[pl.Callback] = []
        if config["barebones"]:  # Lightning measures itself: no logger, no callbacks
            config["log_every_n_steps"] = None
        elif self.subcommand == "fit":
            curves, signals = Curves(), Signals()
            steered = bool(self._get(self.config_init, "steering"))
            replay = self._get(self.config_init, "replay")
            source = run_folder(self.checkpoint) if self.checkpoint is not None else None
            feeding = Feeding(source, replay, lambda: curves.latest)
            callbacks = [
                Resume(self.changes, source, self.resumed is not None),
                Pictures(),
                self._get(self.config_init, "guard"),
                Memory(),
                Contention(),
                signals,
                feeding,
                Steering(steered, replay, self.changes, signals, lambda: curves.latest, feeding),
            ]
            if (every := self._get(self.config_init, "publish_every_n_steps")) is not None:
                callbacks.append(Publish(every))
            if self.model.hparams["compile"] is not None:
                callbacks.append(Compiling())
            theirs = any(isinstance(c, pl.callbacks.ProgressBar) for c in _as_list(config["callbacks"]))
            if config["enable_progress_bar"] is not False and not theirs:
                progress = progress_callback(curves)
                callbacks.append(progress)
                config["enable_progress_bar"] = isinstance(progress, pl.callbacks.ProgressBar)
            if config["enable_checkpointing"] is not False:
                callbacks.append(checkpoint)
            # Before the user's, which go by what it has measured in the epoch that ends.
            config["callbacks"] = [curves, *_as_list(config["callbacks"])]
            if config["logger"] in (None, True):
                config["logger"] = RunLogger(Path(config["default_root_dir"] or "."), self.resumed, self.step)
        else:
            folder = self.live
            if self.checkpoint is not None:
                folder = run_folder(self.checkpoint)
            assert folder is not None
            self.predictions = Predictions(folder)
            callbacks = [self.predictions if self.subcommand == "predict" else Report(folder)]
            config |= {"logger": False, "enable_checkpointing": False}
            if self.subcommand == "predict":  # the files are not shared out among devices
                config |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
            config["enable_progress_bar"] = sys.stdout.isatty() and config["enable_progress_bar"] is not False
            of_fits: list[type] = [pl.callbacks.Checkpoint]  # a fit's config may have them
            if not config["enable_progress_bar"]:
                of_fits.append(pl.callbacks.ProgressBar)
            config["callbacks"] = [c for c in _as_list(config["callbacks"]) if not isinstance(c, tuple(of_fits))]
        if not any(isinstance(plugin, CheckpointIO) for plugin in _as_list(config["plugins"])):
            config["plugins"] = [*_as_list(config["plugins"]), VerifiedCheckpointIO()]
        if config["enable_model_summary"] is None:
            config["enable_model_summary"] = False
        trainer = self._instantiate_trainer(config, callbacks)
        if self.subcommand == "fit" and not config["barebones"]:
            chunk_size, graph = (self._get(self.config_init, name) for name in ("chunk_size", "cuda_graph"))
            StepLoop.install(trainer, chunk_size, graph)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Refuse what would hang or do nothing, and give an evaluation of a live run its weights."""
        assert self.subcommand is not None
        check_run(self.subcommand, self.trainer, self.model, self.datamodule)
        if self.subcommand != "fit":
            check_classes(self._weights_config, self.datamodule)
        if self.live is not None:
            with LiveWeights.open(self.live) as reader:
                self.take(reader.read(verify=True))

    def take(self, version: Version) -> None:
        """Give the network the weights of a run that trains, and the callbacks their step."""
        try:
            self.model.network.load_state_dict(version.best)
        except RuntimeError as error:
            raise Failure(f"live: {self.live} trains another network than the config asks for ({error})") from error
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined] # set outside of __init__
            if isinstance(callback, Report):
                callback.step = version.step
        self.version = version

    def _run_subcommand(self, subcommand: str) -> None:
        if self.trainer.is_global_zero:
            chosen = "chosen for this device" if self.chosen else "as configured"
            line = f"device: {describe(self.device)}; precision: {self.trainer.precision} ({chosen})"
            line += "; channels_last" if self.model.hparams["channels_last"] else ""
            remark = self.model.network.remark(self.device, str(self.trainer.precision)) if subcommand == "fit" else ""
            _say(f"{line}; {remark}" if remark else line)
            for key, sentence in self.leftovers.items():
                _say(f"note: {key}: {sentence}")
            if self.checkpoint is not None:
                _say(f"checkpoint: {self.checkpoint}")
                if self._newer is not None:
                    _say(f"note: ckpt_path: {self._newer} is newer, but has no {self.checkpoint.name}")
            if self.live is not None:
                _say(f"weights: {self.live}, {age_text(self.version)}")
        with warnings.catch_warnings():
            if subcommand == "fit":  # our points go on from epoch to epoch, however short an epoch is
                warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
                # The loader needs no state to go on in the middle of an epoch: it is told the position.
                warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")
            else:  # the callbacks of the fit have no part in an evaluation
                warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            try:
                super()._run_subcommand(subcommand)
            except Exception as error:
                self._explain(error)
                raise

    def _explain(self, error: Exception) -> None:
        """Raise what went wrong in the words of the user; what cannot be said better is left as it is."""
        if is_out_of_memory(error):
            raise Failure(" ".join(["out of memory", *getattr(error, "__notes__", [])])) from error
        if isinstance(error, RuntimeError) and _PEER_IS_GONE.search(str(error)):
            rank = self.trainer.global_rank
            raise Failure(f"another process of this run has ended, so this one (rank {rank}) ends too") from error
        restored = not self.trainer._checkpoint_connector._loaded_checkpoint
        of_optimizer = _raised_in(error, "torch", "optim")
        refused = of_optimizer or _raised_in(error, "lightning", "pytorch")
        early = (isinstance(error, (Interrupted, UsageError)) or _of_disk(error)) and not self._has_saved()
        in_vain = not restored or (self.trainer.global_step == 0 and (refused or early))
        if self.resumed is None and in_vain and isinstance(self.trainer.logger, RunLogger):
            self.trainer.logger.discard()
        if of_optimizer:
            key = "lr_scheduler" if _raised_in(error, "torch", "optim", "lr_scheduler.py") else "optimizer"
            raise UsageError(f"model.{key}: {error}") from error
        if isinstance(error, OSError) and error.filename is None and _raised_in(error, "tensorboard"):
            logger = self.trainer.logger
            folder = f"{os.path.relpath(logger.log_dir)}: " if isinstance(logger, TensorBoardLogger) else ""
            raise Failure(f"{folder}the curves could not be written ({error.strerror})") from error
        said = (Failure, UsageError, Interrupted, OSError, MisconfigurationException)
        if not restored and not isinstance(error, said):
            what = f"{type(error).__name__}: {error}"
            raise Failure(f"ckpt_path: {self.checkpoint} does not fit what is asked for ({what})") from error

    def _has_saved(self) -> bool:
        """Return whether a fit has begun to write checkpoints."""
        folders = [c.folder for c in self.trainer.checkpoint_callbacks if isinstance(c, Checkpoint)]
        return any(folder is not None and any(folder.glob("*.ckpt")) for folder in folders)

    def after_fit(self) -> None:
        """End with where the run is, how to look at it, and how to test it."""
        trainer, log_dir = self.trainer, self.trainer.log_dir  # asked for on all ranks: it is broadcast
        if not trainer.is_global_zero or log_dir is None or trainer.fast_dev_run or trainer.barebones:  # type: ignore[attr-defined] # set outside of __init__
            return
        callback = next((c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)), None)
        if self.checkpoint is not None and trainer.global_step == self.step:
            _say("note: no step was left to take; --trainer.max_epochs or max_steps, with more, trains for longer")
        _say(f"run:         {os.path.relpath(log_dir)}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _say(f"TensorBoard: tensorboard --logdir {shlex.quote(os.path.relpath(logger.log_dir))}")
        if callback is not None and callback.best is not None:
            best = shlex.quote(os.path.relpath(callback.best))
            _say(f"test:        python -m src test{option_of_own(trainer, Path(log_dir))} --ckpt_path {best}")


@contextmanager
def _heard_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let SIGINT and SIGTERM be heard, unless somebody hears or ignores them already."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread()]
    before = {number: signal.getsignal(number) for number in numbers}
    ours = {n: h for n, h in before.items() if h in (signal.SIG_DFL, signal.default_int_handler)}
    try:
        for number in ours:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _own_places(checkpoint: Path) -> list[Path]:
    """Return where a fit may write that goes on from a checkpoint: here, and where the checkpoint's run is."""
    run = run_folder(checkpoint)
    return [Path(), run.parent.parent if run.parent.name == "lightning_logs" else run]


def _inherited(stored: dict[str, Any], command: str) -> dict[str, Any]:
    """Return the part of a checkpoint's config that a sub-command goes by.

    A fit goes on as it was. An evaluation takes model, data and precision, but not the machine it was trained on.
    """
    if command == "fit":
        return {k: v for k, v in stored.items() if k not in ("ckpt_path", "config", "new_run")}
    kept = {k: stored[k] for k in ("seed_everything", "model", "data") if k in stored}
    return kept | {"trainer": {"precision": stored.get("trainer", {}).get("precision")}}


def age_text(version: Version) -> str:
    """Say of which step weights are, and how old."""
    return f"step {version.step:,}, {version.age_steps:,} steps ({version.age_seconds:.1f} s) old"


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _say(line: str) -> None:
    sys.stdout.write(visible(line) + "\n")
    sys.stdout.flush()


def _of_disk(error: BaseException) -> bool:
    """Return whether a file could not be written or read."""
    return isinstance(error, OSError) or isinstance(error.__cause__, OSError)


def _raised_in(error: BaseException, *package: str) -> bool:
    """Return whether a package itself raised an error: then it is about what was asked of it, not a bug of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "/".join(["", *package, ""]) in f"{Path(frames[-1].filename).as_posix()}/"


def main(args: Sequence[str] | None = None, build: Callable[[list[str]], CLI] = CLI) -> int:
    """Run a sub-command.

    Args:
        args: The command line without the program's name; by default the one of this process.
        build: Makes of the command line what runs it.

    Returns:
        The exit status: 0; 1 for a failure; 2 for a command that cannot be. Set ``LIVE_CIFAR10_TRACEBACK=1`` to see
        where an error comes from.
    """
    for name in _NOISY:
        logger = logging.getLogger(f"lightning.{name}")
        logger.addFilter(lambda record: not _RANK.sub("", record.getMessage()).startswith(_NOISE))
    # Lightning's Timer has a default that is a text of a class of its own.
    yaml.SafeDumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str.__str__(text)))
    # Raised inside Lightning: Lightning issue 21326.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
    try:
        cli = build(list(sys.argv[1:] if args is None else args))
    except Interrupted as error:
        _leave_group()
        if _get_rank():  # the first process answers for all; Lightning would kill it for what others return
            return 0
        sys.stderr.write(f"{error}\n")
        return error.status
    except KeyboardInterrupt:
        sys.stderr.write("stopped by SIGINT before the first step; nothing was saved\n")
        return 130
    except (UsageError, Failure) as error:
        return refuse(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"{error.filename or 'a file'} could not be written or read ({error.strerror})"
        return refuse(Failure(what if error.strerror else str(error)))
    except ImportError as error:
        return refuse(Failure(str(error)))
    except OverflowError as error:
        return refuse(UsageError(f"a number is out of range: {error}"))
    except RecursionError:
        return refuse(UsageError("config: it is nested too deeply, or refers to itself"))
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        lightnings = _raised_in(error, "lightning", "pytorch") or _raised_in(error, "lightning", "fabric")
        if not isinstance(error, MisconfigurationException) and not lightnings:
            raise
        return refuse(UsageError(str(error)))
    _leave_group()
    return 1 if cli.subcommand == "predict" and cli.predictions.unreadable else 0


def _leave_group() -> None:
    """End gloo's threads before Python does: else they now and then abort the process (torch issue 190489)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
