"""Small nets that learn scikit-learn's digits in seconds, each with something that breaks quantizers elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fxquant.demo.digits import Digits, load_digits

CLASSES, FLOAT_STEPS = 10, 20
Make = Callable[[], nn.Module]
Spoil = Callable[[nn.Module], None]


class Residual(nn.Module):
    """Two basic blocks, the second with a convolution as shortcut; a batch norm behind each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a1, self.an1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a2, self.an2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b1, self.bn1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.b2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.down, self.dn = nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.an2(self.a2(torch.relu(self.an1(self.a1(x))))) + x)
        x = torch.relu(self.bn2(self.b2(torch.relu(self.bn1(self.b1(x))))) + self.dn(self.down(x)))
        return torch.as_tensor(self.fc(x.mean((2, 3))))


def set_gammas(*gammas: float, only: str = "") -> Spoil:
    """Sets the gammas of all batch norms, or of those whose name ends with `only`, to these, over and over."""

    def spoil(net: nn.Module) -> None:
        for name, norm in net.named_modules():
            if isinstance(norm, nn.BatchNorm2d) and name.endswith(only):
                norm.weight.copy_(torch.tensor(gammas).repeat(norm.num_features)[: norm.num_features])

    return spoil


class Flat(nn.Module):
    """conv - bn - relu, conv - bn - relu, mean, classifier."""

    def __init__(self, first: nn.Module, norm1: nn.Module, second: nn.Module, norm2: nn.Module) -> None:
        super().__init__()
        self.first, self.norm1, self.second, self.norm2 = first, norm1, second, norm2
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm2(self.second(torch.relu(self.norm1(self.first(x))))))
        return torch.as_tensor(self.fc(x.flatten(2).mean(2)))


class DeadChannel(nn.Module):
    """A channel of zeros beside the image, and convolutions of each, so that half of the channels are constant."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv2d(2, 8, 3, padding=1, groups=2, bias=False)
        self.body = Flat(first, nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.body(torch.cat([x, torch.zeros_like(x)], 1)))


def set_variances(net: nn.Module) -> None:
    """Running variances of 0, 1e-30 and 1e8."""
    net.get_buffer("body.norm1.running_var")[:3] = torch.tensor([0.0, 1e-30, 1e8])


class Shared(nn.Module):
    """A convolution called twice with a batch norm for each call, or one batch norm for both."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(norms))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norms[0](self.conv(x)))
        x = torch.relu(self.norms[-1](self.conv(F.max_pool2d(x, 2))))
        return torch.as_tensor(self.fc(x.mean((2, 3))))


class TwoNorms(nn.Module):
    """Two batch norms on one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8, eps=1e-3)
        self.head, self.bn3, self.fc = nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = torch.relu(self.bn1(x)) + torch.relu(-self.bn2(x))
        return torch.as_tensor(self.fc(torch.relu(self.bn3(self.head(x))).mean((2, 3))))


class Nested(nn.Module):
    """Modules in modules in modules."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3, momentum=0.03))
        middle = nn.ModuleDict({"inner": nn.Sequential(inner, nn.ReLU()), "bn": nn.BatchNorm2d(8, momentum=None)})
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.Sequential(nn.BatchNorm2d(8, eps=1e-3), nn.ReLU()))
        self.body = nn.ModuleDict({"middle": middle, "conv": nn.Conv2d(8, 8, 1)})
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, middle = self.stem(x), self.body["middle"]
        assert isinstance(middle, nn.ModuleDict)
        x = torch.relu(middle["bn"](self.body["conv"](middle["inner"](x))) + x)
        return torch.as_tensor(self.fc(x.mean((2, 3))))


class Inverted(nn.Module):
    """MobileNetV2's block: expansion, depthwise, projection, all with batch norm, ReLU6; a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        depthwise = nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(24), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.dropout, self.fc = nn.Dropout(0.1), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return torch.as_tensor(self.fc(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1))))


class Decoder(nn.Module):
    """A strided convolution undone by a transposed one, each with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm1 = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.up, self.norm2 = nn.ConvTranspose2d(8, 6, 2, 2, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, CLASSES, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.down(x)))
        x = torch.relu(self.norm2(self.up(x)))
        return torch.as_tensor(self.head(x).mean((2, 3)))


class Rows(nn.Module):
    """Linear layers with BatchNorm1d and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.bn1 = nn.Linear(64, 24), nn.BatchNorm1d(24)
        self.two, self.bn2 = nn.Linear(24, 16, bias=False), nn.BatchNorm1d(16, momentum=None)
        self.fc, self.dropout = nn.Linear(16, CLASSES), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(torch.relu(self.bn1(self.one(x.flatten(1)))))
        return torch.as_tensor(self.fc(torch.relu(self.bn2(self.two(x)))))


class NormFirst(nn.Module):
    """A batch norm in front of a convolution, and one behind a relu."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0, self.conv1 = nn.BatchNorm2d(1), nn.Conv2d(1, 8, 3)
        self.bn1, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, bias=False)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(torch.relu(self.conv1(self.bn0(x))))
        return torch.as_tensor(self.fc(torch.relu(self.conv2(x)).mean((2, 3))))


class Concatenating(nn.Module):
    """Concatenations and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.one, self.norm1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.two, self.fc = nn.Conv2d(12, 6, 1), nn.Linear(18, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = F.max_pool2d(torch.cat([torch.relu(self.norm1(self.one(x))), x], 1), 2)
        return torch.as_tensor(self.fc(torch.cat([torch.relu(self.two(x)), x], 1).mean((2, 3))))


class Smooth(nn.Module):
    """SiLU, hard-swish and GELU, behind batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.three, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.norm1(self.one(x)))
        x = F.hardswish(self.norm2(self.two(x)))
        return torch.as_tensor(self.fc(F.gelu(self.three(x)).mean((2, 3))))


class Attention(nn.Module):
    """One encoder block over the rows of an image, with layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.fc = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.flatten(1, 2))
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return torch.as_tensor(self.fc(x.mean(1)))


class Excited(nn.Module):
    """Squeeze-and-excite between batch-normed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.two, self.norm2, self.fc = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.one(x)))
        gate = torch.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        x = x * torch.sigmoid(self.excite(gate))
        return torch.as_tensor(self.fc(torch.relu(self.norm2(self.two(x))).mean((2, 3))))


class Tied(nn.Module):
    """One weight under two names: two convolutions, a batch norm behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.two.weight = self.one.weight
        self.norm1, self.norm2, self.fc = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.one(torch.relu(self.stem(x)))))
        return torch.as_tensor(self.fc(torch.relu(self.norm2(self.two(x))).mean((2, 3))))


def convolutions(norm: Callable[[int], nn.Module], groups: int = 1) -> Make:
    """Makes two convolutions with such batch norms behind them."""
    return lambda: Flat(nn.Conv2d(1, 8, 3), norm(8), nn.Conv2d(8, 12, 3, groups=groups, bias=False), norm(12))


def conv1d() -> nn.Module:
    """Convolutions along rows."""
    return Flat(nn.Conv1d(8, 12, 3), nn.BatchNorm1d(12), nn.Conv1d(12, 12, 3), nn.BatchNorm1d(12))


def conv3d() -> nn.Module:
    """Convolutions of volumes."""
    return Flat(nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.Conv3d(6, 12, 2), nn.BatchNorm3d(12))


IMAGE, SIGNAL, VOLUME = (1, 8, 8), (8, 8), (1, 4, 4, 4)


@dataclass(frozen=True)
class Case:
    """A net of the zoo.

    Arguments:
        make: makes it; its weights come from torch's generator.
        shape: of one example, whose 64 numbers are a digit's.
        spoil: what is done to it once it has learned in float.
    """

    make: Make
    shape: tuple[int, ...] = IMAGE
    spoil: Spoil | None = None


NETS: dict[str, Case] = {
    "residual": Case(Residual),
    "zero-init residual": Case(Residual, spoil=set_gammas(0.0, only="n2")),
    "all gammas 0": Case(Residual, spoil=set_gammas(0.0)),
    "gammas of both signs": Case(Residual, spoil=set_gammas(-1.0, 0.5, 0.0, -1e-4)),
    "dead channel": Case(DeadChannel),
    "tiny variance": Case(DeadChannel, spoil=set_variances),
    "shared conv, one norm": Case(lambda: Shared(1)),
    "shared conv, two norms": Case(lambda: Shared(2)),
    "two norms on one conv": Case(TwoNorms),
    "nested": Case(Nested),
    "eps 1e-3, momentum 0.03": Case(convolutions(lambda n: nn.BatchNorm2d(n, eps=1e-3, momentum=0.03))),
    "momentum None": Case(convolutions(lambda n: nn.BatchNorm2d(n, momentum=None))),
    "inverted residual": Case(Inverted),
    "grouped": Case(convolutions(nn.BatchNorm2d, groups=4)),
    "transposed": Case(Decoder),
    "linear": Case(Rows),
    "norm first": Case(NormFirst),
    "conv1d": Case(conv1d, SIGNAL),
    "conv3d": Case(conv3d, VOLUME),
    "concatenation": Case(Concatenating),
    "smooth": Case(Smooth),
    "attention": Case(Attention),
    "squeeze-excite": Case(Excited),
    "tied": Case(Tied),
    "without affine": Case(convolutions(lambda n: nn.BatchNorm2d(n, affine=False))),
}
# It trains, but normalises by its batch in eval mode too, which no integer kernel does.
WITHOUT_STATISTICS = Case(convolutions(lambda n: nn.BatchNorm2d(n, track_running_stats=False)))


@cache
def digits() -> Digits:
    """The digits, always in the same order."""
    return load_digits(0)


def net(name: str) -> nn.Module:
    """A net that has begun to learn the digits in float, in eval mode."""
    model = NETS[name].make()
    model.load_state_dict(_learned(name))
    spoil = NETS[name].spoil
    if spoil is not None:
        with torch.no_grad():
            spoil(model)
    return model.eval()


@cache
def _learned(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = NETS[name].make().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    images, labels = examples(name, 512)
    for chosen in torch.randint(0, len(labels), (FLOAT_STEPS, 32)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


def examples(name: str, count: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` digits in the shape that the net takes, and their labels."""
    data, end = digits(), start + count
    images = data.train_images[start:end]
    return images.reshape(len(images), *NETS[name].shape), data.train_labels[start:end]
