"""Change how a run trains while it trains, and see how it does.

    python -m src steer lightning_logs/version_0 lr=0.02 batch_size=128
    python -m src steer lightning_logs/version_0 status

It writes a file into the run's folder and waits for the answer; neither torch nor Lightning is imported.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from src.errors import Failure, OneLineParser, UsageError, refuse, visible
from src.live.commands import VERBS, Command, new_command, send
from src.live.journal import SHOWN, Journal

_HELP = """\
what to do, one of:
  lr=0.02 momentum=0.95 weight_decay=5e-4 batch_size=128 label_smoothing=0.1
  'betas=[0.9,0.99]' eps=1e-8 log_every_n_steps=5
                         new values, all of them or none; status lists what there is
  checkpoint             write last.ckpt now
  evaluate               score the val split now
  pause, resume          stop between two steps, and go on
  stop                   write last.ckpt and end the run; fit --ckpt_path goes on with it
  status                 step, values and newest metrics
  history                what has been done to the run so far
"""


def main(args: Sequence[str]) -> int:
    """Run ``steer``.

    Args:
        args: The command line behind ``steer``.

    Returns:
        The exit status: 0; 1 if the run does not answer; 2 if it refuses, or the command cannot be.
    """
    parser = OneLineParser(
        prog="python -m src steer",
        description=(__doc__ or "").split("\n")[0],
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of the run, e.g. lightning_logs/version_0")
    parser.add_argument("what", metavar="WHAT", nargs="+", help="see below")
    parser.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True, help="for the answer (default)")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds to wait at most (default: 30)")
    parser.add_argument("--id", default="", help="names the command: it is done once, however often it is sent")
    try:
        options = parser.parse_args(args)
        command = None if options.what == ["history"] else _command(options.what)
        _check_run(options.run)
        if command is None:
            _print_history(options.run)
            return 0
        if options.id:
            command = command._replace(id=options.id)
        answer = send(options.run, command, options.timeout if options.wait else None)
        _print_answer(command, answer)
    except (UsageError, Failure) as error:
        return refuse(error)
    except BrokenPipeError:
        raise
    except OSError as error:  # a TimeoutError is one
        return refuse(Failure(str(error)))
    except KeyboardInterrupt:
        return 130
    return 0


def _command(words: list[str]) -> Command:
    """Return the command that the words ask for."""
    verbs = [word for word in words if "=" not in word]
    if verbs:
        if len(words) > 1 or verbs[0] not in VERBS:
            raise UsageError(
                f"{verbs[0]!r}: give new values (lr=0.02 batch_size=128), or one of {', '.join(VERBS)}, history"
            )
        return new_command(verbs[0])
    values: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if not name:
            raise UsageError(f"{word!r}: the name of a value is missing, as in lr=0.02")
        if name in values:
            raise UsageError(f"{name} is given twice")
        values[name] = _value(name, text)
    return new_command()._replace(set=values)


def _value(name: str, text: str) -> Any:
    for read in (json.loads, float):  # .02 and 1. are no JSON
        with suppress(ValueError, RecursionError):
            value = read(text)
            if isinstance(value, float) and not math.isfinite(value):
                break
            return value
    form = f"; several are given as '{name}=[{text.strip('()[] ')}]'" if "," in text else ""
    raise UsageError(f"{name}: {text!r} is not a number{form}")


def _print_answer(command: Command, answer: dict[str, Any]) -> None:
    if not answer:
        _say(f"sent: --id {command.id}")
    elif command.do == "status":
        state = "paused" if answer["paused"] else "training"
        _say(f"{state}: step {answer['step']:,}, epoch {answer['epoch'] + 1}")
        metrics = {k: v for k, v in answer["metrics"].items() if k not in answer["values"]}
        width = max(18, *(len(name) + 2 for name in (*answer["values"], *metrics)))
        for name, value in sorted(answer["values"].items()):
            _say(f"  {name:<{width}}{_text(value)}")
        for name, value in sorted(metrics.items()):
            form = ".0f" if float(value).is_integer() else ".4g"  # a count is told to the last one
            _say(f"  {name:<{width}}{value:{form}}")
    else:
        changes = [f"{name} {_text(old)} -> {_text(new)}" for name, (old, new) in answer.get("changes", {}).items()]
        done = ", ".join([*changes, *_results(answer.get("result") or {})]) or command.do
        _say(f"step {answer['step']:,}: {done}{' (done before)' if answer.get('repeated') else ''}")


def _check_run(run: Path) -> None:
    if not run.is_dir():
        raise Failure(f"{run}: there is no such folder; give that of a run")
    if not (run / "config.yaml").is_file() and not (run / "live").is_dir():
        raise Failure(f"{run} is not the folder of a run")


def _print_history(run: Path) -> None:
    for line in Journal(run / "live" / "journal.jsonl").read():
        when = "?"
        with suppress(OverflowError, ValueError, OSError):  # a stranger's line
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line["time"]))
        what, facts = SHOWN.get(line["kind"], str(line["kind"])), line["effective"]
        if what == "segment" and isinstance(facts, dict):
            what += f" {line['name']}: {_text(facts.get('images'))} images, ids from {_text(facts.get('first_id'))}"
        elif what in ("relabel", "drop") and isinstance(facts, dict):
            what += f" {line['name']}: {_text(line['before'])} -> {_text(facts.get('class') or 'out of the data')}"
        elif what == "refused" and line["name"]:
            what += f" {line['name']}: {_text(facts)}"
        elif line["name"]:
            what += f" {line['name']} {_text(line['before'])} -> {_text(line['effective'])}"
        elif what == "refused":
            what += f" {_text(line['requested'])}: {line['effective']}"
        elif isinstance(line["effective"], dict):
            what += " " + ", ".join(_results(line["effective"]))
        _say(f"step {line['step']:<8,} {when}  {what}  {line.get('actor', '')}".rstrip())


def _results(found: Mapping[str, Any]) -> list[str]:
    """Return what came of a command, e.g. ``val/acc 0.9`` or ``saved RUN/checkpoints/last.ckpt``."""
    return [f"{'saved' if name == 'path' else name} {_text(value)}" for name, value in found.items()]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _say(line: str) -> None:
    """Print one line, whatever a stranger has put into it to move the cursor or to begin another."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(visible(line).encode(encoding, "backslashreplace").decode(encoding) + "\n")
