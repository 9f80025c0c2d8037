"""torchvision's ResNets, with a stem for small images or with their ImageNet weights.

python -m src fit --config configs/resnet18.yaml
python -m src fit --config configs/transfer.yaml
"""

from pathlib import Path
from typing import Literal

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)

from src.errors import Failure
from src.networks.network import Network, read_weights


class ResNet(Network):
    """A ResNet (He et al., arXiv 1512.03385) by torchvision.

    Takes float images ``[b, 3, h, w]``.

    Args:
        num_classes: The number of classes.
        depth: Number of layers: 18, 34 or 50.
        stem: ``cifar``: a 3x3 convolution of stride 1 and no pooling, for images of about 32 pixels.
            ``imagenet``: the original 7x7 convolution of stride 2 and pooling, which pretrained weights need.
        resize: Images are scaled to this side in pixels before the stem, at least 32; null leaves them as they are.
            Pretrained weights have learned images of 224 pixels; 128 costs a third and loses little.
        weights: ``DEFAULT`` downloads torchvision's ImageNet weights at the start of a fit; a path reads a local file
            (a ``state_dict`` or a checkpoint of this project). All layers but the head are loaded.
    """

    def __init__(
        self,
        num_classes: int = 10,
        depth: Literal[18, 34, 50] = 18,
        stem: Literal["cifar", "imagenet"] = "cifar",
        resize: int | None = None,
        weights: Literal["DEFAULT"] | Path | None = None,
    ) -> None:
        super().__init__()
        if resize is not None and resize < 32:
            raise ValueError(f"resize: {resize} is out of range: at least 32 pixels")
        if weights == "DEFAULT" and stem != "imagenet":
            raise ValueError("weights: DEFAULT needs stem: imagenet, the one these weights were trained with")
        self.depth, self.resize, self.weights = depth, resize, weights
        self.resnet = getattr(torchvision.models, f"resnet{depth}")(num_classes=num_classes)
        if stem == "cifar":
            self.resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            self.resnet.maxpool = nn.Identity()

    @property
    def head(self) -> nn.Module:  # type: ignore[override] # a property keeps it from being registered twice
        """The last linear layer."""
        layer: nn.Module = self.resnet.fc
        return layer

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[b, num_classes]``."""
        if self.resize is not None:
            images = F.interpolate(images, size=(self.resize, self.resize), mode="bilinear", antialias=True)
        logits: Tensor = self.resnet(images)
        return logits

    def load_pretrained(self) -> None:
        """Load all layers but the head, from torchvision or from the file that was given."""
        if self.weights is None:
            return
        if self.weights == "DEFAULT":
            weights = torchvision.models.get_model_weights(f"resnet{self.depth}").DEFAULT
            try:
                state = weights.get_state_dict(progress=True, check_hash=True)
            except (OSError, RuntimeError) as error:  # RuntimeError: the download came out with another hash
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise Failure(
                    f"weights: DEFAULT could not be downloaded ({reason}): fetch {weights.url} by other means and give "
                    f"its file in place of DEFAULT"
                ) from error
        else:
            state = read_weights(Path(self.weights))
        if not any(name.startswith("resnet.") for name in state):  # torchvision's own names lack our attribute's
            state = {f"resnet.{name}": tensor for name, tensor in state.items()}
        self.load_backbone(state, str(self.weights))
