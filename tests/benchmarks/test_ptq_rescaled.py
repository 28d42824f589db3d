"""Rescaled nets: the float function stays, naive per-tensor quantization does not; where it is exact and where not."""

from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from benchmarks import lowered, ptq_nets
from benchmarks.kernels import open_session
from benchmarks.labelled_images import synthetic
from benchmarks.models import SamePadConv2d, randomise
from benchmarks.ptq_nets import NETS, NotPreserved, rescaled, small_samples, trained_resnet
from benchmarks.qat_accuracy_runs import Recipe, TrainingPlan
from benchmarks.qat_networks import SmallMobileNet, SmallResNet
from benchmarks.quality import sqnr_db
from benchmarks.rescaled import Link, links, rescale, with_relu


def moved(net: nn.Module, images: Tensor, octaves: float, seed: int = 0) -> float:
    """The largest change of the output, as a part of the largest output."""
    with torch.no_grad():
        before = net(images)
        rescale(net, octaves, seed)
        return float((net(images) - before).abs().max() / before.abs().max())


def chain(widths: Sequence[int], kinds: Sequence[str], seed: int) -> nn.Module:
    """Convolutions with what `kinds` say behind each of them."""
    layers: list[nn.Module] = []
    behind = {"bn-relu": [nn.BatchNorm2d, nn.ReLU], "relu": [nn.ReLU], "bn": [nn.BatchNorm2d], "relu6": [nn.ReLU6]}
    channels = 3
    for width, kind in zip(widths, kinds, strict=True):
        groups = channels if kind == "depthwise" else 1
        width = 2 * channels if kind == "depthwise" else width
        layers.append(nn.Conv2d(channels, width, 3, padding=1, groups=groups))
        layers += [make(width) if make is nn.BatchNorm2d else make() for make in behind.get(kind, [])]
        channels = width
    return randomise(nn.Sequential(*layers, nn.Conv2d(channels, 2, 1)), seed)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from(["bn-relu", "relu", "bn", "relu6", "depthwise"])),
        min_size=1,
        max_size=4,
    ),
    octaves=st.floats(0.1, 6),
    seed=st.integers(0, 1000),
)
def test_function_stays_when_channels_are_rescaled(shape: list[tuple[int, str]], octaves: float, seed: int) -> None:
    net = chain([width for width, _ in shape], [kind for _, kind in shape], seed)
    weights = [parameter.clone() for parameter in net.parameters()]
    assert moved(net, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), octaves, seed) <= 1e-4
    changed = any(not torch.equal(old, new) for old, new in zip(weights, net.parameters(), strict=True))
    assert changed == any(kind != "relu6" for _, kind in shape)


@pytest.mark.parametrize("net", [with_relu(SmallMobileNet(1)), SmallResNet(1)])
def test_function_stays_when_nets_have_residuals(net: nn.Module) -> None:
    assert 0 < moved(randomise(net, 0), torch.randn(2, 1, 28, 28), 5.0) <= 1e-4


def test_links_are_those_whose_values_one_layer_reads() -> None:
    inside = [f"blocks.{number}.layers" for number in range(3)]
    assert links(SmallResNet(1)) == [Link(f"{b}.0.0", f"{b}.0.1", f"{b}.1.0") for b in inside]
    relu = links(with_relu(SmallMobileNet(1)))
    assert Link("blocks.1.layers.0.0", "blocks.1.layers.0.1", "blocks.1.layers.1.0") in relu, "into a depthwise layer"
    assert Link("blocks.1.layers.1.0", "blocks.1.layers.1.1", "blocks.1.layers.2.0") in relu, "out of it"
    assert links(SmallMobileNet(1)) == [], "behind every layer stands a ReLU6 or a sum"


class Odd(nn.Module):
    """Layers that must be left alone: read twice, called twice, grouped in pairs, padded by values, sigmoid between."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice = nn.Conv2d(4, 4, 1)
        self.shared = nn.Conv2d(4, 4, 1)
        self.paired = nn.Conv2d(4, 4, 1, groups=2)
        self.reflected = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 4, H, W) to the same shape."""
        y = self.read_twice(x)
        y = self.paired(torch.relu(self.shared(self.shared(y)))) + y
        found: Tensor = self.last(torch.sigmoid(self.reflected(y)))
        return found


def test_layers_are_left_alone_when_rescaling_would_not_be_exact() -> None:
    assert links(Odd()) == []


def test_padding_inside_a_layer_is_no_obstacle() -> None:
    net = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), SamePadConv2d(4, 5, 3, 8, stride=2)), 0)
    assert len(links(net)) == 1 and 0 < moved(net, torch.randn(2, 3, 8, 8), 4.0) <= 1e-4


class Clipped(nn.Module):
    """ReLU6 as a function and as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)
        self.relu6 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 1, H, W) to (N, 2, H, W)."""
        found: Tensor = self.relu6(self.second(functional.relu6(self.first(x), inplace=False)))
        return found


def test_relu_stands_for_every_relu6_and_weights_are_shared() -> None:
    net = Clipped().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.5)
    relu = with_relu(net)
    x = torch.rand(2, 1, 4, 4) / 10
    assert torch.equal(net(x), relu(x)) and not relu.training
    assert bool((relu(1000 * x) > 6).any()) and bool((net(1000 * x) <= 6).all())
    assert not any(isinstance(module, nn.ReLU6) for module in relu.modules())
    assert relu.get_parameter("first.weight") is net.first.weight


def test_naive_per_tensor_collapses_when_channels_are_rescaled(tmp_path: Path) -> None:
    images = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    net = randomise(SmallResNet(1), 0)
    with torch.no_grad():
        reference = net(images).numpy()

    def decibels() -> float:
        path = tmp_path / "model.onnx"
        lowered.quantize(net, images, path, fxquant.load_pipeline("int8_per_tensor"))
        return sqnr_db(open_session(path, 1).run(images.numpy()), reference) or numpy.inf

    before = decibels()
    rescaled(net, images, octaves=5)
    assert decibels() < before - 10


def test_rescaling_is_refused_when_it_changes_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(net: nn.Module, octaves: float, seed: int) -> list[Link]:
        with torch.no_grad():
            net.get_parameter("classifier.bias").add_(0.01 * octaves)
        return [Link("stem.0", "stem.1", "classifier")]

    monkeypatch.setattr(ptq_nets, "rescale", wrong)
    with pytest.raises(NotPreserved, match="outputs within 0.0001 of what they were"):
        rescaled(randomise(SmallResNet(1), 0), torch.randn(2, 1, 28, 28), octaves=4)


def test_rescaling_is_refused_when_nothing_can_be_rescaled() -> None:
    with pytest.raises(NotPreserved, match="after 0 rescalings"):
        rescaled(randomise(SmallMobileNet(1), 0), torch.randn(2, 1, 28, 28), octaves=4)


def test_nets_come_in_pairs_of_one_function() -> None:
    assert len(NETS) == 10
    for name, net in NETS.items():
        assert net.name == name
        assert net.origin in NETS and not NETS[net.origin].is_rescaled
        assert (NETS[net.origin].base, NETS[net.origin].is_relu) == (net.base, net.is_relu)


def test_small_images_that_are_judged_did_not_calibrate() -> None:
    data = synthetic(40)
    samples = small_samples(2, lambda: data)
    assert len(samples.calibration) == 16 and len(samples.judged) == len(samples.labels) == 40
    assert torch.equal(samples.calibration, data.prepared(data.train.pixels[:16]))
    assert torch.equal(samples.judged, data.prepared(data.test.pixels))
    assert samples.labels[3] == (int(data.test.labels[3]),) and samples.resolution == 2.5


def test_resnet_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path))
    data, plan = synthetic(64), TrainingPlan(1, learning_rate=0.05, warmup=0.2)
    recipe = Recipe("synthetic", plan, plan, batch=16)
    first = trained_resnet(lambda: data, recipe)
    monkeypatch.setattr(ptq_nets, "execute", lambda run, recipe, data, store: None)
    again = trained_resnet(lambda: data, recipe)
    for old, new in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(old, new)
