"""What every network here is: images in, one logit a class out, with a named head.

To add a network, subclass `Network` in a file of its own and name it in a config: ``model.network.class_path``.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import Failure


class Network(nn.Module):
    """Base class of the networks.

    Attributes:
        head: The last layer, which maps features to logits; transfer learning replaces it and trains it first.
    """

    head: nn.Module

    def load_pretrained(self) -> None:
        """Load the weights that the constructor was told of. Called once, at the start of a fit from scratch.

        Raises:
            Failure: If they do not fit this network.
        """

    def initialize(self, images: Tensor) -> None:
        """Set weights by what the images are like. Called once, at the start of a fit from scratch.

        Args:
            images: The first 5,000 images of the train split, or fewer, as the network is given them. They are on the
                device of the fit already, the weights may not be.
        """

    def remark(self, device: str, precision: str) -> str:
        """Return what a person should know about how this network is computed on a device, or nothing.

        Args:
            device: Its type, e.g. ``cpu``.
            precision: As in ``trainer.precision``, e.g. ``bf16-mixed``.
        """
        return ""

    def begin_epoch(self, epoch: int) -> None:
        """Choose which parameters are learned in an epoch, from 0; a function of the epoch alone."""

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the parameters outside the head."""
        head = {id(p) for p in self.head.parameters()}
        return [p for p in self.parameters() if id(p) not in head]

    def load_backbone(self, state: Mapping[str, Tensor], source: str) -> None:
        """Copy weights into all layers but the head, whose classes are other ones.

        Args:
            state: Tensors by name, as `state_dict` gives them; a head in it is passed over.
            source: Where they come from, for the error.

        Raises:
            Failure: If a tensor of the backbone is missing or has another shape.
        """
        head = {id(t) for t in (*self.head.parameters(), *self.head.buffers())}
        own = {k: v for k, v in self.state_dict(keep_vars=True).items() if id(v) not in head}
        for name, tensor in own.items():
            if name not in state:
                raise Failure(f"weights: {source} has no tensor {name}: it is not of this network")
            if state[name].shape != tensor.shape:
                found, due = list(state[name].shape), list(tensor.shape)
                raise Failure(f"weights: {source} has {name} of shape {found}, this network {due}")
        self.load_state_dict({name: state[name] for name in own}, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a network's tensors from a file: a ``state_dict`` saved by torch, or a checkpoint of this project.

    Nothing but plain tensors and containers is unpickled.

    Raises:
        Failure: If the file cannot be read or holds something else.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise Failure(f"weights: there is no file {path}") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise Failure(f"weights: {path} is not a file of weights that torch can read") from error
    except Exception as error:  # the unpickler's own error class is private
        raise Failure(f"weights: {path} holds more than plain tensors; it was not loaded") from error
    prefix = ""
    if isinstance(content, Mapping) and "state_dict" in content:
        content, prefix = content["state_dict"], "network."
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    tensors = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)} if named else {}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise Failure(f"weights: {path} does not hold a network's tensors by name")
    return tensors
