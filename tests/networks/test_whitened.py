"""The network of the speed-runs: its whitening, its first state, and its fast convolution."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.networks import WhitenedCNN, convolution
from src.networks.convolution import Conv3x3
from src.networks.native import compiled


def images(count: int, side: int = 32) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    mixed = torch.randn(count, 3, side, side, generator=draws)
    return mixed + 2 * mixed.roll(1, 1) + mixed.roll(1, 3)  # correlated, between channels and neighbours


def test_it_has_the_size_of_the_speed_run() -> None:
    assert sum(p.numel() for p in WhitenedCNN().parameters()) == 1_972_792
    assert WhitenedCNN()(images(2)).shape == (2, 10)


@pytest.mark.parametrize("side", [17, 24, 32, 40])
def test_it_takes_images_of_any_side(side: int) -> None:
    assert WhitenedCNN(num_classes=7)(images(2, side)).shape == (2, 7)


def test_the_first_layer_whitens_patches() -> None:
    network = WhitenedCNN()
    network.initialize(images(500))
    with torch.no_grad():
        found = nn.functional.conv2d(images(500), network.whiten.weight)
    rows = found[:, :12].movedim(1, 3).reshape(-1, 12)
    covariance = rows.T @ rows / len(rows)
    torch.testing.assert_close(covariance, torch.eye(12), atol=5e-3, rtol=0)
    torch.testing.assert_close(found[:, 12:], -found[:, :12])
    assert not network.whiten.weight.requires_grad


def test_convolutions_begin_by_passing_on_what_they_are_given() -> None:
    x = images(2)[:, :, :8, :8].repeat(1, 8, 1, 1)
    network = WhitenedCNN()
    with torch.no_grad():
        torch.testing.assert_close(network.blocks[0].conv1(x)[:, :24], x)  # type: ignore[operator]


def test_the_bias_of_the_whitening_is_learned_in_the_first_epochs_alone() -> None:
    network = WhitenedCNN(whiten_bias_epochs=2)
    assert network.whiten.bias is not None
    learned = []
    for epoch in (0, 1, 2, 1):
        network.begin_epoch(epoch)
        learned.append(network.whiten.bias.requires_grad)
    assert learned == [True, True, False, True]


@pytest.mark.parametrize("side", [1, 2, 3, 7, 8, 15])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("library", [compiled(), None], ids=["compiled", "not compiled"])
def test_the_fast_convolution_is_the_convolution(
    side: int, learns: bool, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, of which the last bit is 0.4 %."""
    monkeypatch.setattr(convolution, "compiled", lambda: library)
    torch.manual_seed(0)
    fast, plain = Conv3x3(32, 48), nn.Conv2d(32, 48, 3, padding=1, bias=False)
    plain.load_state_dict(fast.state_dict())
    results = []
    for layer in (fast, plain):
        layer.to(memory_format=torch.channels_last)
        layer.weight.requires_grad_(learns)
        draws = torch.Generator().manual_seed(1)
        x = torch.randn(130, 32, side, side, generator=draws).contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().mean().backward()
        results.append((y.float(), x.grad, layer.weight.grad))
    assert results[0][2] is None if not learns else results[0][2] is not None
    for a, b in zip(*results, strict=True):
        if a is not None and b is not None:
            assert (a - b).norm() < 4e-3 * b.norm()


def test_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"^bn_momentum: 0\.0 is out of range"):
        WhitenedCNN(bn_momentum=0.0)
    with pytest.raises(ValueError, match=r"^widths: \[8, 64, 64\] is out of range"):
        WhitenedCNN(widths=(8, 64, 64))


def test_with_three_convolutions_it_has_the_size_of_the_96_percent_speed_run() -> None:
    """By hand: 312 + 323,328 + 3,098,880 + 6,491,136 + 5,120 in the whitening, the blocks and the head."""
    with torch.device("meta"):
        network = WhitenedCNN(widths=(128, 384, 512), convs=3, unit_head=False)
    assert sum(p.numel() for p in network.parameters()) == 9_918_776
    assert [sum(p.numel() for p in block.parameters()) for block in network.blocks] == [323_328, 3_098_880, 6_491_136]


def test_the_third_convolution_has_a_residual_connection_around_it_and_the_second() -> None:
    torch.manual_seed(0)
    network = WhitenedCNN(num_classes=7, widths=(24, 32, 40), convs=3)
    assert network(images(2)).shape == (2, 7)
    x = images(4)[:, :, :16, :16].repeat(1, 8, 1, 1)
    block = network.blocks[0].eval()
    parts = dict(block.named_children())
    pooled = nn.functional.max_pool2d(parts["conv1"](x), 2)
    first = nn.functional.gelu(parts["norm1"](pooled))
    second = nn.functional.gelu(parts["norm2"](parts["conv2"](first)))
    third = nn.functional.gelu(parts["norm3"](parts["conv3"](second)) + first)
    assert torch.equal(block(x), third)


def test_two_convolutions_are_named_and_drawn_as_ever() -> None:
    torch.manual_seed(0)
    network = WhitenedCNN()
    names = ["conv1.weight", "norm1.weight", "norm1.bias", "conv2.weight", "norm2.weight", "norm2.bias"]
    assert [name for name, _ in network.blocks[0].named_parameters()] == names
    torch.manual_seed(0)
    whiten, drawn = nn.Conv2d(3, 24, 2), []
    for a, b in ((24, 64), (64, 256), (256, 256)):
        drawn += [nn.Conv2d(a, b, 3, bias=False), nn.Conv2d(b, b, 3, bias=False)]
    head = nn.Linear(256, 10, bias=False)
    assert torch.equal(network.whiten.weight, whiten.weight)
    found = [convolution for block in network.blocks for name, convolution in block.named_children() if "conv" in name]
    for own, plain in zip(found, drawn, strict=True):
        width_in = plain.in_channels
        assert torch.equal(own.weight[width_in:], plain.weight[width_in:])  # type: ignore[index]
    assert torch.equal(network.get_parameter("head.weight"), head.weight / head.weight.std())


def test_the_head_and_the_scale_of_the_logits_can_be_those_of_torch() -> None:
    networks = []
    for unit_head, divisor in ((True, 256.0), (False, 2.0)):
        torch.manual_seed(0)
        networks.append(WhitenedCNN(widths=(24, 24, 24), unit_head=unit_head, logit_divisor=divisor).eval())
    heads = [network.get_parameter("head.weight") for network in networks]
    torch.testing.assert_close(heads[0], heads[1] / heads[1].std())
    logits = [network(images(2)) * divisor for network, divisor in zip(networks, (256.0, 2.0), strict=True)]
    torch.testing.assert_close(logits[0], logits[1] / heads[1].std())


@pytest.mark.parametrize("argument", [{"convs": 1}, {"convs": 4}, {"logit_divisor": 0.0}])
def test_the_shape_of_a_block_is_checked(argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(argument))}: .* is out of range"):
        WhitenedCNN(**argument)


@pytest.mark.parametrize(
    ("device", "precision", "library", "said"),
    [
        ("cpu", "bf16-mixed", object(), "fused: compiled"),
        ("cpu", "bf16-mixed", None, "fused: by torch's own operations, as its C cannot be compiled here"),
        ("cpu", "32-true", object(), "fused: by torch's own operations, as it is for bf16"),
        ("cuda", "bf16-mixed", object(), ""),
    ],
)
def test_a_person_is_told_whether_the_fused_functions_are_those_in_c(
    device: str, precision: str, library: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.networks.whitened.compiled", lambda: library)
    assert WhitenedCNN(fused=True).remark(device, precision) == said
    assert WhitenedCNN().remark(device, precision) == ""
