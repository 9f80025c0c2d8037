"""A network whose parameters are updated in real time, while other processes read them.

    from src.live.update import LiveUpdate

    with LiveUpdate(network, partial(torch.optim.SGD, lr=0.01), folder="service") as live:
        loss = cross_entropy(live(images), labels)
        live.update_model(torch.autograd.grad(loss, live.parameters()))

For loops written by hand, and for online correction: a service that learns from each answer that is put right. In
another process ``LiveWeights.open("service")`` reads the parameters, whole, with the number of updates as their step.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from src.live.weights import Publisher


class LiveUpdate(nn.Module):
    """Wraps a network, applies gradients to it as they come, and keeps its newest weights in shared memory.

    An update is the very step that the optimizer takes by itself, and is done as a whole or not at all. Several threads
    may use it: an update waits for a forward pass that is under way, and the other way round.

    Args:
        network: The network; it stays where it is, and its parameters stay the same objects.
        optimizer: Makes an optimizer of the parameters, e.g. ``partial(torch.optim.SGD, lr=0.01)``.
        folder: Readers open the weights by this folder; ``live/weights.json`` is written in it.
        publish_every_n_updates: Updates from one publication to the next, at least 1.

    Attributes:
        network: The network.
        optimizer: The optimizer.
        step: Updates that have been applied.

    Raises:
        OSError: If there is no shared memory, or no room in it.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        folder: str | Path,
        publish_every_n_updates: int = 1,
    ) -> None:
        super().__init__()
        if publish_every_n_updates < 1:
            raise ValueError(f"publish_every_n_updates: {publish_every_n_updates} is out of range: at least 1")
        self.network = network
        self.optimizer = optimizer(list(network.parameters()))
        self.publish_every_n_updates = publish_every_n_updates
        self.step = 0
        self._closed = self._said = False
        self._lock = threading.RLock()
        self._publisher = Publisher(Path(folder) / "live", {"run": str(Path(folder).resolve())})
        self._publish()

    def forward(self, *inputs: Any) -> Any:
        """Return what the network makes of its inputs, with the parameters of one update."""
        with self._lock:
            return self.network(*inputs)

    def update_model(self, gradients: Sequence[Tensor]) -> int:
        """Apply the optimizer to all parameters.

        Args:
            gradients: One for each parameter, in the order of ``model.parameters()``.

        Returns:
            The number of updates that have been applied.

        Raises:
            ValueError: If their number, or the shape, dtype, device or a value of one of them, is wrong. Nothing has
                been changed.
        """
        return self.update_parameters(list(self.network.parameters()), gradients)

    def update_parameters(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> int:
        """Apply the optimizer to some of the parameters, and leave the others and their momentum as they are.

        Args:
            parameters: Parameters of the network, none of them twice.
            gradients: One for each of them, in the same order.

        Returns:
            The number of updates that have been applied.

        Raises:
            ValueError: As `update_model` does, or if a parameter is not one of the network. Nothing has been changed.
        """
        with self._lock:
            if self._closed:
                raise ValueError("it is closed: nothing is updated any more")
            self._check(parameters, gradients)
            everything = list(self.network.parameters())
            kept = [parameter.grad for parameter in everything]
            try:
                for parameter in everything:
                    parameter.grad = None  # the optimizer leaves alone what has none
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.detach()
                self.optimizer.step()
            finally:
                for parameter, grad in zip(everything, kept, strict=True):
                    parameter.grad = grad
            self.step += 1
            self._publisher.tick(self.step)
            if self.step % self.publish_every_n_updates == 0:
                self._publish()
            return self.step

    def close(self) -> None:
        """End publishing, and leave nothing in the shared memory."""
        with self._lock:
            self._closed = True
            self._publisher.close()

    def __enter__(self) -> Self:
        """Return this network."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        """End publishing."""
        self.close()

    def _publish(self) -> None:
        self._publisher.wait()  # each answer counts: a version is not skipped here
        self._publisher.publish(self.network.state_dict(), self.step, 0)
        if self._publisher.failure is not None and not self._said:
            self._said = True
            warnings.warn(f"the weights are not published any more: {self._publisher.failure}", stacklevel=3)

    def _check(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        if len(parameters) != len(gradients):
            raise ValueError(f"gradients: {len(gradients)} for {len(parameters)} parameters")
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        if len({id(parameter) for parameter in parameters}) != len(parameters):
            raise ValueError("parameters: one is given twice")
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(f"parameters: number {i} is none of the network's")
            if not isinstance(gradient, Tensor):
                raise ValueError(f"gradients: that of {name} is a {type(gradient).__name__}, not a tensor")
            for what in ("shape", "dtype", "device"):
                if (found := getattr(gradient, what)) != (wanted := getattr(parameter, what)):
                    wanted, found = (list(v) if what == "shape" else v for v in (wanted, found))
                    raise ValueError(f"gradients: that of {name} has {what} {found}, not {wanted}")
            if gradient.is_sparse:
                raise ValueError(f"gradients: that of {name} is sparse")
        if parameters and not bool(torch.stack([g.detach().isfinite().all() for g in gradients]).all()):
            bad = next(i for i, g in enumerate(gradients) if not g.isfinite().all())
            raise ValueError(f"gradients: that of {names[id(parameters[bad])]} is not finite")
