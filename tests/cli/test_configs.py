"""Every recipe and preset says what it means: it loads, prints, loads again, and resolves to what is written in it."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.arguments import check_nesting
from src.cli import main
from src.errors import UsageError
from tests.conftest import CONFIGS, TINY, help_of, run_src

RECIPES = sorted(CONFIGS.glob("*.yaml"))
PRESETS = sorted((CONFIGS / "presets").glob("*.yaml"))


def print_config(capsys: pytest.CaptureFixture[str], *configs: Path) -> Any:
    """Return what ``--print_config`` prints for these configs."""
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *(f"--config={config}" for config in configs), "--print_config"])
    assert exit_.value.code in (None, 0)
    return yaml.safe_load(capsys.readouterr().out)


def contains(whole: Any, part: Any) -> bool:
    """Return whether a config says at least what another one says."""
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return bool(whole == part)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_prints_what_it_says_and_loads_again(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    printed = print_config(capsys, recipe)
    assert contains(printed, yaml.safe_load(recipe.read_text()))
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(printed))
    assert print_config(capsys, tmp_path / "again.yaml") == printed


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_stacks_on_any_recipe(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for recipe in RECIPES:
        printed = print_config(capsys, recipe, preset)
        assert contains(printed, yaml.safe_load(preset.read_text()))
        assert printed["data"]["class_path"] == yaml.safe_load(recipe.read_text())["data"]["class_path"]


def test_the_optimizer_of_the_default_leaks_nothing_into_another(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = print_config(capsys, CONFIGS / "transfer.yaml")["model"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert optimizer["init_args"]["weight_decay"] == 0.01
    assert "momentum" not in optimizer["init_args"]


@pytest.mark.parametrize("preset", ["debug", "profile", "overfit"])
def test_a_preset_does_what_it_promises(
    preset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [f"--config={CONFIGS / name}.yaml" for name in ("quickstart", f"presets/{preset}")]
    small = ["--data.train_images=3000", "--data.val_size=100", "--trainer.log_every_n_steps=1"]
    command = ["fit", *configs, *small]
    if preset == "overfit":
        command.append("--trainer.max_epochs=1")
    assert main(command) == 0
    output = capsys.readouterr().out + caplog.text
    if preset == "debug":
        assert not Path("lightning_logs").exists(), "a debug run writes nothing"
    elif preset == "profile":
        assert "run_training_batch" in output
    else:
        assert "step 10  " in output


@pytest.mark.parametrize(
    ("words", "taken", "own"),
    [
        (["--model.optimizer", "AdamW"], "lr 0.05, weight_decay 0.0005", {"lr": 0.001, "weight_decay": 0.01}),
        (["--model.optimizer.class_path=torch.optim.AdamW", "--model.optimizer.lr=0.05"], "weight_decay 0.0005",
         {"weight_decay": 0.01}),
        (["--model.optimizer=AdamW", "--model.optimizer.init_args.weight_decay", "0.0005"], "lr 0.05", {"lr": 0.001}),
        (["--model.optimizer=AdamW", "--model.optimizer.lr=0.01", "--model.optimizer.weight_decay=0.1"], "", {}),
        (["--model.optimizer", "{class_path: AdamW, init_args: {lr: 0.05, weight_decay: 0.0005}}"], "", {}),
        (["--model.optimizer", "torch.optim.SGD", "--model.lr_scheduler=null", "--model.network=CNN"], "", {}),
        (["--config=model: {optimizer: {class_path: AdamW}}"], "lr 0.05, weight_decay 0.0005",
         {"lr": 0.001, "weight_decay": 0.01}),
        (["--config", "later.yaml"], "weight_decay 0.0005", {"weight_decay": 0.01}),
        (["--config=later.yaml", "--model.optimizer.weight_decay=0.1"], "", {}),
        (["--model.optimizer=AdamW", "--config=model: {lr_scheduler: null}"], "lr 0.05, weight_decay 0.0005",
         {"lr": 0.001, "weight_decay": 0.01}),
    ],
    ids=["two", "class_path", "init_args", "none", "whole", "the same", "itself", "later", "given", "before"],
)  # fmt: skip
def test_what_a_class_takes_over_from_the_one_it_replaces_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    taken: str,
    own: dict[str, float],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("later.yaml").write_text("model: {optimizer: {class_path: AdamW, init_args: {lr: 0.05}}}")
    fit = ["fit", f"--config={CONFIGS / 'quickstart.yaml'}", *TINY, "--trainer.max_steps=1"]
    assert main([*fit, *words]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    options = " ".join(f"--model.optimizer.{name} {value}" for name, value in own.items())
    assert notes == [f"note: model.optimizer: AdamW takes over {taken} from SGD; its own: {options}"] * bool(taken)
    if own:
        assert main([*fit, *words, *options.split()]) == 0
        assert "note:" not in capsys.readouterr().out


def test_what_an_optimizer_takes_over_from_the_one_that_nobody_named_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    note = "note: model.optimizer: {} takes over lr 0.02, {} from SGD; its own: --model.optimizer.lr {} "
    muon = "src.optim.Muon", "momentum 0.9, weight_decay 0.0005", "0.24"
    for name, taken, lr in (("AdamW", "weight_decay 0.0005", "0.001"), muon):
        told = note.format(name.rpartition(".")[2], taken, lr)
        for more, notes in ([], 1), (["--model.optimizer.lr=0.1"], 0):
            assert main(["fit", *TINY, "--trainer.max_steps=1", f"--model.optimizer={name}", *more]) == 0
            assert capsys.readouterr().out.count(told) == notes


@pytest.mark.parametrize(
    "config",
    [["--config", "x.yaml"], ["--config=x.yaml"], ["-c", "x.yaml"], ["-c=x.yaml"], ["-cx.yaml"]],
    ids=" ".join,
)
def test_the_command_line_beats_a_config_that_stands_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(
        "trainer: {max_steps: 5, max_epochs: 9, callbacks: [{class_path: ModelSummary}]}\n"
        "data: {class_path: Shapes10, init_args: {batch_size: 8, val_size: 9}}\n"
        "model: {optimizer: {class_path: SGD, init_args: {lr: 0.3}}}"
    )
    said = ["--trainer.max_steps=3", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    said += ["--data", "CIFAR10", "--data.batch_size", "7", "--model.optimizer.lr=0.1"]
    later = ["--config=trainer: {max_steps: 6, max_epochs: 2}"]
    with pytest.raises(SystemExit):
        main(["fit", *said, *config, *later, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["trainer"]["max_steps"], printed["trainer"]["max_epochs"]) == (3, 2)
    names = [callback["class_path"].rpartition(".")[2] for callback in printed["trainer"]["callbacks"]]
    assert names == ["ModelSummary", "EarlyStopping"]
    assert printed["data"]["class_path"] == "src.data.CIFAR10"
    assert (printed["data"]["init_args"]["batch_size"], printed["data"]["init_args"]["val_size"]) == (7, 9)
    assert printed["model"]["optimizer"]["init_args"]["lr"] == 0.1


def test_a_config_without_a_file_is_refused_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--config"], ["--config", "--trainer.max_steps=3"], ["x.yaml", "-c"]):
        with pytest.raises(SystemExit, match="2"):
            main(["fit", *words])
        assert "expected one argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "{trainer: {}, model: {}, data: {}, checkpoint: {}, guard: {}}",
        "model: {optimizer: {class_path: SGD, init_args: {}, dict_kwargs: {}}, network: {}, lr_scheduler: {}}",
        "trainer: {callbacks: [{class_path: GradientAccumulationScheduler, init_args: {scheduling: {}}}]}",
        "trainer: {callbacks: [{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}]}",
        "{trainer.callbacks: {}, model.network.init_args: {}, data: {init_args: {}}}",
    ],
)
def test_an_empty_section_that_there_is_changes_nothing(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", f"--config={text}\n", "--data=CIFAR10", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["class_path"] == "src.data.CIFAR10"


def test_a_note_is_no_reason_to_refuse_what_can_be_done(tmp_path: Path) -> None:
    Path(tmp_path / "step.yaml").write_text("model: {lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR}}")
    words = ["--config=step.yaml", "--model.lr_scheduler=torch.optim.lr_scheduler.ExponentialLR"]
    done = run_src("fit", *TINY, *words, "--model.lr_scheduler.gamma=0.9", cwd=tmp_path)
    assert (done.stderr, "note:" in done.stdout) == ("", False)


def test_what_nobody_names_has_a_class_that_leaves_nothing_to_others(capsys: pytest.CaptureFixture[str]) -> None:
    for words, data, network, val_size in (
        ([], "Shapes10", "CNN", 2000),
        (["--data.batch_size=7"], "Shapes10", "CNN", 2000),
        (["--data=CIFAR10"], "CIFAR10", "CNN", 5000),
        (["--config=data: {class_path: CIFAR10}", "--model.network", "ResNet"], "CIFAR10", "ResNet", 5000),
        (["--config=data: {init_args: {batch_size: 7}}"], "Shapes10", "CNN", 2000),
    ):
        with pytest.raises(SystemExit):
            main(["fit", *words, "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["data"]["class_path"] == f"src.data.{data}"
        assert printed["data"]["init_args"]["val_size"] == val_size
        assert printed["model"]["network"]["class_path"] == f"src.networks.{network}"


def test_the_version_and_the_help_are_printed(tmp_path: Path) -> None:
    from src import __version__

    assert run_src("--version", cwd=tmp_path).stdout == f"python -m src {__version__}\n"
    text = run_src("fit", "--help", cwd=tmp_path).stdout
    assert "usage: python -m src" in text
    for phrase in ("in [0, 1)", "--model.label_smoothing", "--checkpoint.monitor", "--data.help", "or best or last"):
        assert phrase in text
    assert len(text.splitlines()) < 500, "help must stay readable"
    assert "[--model.network NETWORK]" in text and "(required" not in text, "fit alone will do"
    words = " ".join(text.split())
    assert "By default src.networks.CNN. (type: <class 'Network'>, known" in words
    assert "By default src.data.Shapes10. (type: Optional[ImageData], known" in words


def test_the_help_of_an_evaluation_leaves_out_what_is_for_fits_but_their_configs_are_taken(tmp_path: Path) -> None:
    options = ("--chunk_size", "--cuda_graph", "--guard.on_nonfinite", "--checkpoint.monitor", "--new_run")
    text = help_of("test")
    assert "--live" in text and not any(option in text for option in options)
    text = help_of("fit")
    assert all(option in text for option in options)
    config = CONFIGS / "speed94_gpu.yaml"
    done = run_src("test", f"--config={config}", "--chunk_size=2", "--guard.lr_factor=0.5", cwd=tmp_path, status=2)
    assert done.stderr.startswith("error: test needs weights"), done.stderr


def test_every_numeric_argument_of_ours_tells_its_range_in_the_help(tmp_path: Path) -> None:
    text = run_src("fit", "--data.help", "CIFAR10", cwd=tmp_path).stdout
    for phrase in ("at least 1", "above 0, up to 1", "a share between 0 and 1", "--data.batch_size", "--data.root"):
        assert phrase in " ".join(text.split())


def test_a_network_of_the_user_is_wrapped_like_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "from src.networks import Network\n"
        "class Linear(Network):\n"
        "    def __init__(self, num_classes: int = 10) -> None:\n"
        "        super().__init__()\n"
        "        self.head = nn.Linear(3072, num_classes)\n"
        "    def forward(self, images):\n"
        "        return self.head(images.flatten(1))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny = ["--data.train_images=200", "--data.val_size=50", "--data.test_images=20", "--trainer.max_epochs=1"]
    assert main(["fit", "--model.network", "mynet.Linear", *tiny]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    checkpoint = "lightning_logs/version_0/checkpoints/best.ckpt"
    assert main(["test", "--ckpt_path", checkpoint]) == 1, "a class from a checkpoint alone is not trusted"
    assert main(["test", "--ckpt_path", checkpoint, "--model.network", "mynet.Linear"]) == 0
    assert main(printed.split("python -m src ")[1].split()) == 0, "the command that was printed knows"


def test_a_config_that_would_unfold_is_refused_before_it_is_unfolded() -> None:
    rows = [[0] * 5000] * 5000
    tracemalloc.start()
    with pytest.raises(UsageError, match="nested too deeply"):
        check_nesting({"rows": rows}, "x.yaml")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_config_may_come_from_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    def say(text: str) -> str:
        reading, writing = os.pipe()
        pipes.append(reading)
        os.write(writing, text.encode())
        os.close(writing)
        return f"/dev/fd/{reading}"

    pipes: list[int] = []
    for words in (["--config", say("---\ntrainer: {max_epochs: 3}")], [f"--config={say('trainer: {max_epochs: 3}')}"]):
        with pytest.raises(SystemExit, match="0"):
            main(["fit", *words, "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_epochs"] == 3
    assert main(["fit", "--config", say("a: 1\na: 2")]) == 2
    assert capsys.readouterr().err == "error: config: the text that is given: a is given twice, in lines 1, 2\n"
    assert main(["fit", "--config", say("")]) == 2
    assert "has no keys" in capsys.readouterr().err
    for pipe in pipes:
        os.close(pipe)
