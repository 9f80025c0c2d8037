"""The networks: plain ``nn.Module``s, one a file."""

from src.networks.cnn import CNN
from src.networks.network import Network
from src.networks.resnet import ResNet
from src.networks.whitened import WhitenedCNN

__all__ = ["CNN", "Network", "ResNet", "WhitenedCNN"]
