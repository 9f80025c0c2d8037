"""The small CNN: four convolutions, each halving the image, and two linear layers.

python -m src fit --config configs/cifar10.yaml
"""

from itertools import pairwise
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from src.networks.network import Network, read_weights


class CNN(Network):
    """Convolutions 3→32→64→128→256 with ReLU and 2x2 max pooling after each, then linear layers 512 and `num_classes`.

    Takes float images ``[b, 3, 32, 32]``; the last pooling leaves 256x2x2 features.

    Args:
        num_classes: The number of classes.
        norm: ``batch`` puts a BatchNorm after each convolution (whose bias goes, as the norm has one).
        dropout: Share of the features dropped before each linear layer, in [0, 1).
        conv: ``separable`` makes every convolution but the first a 3x3 convolution of each channel followed by a
            1x1 convolution across them (Howard et al., MobileNets, arXiv 1704.04861): a ninth of the work.
        weights: A file of weights to start from (a checkpoint of this project or a ``state_dict``), all but the head.
    """

    def __init__(
        self,
        num_classes: int = 10,
        norm: Literal["none", "batch"] = "none",
        dropout: float = 0.0,
        conv: Literal["standard", "separable"] = "standard",
        weights: Path | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout} is out of range: at least 0, below 1")
        self.weights = weights
        widths = (3, 32, 64, 128, 256)
        layers: list[nn.Module] = []
        for i, (width_in, width_out) in enumerate(pairwise(widths)):
            layers += _conv3x3(width_in, width_out, separable=conv == "separable" and i > 0, bias=norm == "none")
            if norm == "batch":
                layers.append(nn.BatchNorm2d(width_out))
            layers += [nn.MaxPool2d(2), nn.ReLU()]  # the same as the other way round, at a quarter of the ReLU's work
        self.features = nn.Sequential(*layers)
        self.neck = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(256 * 2 * 2, 512), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(512, num_classes)
        if norm == "none":
            # No norm will set the scale of the activations right, and torch's default weights are too small for ReLU:
            # the network would sit at chance for its first epoch (He et al., arXiv 1502.01852).
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear) and module is not self.head:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[b, num_classes]``."""
        logits: Tensor = self.head(self.dropout(self.neck(self.features(images))))
        return logits

    def load_pretrained(self) -> None:
        """Load all layers but the head from the file of weights, if one was given."""
        if self.weights is not None:
            self.load_backbone(read_weights(self.weights), str(self.weights))


def _conv3x3(width_in: int, width_out: int, *, separable: bool, bias: bool) -> list[nn.Module]:
    if not separable:
        return [nn.Conv2d(width_in, width_out, 3, padding=1, bias=bias)]
    return [
        nn.Conv2d(width_in, width_in, 3, padding=1, groups=width_in, bias=False),
        nn.Conv2d(width_in, width_out, 1, bias=bias),
    ]
