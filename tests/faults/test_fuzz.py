"""A small part of `benchmarks.fuzz`: mutated input ends in one line, runs nothing, and leaves no run behind."""

from pathlib import Path

from benchmarks.fuzz import IMAGES, fuzz

COUNTS = {"config": 40, "checkpoint": 60, "data": 100, "image": 30 // IMAGES}


def test_mutated_input_ends_in_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    results = fuzz(COUNTS, seed=20261121, folder=tmp_path, show=lambda _: None)
    assert not [f"{r.kind} {r.number}: {r.finding}\n{r.note}\n{r.detail}" for r in results if r.finding]
    assert len(results) == sum(COUNTS.values())
    for kind in COUNTS:  # the mutations are neither all harmless nor all of them hopeless
        outcomes = {r.outcome for r in results if r.kind == kind}
        assert len(outcomes) > 1
        assert "valid" in outcomes or kind == "image"
