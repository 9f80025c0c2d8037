"""What the journal of a run says was done to it, to be done again at the same steps.

python -m src fit --config lightning_logs/version_0/config.yaml --replay lightning_logs/version_0
"""

from collections.abc import Collection, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from src.errors import Failure
from src.live.journal import DONE, FED, Journal

_HARMLESS = ("checkpoint.", "chunk_size", "publish_every_n_steps", "steering", "replay", "trainer.default_root_dir",
             "trainer.enable_", "trainer.log_every_n_steps", "trainer.logger")  # fmt: skip
"""What a resumed fit may do otherwise and be replayed all the same."""

_KEYS = ("model.label_smoothing", "data.batch_size", "trainer.log_every_n_steps")
"""The keys of what can be steered, besides those of the optimizer."""


class Intervention(NamedTuple):
    """What a journal says was done at a step.

    Attributes:
        step: Optimizer steps taken before.
        kind: ``set``, ``evaluate``, ``segment``, ``relabel`` or ``drop``.
        wanted: The new values by name, as they were asked for.
        effective: What they were then; or what was fed or put right.
        actor: Who asked for it.
        id: The command that did.
        own: Whether it is in this run's own journal.
    """

    step: int
    kind: str
    wanted: dict[str, Any]
    effective: dict[str, Any]
    actor: str
    id: str
    own: bool = True


def interventions(lines: Iterable[dict[str, Any]]) -> list[Intervention]:
    """Return what the lines of a journal say was done, a transaction as one, in the order of the lines.

    Where the command line of a resumed run gave a value another, what steering set later than the step it went on from
    is left out.
    """
    found: list[Intervention] = []
    for (step, kind, id), group in groupby(lines, key=lambda line: (line["step"], line["kind"], line["id"])):
        of_one = list(group)
        if kind in DONE:
            wanted = {line["name"]: line["requested"] for line in of_one if kind == "set"}
            effective = {line["name"]: line["effective"] for line in of_one if kind == "set"}
            if kind in FED:
                effective = fed_facts(of_one[0])
            found.append(Intervention(step, kind, wanted, effective, of_one[0]["actor"], id))
        elif kind == "resume":
            said = {name for line in of_one for name in names_of(line["effective"])}
            found = [done._replace(wanted=_without(done.wanted, said if done.step >= step else ())) for done in found]
    return [done for done in found if done.wanted or done.kind != "set"]


def fed_facts(line: dict[str, Any]) -> dict[str, Any]:
    """Return what a line of a kind in `FED` says was fed or put right.

    Returns:
        Of a segment its ``number``, ``images``, ``first_id`` and ``sha256``; of a correction ``id`` and ``label``.

    Raises:
        Failure: If it does not say that: somebody else wrote it.
    """
    facts = line["effective"]
    kinds: dict[str, Any] = {"number": int, "images": int, "first_id": int, "sha256": str}
    if line["kind"] != "segment":
        kinds = {"id": int, "label": int if line["kind"] == "relabel" else type(None)}
    if not isinstance(facts, dict) or any(type(facts.get(name, ...)) is not kind for name, kind in kinds.items()):
        raise Failure(f"journal: line {line['seq']}, a {line['kind']}, does not say what was fed or put right")
    return facts


def names_of(keys: Any) -> set[str]:
    """Return what steering calls some values of a config, by dotted keys."""
    found = set()
    for key in keys if isinstance(keys, Collection) else ():
        parent, _, name = str(key).rpartition(".")
        if key in _KEYS or (parent == "model.optimizer" and name != "batch_size"):
            found.add(name)
    return found


def _without(values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def replayed(run: Path) -> list[dict[str, Any]]:
    """Return the lines of the journal of a run that is to be replayed.

    Raises:
        Failure: If there is no such run, or it went on with another config, or began with another run's checkpoint.
    """
    if not (run / "config.yaml").is_file():
        raise Failure(f"replay: {run} is not the folder of a run: it has no config.yaml")
    lines = Journal(run / "live" / "journal.jsonl").read()
    for line in lines:
        if line["kind"] != "resume":
            continue
        if line["requested"]:
            raise Failure(
                f"replay: {run} began at step {line['step']:,}, with a checkpoint of another run, which a replay "
                f"cannot follow"
            )
        for key in line["effective"] if isinstance(line["effective"], dict) else {}:
            if not key.startswith(_HARMLESS) and key != "data.feed":
                raise Failure(
                    f"replay: {run} went on at step {line['step']:,} with another {key}, which a replay cannot follow"
                )
    return lines
