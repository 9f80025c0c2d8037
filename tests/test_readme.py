"""What the READMEs say is true: their commands run, as they stand there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from src.cli import main
from tests.cli.test_live import ENDLESS, running, wait_for_step
from tests.conftest import CONFIGS, REPOSITORY, run_src

LANGUAGES = ("", ".zh-CN")
READMES = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")}


def commands(text: str) -> list[str]:
    """Return the lines of the bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


COMMANDS = commands(READMES["README.md"])
LIVE = "lightning_logs/version_0"
SRC_COMMANDS = [c.removeprefix("python -m src ") for c in COMMANDS if c.startswith("python -m src ") and LIVE not in c]
LIVE_COMMANDS = [c.removeprefix("python -m src ") for c in COMMANDS if c.startswith("python -m src ") and LIVE in c]


def test_both_languages_give_the_same_commands_and_figures() -> None:
    chinese = READMES["README.zh-CN.md"]
    assert commands(chinese) == COMMANDS
    rows = [re.findall(r"\d[\d.,]*\d|\d", line) for line in READMES["README.md"].splitlines() if line.startswith("| `")]
    assert rows
    assert [re.findall(r"\d[\d.,]*\d|\d", line) for line in chinese.splitlines() if line.startswith("| `")] == rows


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (command,) = [c for c in COMMANDS if "pytest" in c]
    assert command in (REPOSITORY / ".ci" / "run").read_text().splitlines()


def test_both_languages_tell_the_same_measurements() -> None:
    lines = [
        (REPOSITORY / "docs" / f"measurements{end}.md").read_text(encoding="utf-8").splitlines() for end in LANGUAGES
    ]
    assert len(lines[0]) == len(lines[1])
    for english, chinese in zip(*lines, strict=True):
        for wanted in (r"`[^`]+`", r"\d[\d.,]*\d"):  # code, and numbers of two digits and more
            here, there = (
                sorted(re.findall(wanted, re.sub("2026 年 11 月|November 2026", "", t))) for t in (english, chinese)
            )
            assert here == there, english


def test_the_layout_is_the_one_that_was_asked_for_and_runs_are_never_committed() -> None:
    for name in ("pyproject.toml", "README.md", "src", "configs", "tests", "lightning_logs/.gitignore"):
        assert (REPOSITORY / name).exists(), name
    lines = (REPOSITORY / "lightning_logs/.gitignore").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["*", "!.gitignore"]


def test_every_link_and_file_in_the_readme_is_there() -> None:
    pages = [REPOSITORY / f"{name}{end}.md" for name in ("README", "docs/measurements") for end in LANGUAGES]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!\w+:)([^)#]+)(?:#([^)]*))?\)", text):
            linked = page.parent / target
            assert linked.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
        for target in re.findall(r"\bconfigs/[a-z][\w/]*\.yaml", text):
            assert (REPOSITORY / target).exists(), target


@pytest.mark.parametrize("command", [c for c in SRC_COMMANDS if c.startswith("fit") and "--help" not in c])
def test_a_fit_command_of_the_readme_is_understood(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as exit_:
        main([*shlex.split(command.replace("--ckpt_path last", "")), "--print_config"])  # there is no run here
    assert exit_.value.code in (None, 0), capsys.readouterr().err


def test_the_first_command_trains_well_and_the_others_work_on_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (first,) = [c.split("&& python -m src ")[1] for c in COMMANDS if "&& python -m src" in c]
    (tmp_path / "configs").symlink_to(CONFIGS)
    last_lines = run_src(*shlex.split(first), cwd=tmp_path).stdout.splitlines()[-3:]
    assert "\n".join(last_lines) in READMES["README.md"], "the three lines at the end are those of the README"

    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in ("cat.png", "photos/dog.jpg"):
        Image.new("RGB", (64, 48), (200, 50, 50)).save(name)
    assert "fit --ckpt_path last" in SRC_COMMANDS
    evaluations = [c for c in SRC_COMMANDS if not c.startswith(("fit", "feed"))]
    assert {c.split()[0] for c in evaluations} == {"validate", "test", "predict"}
    for command in [*evaluations, "fit --ckpt_path last", last_lines[-1].split("python -m src ")[1]]:
        assert main(shlex.split(command)) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert float(re.findall(r"val/acc ([\d.]+)", output)[0]) >= 0.95
    assert json.loads(Path("lightning_logs/version_0/test.json").read_text())["test/acc"] >= 0.95


def test_the_commands_that_feed_a_run_work(tmp_path: Path) -> None:
    feed, relabel, drop = [c for c in SRC_COMMANDS if c.startswith("feed")]
    (tmp_path / "photos").mkdir()
    for name in ("cat.png", "photos/dog.jpg"):
        Image.new("RGB", (64, 48), (200, 50, 50)).save(tmp_path / name)
    assert run_src(*shlex.split(feed), cwd=tmp_path).stdout.startswith("fed 2 images to incoming/cat\n")
    for command in (relabel, drop):
        run_src(*shlex.split(command), cwd=tmp_path)


def test_the_commands_beside_a_run_that_trains_work(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), (200, 50, 50)).save(tmp_path / "cat.png")
    *beside, replay = LIVE_COMMANDS
    assert {c.split()[0] for c in beside} == {"watch", "steer", "predict"}
    with running("fit", *ENDLESS, cwd=tmp_path) as fit:
        wait_for_step(tmp_path / LIVE, 1)
        for command in beside:
            run_src(*shlex.split(command), *(["--once"] if command.startswith("watch") else []), cwd=tmp_path)
        run_src("steer", LIVE, "stop", cwd=tmp_path)
        assert fit.wait(timeout=60) == 0
    run_src(*shlex.split(replay), "--trainer.max_steps=2", cwd=tmp_path)
