"""Tiny programs built by hand, and comparisons with golden texts. tests/test_helpers.py proves with planted faults
that they bite.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxquant.graph.manager import PassManager
from fxquant.graph.module import ProgramModule
from fxquant.graph.pass_data import PassData
from fxquant.graph.passes import Pass
from fxquant.graph.program import Program, Stage, ValueType
from fxquant.graph.trace import PassEntry
from fxquant.numerics.fake_quant import BiasFakeQuant, FakeQuant, Mode
from fxquant.spec import Granularity, QuantSpec

aten = torch.ops.aten
GOLDEN = Path(__file__).parent / "golden"
WEIGHT_SPEC = QuantSpec(bits=8, signed=True, symmetric=True, strict=True, granularity=Granularity(0))


class Builder:
    """Builds a program in the normal form, node by node; each method returns the node it added, and the batch is "s0".

        build = Builder()
        x = build.input("x", 3, 8, 8)
        build.output(build.relu("relu", build.conv("conv", x, 4)))
        program = build.program()

    A node called "layer1_0_conv" comes from module "layer1.0.conv" if that is given as `path`, else from one of its
    own name. Parameters are seeded by the order in which they are made.
    """

    def __init__(self, seed: int = 0) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self._generator = torch.Generator().manual_seed(seed)

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        """A placeholder of shape (s0, *shape)."""
        node = self.graph.create_node("placeholder", name, name=name)
        return self._typed(node, ("s0", *shape), dtype)

    def tensor(self, path: str, value: torch.Tensor, *, parameter: bool = True) -> fx.Node:
        """A parameter or buffer at `path`, and the node that reads it."""
        owner_path, _, attribute = path.rpartition(".")
        owner = self._owner(owner_path)
        if parameter:
            owner.register_parameter(attribute, nn.Parameter(value))
        else:
            owner.register_buffer(attribute, value)
        node = self.graph.create_node("get_attr", path, name=path.replace(".", "_"))
        return self._typed(node, tuple(value.shape), value.dtype, owner_path)

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers, the next of the builder's."""
        return torch.randn(*shape, generator=self._generator)

    def call(self, name: str, target: Any, *args: Any, path: str | None = None, **kwargs: Any) -> fx.Node:
        """A call_function node; its type is found by running the operator on the meta device."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta["module_path"] = name if path is None else path
        found = _run_on_meta(target, args, kwargs)
        if isinstance(found, torch.Tensor):
            return self._typed(node, _symbolic(found.shape), found.dtype, node.meta["module_path"])
        if isinstance(found, (tuple, list)):
            node.meta["type"] = tuple(ValueType(_symbolic(item.shape), item.dtype) for item in found)
        return node

    def conv(
        self,
        name: str,
        x: fx.Node,
        channels: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        padding: int = 1,
        groups: int = 1,
        bias: bool = True,
        path: str | None = None,
    ) -> fx.Node:
        """A two-dimensional convolution with its weight and bias at `path`."""
        place = name if path is None else path
        weight = self.tensor(
            f"{place}.weight", self.random(channels, x.meta["type"].shape[1] // groups, kernel, kernel)
        )
        shift = self.tensor(f"{place}.bias", self.random(channels)) if bias else None
        geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)
        return self.call(name, aten.convolution.default, x, weight, shift, *geometry, path=place)

    def linear(self, name: str, x: fx.Node, features: int) -> fx.Node:
        """A linear layer."""
        weight = self.tensor(f"{name}.weight", self.random(features, x.meta["type"].shape[-1]))
        bias = self.tensor(f"{name}.bias", self.random(features))
        return self.call(name, aten.linear.default, x, weight, bias)

    def relu(self, name: str, x: fx.Node) -> fx.Node:
        """A relu."""
        return self.call(name, aten.relu.default, x)

    def add(self, name: str, x: fx.Node, y: fx.Node) -> fx.Node:
        """A sum."""
        return self.call(name, aten.add.Tensor, x, y)

    def batch_norm(self, name: str, x: fx.Node) -> fx.Node:
        """A BatchNorm2d in eval mode, with statistics and parameters that are not those it is born with."""
        module = nn.BatchNorm2d(x.meta["type"].shape[1], eps=1e-3, momentum=0.03).eval()
        for tensor in (module.weight, module.bias, module.running_mean):
            assert tensor is not None
            tensor.data.copy_(self.random(module.num_features))
        assert module.running_var is not None
        module.running_var.copy_(self.random(module.num_features).abs() + 0.5)
        return self.module(name, name, module, x)

    def module(self, name: str, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of `module`, which is added at `path`; the value is like the first argument."""
        owner_path, _, attribute = path.rpartition(".")
        self._owner(owner_path).add_module(attribute, module)
        node = self.graph.create_node("call_module", path, args, kwargs, name=name)
        node.meta.update({"type": args[0].meta["type"], "module_path": path, "module_class": type(module).__name__})
        return node

    def fake_quant(self, value: fx.Node, spec: QuantSpec, low: float = -1.0, high: float = 1.0) -> fx.Node:
        """A FakeQuant behind `value`, in mode fake, with a grid that covers [low, high]."""
        axis = spec.granularity.axis
        module = FakeQuant(
            spec, () if axis is None else (value.meta["type"].shape[axis],), follows=value.op == "get_attr"
        )
        module.set_range(torch.full_like(module.scale, low), torch.full_like(module.scale, high))
        module.mode = Mode.FAKE
        node = self.module(f"{value.name}_fq", f"fake_quants.{value.name}", module, value)
        node.meta["module_path"] = value.meta.get("module_path", "")
        return node

    def bias_fake_quant(self, bias: fx.Node, x: fx.Node, weight: fx.Node) -> fx.Node:
        """A BiasFakeQuant behind `bias`, for the layer that reads the FakeQuant nodes `x` and `weight`."""
        node = self.module(f"{bias.name}_fq", f"fake_quants.{bias.name}", BiasFakeQuant(), bias, x, weight)
        node.meta["module_path"] = bias.meta.get("module_path", "")
        return node

    def output(self, *values: fx.Node) -> None:
        """The output: one value, or a tuple of several."""
        self.graph.output(values[0] if len(values) == 1 else tuple(values))

    def program(self, name: str = "tiny", stage: Stage = Stage.CAPTURED) -> Program:
        """The program, in eval mode."""
        program = Program(ProgramModule(self.root.eval(), self.graph), name=name, stage=stage)
        program.link_biases()
        return program

    def _typed(
        self, node: fx.Node, shape: tuple[int | str, ...], dtype: torch.dtype, path: str | None = None
    ) -> fx.Node:
        node.meta["type"] = ValueType(shape, dtype)
        if path is not None:
            node.meta["module_path"] = path
        return node

    def _owner(self, path: str) -> nn.Module:
        owner = self.root
        for part in filter(None, path.split(".")):
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner


BATCH = 7  # stands for "s0" while types are found; no other size of a test program may be it


def _run_on_meta(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    def empty(node: fx.Node) -> Any:
        found = node.meta.get("type")
        if isinstance(found, tuple):
            return tuple(_empty(item) for item in found)
        return BATCH if found is None else _empty(found)

    values, named = fx.node.map_arg((tuple(args), kwargs), empty)
    return target(*values, **named)


def _empty(found: ValueType) -> torch.Tensor:
    return torch.empty([BATCH if size == "s0" else int(size) for size in found.shape], dtype=found.dtype, device="meta")


def _symbolic(shape: Sequence[int]) -> tuple[int | str, ...]:
    return tuple("s0" if size == BATCH else size for size in shape)


def residual_program() -> Program:
    """conv - batch norm - relu - depthwise conv, added to the relu, then a global mean and a linear layer."""
    build = Builder()
    x = build.input("x", 3, 8, 8)
    stem = build.relu("relu", build.batch_norm("bn", build.conv("conv", x, 4, bias=False)))
    depthwise = build.conv("block_0_conv", stem, 4, groups=4, path="block.0.conv")
    total = build.add("block_0_add", depthwise, stem)
    pooled = build.call("mean", aten.mean.dim, total, [2, 3])
    build.output(build.linear("fc", pooled, 5))
    return build.program()


def quantized_program() -> Program:
    """A convolution with quantized input, weight, bias and output, behind it a sigmoid in float."""
    build = Builder()
    x = build.fake_quant(build.input("x", 3, 8, 8), QuantSpec(), -2.0, 2.0)
    weight = build.fake_quant(build.tensor("conv.weight", build.random(4, 3, 3, 3)), WEIGHT_SPEC)
    bias = build.bias_fake_quant(build.tensor("conv.bias", build.random(4)), x, weight)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    conv = build.call("conv", aten.convolution.default, x, weight, bias, *geometry)
    quantized = build.fake_quant(conv, QuantSpec(), 0.0, 6.0)
    build.output(build.call("sigmoid", aten.sigmoid.default, quantized))
    return build.program(stage=Stage.CALIBRATED)


def run_pass(item: Pass, program: Program, check_inputs: Any = None, data: PassData | None = None) -> PassEntry:
    """Run one pass through the manager, with all its checks; `data` for one that measures."""
    (entry,) = PassManager([item]).run(program, check_inputs, data=data).entries
    return entry


def assert_rewrites(entry: PassEntry, expected: str, edits: int) -> None:
    """The lines of the printed graph that the pass took away ("- ...") and put in ("+ ..."), and its number of edits.

    `expected` is one line each, in the order of the diff, indented as one likes; "" for a pass that changes nothing.
    """
    found = [line for line in entry.diff().splitlines()[2:] if line[0] in "+-" and not line[1:].startswith("program ")]
    lines = [line.strip() for line in expected.strip().splitlines()]
    wanted = [line[0] + line[1:].strip() for line in lines if line]
    got = [line[0] + line[1:].strip() for line in found]
    assert got == wanted, _compared(wanted, got)
    assert len(entry.edits) == edits, "edits: " + "; ".join(map(str, entry.edits))


def assert_golden(text: str, name: str) -> None:
    """`text` is what tests/golden/<name> holds; FXQUANT_UPDATE_GOLDEN=1 writes it, to be read before it is kept."""
    path = GOLDEN / name
    if os.environ.get("FXQUANT_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    expected = path.read_text(encoding="utf-8")
    assert text == expected, _compared(expected.splitlines(), text.splitlines())


def _compared(expected: list[str], got: list[str]) -> str:
    return "\n" + "\n".join(difflib.unified_diff(expected, got, "expected", "got", lineterm=""))


def relative_difference(old: torch.Tensor, new: torch.Tensor) -> float:
    """Largest difference as a fraction of the largest magnitude of `old`; shapes and dtypes must be equal."""
    assert old.shape == new.shape and old.dtype == new.dtype, f"{old.shape} {old.dtype}, {new.shape} {new.dtype}"
    return float((old - new).abs().max() / old.abs().max().clamp(min=1e-30))
