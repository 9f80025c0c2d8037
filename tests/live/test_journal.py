"""The journal: append-only, whole line by whole line."""

import threading
from pathlib import Path
from typing import Any

import pytest

from src.errors import Failure
from src.live.journal import Journal
from src.live.replay import interventions


def test_lines_come_back_in_order_with_their_numbers(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "live/journal.jsonl")
    assert journal.seq == 0
    journal.append(3, "set", "lr", before=0.1, requested=0.2, effective=0.2, actor="me", id="a")
    assert journal.extend(4, "set", [{"name": "x"}, {"name": "y"}], id="b") == [1, 2]
    lines = Journal(journal.path).read()
    assert [(line["seq"], line["step"], line["name"], line["id"]) for line in lines] == [
        (0, 3, "lr", "a"), (1, 4, "x", "b"), (2, 4, "y", "b"),
    ]  # fmt: skip
    assert Journal(journal.path).seq == 3


def test_a_line_that_was_cut_short_or_changed_is_left_out_and_the_next_begins_anew(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for step in range(3):
        journal.append(step, "set", "lr", effective=step)
    content = journal.path.read_bytes()
    journal.path.write_bytes(content.replace(b'"effective": 1', b'"effective": 7')[:-10])
    assert [line["step"] for line in journal.read()] == [0]
    journal.append(5, "set", "lr")
    assert [(line["seq"], line["step"]) for line in journal.read()] == [(0, 0), (1, 5)]


def test_lines_of_several_writers_have_numbers_of_their_own(tmp_path: Path) -> None:
    one, other = Journal(tmp_path / "journal.jsonl"), Journal(tmp_path / "journal.jsonl")
    for step in range(3):
        one.append(step, "set")
        one.append(step, "set")
        other.append(step, "set")
    with one.path.open("ab") as file:
        file.write(b'{"cut sh')
    one.append(3, "set")
    one.append(4, "set")
    assert [line["seq"] for line in one.read()] == list(range(11))


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(0, "set")
    before = journal.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.extend(1, "set", [{}, {}])
    assert journal.path.read_bytes() == before


def test_several_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    def write(_: int) -> None:
        for step in range(20):
            Journal(tmp_path / "journal.jsonl").extend(step, "refused", [{}, {}], sync=False)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [line["seq"] for line in Journal(tmp_path / "journal.jsonl").read()] == list(range(160))


def test_a_transaction_is_one_intervention_and_what_was_only_noted_is_none(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    lines: list[dict[str, Any]] = [
        {"name": n, "before": 0, "requested": v, "effective": v} for n, v in (("lr", 1), ("momentum", 2))
    ]
    journal.extend(3, "set", lines, actor="me", id="a")
    for kind in ("refused", "pause", "checkpoint", "resume", "rollback", "stop"):
        journal.append(3, kind)
    journal.append(4, "evaluate", effective={"val/acc": 0.5}, id="b")
    one, two = interventions(journal.read())
    assert (one.step, one.kind, one.wanted, one.actor, one.id, one.own) == (
        3, "set", {"lr": 1, "momentum": 2}, "me", "a", True,
    )  # fmt: skip
    assert (two.step, two.kind, two.wanted, two.id) == (4, "evaluate", {}, "b")


@pytest.mark.parametrize(
    ("kind", "effective"),
    [
        ("segment", None),
        ("segment", {"number": 1, "images": 5, "first_id": 400}),
        ("segment", {"number": "1", "images": 5, "first_id": 400, "sha256": "00"}),
        ("relabel", {"id": 3, "label": None}),
        ("drop", {"id": 3, "label": 1}),
        ("drop", [3]),
    ],
)
def test_a_line_that_does_not_say_what_was_fed_is_refused_by_its_number(
    kind: str, effective: Any, tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(0, "evaluate")
    journal.append(7, kind, effective=effective)
    with pytest.raises(Failure, match=f"journal: line 1, a {kind}, does not say"):
        interventions(journal.read())
