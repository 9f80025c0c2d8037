"""Bad input gets one line that names the key or the file, the right exit status, and leaves no run behind."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from src.checkpoint_io import commit, serialize
from src.cli import CLI, main
from tests.conftest import CONFIGS, TINY, run_src

LIGHTNING = "lightning.pytorch.callbacks"

BAD_ARGUMENTS = [
    (["fit", "--trainer.max_epoch", "3"], "unknown option --trainer.max_epoch; did you mean --trainer.max_epochs?"),
    (["fit", "--trainr.max_epochs=3"], "unknown option --trainr.max_epochs; did you mean --trainer.max_epochs?"),
    (["fit", "--data.batch_sise", "3"], "unknown key data.batch_sise; did you mean data.batch_size?"),
    (["fit", "--model.optimizer.lrr", "3"], "unknown key model.optimizer.lrr; did you mean model.optimizer.lr?"),
    (["fit", "--model.optimiser.lrr", "3"], "unknown option --model.optimiser.lrr; did you mean --model.optimizer.lr?"),
    (["fit", "--max_epochs", "3"], "unknown option --max_epochs; did you mean --trainer.max_epochs?"),
    (
        ["fit", "--model.optimizer.learning_rate=0.1"],
        "unknown key model.optimizer.learning_rate; python -m src fit --model.optimizer.help SGD lists what there is",
    ),
    (
        ["fit", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.learning_rate=0.1"],
        "unknown key model.optimizer.learning_rate; python -m src fit --model.optimizer.help torch.optim.AdamW lists",
    ),
    (
        ["fit", "--data.root", "x"],
        "unknown key data.root; python -m src fit --data.help src.data.Shapes10 lists what there is",
    ),
    (
        ["fit", "--config", f"{CONFIGS}/cifar10.yaml", "--data.train_images=3"],
        "unknown key data.train_images; python -m src fit --data.help src.data.CIFAR10 lists what there is",
    ),
    (
        ["fit", "--model.lr_scheduler.foo=3"],
        "unknown key model.lr_scheduler.foo; python -m src fit --model.lr_scheduler.help CLASS lists what there is",
    ),
    (["fit", "--guard.foo=3"], "unknown option --guard.foo; --help lists what there is"),
    (["fit", "stray"], "'stray' is not an option"),
    (["fitt"], "unknown sub-command 'fitt'; choose from fit, validate, test, predict"),
    ([], "give a sub-command: fit, validate, test, predict, watch, steer, feed"),
    (["fit", "--config", "nowhere.yaml"], "config: there is no file"),
    (["fit", "--trainer.max_epochs", "many"], "trainer.max_epochs: 'many' is not valid; expected a whole number"),
    (["fit", "--data.batch_size", "big"], "data.batch_size: 'big' is not valid; expected a whole number"),
    (["fit", "--model.optimizer.lr", "fast"], "model.optimizer.lr: 'fast' is not valid; expected a number"),
    (["fit", "--trainer.precision", "9-true"], "trainer.precision: '9-true' is not valid; expected"),
    (["fit", "--seed_everything", "true"], "seed_everything: give a whole number"),
    (["fit", "--seed_everything", "x"], "seed_everything: 'x' is not valid; expected a whole number\n"),
    (
        ["fit", "--trainer.max_time", "3s"],
        "trainer.max_time: '3s' is not valid; expected days:hours:minutes:seconds, such as 00:01:30:00\n",
    ),
    (
        ["fit", "--trainer.max_time={minute: 3}"],
        "trainer.max_time: {'minute': 3} is not valid; expected days:hours:minutes:seconds",
    ),
    (["fit", "--chunk_size", "0"], "chunk_size: 0 is out of range: at least 1 step"),
    (["fit", "--data.split_seed=null"], "data.split_seed: null is not valid; leave it out to have the default"),
    (["fit", "--data.batch_size=null"], "data.batch_size: null is not valid"),
    (["fit", "--model.optimizer.lr=null"], "model.optimizer.lr: null is not valid"),
    (
        ["fit", "--data.augment=[{class_path: RandomCrop, init_args: {padding: null}}]"],
        "data.augment.padding: null is not valid",
    ),
    (["fit", "--seed_everything", "-1"], "seed_everything: -1 is out of range: at least 0, below 2**32"),
    (["fit", "--model.network", "{class_path: CNN"], "model.network: "),
    (
        ["fit", "--checkpoint.monitor", "train/loss"],
        "checkpoint.monitor: 'train/loss' is not valid; expected one of val/",
    ),
    (
        ["fit", "--config", f"{CONFIGS}/quickstart.yaml", "--trainer.max_epochs", "-1", "--data.train_images", "2500"],
        "model.lr_scheduler: OneCycle needs the length of the run",
    ),
    (
        ["fit", "--data.augment", "[{class_path: RandomCrop, init_args: {padding: 32}}]"],
        "data.augment.padding: 32 is out",
    ),
    (
        ["fit", "--trainer.accelerator=cpu", "--trainer.devices=2", "--data.batch_size=1"],
        "data.batch_size: 1 is less than the number of devices, 2",
    ),
    (["fit", "--trainer.default_root_dir=caf\udce9"], "trainer.default_root_dir: caf\\udce9 is not text in UTF-8"),
    (["fit", "--checkpoint.mode", "big"], "checkpoint.mode: 'big' is not valid; expected one of max, min"),
    (["fit", "--data", "CIFAR100"], "data: there is no class CIFAR100; there are CIFAR10, Shapes10"),
    (["fit", "--model.network", "CNNN"], "model.network: there is no class CNNN; there are CNN, ResNet"),
    (["fit", "--model.network", "torch.nn.Linear"], "model.network: torch.nn.Linear is not a Network"),
    (["fit", "--data.augment", "[{class_path: RandomFlip, init_args: {mode: up}}]"], "data.augment.mode: 'up' is not"),
    (["fit", "--model.optimizer.lr", "-1"], "model.optimizer.lr: -1.0 is out of range: at least 0"),
    (["fit", "--model.optimizer.lr", ".inf"], "model.optimizer.lr: inf is out of range"),
    (["fit", "--model.optimizer.lr", "1e39"], "model.optimizer.lr: 1e+39 is out of range: at least 0, below 3.4e+38"),
    (["fit", "--model.backbone_lr", ".inf"], "model.backbone_lr: inf is out of range: above 0"),
    (["--config", f"{CONFIGS}/quickstart.yaml", "fit"], "config: it is given behind the sub-command: python -m src "),
    (
        ["fit", "--model.optimizer.momentum", "1.5"],
        "model.optimizer.momentum: 1.5 is out of range: at least 0, below 1",
    ),
    (["fit", "--model.optimizer", "Adadelta", "--model.optimizer.rho", "3"], "model.optimizer.rho: 3.0 is not valid"),
    (["fit", "--model.optimizer", "Adafactor", "--model.optimizer.d", "0"], "model.optimizer: Clipping threshold d"),
    (["fit", "--model.network", "src.networks.Network"], "model.network: Network has nothing to learn"),
    (["fit", "--model.label_smoothing", "1"], "model.label_smoothing: 1.0 is out of range: at least 0, below 1"),
    (["fit", "--model.freeze_backbone", "-1"], "model.freeze_backbone: -1 is out of range"),
    (["fit", "--model.network.dropout", "1.5"], "model.network.dropout: 1.5 is out of range: at least 0, below 1"),
    (
        ["fit", "--model.lr_scheduler", "OneCycle", "--model.lr_scheduler.pct_start", "2"],
        "model.lr_scheduler.pct_start: 2",
    ),
    (["fit", "--data.batch_size", "0"], "data.batch_size: 0 is out of range: at least 1 image"),
    (["fit", "--data.val_size", "1.5"], "data.val_size: 1.5 is out of range: a number of images, or a share in [0, 1)"),
    (["fit", "--data.train_fraction", "0"], "data.train_fraction: 0.0 is out of range: above 0, up to 1"),
    (
        ["fit", "--trainer.callbacks+={class_path: EarlyStopping, init_args: {monitor: val_loss}}"],
        "trainer.callbacks.monitor: 'val_loss' is not measured; there are train/loss, train/acc, val/loss, val/acc",
    ),
    (["fit", "--data.small_size", "40"], "data.small_size: 40 is out of range: 8 to 32 pixels"),
    (["fit", "--data.small_epochs", "1"], "data.small_size: the network takes no images of 24 pixels"),
    (["fit", "--data.val_size", "99999"], "data.val_size: 99999 leaves nothing to train on"),
    (
        ["fit", "--trainer.min_steps", "1" + "0" * 30],
        "trainer.min_steps: 1e+30 is out of range: whole numbers are below 2**63",
    ),
    (
        ["fit", "--data.augment", "[{class_path: RandomCrop, init_args: {padding: 0}}]"],
        "data.augment.padding: 0 is out",
    ),
    (["fit", "--trainer.max_epochs", "-5"], "trainer.max_epochs: -5 is out of range: at least -1"),
    (["fit", "--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches: 0 is out of range"),
    (["fit", "--trainer.limit_train_batches", "-1"], "-1 for limit_train_batches"),
    (["fit", "--trainer.precision", "16-mixed", "--trainer.accelerator", "cpu"], "trainer.precision: 16-mixed: a CPU"),
    (["fit", "--trainer.precision", "16-true", "--trainer.accelerator", "cpu"], "trainer.precision: 16-true: a CPU"),
    (["fit", "--ckpt_path", "https://example.org/x.ckpt"], "ckpt_path: https://example.org/x.ckpt is a URL"),
    (
        ["fit", "--model.freeze_backbone=1", "--trainer.accelerator=cpu", "--trainer.devices=2"],
        "model.freeze_backbone: with several devices it needs --trainer.strategy ddp_find_unused_parameters_true",
    ),
    (
        [
            "fit",
            "--model.selection.network=CNN",
            "--model.selection.every=2",
            "--trainer.accelerator=cpu",
            "--trainer.devices=2",
        ],
        "model.selection: with several devices it needs --trainer.strategy ddp_find_unused_parameters_true",
    ),
    (
        [
            "fit",
            "--model.tta=six_if_unsure",
            "--trainer.strategy={class_path: lightning.pytorch.strategies.ModelParallelStrategy}",
            "--trainer.accelerator=cpu",
            "--trainer.devices=2",
        ],
        "model.tta: six_if_unsure is not for devices that share out the parameters; take six",
    ),
    (
        ["fit", "--model.selection.share=0.5"],
        "model.selection: Selection needs network; give model.selection.network",
    ),
    (
        ["fit", "--model.selection.network=CNN", "--model.selection.share=1"],
        "model.selection.share: 1.0 is out of range",
    ),
    (["fit", "--checkpoint.every_n_steps", "0"], "checkpoint.every_n_steps: 0 is out of range: at least 1"),
    (["fit", "--checkpoint.every_n_steps", "-3"], "checkpoint.every_n_steps: -3 is out of range"),
    (["fit", "--trainer.val_check_interval", "0"], "trainer.val_check_interval: 0 is out of range: above 0"),
    (["fit", "--trainer.val_check_interval", "-0.5"], "trainer.val_check_interval: -0.5 is out of range: above 0"),
    (["fit", "--trainer.min_epochs", "-5"], "trainer.min_epochs: -5 is out of range: at least 0"),
    (["fit", "--trainer.min_steps", "-1"], "trainer.min_steps: -1 is out of range: at least 0"),
    (
        ["fit", "--trainer.reload_dataloaders_every_n_epochs", "1"],
        "trainer.reload_dataloaders_every_n_epochs: leave it",
    ),
    (["fit", "--data.val_size", "0.00001"], "data.val_size: 1e-05 of 12000 images is none; give 0, or more"),
    (["fit", "--checkpoint.every_n_epochs", "0"], "checkpoint.every_n_epochs: 0 is out of range: at least 1"),
    (["fit", "--checkpoint.every_n_minutes", "0"], "checkpoint.every_n_minutes: 0.0 is out of range: above 0"),
    (["fit", "--checkpoint.every_n_minutes", ".nan"], "checkpoint.every_n_minutes: nan is out of range"),
    (["fit", "--guard.lr_factor", ".nan"], "guard.lr_factor: nan is out of range: above 0, up to 1"),
    (["fit", "--guard.lr_factor", ".inf"], "guard.lr_factor: inf is out of range"),
    (["fit", "--guard.lr_factor", "-0.5"], "guard.lr_factor: -0.5 is out of range"),
    (["fit", "--guard.on_nonfinite", "hope"], "guard.on_nonfinite: 'hope' is not valid; expected one of stop, "),
    (
        [
            *("fit", f"--trainer.callbacks={LIGHTNING}.StochasticWeightAveraging"),
            *("--trainer.callbacks.swa_lrs=0.1", "--trainer.callbacks.device=null"),
        ],
        "trainer.callbacks: StochasticWeightAveraging is not supported: take EMAWeightAveraging",
    ),
    (
        ["fit", f"--trainer.callbacks={LIGHTNING}.LearningRateFinder"],
        "trainer.callbacks: LearningRateFinder is not supported: give model.optimizer.lr",
    ),
    (
        ["fit", f"--trainer.callbacks={LIGHTNING}.BatchSizeFinder"],
        "trainer.callbacks: BatchSizeFinder is not supported: give data.batch_size",
    ),
    (
        [
            *("fit", "--model.lr_scheduler=OneCycle", "--trainer.callbacks"),
            f"{{class_path: {LIGHTNING}.GradientAccumulationScheduler, init_args: {{scheduling: {{0: 2}}}}}}",
        ],
        "trainer.callbacks: GradientAccumulationScheduler: OneCycle would not know the length of the run",
    ),
    (
        ["fit", f"--trainer.callbacks={LIGHTNING}.ModelCheckpoint", "--trainer.callbacks.monitor=val_acc"],
        "trainer.callbacks.monitor: 'val_acc' is not measured; there are train/loss, train/acc, val/loss, val/acc",
    ),
    (
        ["fit", "--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=loss"],
        "model.lr_scheduler.monitor: 'loss' is not measured; there are val/loss, val/acc",
    ),
    (
        ["fit", *TINY, "--model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau", "--data.val_size=0"],
        "model.lr_scheduler: it goes by val/loss, and nothing is validated; see data.val_size",
    ),
    (
        ["fit", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp_spawn"],
        "trainer.strategy: what starts its processes out of this one is not supported; take ddp",
    ),
    (
        ["fit", "--model.network=WhitenedCNN", "--model.network.whiten_bias_epochs=-3"],
        "model.network.whiten_bias_epochs: -3 is out of range: 0 or more epochs",
    ),
    (
        ["fit", "--data=tests.data.test_module.Uneven", "--data.val_size=10"],
        "model.network: the network takes no images of 8 pixels",
    ),
    (["fit", *TINY, "--trainer.val_check_interval=100"], "`val_check_interval` (100) must be less than or equal"),
    (
        ["fit", "--model.lr_scheduler", "StepLR"],
        "model.lr_scheduler: StepLR needs step_size; give model.lr_scheduler.step_size",
    ),
    (
        ["fit", f"--trainer.callbacks={LIGHTNING}.EarlyStopping"],
        "trainer.callbacks: EarlyStopping needs monitor; give trainer.callbacks.monitor",
    ),
    (
        ["fit", "--model.lr_scheduler=ReduceLROnPlateau"],
        "model.lr_scheduler: there are several classes ReduceLROnPlateau; give the import path of one: torch.optim.",
    ),
    (
        ["fit", "--model.optimizer=torch.optim.AdamWW"],
        "model.optimizer: there is no class torch.optim.AdamWW; did you mean AdamW?",
    ),
    (["fit", "--model.lr_scheduler=OneCycl"], "model.lr_scheduler: there is no class OneCycl; did you mean OneCycle?"),
    (["fit", "--model.optimizer=torch.optim.Foo"], "model.optimizer: there is no class torch.optim.Foo\n"),
    (["fit", "--model.optimizer=my.Foo"], "model.optimizer: there is no class my.Foo: No module named 'my'\n"),
    (["fit", "--model.network=my.Net"], "model.network: there is no class my.Net: No module named 'my'\n"),
    (
        ["fit", "--model.network=src.networks.ResNet18"],
        "model.network: there is no class src.networks.ResNet18; there are CNN, ResNet",
    ),
    (["fit", "--data=src.data.CIFAR100"], "data: there is no class src.data.CIFAR100; there are CIFAR10, Shapes10"),
    (
        ["fit", "--data.augment+=src.data.RandomCro"],
        "data.augment: there is no class src.data.RandomCro; there are ColorJitter",
    ),
    (["fit", "--data.mix=src.data.Mix"], "data.mix: there is no class src.data.Mix; there are CutMix, MixUp"),
    (["fit", "--trainer.callbacks+=my.Own"], "trainer.callbacks: there is no class my.Own: No module named 'my'\n"),
    (["fit", "--model.optimizer=Foo"], "model.optimizer: there is no class Foo; give its whole import path, such as"),
    (
        ["fit", "--model.lr_scheduler=torch.optim.SGD"],
        "model.lr_scheduler: torch.optim.SGD is not a LRScheduler or ReduceLROnPlateau",
    ),
    (["fit", "--trainer.logger=CSVLogger"], "trainer.logger: CSVLogger needs save_dir; give trainer.logger.save_dir"),
    (["fit", "--data=[]"], "data: '[]' is not valid; see --help"),
    (["fit", "--data.seed=3"], "data.seed: it is that of the whole run; give seed_everything"),
    (["fit", "--model.network=CNN", "--model.network.num_classes=3"], "model.network.num_classes: it is that of the d"),
    (["fit", "--ckpt_path=null", "--data.batch_size=0"], "data.batch_size: 0 is out of range"),
    (["test"], "test needs weights: give --ckpt_path best, last, or a file"),
    (["validate"], "validate needs weights"),
    (["predict"], "predict needs weights"),
]

BAD_CONFIGS = [
    ("trainer: {max_epoch: 3}", "unknown key trainer.max_epoch; did you mean trainer.max_epochs?"),
    ("trainr: {max_epoch: 3}", "unknown key trainr.max_epoch; did you mean trainer.max_epochs?"),
    (
        "trainer: {max_time: 1:30:00}",
        "trainer.max_time: '5400' is not valid; expected days:hours:minutes:seconds, such",
    ),
    ("optimiser: 1", "unknown key optimiser; did you mean model.optimizer?"),
    ("modle: null", "unknown key modle; did you mean model?"),
    ("modle: {}", "unknown key modle; did you mean model?"),
    ("model.optimiser: {}", "unknown key model.optimiser; did you mean model.optimizer?"),
    ("modle: {network: {}}", "unknown key modle; did you mean model?"),
    ("checkpoint: {every_n_step: {}}", "unknown key checkpoint.every_n_step; did you mean checkpoint.every_n_steps?"),
    ("data: {bach_size: {}}", "unknown key data.bach_size; did you mean data.batch_size?"),
    ("data: {class_path: CIFAR10, init_args: {roots: {}}}", "unknown key data.roots; did you mean data.root?"),
    (
        "trainer: {callbacks: [{class_path: ModelSummary, init_args: {max_dept: {}}}]}",
        "unknown key trainer.callbacks.max_dept",
    ),
    ("model: {optimiser: {class_path: SGD}}", "unknown key model.optimiser.class_path; did you mean model.optimizer.c"),
    (
        "model: {optimiser: {class_path: SGD, init_args: {lr: 0.1}}}",
        "unknown key model.optimiser.lr; did you mean model.optimizer.lr?",
    ),
    (
        "data: {class_path: CIFAR10, init_args: {batch_sise: 3}}",
        "unknown key data.batch_sise; did you mean data.batch_",
    ),
    ("model: {network: {class_path: CNN, init_args: {dropout: 1.5}}}", "model.network.dropout: 1.5 is out of range"),
    ("model: [", "config: bad.yaml is not valid YAML: expected the node content, but found '<stream end>' in line 1"),
    ("", "config: bad.yaml has no keys"),
    ("- 1", "config: bad.yaml has no keys"),
    ("1: 2", "config: bad.yaml: the key 1 is not a text"),
    ("trainer:\n  max_epochs: 1\n  max_epochs: 2", "config: bad.yaml: max_epochs is given twice, in lines 2, 3"),
    ("trainer: [max_epochs: 3]", "trainer: [{'max_epochs': 3}] is not valid; expected keys and values (bad.yaml)"),
    ("model: 3", "model: 3 is not valid; expected keys and values (bad.yaml)"),
    ("config: [a.yaml]", "config: bad.yaml names another config, which is not read; give --config for each"),
    ("checkpoint: null", "checkpoint: None is not valid; expected keys and values (bad.yaml)"),
    ("data: [1]", "data: [1] is not valid; expected a class"),
    ("model: {network: null}", "model.network: it has to be given"),
    (
        "model: {optimizer: {class_path: torch.optim.SGD, lr: 0.1}}",
        "model.optimizer.lr: arguments of a class are under",
    ),
    ("model: {optimizer: {class_path: 3}}", "model.optimizer.class_path: 3 is not the name of a class (bad.yaml)"),
    ("model: {network: {class_path: CNN, init_args: [1]}}", "model.network.init_args: [1] is not valid; expected keys"),
    ("model: {optimizer: {class_path: torch.optim.SDG}}", "model.optimizer: there is no class torch.optim.SDG; did y"),
    ("data: {class_path: Shapes10, init_args: {seed: 3}}", "data.seed: it is that of the whole run; give seed_everyth"),
    (
        "model: {lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {gamma: 0.5}}}",
        "model.lr_scheduler: StepLR needs step_size; give model.lr_scheduler.step_size",
    ),
]

FAILURES = [
    (["fit", "--trainer.accelerator", "gpu"], "trainer.accelerator: gpu: torch finds none on this machine"),
    (["fit", "--ckpt_path", "last"], "ckpt_path: no run in lightning_logs has a last.ckpt yet"),
    (["test", "--ckpt_path", "best"], "ckpt_path: no run in lightning_logs has a best.ckpt yet"),
    (["test", "--ckpt_path", "nowhere.ckpt"], "ckpt_path: there is no file nowhere.ckpt"),
    (["predict", "--ckpt_path", "nowhere.ckpt"], "ckpt_path: there is no file nowhere.ckpt"),
    (
        ["fit", "--data", "CIFAR10", "--data.download", "false"],
        "there is no CIFAR-10 in data: put cifar-10-python.tar.gz",
    ),
    (["fit", "--model.network", "CNN", "--model.network.weights", "no.pt"], "model.network.weights: there is no file"),
    (
        ["fit", "--model.selection.network", "CNN", "--model.selection.network.weights=no.pt"],
        "model.selection.network.weights: there is no file no.pt",
    ),
]


def refusal(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command that must be refused; return its exit status and the one line that it printed."""
    try:
        status = main(args)
    except SystemExit as exit_:
        status = int(str(exit_.code))
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(Path().glob("lightning_logs/*")), "a run folder was left behind"
    return status, error.removeprefix("error: ")


@pytest.mark.parametrize(("args", "line"), BAD_ARGUMENTS, ids=[" ".join(a) for a, _ in BAD_ARGUMENTS])
def test_a_bad_argument_is_refused_in_one_line(
    args: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, error = refusal(args, capsys)
    assert (status, line in error) == (2, True), error


@pytest.mark.parametrize(("text", "line"), BAD_CONFIGS)
def test_a_bad_config_is_refused_in_one_line(
    text: str, line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    status, error = refusal(["fit", "--config", "bad.yaml"], capsys)
    assert (status, line in error) == (2, True), error


def test_an_unknown_argument_of_a_class_that_only_a_run_names_is_refused_with_what_lists_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("data: {class_path: src.data.CIFAR10}")
    _, error = refusal(["test", "--live", ".", "--data.train_images=3"], capsys)
    assert error.startswith("unknown key data.train_images; python -m src fit --data.help src.data.CIFAR10 lists")


@pytest.mark.parametrize(("args", "line"), FAILURES, ids=[" ".join(a) for a, _ in FAILURES])
def test_a_failure_of_the_world_is_told_in_one_line(
    args: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "gpu" in args and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    status, error = refusal(args, capsys)
    assert (status, line in error) == (1, True), error


def test_an_altered_data_file_is_named_before_a_run_begins(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("cifar-10-batches-py")
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"altered")
    status, error = refusal(["fit", "--data=CIFAR10", "--data.root=."], capsys)
    assert status == 1
    assert "cifar-10-batches-py/data_batch_1 is not the official file: it has 7 bytes" in error


def test_in_a_process_of_its_own_there_is_the_line_and_nothing_else(tmp_path: Path) -> None:
    done = run_src("fit", "--data.batch_size", "0", cwd=tmp_path, status=2)
    assert done.stderr == "error: data.batch_size: 0 is out of range: at least 1 image\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_what_lightning_says_of_a_cluster_takes_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("SLURM_NTASKS", "4"), ("SLURM_JOB_ID", "1"), ("SLURM_JOB_NAME", "train")):
        monkeypatch.setenv(name, value)
    status, error = refusal(["fit"], capsys)
    assert (status, "`--ntasks=4`" in error) == (2, True), error


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "RANK=1"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=0"),
        ({"SLURM_PROCID": "3"}, "SLURM_PROCID=3"),
    ],
    ids=["second", "first", "slurm"],
)
def test_one_of_several_processes_that_know_nothing_of_each_other_is_refused(
    tmp_path: Path, variables: dict[str, str], named: str
) -> None:
    done = run_src("fit", *TINY, cwd=tmp_path, status=2, **variables)
    assert done.stderr.count("\n") == 1
    assert f"error: trainer.strategy: {named} in the environment makes this one of several" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_is_shown_to_who_asks_for_it(tmp_path: Path) -> None:
    done = run_src("fit", "--data.batch_size", "0", cwd=tmp_path, status=2, LIVE_CIFAR10_TRACEBACK="1")
    assert "Traceback" in done.stderr


def test_a_traceback_leads_to_where_it_went_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> CLI:
        raise OSError(errno.ENOSPC, "No space left on device", "some/file")

    assert main([], fail) == 1
    line = "error: some/file could not be written or read (No space left on device)\n"
    assert capsys.readouterr().err == line
    monkeypatch.setenv("LIVE_CIFAR10_TRACEBACK", "1")
    assert main([], fail) == 1
    told = capsys.readouterr().err
    assert "in fail\n" in told
    assert told.endswith(line)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"not a checkpoint", "bad.ckpt is damaged or cut short, or is not a checkpoint of this project"),
        ({"state_dict": {}, "epoch": 0, "global_step": 0}, "bad.ckpt is not a checkpoint of this project"),
    ],
    ids=["a text", "other content"],
)
def test_what_is_no_checkpoint_of_this_project_is_refused_by_name(
    content: bytes | dict[str, Any],
    line: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("bad.ckpt")
    commit(content if isinstance(content, bytes) else serialize(content, path), path)
    status, error = refusal(["test", "--ckpt_path", "bad.ckpt"], capsys)
    assert (status, line in error) == (1, True), error


def test_weights_of_another_network_are_refused_by_the_tensor(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = trained[0] / "lightning_logs/version_0/checkpoints/last.ckpt"
    assert main(["test", "--ckpt_path", str(checkpoint), *TINY[:4], "--model.network.norm", "batch"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ckpt_path: the checkpoint holds another network")
    assert "network.features" in error


def test_an_optimizer_that_refuses_the_first_step_leaves_no_run_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *TINY, "--model.optimizer=SparseAdam"]) == 2
    assert capsys.readouterr().err.startswith("error: model.optimizer: SparseAdam does not support dense gradients")
    assert list(tmp_path.rglob("version_*")) == []
