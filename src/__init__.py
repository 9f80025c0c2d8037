"""Live CIFAR-10: real-time training of convolutional networks with PyTorch Lightning."""

__version__ = "0.1.0"
