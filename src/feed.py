"""Give labelled images to a run that learns from a folder while it trains, and put labels right.

    python -m src feed DIR cat.png photos/ --label cat
    python -m src feed DIR --relabel 50123 dog
    python -m src feed DIR --drop cat/1-9f86d081884c.png

DIR is what the run was told with --data.feed; neither torch nor Lightning is imported.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from src.errors import Failure, OneLineParser, UsageError, refuse
from src.live.feed import announced, check_file, check_label, correct, offer


def main(args: Sequence[str]) -> int:
    """Run ``feed``.

    Args:
        args: The command line behind ``feed``.

    Returns:
        The exit status: 0; 1 if a file cannot be read or the folder not be written to; 2 for a command that cannot be.
    """
    parser = OneLineParser(prog="python -m src feed", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder that the run is fed from")
    parser.add_argument(
        "images", metavar="IMAGE", nargs="*", type=Path, help="image files, or folders whose image files are all taken"
    )
    parser.add_argument("--label", metavar="CLASS", help="the class that the images show")
    parser.add_argument(
        "--relabel", metavar=("ID", "CLASS"), nargs=2, help="say what an image, by its id or name, really shows"
    )
    parser.add_argument("--drop", metavar="ID", help="take an image, by its id or name, out of the data")
    try:
        options = parser.parse_args(args)
        _say(_do(options))
        if announced(options.folder) is None:  # right before a run begins; else the folder may be misspelt
            _say(f"note: no run has left its classes in {options.folder}; is this what its --data.feed names?")
    except (UsageError, Failure) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130
    return 0


def _do(options: argparse.Namespace) -> str:
    """Do what the options ask for, and return what was done."""
    folder: Path = options.folder
    asked = [name for name in ("label", "relabel", "drop") if getattr(options, name) is not None]
    if len(asked) != 1:
        raise UsageError("give images and their --label, or --relabel ID CLASS, or --drop ID: one of the three")
    if options.label is not None:
        check_label(options.label)
        images = _list(options.images)
        offer(folder, images, options.label)
        return f"fed {len(images):,} image{'s' if len(images) != 1 else ''} to {folder / options.label}"
    if options.images:
        raise UsageError(f"{options.images[0]}: --{asked[0]} takes no images; give --label to feed them")
    if options.relabel:
        sample, label = options.relabel
        id = correct(folder, _sample(sample), label)
        return f"asked to relabel {sample} as {label} ({id})"
    id = correct(folder, _sample(options.drop), None)
    return f"asked to drop {options.drop} ({id})"


def _list(paths: Sequence[Path]) -> list[Path]:
    """Return the files given and the image files in the folders given."""
    from src.live.decode import image_suffixes, list_images

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += list_images(path)
            continue
        check_file(path)
        if path.suffix.lower() not in image_suffixes():
            raise UsageError(
                f"{path}: {path.suffix or 'no suffix'} is no image's suffix; there are .png, .jpg and others"
            )
        files.append(path)
    if not files:
        where = f"no image in {', '.join(map(str, paths))}" if paths else "no image given"
        raise Failure(f"{where}: name image files, or folders that hold some")
    return files


def _sample(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else text


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
