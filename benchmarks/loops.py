"""Two loops to compare with that know nothing of this project: the seed's, and a port of the published 94 % recipe.

    python -m benchmarks.loops seed --root data --epochs 10
    python -m benchmarks.loops port94 --root data --seed 0

Each is one process that prints one line of JSON. Both take the GPU if there is one; ``--steps`` cuts them short.

``seed`` is written from its description, its bugs fixed: torchvision's CIFAR-10 with PIL transforms, a DataLoader
without workers, batch 64, float32 in NCHW, SGD, the loss read in every step; it trains on all 50,000 images, and is
tested once at the end.

``port94`` is airbench94_muon (K. Jordan, 2024) written from its published facts, without tricks for the CPU: eager,
bf16 autocast, channels_last, batches of 2,000. Its clock is that of the speed-runs: whitening, augmentation, training
and the evaluation with test-time augmentation are in; imports, loading the data and building the network are out.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)

from benchmarks.paired import my_turn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seed(root: Path, number: int, epochs: int, batch_size: int, steps: int | None, skip: int) -> dict[str, Any]:
    """Train the small CNN as the seed of this project does.

    Args:
        root: The folder with CIFAR-10.
        number: Seed of the weights and the order.
        epochs: Passes over the train set.
        batch_size: Images in a step.
        steps: Stop after so many, and test on 500 images.
        skip: Steps that do not count for images/s.
    """
    torch.manual_seed(number)
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    )
    train, test = (torchvision.datasets.CIFAR10(root, train=part, transform=transform) for part in (True, False))
    loader = torch.utils.data.DataLoader(train, batch_size, shuffle=True)
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise((3, 32, 64, 128, 256)):
        layers += [nn.Conv2d(width_in, width_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)).to(DEVICE)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    alone = my_turn()
    begun = counted = time.perf_counter()
    seen = done = 0
    running = 0.0
    for _ in range(epochs):
        network.train()
        for images, labels in loader:
            images, labels = images.to(DEVICE), labels.to(DEVICE)
            optimizer.zero_grad()
            loss = criterion(network(images), labels)
            loss.backward()
            optimizer.step()
            running += loss.item()
            done, seen = done + 1, seen + len(labels)
            if done == skip:
                seen, counted = 0, time.perf_counter()
            if done == steps:
                break
        if done == steps:
            break
    ended = time.perf_counter()
    result = alone | {"seconds": ended - begun, "images/s": seen / (ended - counted), "train loss": running / done}
    network.eval()
    if steps is not None:
        test = torch.utils.data.Subset(test, range(500))
    correct = 0
    with torch.no_grad():
        for images, labels in torch.utils.data.DataLoader(test, batch_size):
            correct += int((network(images.to(DEVICE)).argmax(1).cpu() == labels).sum())
    return result | {"test acc": correct / len(test)}


def port94(root: Path, number: int, steps: int | None) -> dict[str, Any]:
    """Train the network of the 94 % speed-run.

    Args:
        root: The folder with CIFAR-10.
        number: Seed of the weights, the order and the augmentation.
        steps: Stop after so many of the 200, and test on 500 images; the schedule stays that of 200.
    """
    torch.manual_seed(number)
    epochs, batch_size = 8, 2000
    total = epochs * (50_000 // batch_size)
    (train, labels), (test, test_labels) = (_load(root, part) for part in (True, False))
    if steps is not None:
        test, test_labels = test[:500], test_labels[:500]
    network = _Network().to(memory_format=torch.channels_last).to(DEVICE)
    filters = [m.weight for m in network.blocks if isinstance(m, nn.Conv2d)]
    momenta = [torch.zeros_like(p) for p in filters]
    biases = [m.bias for m in network.blocks if isinstance(m, nn.BatchNorm2d)]
    whiten_bias = network.whiten.bias
    assert whiten_bias is not None
    groups = [([whiten_bias], 0.053), (biases, 0.053), ([network.head.weight], 0.67)]
    rest = torch.optim.SGD(
        [{"params": p, "lr": lr, "initial_lr": lr, "weight_decay": 0.004 / lr} for p, lr in groups],
        lr=0.053, momentum=0.85, nesterov=True,
    )  # fmt: skip

    begun = _now()
    train, test = _normalize(train), _normalize(test)
    network.set_whitening(train[:5000])
    train = torch.where(torch.rand(len(train), 1, 1, 1, device=DEVICE) < 0.5, train.flip(3), train)
    padded = F.pad(train, (2, 2, 2, 2), "reflect")
    network.train()
    done = 0
    for epoch in range(epochs):
        windows = (padded.flip(3) if epoch % 2 else padded).unfold(2, 32, 1).unfold(3, 32, 1)
        whiten_bias.requires_grad_(epoch < 3)
        for ids in torch.split(torch.randperm(len(train), device=DEVICE), batch_size):
            down, right = torch.randint(5, (2, len(ids)), device=DEVICE)
            images = windows[ids, :, down, right].contiguous(memory_format=torch.channels_last)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                logits = network(images)
            loss = F.cross_entropy(logits.float(), labels[ids], label_smoothing=0.2, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            share = 1 - done / total
            rest.param_groups[0]["lr"] = 0.053 * (1 - done / (3 * total / epochs))  # without gradient once negative
            for group in rest.param_groups[1:]:
                group["lr"] = group["initial_lr"] * share
            rest.step()
            _muon(filters, momenta, 0.24 * share)
            network.zero_grad()
            done += 1
            if done == steps:
                break
        if done == steps:
            break
    trained = _now()
    network.eval()
    with_views = _accuracy(network, test, test_labels, views=True)
    ended = _now()
    without = _accuracy(network, test, test_labels, views=False)
    seconds, training = ended - begun, trained - begun
    return {"seconds": seconds, "training seconds": training, "steps": done, "acc tta": with_views, "acc": without}


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise((24, 64, 256, 256)):
            layers += [_conv(width_in, width_out), nn.MaxPool2d(2), _norm(width_out), nn.GELU()]
            layers += [_conv(width_out, width_out), _norm(width_out), nn.GELU()]
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(256, 10, bias=False)
        self.head.weight.data /= self.head.weight.data.std()

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(self.blocks(F.gelu(self.whiten(images))), 3)
        logits: Tensor = self.head(features.flatten(1)) / 256
        return logits

    @torch.no_grad()
    def set_whitening(self, images: Tensor) -> None:
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def _conv(width_in: int, width_out: int) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width_out, 3, padding="same", bias=False)
    nn.init.dirac_(conv.weight.data[:width_in])
    return conv


def _norm(width: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


@torch.no_grad()
def _muon(filters: list[Tensor], momenta: list[Tensor], lr: float) -> None:
    for weight, momentum in zip(filters, momenta, strict=True):
        assert weight.grad is not None
        momentum.mul_(0.6).add_(weight.grad)
        x = weight.grad.add(momentum, alpha=0.6).reshape(len(weight), -1).bfloat16()
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / (x.norm() + 1e-7)
        for _ in range(3):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        weight.mul_(len(weight) ** 0.5 / weight.norm())
        weight.sub_((x.T if tall else x).reshape(weight.shape), alpha=lr)


def _load(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    data = torchvision.datasets.CIFAR10(root, train=train)
    return torch.from_numpy(data.data).to(DEVICE), torch.tensor(data.targets, device=DEVICE)


def _normalize(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=DEVICE) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    images: Tensor = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    return images


@torch.no_grad()
def _accuracy(network: nn.Module, images: Tensor, labels: Tensor, views: bool) -> float:
    def mirrored(x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        logits: Tensor = 0.5 * network(x).float() + 0.5 * network(x.flip(3)).float()
        return logits

    correct = 0
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for x, y in zip(torch.split(images, 2000), torch.split(labels, 2000), strict=True):
            if views:
                padded = F.pad(x, (1, 1, 1, 1), "reflect")
                shifted = [mirrored(padded[:, :, i : i + 32, i : i + 32]) for i in (0, 2)]
                logits = 0.5 * mirrored(x) + 0.25 * (shifted[0] + shifted[1])
            else:
                logits = network(x).float()
            correct += int((logits.argmax(1) == y).sum())
    return correct / len(labels)


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def command() -> None:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=("seed", "port94"))
    parser.add_argument("--root", type=Path, default=Path("data"), help="a folder with cifar-10-batches-py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop after so many")
    parser.add_argument("--epochs", type=int, default=10, help="of seed")
    parser.add_argument("--batch_size", type=int, default=64, help="of seed")
    parser.add_argument("--skip", type=int, default=0, help="steps of seed that do not count for images/s")
    o = parser.parse_args()
    if o.loop == "seed":
        print(json.dumps(seed(o.root, o.seed, o.epochs, o.batch_size, o.steps, o.skip)))
    else:
        print(json.dumps(port94(o.root, o.seed, o.steps)))


if __name__ == "__main__":
    command()
