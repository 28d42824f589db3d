"""What the tests of live batch norms share: nets, how they are brought to a stage, and their codes compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fxquant.calibration import calibrate
from fxquant.graph.pipeline import load_pipeline
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import FakeQuant
from tests.passes.harness import Chain, captured, randomize

IMAGE = torch.randn(4, 4, 9, 8, generator=torch.Generator().manual_seed(1))
SIGNAL = torch.randn(4, 4, 11, generator=torch.Generator().manual_seed(2))
ROWS = torch.randn(16, 4, generator=torch.Generator().manual_seed(4))


class Reuse(nn.Module):
    """A convolution called twice, a batch norm behind each call; and a batch norm called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, eps=1e-3)
        self.one, self.two = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1, bias=False)
        self.shared = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv(x)))
        x = torch.relu(self.bn2(self.conv(x)))
        out: torch.Tensor = torch.relu(self.shared(self.one(x))) + self.shared(self.two(x))
        return out


class TwoNorms(nn.Module):
    """Two batch norms on one convolution, which cannot be folded, in front of one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.head, self.bn3 = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return torch.as_tensor(self.bn3(self.head(torch.relu(self.bn1(x)) + torch.relu(self.bn2(x)))))


class Nested(nn.Module):
    """Blocks in blocks, with a residual, a depthwise layer and a classifier with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU())
        depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.block = nn.ModuleDict({"inner": nn.Sequential(depthwise, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))})
        self.fc, self.norm = nn.Linear(8, 5), nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.block["inner"](x) + x)
        return torch.as_tensor(self.norm(self.fc(x.mean((2, 3)))))


class Tokens(nn.Module):
    """A linear of tokens, their rows flattened for the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.head = nn.Linear(11, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return torch.as_tensor(self.head(torch.relu(self.bn(y.flatten(0, 1)).reshape_as(y))))


def tiny_variance() -> nn.Module:
    """Channels whose running variance is tiny, or huge, before a relu."""
    model = randomize(Chain(conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6, eps=1e-3), relu=nn.ReLU()))
    var = model.get_buffer("bn.running_var")
    var[0], var[1], var[2] = 1e-20, 0.0, 1e8
    return model


def transposed() -> nn.Module:
    """A transposed convolution, grouped, behind one that has an integer kernel."""
    up = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    return randomize(Chain(conv=nn.Conv2d(4, 4, 1), up=up, norm=nn.BatchNorm2d(6), relu=nn.ReLU()))


def pair(layer: Callable[[], nn.Module], norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """layer - norm - relu."""
    return lambda: randomize(Chain(layer=layer(), norm=norm(), relu=nn.ReLU()))


def plain() -> nn.Module:
    """Nothing between a batch norm and the next layer, so that all that the former gives counts."""
    return randomize(Chain(conv=nn.Conv2d(4, 6, 3, bias=False), norm=nn.BatchNorm2d(6), head=nn.Conv2d(6, 3, 1)))


BIASED = partial(nn.Conv2d, 4, 6, 3, padding=1)
NETS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "no activation": (plain, IMAGE),
    "conv without bias": (pair(partial(nn.Conv2d, 4, 6, 3, bias=False), partial(nn.BatchNorm2d, 6)), IMAGE),
    "conv with bias, eps=1e-3": (pair(BIASED, partial(nn.BatchNorm2d, 6, eps=1e-3)), IMAGE),
    "grouped": (pair(partial(BIASED, groups=2), partial(nn.BatchNorm2d, 6, momentum=None)), IMAGE),
    "depthwise": (pair(partial(nn.Conv2d, 4, 8, 3, groups=4), partial(nn.BatchNorm2d, 8, affine=False)), IMAGE),
    "transposed, grouped": (transposed, IMAGE),
    "conv1d": (pair(partial(nn.Conv1d, 4, 5, 3), partial(nn.BatchNorm1d, 5)), SIGNAL),
    "linear": (pair(partial(nn.Linear, 4, 6), partial(nn.BatchNorm1d, 6)), ROWS),
    "tokens": (lambda: randomize(Tokens()), SIGNAL),
    "tiny variance": (tiny_variance, IMAGE),
    "reuse": (lambda: randomize(Reuse()), IMAGE),
    "two norms": (lambda: randomize(TwoNorms()), IMAGE),
    "nested": (lambda: randomize(Nested()), IMAGE),
}


def model_of(case: str) -> tuple[nn.Module, torch.Tensor]:
    """A net with seeded weights, and its input."""
    torch.manual_seed(0)
    make, x = NETS[case]
    return make().eval(), x


def prepared(case: str, preset: str = "int8_per_channel_qat") -> Program:
    """A net prepared by a packaged preset and calibrated."""
    model, x = model_of(case)
    program = captured(model, x)
    load_pipeline(preset).prepare(program)
    calibrate(program, [x, 0.7 * x])
    return program


def finalized(program: Program, preset: str = "int8_per_channel_qat") -> Program:
    """A finalized copy."""
    twin = program.copy()
    load_pipeline(preset).finalize(twin)
    return twin


def codes(program: Program, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The codes that each FakeQuant and BiasFakeQuant gives for an input in eval mode, in float simulation, by node."""
    program = program.copy()
    program.module.eval()
    values: dict[str, torch.Tensor] = {}
    interpreter = _Recorder(program, values)
    with torch.no_grad():
        interpreter.run(x)
    return values


class _Recorder(torch.fx.Interpreter):
    def __init__(self, program: Program, values: dict[str, torch.Tensor]) -> None:
        super().__init__(program.module)
        self._program, self._values = program, values

    def run_node(self, n: torch.fx.Node) -> object:
        found = super().run_node(n)
        module = self._program.submodule(n) if n.op == "call_module" else None
        quantizer = self._program.fake_quant(n) or self._program.bias_fake_quant(n)
        if quantizer is not None:
            assert module is quantizer
            (source, *_), _ = self.fetch_args_kwargs_from_env(n)
            if isinstance(quantizer, FakeQuant):
                quantizer.refresh(source)
            self._values[n.name] = quantizer.codes(source)
        return found


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    """Codes that differ at the FakeQuants of both; the programs must have the same ones, and some."""
    assert one.keys() == other.keys() and one
    return sum(int((one[name] != other[name]).sum()) for name in one)


def train(program: Program, x: torch.Tensor, steps: int = 5, lr: float = 0.02) -> None:
    """A few steps of SGD towards noise, then eval mode."""
    generator = torch.Generator().manual_seed(9)
    optimizer = torch.optim.SGD(program.module.parameters(), lr=lr, momentum=0.9)
    program.module.train()
    for _ in range(steps):
        found = program.module(x)
        loss = (found - torch.randn(found.shape, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    program.module.eval()
