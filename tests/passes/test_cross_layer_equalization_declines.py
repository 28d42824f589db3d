"""cross-layer-equalization: the layers that it leaves alone, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxquant.passes import CrossLayerEqualization
from tests.helpers import run_pass
from tests.passes.harness import Chain, captured, reasons
from tests.passes.rescaling_nets import IMAGE, Net, conv, measured, spread


class Twice(Net):
    def forward(self, x: torch.Tensor) -> Any:
        part: Any = self
        return part.conv2(torch.relu(part.conv1(x))) + part.conv2(torch.relu(part.conv1(x + 1)))


class TwoReaders(Net):
    def forward(self, x: torch.Tensor) -> Any:
        part: Any = self
        y = torch.relu(part.conv1(x))
        return part.conv2(y) + part.conv3(y)


class Returned(Net):
    def forward(self, x: torch.Tensor) -> Any:
        part: Any = self
        y = torch.relu(part.conv1(x))
        return part.conv2(y), y


class Joined(Net):
    def forward(self, x: torch.Tensor) -> Any:
        part: Any = self
        return part.conv3(torch.cat([part.conv1(x), part.conv2(x)], 1))


class Added(Net):
    def forward(self, x: torch.Tensor) -> Any:
        part: Any = self
        return part.conv2(torch.relu(part.conv1(x) + 1.0))


class Tied(Net):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__(**parts)
        part: Any = self
        part.other.weight = part.conv2.weight

    def forward(self, x: torch.Tensor) -> Any:
        part: Any = self
        return part.conv2(torch.relu(part.conv1(x)))


class Computed(Net):
    def forward(self, x: torch.Tensor) -> Any:
        part: Any = self
        return F.conv2d(torch.relu(part.conv1(x)), part.conv2.weight * 2)


class Mixed(Net):
    def forward(self, x: torch.Tensor) -> Any:
        part: Any = self
        y = torch.relu(part.conv1(x))
        return part.conv2(y.reshape(y.shape[0], 3, 14, 6))


class NextAxis(Net):
    def forward(self, x: torch.Tensor) -> Any:
        part: Any = self
        return part.fc(torch.relu(part.conv1(x)))


RELU6 = "'replace-relu6' makes it a relu, which changes the outputs"
DECLINED: dict[str, tuple[nn.Module, str]] = {
    "relu6": (
        Chain(conv1=conv(), act=nn.ReLU6(), conv2=conv(4, 6)),
        f"conv1 ends its chain: act clips to [0, 6], wherever a channel's scale is; {RELU6}",
    ),
    "hardtanh": (
        Chain(conv1=conv(), act=nn.Hardtanh(), conv2=conv(4, 6)),
        "conv1 ends its chain: act clips to [-1, 1], wherever a channel's scale is",
    ),
    "sigmoid": (
        Chain(conv1=conv(), act=nn.Sigmoid(), conv2=conv(4, 6)),
        "conv1 ends its chain: act (aten.sigmoid.default) is not positive-homogeneous in each channel",
    ),
    "hardswish": (
        Chain(conv1=conv(), act=nn.Hardswish(), conv2=conv(4, 6)),
        "conv1 ends its chain: act (aten.hardswish.default) is not positive-homogeneous in each channel",
    ),
    "batch norm": (
        Chain(conv1=conv(), bn=nn.BatchNorm2d(6), conv2=conv(4, 6)),
        "conv1 ends its chain: bn (BatchNorm2d) is not positive-homogeneous in each channel",
    ),
    "padding with ones": (
        Chain(conv1=conv(), pad=nn.ConstantPad2d(1, 1.0), conv2=conv(4, 6)),
        "conv1 ends its chain: pad pads with 1.0",
    ),
    "two readers": (
        TwoReaders(conv1=conv(), conv2=conv(4, 6), conv3=conv(4, 6)),
        "conv1 ends its chain: relu has 2 users (conv2, conv3)",
    ),
    "returned": (
        Returned(conv1=conv(), conv2=conv(4, 6)),
        "conv1 ends its chain: relu has 2 users (conv2, output)",
    ),
    "called twice": (
        Twice(conv1=conv(), conv2=conv(4, 6)),
        "conv1 ends its chain: conv1_weight has 2 users (conv1, conv1_1)",
    ),
    "concatenated": (
        Joined(conv1=conv(), conv2=conv(), conv3=conv(4, 12)),
        "conv1 ends its chain: cat reads conv1 beside another value",
    ),
    "added": (
        Added(conv1=conv(), conv2=conv(4, 6)),
        "conv1 ends its chain: add (aten.add.Tensor) is not positive-homogeneous in each channel",
    ),
    "tied": (
        Tied(conv1=conv(), conv2=conv(4, 6), other=conv(4, 6)),
        "conv1 ends its chain: conv2.weight and other.weight are one tensor",
    ),
    "computed": (
        Computed(conv1=conv(), conv2=conv(4, 6)),
        "conv1 ends its chain: convolution's weight or bias is computed, by mul",
    ),
    "channels mixed": (
        Mixed(conv1=conv(), conv2=conv(4, 3)),
        "conv1 ends its chain: reshape reshapes float32[s0, 6, 7, 6] to float32[s0, 3, 14, 6], which mixes channels",
    ),
    "another axis": (
        NextAxis(conv1=conv(), fc=nn.Linear(6, 3)),
        "conv1 ends its chain: fc does not take its channels from axis 1 of relu (float32[s0, 6, 7, 6])",
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_layer_is_left_alone_with_the_reason(case: str) -> None:
    model, reason = DECLINED[case]
    program = captured(spread(model), IMAGE)
    entry = run_pass(CrossLayerEqualization(), program, check_inputs=IMAGE)
    assert not entry.edits and measured(program) == []
    assert reason in reasons(entry), reasons(entry)
