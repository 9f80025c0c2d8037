"""Behaviour of src/networks/: exact sizes, and weights that are loaded whole or refused."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from src.errors import Failure
from src.networks import CNN, Network, ResNet
from src.networks.network import read_weights


def count_macs(build: Callable[[], Network]) -> dict[str, int]:
    """Return the multiply-adds of a forward pass of one 32x32 image, by operation; nothing is computed."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build().eval()(torch.empty(1, 3, 32, 32))
    return {str(operation): flops // 2 for operation, flops in counter.get_flop_counts()["Global"].items()}


# The CNN by hand, layer by layer:
#     conv 3→32     parameters   3*32*9 + 32  =     896   multiply-adds  32*32 *   3*32*9  =    884,736
#     conv 32→64               32*64*9 + 64   =  18,496                  16*16 *  32*64*9  =  4,718,592
#     conv 64→128             64*128*9 + 128  =  73,856                    8*8 *  64*128*9 =  4,718,592
#     conv 128→256           128*256*9 + 256  = 295,168                    4*4 * 128*256*9 =  4,718,592
#     linear 1024→512         1024*512 + 512  = 524,800                           1024*512 =    524,288
#     linear 512→10              512*10 + 10  =   5,130                             512*10 =      5,120
#     sum                                       918,346                                      15,569,920
# BatchNorm takes the 480 biases away and adds a scale and a shift for each of the 480 channels: 918,826.
# Separable, the last three convolutions have (9 + 64)*32, (9 + 128)*64 and (9 + 256)*128 weights, 45,024 in place of
# 387,072: 918,826 - 342,048 = 576,778; the multiply-adds are 884,736 + 256*2,336 + 64*8,768 + 16*33,920 = 2,586,624
# in convolutions and 529,408 in linear layers.
@pytest.mark.parametrize(
    ("build", "parameters", "macs"),
    [
        (lambda: CNN(), 918_346, 15_569_920),
        (lambda: CNN(norm="batch"), 918_826, 15_569_920),
        (lambda: CNN(norm="batch", conv="separable"), 576_778, 3_116_032),
        (lambda: ResNet(depth=18), 11_173_962, 555_422_720),
        (lambda: ResNet(depth=34), 21_282_122, 1_159_402_496),
        (lambda: ResNet(depth=50), 23_520_842, 1_297_829_888),
        (lambda: ResNet(depth=18, stem="imagenet", resize=128), 11_181_642, 592_188_416),
    ],
    ids=["cnn", "cnn-batch", "cnn-separable", "resnet18", "resnet34", "resnet50", "resnet18-imagenet-128"],
)
def test_a_network_has_its_exact_size(build: Callable[[], Network], parameters: int, macs: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == parameters
    assert sum(count_macs(build).values()) == macs


def test_separable_convolutions_do_at_most_a_quarter_of_the_work() -> None:
    convolutions = [
        count_macs(lambda conv=conv: CNN(norm="batch", conv=conv))["aten.convolution"]  # type: ignore[misc]
        for conv in ("standard", "separable")
    ]
    assert 4 * convolutions[1] <= convolutions[0]


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: CNN(num_classes=7), 32),
        (lambda: CNN(num_classes=7, norm="batch", conv="separable", dropout=0.5), 32),
        (lambda: ResNet(num_classes=7), 32),
        (lambda: ResNet(num_classes=7, stem="imagenet", resize=64), 20),
    ],
)
def test_a_network_gives_one_logit_a_class(build: Callable[[], Network], size: int) -> None:
    images = torch.rand(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    logits = build()(images)
    assert (logits.shape, logits.dtype) == ((2, 7), torch.float32)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("network", [CNN(num_classes=7), ResNet(num_classes=7)], ids=["cnn", "resnet"])
def test_backbone_and_head_share_out_the_parameters(network: Network) -> None:
    head = list(network.head.parameters())
    assert [list(p.shape) for p in head] == [[7, head[0].shape[1]], [7]]
    both = [*network.backbone_parameters(), *head]
    assert sorted(map(id, both)) == sorted(map(id, network.parameters()))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: CNN(dropout=1.0), "dropout"),
        (lambda: CNN(dropout=-0.1), "dropout"),
        (lambda: ResNet(resize=31), "resize"),
        (lambda: ResNet(weights="DEFAULT"), "weights"),
        (lambda: ResNet(weights="DEFAULT", stem="cifar", resize=224), "weights"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(build: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        build()


def clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def torchvision_state() -> dict[str, Tensor]:
    """Return what torchvision saves of a ResNet-18 with the 1000 classes of ImageNet."""
    return dict(torchvision.models.resnet18().state_dict())


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def as_checkpoint(network: Network) -> dict[str, Any]:
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    return {"epoch": 3, "state_dict": {**state, "train_acc.total": torch.tensor(1)}, "config": "seed_everything: 1"}


@pytest.mark.parametrize("form", ["state_dict", "checkpoint"])
def test_weights_go_into_all_layers_but_the_head(tmp_path: Path, form: str) -> None:
    source = CNN(num_classes=7, norm="batch")
    source.train()(torch.rand(4, 3, 32, 32))  # so that the norms have seen something
    path = saved(source.state_dict() if form == "state_dict" else as_checkpoint(source), tmp_path / "weights.pt")
    network = CNN(norm="batch", weights=path)
    before = clone(network.state_dict())
    network.load_pretrained()
    for name, tensor in network.state_dict().items():
        expected = before[name] if name.startswith("head.") else source.state_dict()[name]
        assert torch.equal(tensor, expected), name
    assert not torch.equal(before["features.0.weight"], network.state_dict()["features.0.weight"])


def test_without_weights_nothing_is_loaded() -> None:
    for network in (CNN(), ResNet()):
        before = clone(network.state_dict())
        network.load_pretrained()
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def assert_backbone_is(network: ResNet, state: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    for name, tensor in network.resnet.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("fc.") else state[name]), name


def test_a_state_dict_of_torchvision_is_loaded_though_its_classes_are_others(tmp_path: Path) -> None:
    state = torchvision_state()
    path = saved(state, tmp_path / "resnet18.pt")
    network = ResNet(num_classes=10, stem="imagenet", weights=path)
    before = clone(network.resnet.state_dict())
    network.load_pretrained()
    path.unlink()
    assert_backbone_is(network, state, before)


def test_a_checkpoint_of_this_project_is_loaded_into_a_resnet(tmp_path: Path) -> None:
    source = ResNet(num_classes=7)
    path = saved(as_checkpoint(source), tmp_path / "last.ckpt")
    network = ResNet(weights=path)
    before = clone(network.resnet.state_dict())
    network.load_pretrained()
    path.unlink()
    assert_backbone_is(network, source.resnet.state_dict(), before)


def test_default_weights_are_fetched_when_they_are_loaded_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    state, calls = torchvision_state(), []

    def get_state_dict(self: object, **kwargs: object) -> dict[str, Tensor]:
        calls.append((self, kwargs))
        return state

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    network = ResNet(num_classes=10, stem="imagenet", weights="DEFAULT")
    assert calls == []
    before = clone(network.resnet.state_dict())
    network.load_pretrained()
    assert calls == [(torchvision.models.ResNet18_Weights.DEFAULT, {"progress": True, "check_hash": True})]
    assert_backbone_is(network, state, before)


@pytest.mark.parametrize(
    "error", [URLError("no route"), RuntimeError("invalid hash value\nand more")], ids=["net", "hash"]
)
def test_default_weights_that_cannot_be_fetched_are_told_with_where_they_are_and_what_else_will_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def get_state_dict(*_: object, **__: object) -> dict[str, Tensor]:
        raise error

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    url = re.escape(torchvision.models.ResNet18_Weights.DEFAULT.url)
    said = (
        rf"^weights: DEFAULT could not be downloaded \(.*(no route|value).*\): fetch {url} .* file in place of DEFAULT$"
    )
    assert_refused(ResNet(stem="imagenet", weights="DEFAULT"), said)


def assert_refused(network: Network, pattern: str) -> None:
    """Check that loading is refused in one line, and that no tensor was changed."""
    before = clone(network.state_dict())
    with pytest.raises(Failure, match=pattern) as caught:
        network.load_pretrained()
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = saved(CNN(norm="batch").state_dict(), tmp_path / "weights.pt")
    assert_refused(CNN(norm="batch", conv="separable", weights=path), r"^weights: .*weights\.pt has .* of shape")
    assert_refused(ResNet(weights=path), r"^weights: .*weights\.pt has no tensor resnet\.conv1\.weight")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    state = torchvision_state()
    path = saved({"conv1.weight": state["conv1.weight"]}, tmp_path / "weights.pt")
    shapes = r"\[64, 3, 7, 7\], this network \[64, 3, 3, 3\]$"
    assert_refused(ResNet(weights=path), rf"^weights: .*weights\.pt has resnet\.conv1\.weight of shape {shapes}")


def test_a_missing_file_of_weights_is_named(tmp_path: Path) -> None:
    assert_refused(CNN(weights=tmp_path / "gone.pt"), r"^weights: there is no file .*gone\.pt$")


class _Gadget:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_code_in_a_file_of_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = saved({"a": _Gadget(marker)}, tmp_path / "weights.pt")
    assert_refused(CNN(weights=path), r"^weights: .*weights\.pt holds more than plain tensors; it was not loaded$")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the gadget works where it is let"


@pytest.mark.parametrize("content", [b"", b"a text", b"PK\x03\x04" + b"0" * 100, bytes(range(256)) * 40])
def test_garbage_is_not_taken_for_weights(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    assert_refused(CNN(weights=path), r"^weights: .*weights\.pt ")


def test_a_truncated_file_of_weights_is_refused(tmp_path: Path) -> None:
    path = saved(CNN().state_dict(), tmp_path / "weights.pt")
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        assert_refused(CNN(weights=path), r"^weights: .*weights\.pt is not a file of weights that torch can read$")


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"a": [1, 2]},
        {"state_dict": [1, 2]},
        {"state_dict": {"network.a": "b"}},
        {"state_dict": {1: torch.zeros(1)}},
        {1: torch.zeros(1)},
        torch.zeros(3),
    ],
    ids=["list", "lists", "state is a list", "state of text", "state by number", "by number", "tensor"],
)
def test_what_is_not_tensors_by_name_is_refused(tmp_path: Path, content: Any) -> None:
    path = saved(content, tmp_path / "weights.pt")
    for network in (CNN(weights=path), ResNet(weights=path)):
        assert_refused(network, r"^weights: .*weights\.pt ")
    with pytest.raises(Failure, match=r"does not hold a network's tensors by name$"):
        read_weights(path)
