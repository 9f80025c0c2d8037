"""Out of memory: says which batch size would have fitted."""

import traceback
from typing import Any

import lightning.pytorch as pl
import torch

from src.classifier import ImageClassifier
from src.data.loader import Batch
from src.hardware import give_pages_back, is_out_of_memory

_THREADS = 64 << 20
"""Bytes of address space that the C library sets aside for a thread at once, when it first asks for memory."""


class Memory(pl.Callback):
    """When a step does not fit into memory, tries smaller ones and adds to the error what does."""

    between_chunks = True

    def __init__(self) -> None:
        self._batch: tuple[tuple[int, ...], int] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember how large the batch is."""
        if self._batch is None:
            self._batch = tuple(batch.images.shape), batch.total

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Try halves of the batch, the smallest first, forward and backward."""
        if not is_out_of_memory(exception) or trainer.world_size > 1:
            return
        if trainer.validating or trainer.sanity_checking:
            size = trainer.datamodule.eval_batch_size  # type: ignore[attr-defined] # set outside of __init__
            exception.add_note(f"with data.eval_batch_size {size} in validation; try a smaller one")
            return
        if self._batch is None:
            return
        assert isinstance(pl_module, ImageClassifier)
        traceback.clear_frames(exception.__traceback__)  # they hold what does not fit
        (size, *shape), total = self._batch
        trainer.optimizers[0].zero_grad(set_to_none=True)
        halves = [size // 2**i for i in range(1, size.bit_length())]
        fits = 0
        for half in reversed(halves):  # the smallest first: one that fails may leave oneDNN unable to do any
            try:
                _step(trainer, pl_module, (half, *shape))
            except RuntimeError as error:  # libraries below torch have words of their own for it
                traceback.clear_frames(error.__traceback__)
                break
            fits = half
        if not fits:
            exception.add_note(f"with data.batch_size {total}, and with a single image too: the network is too large")
            return
        same = "takes the same steps" if pl_module.selection is None else "chooses from each part of a batch"
        exception.add_note(
            f"with data.batch_size {total}; {fits} fits: --data.batch_size {fits} "
            f"--trainer.accumulate_grad_batches {-(-total // fits)} {same}"
        )


def _step(trainer: pl.Trainer, module: ImageClassifier, shape: tuple[int, ...]) -> Any:
    if module.device.type == "cuda":
        torch.cuda.empty_cache()
    give_pages_back()
    ballast = [torch.zeros_like(p) for p in module.parameters() for _ in range(4)]  # optimizer and checkpoint
    if module.device.type == "cpu":  # where the threads that write and publish take theirs too
        ballast.append(torch.empty(_THREADS, dtype=torch.uint8))
    images = torch.zeros(shape, device=module.device).to(memory_format=torch.channels_last)
    with trainer.precision_plugin.forward_context():
        if module.selection is None:
            loss = module(images).float().sum()
        else:
            learned = images[: module.selection.count(len(images))]
            loss = module(learned).float().sum() + module.selection.network(images).float().sum()
    loss.backward()
    module.zero_grad(set_to_none=True)
    del ballast
