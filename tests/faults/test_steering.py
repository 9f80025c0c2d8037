"""What steering promises: a run is a function of its config, its seed and its journal.

A run that is steered, stopped, killed and resumed ends in the same state, to the last bit, as one that was steered the
same way and left alone, and so does its replay from scratch.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.callbacks.controls import _size_problem
from src.callbacks.feeding import Feeding
from src.callbacks.signals import Signals
from src.callbacks.steering import Steering
from src.checkpoint_io import commit, serialize
from src.errors import Interrupted
from src.live.journal import Journal
from src.live.weights import Publisher
from src.steer import main as steer
from tests.faults.probe import (
    SCRIPT,
    SMALL,
    CrashError,
    Done,
    assert_equal,
    assert_same_run,
    batches,
    curves,
    fit,
    fit_through,
    load,
)
from tests.faults.test_resume import CALLBACKS, LAST, RECIPES, RUN, schedule

pytestmark = pytest.mark.usefixtures("fast_and_in_order", "here")

Script = dict[int, list[dict[str, Any]]]
"""Commands by the step after which they are sent."""


def with_steerer(*callbacks: dict[str, Any]) -> list[str]:
    """Return the arguments for a fit with these callbacks and the steerer."""
    return ["--trainer.callbacks", json.dumps([*callbacks, {"class_path": "tests.faults.probe.Steerer"}])]


def steered(*args: str, commands: Script, crashes: list[int], callbacks: list[dict[str, Any]] | None = None) -> Done:
    """Run a fit that is steered, and go on with it after each crash."""
    SCRIPT.write_text(json.dumps({"commands": commands, "crashes": crashes}))
    named = with_steerer(*(callbacks or []))
    command = [*SMALL, "--checkpoint.every_n_steps=2", *named, *args]
    return fit_through(len(crashes), command, ["--ckpt_path", str(LAST), *named])


RATES: Script = {
    3: [{"set": {"lr": 0.01, "momentum": 0.8}}],
    5: [{"set": {"weight_decay": 0.01, "label_smoothing": 0.1}}],
}
SIZES: Script = {1: [{"set": {"batch_size": 7}}], 4: [{"set": {"batch_size": 12}}, {"set": {"lr": 0.05}}]}
LOOKS: Script = {
    2: [{"do": "evaluate"}, {"do": "checkpoint"}],
    6: [{"do": "evaluate"}],
    7: [{"set": {"log_every_n_steps": 2}}],
}
ADAM: Script = {3: [{"set": {"betas": [0.8, 0.9], "lr": 0.0005}}], 6: [{"set": {"eps": 1e-6}}]}
ALL: Script = {
    **SIZES,
    2: [{"set": {"lr": 0.03}}, {"do": "checkpoint"}, {"set": {"lr": 0.02, "momentum": 0.7}}],
    3: [{"do": "evaluate"}, {"set": {"weight_decay": 0.0}}],
    8: [{"do": "pause"}, {"set": {"lr": 0.01}}, {"do": "resume"}, {"set": {"batch_size": 3, "label_smoothing": 0.2}}],
    11: [{"set": {"weight_decay": 0.001}}, {"set": {"lr": -1}}, {"set": {"nothing": 1}}],
}

RUNS: list[Any] = [
    pytest.param("one_cycle", RATES, [4], marks=pytest.mark.slow),
    pytest.param("one_cycle", SIZES, [3, 6], marks=pytest.mark.slow),
    ("one_cycle", ALL, [3, 4, 9]),
    pytest.param("accumulate", SIZES, [4], marks=pytest.mark.slow),
    ("accumulate_and_validate", ALL, [5]),
    ("schedule_of_torch", RATES, [6]),
    ("plateau", LOOKS, [5, 8]),
    ("adam", ADAM, [5, 8]),
    ("averaged", ALL, [5, 10]),
    ("lookahead", ALL, [7]),
    pytest.param("no_validation", RATES, [4], marks=pytest.mark.slow),
    pytest.param("max_steps", SIZES, [7], marks=pytest.mark.slow),
    ("chunks", ALL, [6]),
    pytest.param("cutmix", SIZES, [5], marks=pytest.mark.slow),
]
MORE = {
    "adam": ["--model.optimizer=AdamW", "--model.optimizer.lr=0.001", *schedule("ExponentialLR", gamma=0.9)],
    "chunks": ["--model.lr_scheduler=OneCycle", "--chunk_size=4"],
}


@pytest.mark.parametrize(("recipe", "commands", "crashes"), RUNS)
def test_a_steered_run_that_is_killed_and_resumed_equals_one_that_is_not_and_so_does_its_replay(
    recipe: str, commands: Script, crashes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    args, callbacks = {**RECIPES, **MORE}[recipe], CALLBACKS.get(recipe, [])
    for folder in ("quiet", "killed"):
        Path(folder).mkdir()
    with monkeypatch.context() as patch:
        patch.chdir("quiet")
        steered(*args, commands=commands, crashes=[], callbacks=callbacks)
    monkeypatch.chdir("killed")
    steered(*args, commands=commands, crashes=crashes, callbacks=callbacks)
    assert_same_run(RUN, Path("../quiet") / RUN, distinct=True)
    SCRIPT.unlink()
    done = fit("--config", RUN / "config.yaml", "--replay", RUN)
    assert (done.status, done.err) == (0, ""), done
    assert_same_run(RUN.with_name("version_1"), RUN, distinct=True)


def test_a_replay_that_is_killed_goes_on_as_one() -> None:
    steered(*RECIPES["one_cycle"], commands=ALL, crashes=[])
    for crashes in ([4, 9],):
        SCRIPT.write_text(json.dumps({"commands": {}, "crashes": crashes}))
        with pytest.raises(CrashError):
            fit("--config", RUN / "config.yaml", "--replay", RUN)
        last = RUN.with_name("version_1") / "checkpoints/last.ckpt"
        with pytest.raises(CrashError):
            fit("--ckpt_path", last, *with_steerer())
        done = fit("--ckpt_path", last, *with_steerer())
    assert (done.status, done.err) == (0, ""), done
    assert_same_run(RUN.with_name("version_1"), RUN, distinct=True)


def test_what_is_refused_changes_nothing_and_is_in_the_journal_once() -> None:
    hostile: list[dict[str, Any]] = [
        {"set": {"lr": 0}}, {"set": {"lr": 1e300}}, {"set": {"lr": "0.1"}}, {"set": {"lr": True}},
        {"set": {"lr": None}}, {"set": {"lr": [0.1]}}, {"set": {"batch_size": 0}}, {"set": {"batch_size": 2.5}},
        {"set": {"batch_size": 10**9}}, {"set": {"momentum": 1}}, {"set": {"weight_decay": -1}},
        {"set": {"label_smoothing": 1}}, {"set": {"log_every_n_steps": 0}}, {"set": {"__class__": 1}},
        {"set": {"lr": 0.01, "momentum": 2}}, {"do": "explode"}, {"do": "resume"}, {"set": {}}, {"do": "", "x": 1},
        {"set": {"lr": 0.1}, "do": "stop"},
    ]  # fmt: skip
    Path("a").mkdir()
    Path("b").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("a")
        steered(commands={4: hostile}, crashes=[])
        lines = Journal(RUN / "live/journal.jsonl").read()
        patch.chdir("../b")
        steered(commands={}, crashes=[])
    assert [line["kind"] for line in lines] == ["refused"] * len(hostile)
    assert sorted(line["id"] for line in lines) == sorted({f"4-{i}" for i in range(len(hostile))})
    assert_same_run(Path("a") / RUN, Path("b") / RUN)


def test_an_lr_that_is_steered_rebases_the_schedule() -> None:
    steered(*RECIPES["one_cycle"], commands={4: [{"set": {"lr": 0.004}}]}, crashes=[5])
    lrs = dict(curves(RUN)["lr"])
    Path("log").mkdir()
    steered(*RECIPES["one_cycle"], "--trainer.default_root_dir=log", commands={}, crashes=[])
    plain = dict(curves(Path("log") / RUN)["lr"])
    assert [lrs[k] for k in range(1, 5)] == [plain[k] for k in range(1, 5)]
    ratio = 0.004 / plain[5]
    assert [lrs[k] for k in range(5, 13)] == pytest.approx([plain[k] * ratio for k in range(5, 13)])
    assert load(RUN)["lr_scale"] == pytest.approx(ratio)


def test_tensorboard_shows_all_that_was_done_at_a_step() -> None:
    commands: Script = {3: [{"set": {"lr": 0.01}}, {"do": "evaluate"}, {"set": {"momentum": 0.5}}]}
    steered(commands=commands, crashes=[])
    events = EventAccumulator(str(RUN)).Reload()
    assert "steer/text_summary" in events.Tags()["tensors"]
    text = events.Tensors("steer/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text == "lr 0.02 -> 0.01 (test)  \nevaluate (test)  \nmomentum 0.9 -> 0.5 (test)"


def test_a_batch_size_that_is_steered_neither_repeats_nor_loses_an_image() -> None:
    SCRIPT.write_text(json.dumps({"commands": {2: [{"set": {"batch_size": 7}}], 5: [{"set": {"batch_size": 1}}]},
                                  "crashes": []}))  # fmt: skip
    probe = {"class_path": "tests.faults.probe.Probe", "init_args": {"log": "log"}}
    assert fit(*SMALL, *with_steerer(probe)).status == 0
    log = batches(Path("log"))
    for epoch, sizes in ((0, [10, 10, 7, 7, 7, *[1] * 14]), (1, [1] * 55)):
        ids = [line[3] for line in log if line[1] == epoch]
        assert list(map(len, ids)) == sizes
        assert len({i for of_batch in ids for i in of_batch}) == 55


def test_a_run_whose_batch_size_was_steered_can_be_made_longer() -> None:
    options = [*RECIPES["one_cycle"], "--model.lr_scheduler.pct_start=0"]
    steered(*options, commands={3: [{"set": {"batch_size": 5}}]}, crashes=[])
    SCRIPT.unlink()
    assert fit("--ckpt_path", LAST, "--trainer.max_epochs=4", *with_steerer()).status == 0
    lrs = [lr for _, lr in sorted(curves(RUN)["lr"])]
    Path("plain").mkdir()
    longer = ["--data.batch_size=5", "--trainer.max_epochs=4", "--trainer.default_root_dir=plain"]
    assert fit(*SMALL, *options, *longer).status == 0
    plain = [lr for _, lr in sorted(curves(Path("plain") / RUN)["lr"])]
    assert lrs[-22:] == pytest.approx(plain[-22:]), "the two epochs that were added"


def test_an_option_undoes_what_was_steered_though_the_config_has_it_so() -> None:
    values = {"lr": 0.04, "momentum": 0.5, "batch_size": 20, "label_smoothing": 0.1, "weight_decay": 0.01}
    with pytest.raises(CrashError):
        SCRIPT.write_text(json.dumps({"commands": {2: [{"set": values}], 3: [{"set": values}]}, "crashes": [4]}))
        fit(*SMALL, "--checkpoint.every_n_steps=3", "--model.optimizer.lr=0.02", *with_steerer())
    SCRIPT.unlink()
    same = ["--model.optimizer.momentum=0.9", "--data.batch_size=10", "--model.label_smoothing=0"]
    done = fit("--ckpt_path", LAST, *same, "--model.optimizer.lr=0.02", "--trainer.max_steps=6", *with_steerer())
    assert done.status == 0, done
    (group, _), checkpoint = load(RUN)["optimizer_states"][0]["param_groups"], load(RUN)
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.9, 0.01)
    assert checkpoint["lr_scale"] == 1
    assert "batch_size" not in checkpoint["steering"]["values"]
    assert "label_smoothing" not in checkpoint["steering"]["values"]
    done = fit("--ckpt_path", LAST, "--model.optimizer.lr=0.05", "--trainer.max_steps=7", *with_steerer())
    assert load(RUN)["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.05)


def test_the_batch_size_can_be_steered_where_validation_goes_by_the_clock() -> None:
    steered("--trainer.val_check_interval=00:00:01:00", commands={2: [{"set": {"batch_size": 5}}]}, crashes=[])
    assert load(RUN)["steering"]["values"] == {"batch_size": 5}


def test_the_batch_size_can_be_steered_before_there_is_an_image() -> None:
    trainer: Any = SimpleNamespace(world_size=1, limit_train_batches=1.0)
    loader: Any = SimpleNamespace(ids=[], growth=SimpleNamespace(room=100))
    assert _size_problem(trainer, loader, 100) is None
    assert _size_problem(trainer, loader, 101) == "is out of range: at least 1, below 101"
    loader = SimpleNamespace(ids=[0] * 30, growth=None)
    assert _size_problem(trainer, loader, 31) == "is out of range: at least 1, below 31"


def test_what_the_command_line_says_beats_what_was_steered() -> None:
    with pytest.raises(CrashError):
        SCRIPT.write_text(
            json.dumps({"commands": {3: [{"set": {"batch_size": 5, "label_smoothing": 0.1}}]}, "crashes": [7]})
        )
        fit(*SMALL, "--checkpoint.every_n_steps=2", *with_steerer())
    SCRIPT.unlink()
    done = fit("--ckpt_path", LAST, "--data.batch_size=11", *with_steerer())
    assert done.status == 0, done
    values = load(RUN)["steering"]["values"]
    assert values == {"label_smoothing": 0.1}
    assert load(RUN)["global_step"] == 6 + 1 + 5, "6 steps took 45 images: 10 are left; then an epoch of 55 in elevens"


def test_a_command_is_shown_by_the_word_that_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    commands: Script = {3: [{"do": "pause"}, {"do": "resume"}]}
    done = steered("--trainer.max_epochs=1", commands=commands, crashes=[])
    assert re.search(r"^step 3: pause \(.*\)\nstep 3: resume \(.*\)$", done.out, re.M), done.out
    fit("--ckpt_path", LAST, "--trainer.max_epochs=2", *with_steerer())
    capsys.readouterr()
    assert steer([str(RUN), "history"]) == 0
    shown = [re.split(r"  +", line)[2] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["pause", "resume", 'gone on with config {"trainer.max_epochs": 1} -> {"trainer.max_epochs": 2}']


def test_a_run_that_is_paused_publishes_the_weights_of_that_step(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = Publisher.publish

    def noted(publisher: Publisher, state: Any, step: int, *rest: Any) -> bool:
        with Path("published").open("a") as file:
            file.write(f"{step} ")
        return publish(publisher, state, step, *rest)

    monkeypatch.setattr(Publisher, "publish", noted)
    pauses: Script = {3: [{"do": "pause"}, {"do": "resume"}, {"do": "pause"}, {"do": "resume"}]}
    steered("--trainer.max_epochs=1", "--publish_every_n_steps=1000", commands=pauses, crashes=[])
    assert Path("published").read_text() == "0 3 "


def test_betas_that_are_no_pair_are_refused_with_their_form() -> None:
    commands: Script = {3: [{"set": {"betas": 0.9}}, {"set": {"betas": [0.8]}}]}
    steered("--trainer.max_epochs=1", *MORE["adam"], commands=commands, crashes=[])
    told = "is not a list of 2 numbers, as in 'betas=[0.9,0.999]'"
    found = [line["effective"] for line in Journal(RUN / "live/journal.jsonl").read()]
    assert found == [f"betas: 0.9 {told}", f"betas: [0.8] {told}"]


def test_what_a_command_saved_is_told_as_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Journal(Path("live/journal.jsonl")).append(1409, "stop", effective={"path": "last.ckpt"})
    answers = {"stop": {"step": 1409, "result": {"path": "last.ckpt"}}, "pause": {"step": 1409}}
    monkeypatch.setattr("src.steer.send", lambda _, command, __: answers[command.do])
    for word in ("history", "stop", "pause"):
        assert steer([".", word]) == 0
    history, stopped, paused = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 1,409 +[\d: -]+  stop saved last\.ckpt", history)
    assert (stopped, paused) == ("step 1,409: saved last.ckpt", "step 1,409: pause")


def test_the_fit_writes_a_large_step_as_steer_does(capsys: pytest.CaptureFixture[str]) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=1409, logger=None, checkpoint_callbacks=[])
    signals = Signals()
    feeding = Feeding(None, None, dict)
    Steering(True, None, {}, signals, dict, feeding)._show(trainer, "pause")
    assert capsys.readouterr().out == "step 1,409: pause\n"
    with pytest.raises(Interrupted, match=r"^stopped by steer at step 1,409; nothing was saved$"):
        signals.leave(trainer, None, 0)


@pytest.mark.parametrize("step", [3, 6])
def test_a_stop_saves_and_says_how_to_go_on(step: int) -> None:
    SCRIPT.write_text(json.dumps({"commands": {step: [{"do": "stop"}]}, "crashes": []}))
    done = fit(*SMALL, "--checkpoint.every_n_epochs=2", *with_steerer())
    command = f"python -m src fit --config {RUN}/config.yaml --ckpt_path {LAST}"
    assert done.err == f"stopped by steer at step {step}; go on with: {command}\n"
    assert load(RUN)["global_step"] == step
    SCRIPT.unlink()
    assert fit("--ckpt_path", LAST, *with_steerer()).status == 0
    Path("quiet").mkdir()
    assert fit(*SMALL, "--trainer.default_root_dir=quiet").status == 0
    assert_equal(load(RUN)["state_dict"], load(Path("quiet") / RUN)["state_dict"], "weights")


def test_a_replay_refuses_a_run_that_went_on_with_another_config() -> None:
    steered(commands={3: [{"do": "stop"}]}, crashes=[])
    SCRIPT.unlink()
    assert fit("--ckpt_path", LAST, "--model.optimizer.momentum=0.5", *with_steerer()).status == 0
    done = fit("--config", RUN / "config.yaml", "--replay", RUN)
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        f"error: replay: {RUN} went on at step 3 with another model.optimizer.momentum, which a replay cannot follow\n"
    )
    assert [p.name for p in RUN.parent.iterdir()] == ["version_0"], "nothing is half-written"


def test_a_transaction_that_fails_half_way_is_undone_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    write = Journal.extend

    def fail_on_set(journal: Journal, step: int, kind: str, *args: Any, **kwargs: Any) -> Any:
        return full() if kind == "set" else write(journal, step, kind, *args, **kwargs)

    monkeypatch.setattr(Journal, "extend", fail_on_set)
    wanted = {"lr": 0.0123, "batch_size": 7, "label_smoothing": 0.1, "weight_decay": 0.1, "momentum": 0.5}
    steered(*RECIPES["one_cycle"], commands={3: [{"set": wanted}]}, crashes=[], callbacks=CALLBACKS["lookahead"])
    (line,) = Journal(RUN / "live/journal.jsonl").read()
    assert (line["kind"], line["effective"]) == ("refused", "it cannot be journaled (No space left on device)")
    Path("quiet").mkdir()
    monkeypatch.chdir("quiet")
    steered(*RECIPES["one_cycle"], commands={}, crashes=[], callbacks=CALLBACKS["lookahead"])
    assert_same_run(Path("..") / RUN, RUN)


def test_commands_behind_a_stop_are_refused() -> None:
    commands: Script = {3: [{"do": "stop"}, {"set": {"lr": 0.01}}, {"do": "evaluate"}]}
    steered(commands=commands, crashes=[])
    lines = Journal(RUN / "live/journal.jsonl").read()
    assert [(line["kind"], line["id"]) for line in lines] == [("stop", "3-0"), ("refused", "3-1"), ("refused", "3-2")]


def test_a_size_of_batches_can_be_steered_in_a_run_without_an_end() -> None:
    done = steered(
        "--trainer.max_epochs=-1", commands={3: [{"set": {"batch_size": 7}}], 5: [{"do": "stop"}]}, crashes=[]
    )
    assert "batch_size 10 -> 7" in done.out


def test_an_evaluation_does_not_know_whether_the_fit_was_resumed() -> None:
    commands: Script = {7: [{"do": "evaluate"}]}
    steered(commands=commands, crashes=[])
    whole = curves(RUN)["val/acc"]
    for crash in (8, 9):
        Path(f"at{crash}").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(f"at{crash}")
            steered(commands=commands, crashes=[crash])
            assert curves(RUN)["val/acc"] == whole


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run whose batch size was steered."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        steered(commands={3: [{"set": {"batch_size": 7, "label_smoothing": 0.1}}, {"do": "stop"}]}, crashes=[])
    return folder / LAST


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("batch_size", 0, "the checkpoint's batch_size, 0, is none that the data has images for"),
        ("batch_size", -5, "the checkpoint's batch_size, -5, is none"),
        ("batch_size", "7", "the checkpoint's batch_size, 7, is none"),
        ("batch_size", 10**9, "is none that the data has images for"),
        ("label_smoothing", "x", "the checkpoint's label_smoothing x is not a number"),
        ("drawn", -(10**12), "the checkpoint's place in the epoch, -1000000000000, is none of 55 images"),
        ("drawn", "x", "the checkpoint's place in the epoch, x, is none"),
        ("lr_scale", "x", "lr_scale and schedule_lrs are not those of a schedule"),
        ("lr_scale", float("nan"), "lr_scale and schedule_lrs are not those of a schedule"),
        ("lr_scale", 0.5, "lr_scale and schedule_lrs are not those of a schedule"),
        ("schedule_lrs", [0.1], "ckpt_path: "),
        ("lr_ratio", 0.0, "the checkpoint's lr_ratio, 0.0, is none"),
    ],
)
def test_a_checkpoint_with_values_that_cannot_be_is_refused_in_one_line(
    key: str, value: Any, said: str, stopped: Path
) -> None:
    checkpoint = torch.load(stopped, weights_only=True)
    if key in checkpoint["steering"]["values"]:
        checkpoint["steering"]["values"][key] = value
    elif key in checkpoint["steering"]:
        checkpoint["steering"][key] = value
    elif key == "drawn":
        checkpoint["data"][key] = value
    else:
        checkpoint[key] = value
    path = Path("hostile.ckpt")
    commit(serialize(checkpoint, path), path)
    done = fit("--ckpt_path", path, *with_steerer())
    assert done.status == 1, done
    assert said in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
