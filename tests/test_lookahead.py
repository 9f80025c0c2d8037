"""Lookahead: slow weights that the trained ones go back to, the same whether or not a run is stopped."""

import json
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from src.callbacks.lookahead import Lookahead
from src.callbacks.pictures import Pictures
from src.checkpoint_io import manifest
from src.cli import main
from src.errors import UsageError
from tests.conftest import run_src
from tests.faults.breakers import SMALL as WEAK
from tests.faults.breakers import STARTS
from tests.faults.probe import SMALL, assert_equal, assert_same_run, fit, load, probed

RUN = Path("lightning_logs/version_0")
LAST = RUN / "checkpoints/last.ckpt"
OWN = {"class_path": "src.callbacks.lookahead.Lookahead", "init_args": {"every": 2, "decay": 0.9, "power": 1.0}}
DURABLE = "--checkpoint.every_n_steps=1"


class Line(pl.LightningModule):
    """A weight of 0 that grows by 1 with every optimizer step, and a BatchNorm that counts and averages ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm1d(1, momentum=0.5)
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.norm(batch)
        return -self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=1.0)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        mean = self.norm.running_mean
        assert mean is not None
        self.seen.append((float(self.weight.detach()), float(mean)))


def seen(lookahead: Lookahead | None, batches: int, **options: Any) -> Line:
    module = Line()
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    callbacks: list[pl.Callback] = [lookahead] if lookahead else []
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **quiet, **options)
    ones: Any = torch.ones(2 * batches, 1)
    trainer.fit(module, torch.utils.data.DataLoader(ones, batch_size=2))
    return module


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_values_on_a_line(accumulate: int) -> None:
    """Of 5 steps the second and the fourth are meetings, and after the fifth the slow weights take over."""
    found = seen(Lookahead(every=2, decay=0.5, power=2.0), 5 * accumulate, accumulate_grad_batches=accumulate)
    weights = [weight for weight, _ in found.seen[accumulate - 1 :: accumulate]]
    second = (1 - 0.25 * (2 / 5) ** 2) * 2  # 2, but for a share of the slow weight's 0
    share = 0.25 * (4 / 5) ** 2
    fourth = share * second + (1 - share) * (second + 2)
    assert weights == pytest.approx([1, second, second + 1, fourth, fourth])


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_running_statistics_take_part_and_counters_do_not() -> None:
    found = seen(Lookahead(every=2, decay=1.0, power=0.0), 3)  # the slow ones never move
    assert found.seen == [(1.0, 0.5), (0.0, 0.0), (0.0, 0.0)]
    assert int(found.norm.num_batches_tracked) == 3  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_slow_weight_that_keeps_nothing_changes_nothing() -> None:
    without, found = seen(None, 4), seen(Lookahead(every=1, decay=0.0), 4)
    assert found.seen == without.seen
    again = Lookahead(every=2, decay=0.5)
    assert seen(again, 4).seen == seen(again, 4).seen, "a second fit begins anew"


@pytest.mark.parametrize("argument", [{"every": 0}, {"decay": 1.1}, {"decay": float("nan")}, {"power": -1.0}])
def test_what_is_out_of_range_is_named(argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(argument))}: .* is out of range"):
        Lookahead(**argument)


def test_a_run_without_an_end_is_refused() -> None:
    trainer = pl.Trainer(max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(UsageError, match=r"give trainer\.max_epochs"):
        Lookahead().setup(trainer, Line(), "fit")


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pictures, "on_validation_end", lambda *_: None)  # half of the time of so small a fit


@pytest.mark.usefixtures("_here")
def test_a_fit_that_is_killed_and_resumed_equals_one_that_is_not() -> None:
    """Killed in step 6 of 12, between two meetings."""
    whole = fit(*SMALL, *probed(Path("log"), "", OWN), DURABLE, "--trainer.default_root_dir=whole")
    assert (whole.status, whole.err) == (0, "")
    killed = probed(Path("log"), "train 5", OWN, number="SIGKILL")
    run_src("fit", *SMALL, *killed, DURABLE, cwd=Path(), status=-signal.SIGKILL)
    assert 1 <= manifest(LAST).step <= 5, "those after the first may have been on their way to the disk"
    done = fit("--ckpt_path", LAST, *probed(Path("log"), "", OWN))
    assert (done.status, done.err) == (0, "")
    assert_same_run(RUN, "whole" / RUN)
    end = load(RUN)
    slow = next(state["slow"] for name, state in end["callbacks"].items() if name.startswith("Lookahead"))
    assert any("running_var" in name for name in slow)
    assert_equal({name: end["state_dict"][name] for name in slow}, slow, "at the end they are the same")


@pytest.mark.usefixtures("_here")
def test_a_rollback_takes_the_slow_weights_back_as_well() -> None:
    """Step 7 of 8 is spoilt, the checkpoint is of step 4; at both, and at step 6, the slow weights are the others."""
    own = {**OWN, "init_args": {"every": 2, "decay": 1.0, "power": 1.0}}
    spoiler = {"class_path": "tests.faults.breakers.Spoiler", "init_args": {"at": [6], "where": "output"}}
    callbacks = json.dumps([own, spoiler])
    assert main(["fit", *WEAK, "--guard.on_nonfinite=rollback", "--trainer.callbacks", callbacks]) == 0
    weights = [start.weights for start in STARTS]
    assert not torch.equal(weights[6]["network.head.weight"], weights[4]["network.head.weight"])
    slow = load(RUN)["callbacks"]["Lookahead"]["slow"]
    for name, tensor in slow.items():
        assert torch.equal(tensor, weights[4][name]), "at step 8 of 8 they keep all of what they were at step 4"


@pytest.mark.usefixtures("_here")
def test_the_recipe_trains_and_its_checkpoint_is_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data=Shapes10", "--data.train_images=60", "--data.test_images=10", "--data.val_size=0"]
    recipe = Path(__file__).parent.parent / "configs/speed96.yaml"
    few = ["--model.network.widths=[24,24,24]", "--data.batch_size=20", "--trainer.max_epochs=2"]
    assert main(["fit", f"--config={recipe}", *small, *few]) == 0
    assert main(["test", "--ckpt_path", "best"]) == 0
    assert "acc" in capsys.readouterr().out
