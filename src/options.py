"""The options of fit, validate, test and predict beyond Lightning's own, and how a bad command line is answered."""

from argparse import SUPPRESS, Action
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from src.arguments import config_texts
from src.callbacks.checkpoint import Checkpoint
from src.callbacks.guard import Guard
from src.errors import UsageError, refuse
from src.messages import explain

# Arguments of the Trainer's methods that are not for the user to set.
SUBCOMMANDS = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
    "validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
    "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
    "predict": {"model", "dataloaders", "datamodule", "weights_only", "return_predictions"},
}

HELP = {
    "fit": "Train a network, with live curves and checkpoints in a folder of the run's own.",
    "validate": "Score a checkpoint on the val split.",
    "test": "Score a checkpoint on the test set; writes test.json and a confusion matrix.",
    "predict": "Name the classes of image files.",
}

_DEFAULTS = {"model.network": "src.networks.CNN", "data": "src.data.Shapes10"}
DEFAULTS = [f"--{key}={name}" for key, name in _DEFAULTS.items()]
"""The classes of what nobody names, as the first words of a command line. Of a default that the parser knows as such it
would leave the arguments, such as a val_size, to a class that is named in its place."""

_OF_MODEL = {"model.optimizer": "SGD", "model.selection": "Selection"}
"""The classes of what nobody names, too, but chosen by the model."""

EPILOG = (
    "The options of a class are told by --data.help CIFAR10, --model.network.help WhitenedCNN, "
    "--model.optimizer.help src.optim.Muon and the like."
)

# In place of what Lightning says of them.
_TEXTS = {
    "ckpt_path": "A checkpoint's file; or best or last: that of the newest run in lightning_logs that has one.",
    "seed_everything": "The seed of order, augmentation and weights: a whole number from 0, below 2**32.",
    "trainer.precision": "Such as 32-true, bf16-mixed, 16-mixed or bf16-true; null chooses bf16-mixed where the device "
    "multiplies bf16 in hardware, else 32-true.",
}

# What does nothing in an evaluation: a fit's config may say it there, but its help need not.
_OF_FITS = ("checkpoint", "guard", "new_run", "chunk_size", "cuda_graph", "publish_every_n_steps", "steering", "replay")


class _HelpFormatter(DefaultHelpFormatter):
    """Leaves out the null that the parser has as the default of what has one in `DEFAULTS`."""

    def _get_help_string(self, action: Action) -> str:
        text: str = super()._get_help_string(action)
        return text.replace(", default: %(default)s", "") if action.dest in _DEFAULTS else text


class Parser(LightningArgumentParser):
    """A parser whose errors take one line, and which takes no abbreviations for options."""

    command_line: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong with the command line, in one line, and exit."""
        parser = getattr(ex, "subcommand_parser", None) or self
        keys = [action.dest for action in parser._actions]
        args = Parser.command_line
        error = UsageError(explain(message, keys, args, config_texts(args), {**_OF_MODEL, **_DEFAULTS}))
        error.__cause__ = ex
        # The parser takes an exception inside a nested class for one more alternative that did not fit; not an exit.
        raise SystemExit(refuse(error))


def add_options(parser: LightningArgumentParser) -> None:
    """Add what is beside model, data and trainer; the defaults, and what is taken from elsewhere."""
    parser.add_lightning_class_args(Checkpoint, "checkpoint")
    parser.add_lightning_class_args(Guard, "guard")
    parser.add_argument(
        "--new_run",
        type=bool,
        default=False,
        help="Let a resumed fit write into a folder of its own, not its run's.",
    )
    parser.add_argument(
        "--chunk_size",
        type=int,
        default=1,
        help="Optimizer steps that a fit takes in one go. Signals, checkpoints, the progress bar, the "
        "guard against infinite numbers, steering, feeding and publications wait for the end of a chunk; the "
        "weights and the curves stay the same. It pays with small batches, whose steps take less time than the "
        "bookkeeping between them. At least 1.",
    )
    parser.add_argument(
        "--cuda_graph",
        type=bool,
        default=False,
        help="On a CUDA GPU, record a whole optimizer step (augmentation, network, optimizer) and start it in one "
        "go, not by its hundreds of pieces: small batches take a fraction of the time. For SGD and DecoupledSGD "
        "with fused: true, and for Muon; elsewhere it changes nothing.",
    )
    parser.add_argument(
        "--publish_every_n_steps",
        type=int | None,
        default=10,
        help="Optimizer steps from one publication of the weights in shared memory to the next, for watch and "
        "predict --live, at least 1; null: none.",
    )
    parser.add_argument(
        "--steering", type=bool, default=True, help="Let a fit be steered while it trains, see steer --help."
    )
    parser.add_argument(
        "--replay",
        type=Path | None,
        default=None,
        help="The folder of a run, whose interventions this fit makes again at their steps.",
    )
    parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_seed)
    parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
    parser.link_arguments("data.num_classes", "model.network.init_args.num_classes", apply_on="instantiate")


def describe_options(parser: LightningArgumentParser, subcommand: str) -> None:
    """Say in our words what Lightning's options of a sub-command do, and add what it has to itself."""
    for action in parser._actions:
        action.help = _TEXTS.get(action.dest, action.help)
        if action.dest in _DEFAULTS:
            action.help = f"{action.help} By default {_DEFAULTS[action.dest]}."
            action.required = False  # so says the help; null is refused as before
            parser._extra_required_keys.add(action.dest)
        if subcommand != "fit" and action.dest.partition(".")[0] in _OF_FITS:
            action.help = SUPPRESS
    if subcommand != "fit":
        parser.add_argument(
            "--live",
            type=Path | None,
            default=None,
            help="The folder of a run that trains now: its config and its weights of this moment are taken, "
            "instead of a checkpoint's.",
        )


def _seed(seed: bool | int) -> int:
    if isinstance(seed, bool):
        raise ValueError("seed_everything: give a whole number: a run is a function of its seed")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed_everything: {seed} is out of range: at least 0, below 2**32")
    return seed
