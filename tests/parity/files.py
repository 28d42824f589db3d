"""ONNX files of small programs, and faults planted in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper
from torch import nn

import fxquant
from fxquant.graph.program import Program
from fxquant.lowering.lower import lower
from fxquant.numerics.runtime import Array
from fxquant.parity import ParityReport, RuntimeOptions, check_parity
from fxquant.parity.simulation import Simulation
from tests.lowering import programs
from tests.lowering.programs import fake_quant_of, float_program, image, quantized
from tests.simulation.programs import pipeline_of

ONE_THREAD = RuntimeOptions(threads=1)
Edit = Callable[[onnx.GraphProto], None]


class Tokens(nn.Module):
    """Square linear layers at rank 3, an attention-like product, a layer norm, and a head whose output stays float."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), dim=-1)
        logits: torch.Tensor = self.head(nn.functional.gelu(self.norm(scores @ x)))
        return logits


TOKENS_VALUES = ("x", "linear", "linear_1", "transpose", "matmul", "softmax", "matmul_1", "layer_norm", "gelu")


def tokens(batch: int = 2, seed: int = 3, length: int = 6) -> torch.Tensor:
    """Normal noise of shape [batch, length, 8]."""
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(seed))


def residual_program(seed: int = 0) -> Program:
    """A calibrated Residual, from the cache."""
    return _residual(seed).copy()


@lru_cache
def _residual(seed: int) -> Program:
    return programs.residual_program(seed)


def tokens_program() -> Program:
    """A calibrated Tokens, from the cache; its head's output is not quantized."""
    return _tokens().copy()


@lru_cache
def _tokens() -> Program:
    torch.manual_seed(1)
    return quantized(float_program(Tokens(), tokens()), TOKENS_VALUES, tokens(8), shares={"transpose": "linear_1"})


def square_tokens_program() -> Program:
    """The same for as many tokens as channels: what is transposed keeps its shape."""
    torch.manual_seed(1)
    square = tokens(8, length=8)
    return quantized(float_program(Tokens(), square), TOKENS_VALUES, square, shares={"transpose": "linear_1"})


class Branches(nn.Module):
    """A concat net with sigmoid gates, average pooling, a product of activations and a hard-swish island."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(8, 4, 3, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.left(x), self.right(x)], 1)
        gated = joined * torch.sigmoid(joined)
        pooled = nn.functional.avg_pool2d(nn.functional.hardswish(gated), 2)
        result: torch.Tensor = self.last(pooled)
        return result


BRANCHES_VALUES = (
    "x",
    "conv2d",
    "conv2d_1",
    "cat",
    "sigmoid",
    "mul",
    "hardswish",
    "avg_pool2d",
    "conv2d_2",
)


def branches_program() -> Program:
    """A calibrated Branches, from the cache."""
    return _branches().copy()


@lru_cache
def _branches() -> Program:
    torch.manual_seed(2)
    return quantized(float_program(Branches(), image()), BRANCHES_VALUES, image(8))


class Gates(nn.Module):
    """A convolution whose codes a sigmoid, a sum and a second convolution read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.side = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        result: torch.Tensor = self.last(torch.sigmoid(first) + first) * self.side(first)
        return result


def narrow_gates_program(folder: Path) -> Program:
    """Gates with weights and activations of 4 bits; calibrated on 0.3 of the range of image(), so that codes clip."""
    torch.manual_seed(0)
    program = fxquant.capture(Gates().eval(), image())
    pipeline = pipeline_of(folder, weight=4, activation=4)
    pipeline.prepare(program)
    fxquant.calibrate(program, [0.3 * image()], progress=False)
    pipeline.finalize(program)
    return program


def bypass_clip(value: str) -> Edit:
    """Take out the Clip of a narrow value's codes."""
    return remove_node(f"{value}.clip")


class Product(nn.Module):
    """A product of one input with itself, cut at 1e4."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x * x, -1e4, 1e4)


def overflowing_program() -> Program:
    """A calibrated Product on a grid so fine that QLinearMul would leave int32: lowering puts a barrier behind it."""
    program = quantized(float_program(Product(), image()), ("x", "clamp"), image(8))
    low = torch.tensor(0.0)
    fake_quant_of(program, "clamp").set_range(low, low + 1e-7)
    return program


class Shifted(nn.Module):
    """A linear layer whose float output is negated, then quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.neg(self.fc(x))


def shifted_program() -> Program:
    """A calibrated Shifted: its layer writes float32, from integers."""
    torch.manual_seed(0)
    return quantized(float_program(Shifted(), tokens()), ("x", "neg"), tokens(8))


def tie_program() -> Program:
    """A calibrated Residual on grids of powers of two with odd zero points, where many codes are ties."""
    program = residual_program()
    for value, steps, zero in (("x", 5, 101), ("relu", 6, 0), ("conv2d_1", 6, 101), ("adaptive_avg_pool2d", 5, 101)):
        _set_grid(program, value, 2.0**-steps, zero)
    _set_grid(program, "linear", 2.0**-7, 103)
    _set_grid(program, "relu_1", 2.0**-5, 0)
    for name in ("conv1_weight", "conv2_weight", "fc_weight"):
        weight = program.module.get_parameter(str(program.node(name).target))
        largest = weight.detach().flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1))
        with torch.no_grad():  # the largest of each channel becomes 127 / 256: scale 1 / 256
            weight.copy_(torch.round(weight / largest * 127) / 256)
    return program


def _set_grid(program: Program, value: str, scale: float, zero_point: int) -> None:
    low = torch.tensor(-zero_point * scale)
    fake_quant_of(program, value).set_range(low, low + 255 * scale)


def low_relu_program() -> Program:
    """A calibrated Residual whose first relu has a grid that reaches below 0, so that the Relu is needed."""
    program = residual_program()
    fake_quant_of(program, "relu").set_range(torch.tensor(-1.0), torch.tensor(2.0))
    return program


def export(program: Program, folder: Path) -> Path:
    """The program's ONNX file in `folder`."""
    path = folder / "model.onnx"
    onnx.save(ir.to_proto(lower(program)), path)
    return path


def plant(path: Path, edit: Edit) -> Path:
    """The same file with `edit` done to its graph; everything else, the fingerprint too, stays."""
    model = onnx.load(path)
    edit(model.graph)
    planted = path.with_name("planted.onnx")
    onnx.save(model, planted)
    return planted


def compare(
    program: Program,
    path: Path,
    *,
    check_stored: bool = True,
    seeds: int = 2,
    simulation: str | Simulation = "float",
    options: RuntimeOptions = ONE_THREAD,
) -> ParityReport:
    """check_parity on `seeds` batches of 4 images or token sequences."""
    shape = program.node("x").meta["type"].shape
    batches = [tokens(4, seed, shape[1]) if len(shape) == 3 else image(4, seed) for seed in range(seeds)]
    return check_parity(
        program,
        path,
        batches,
        options=options,
        simulation=simulation,
        progress=False,
        check_stored=check_stored,
    )


def change_constant(name: str, change: Callable[[Array], Array]) -> Edit:
    """Replace an initializer's contents."""

    def edit(graph: onnx.GraphProto) -> None:
        tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(change(array.copy()).astype(array.dtype), name))

    return edit


def change_code(name: str, by: int) -> Edit:
    """Move the code of largest room in an initializer by `by`."""

    def change(codes: Array) -> Array:
        index = np.unravel_index(int(np.argmin(codes) if by > 0 else np.argmax(codes)), codes.shape)
        codes[index] += by
        return codes

    return change_constant(name, change)


def change_grid(quantizer: str, slot: int, change: Callable[[Array], Array]) -> Edit:
    """Give a DequantizeLinear and its QuantizeLinear a changed scale (slot 1) or zero point (slot 2) of their own."""

    def edit(graph: onnx.GraphProto) -> None:
        node = node_of(graph, quantizer)
        old = node.input[slot]
        array = numpy_helper.to_array(next(tensor for tensor in graph.initializer if tensor.name == old))
        graph.initializer.append(
            numpy_helper.from_array(change(array.copy()).astype(array.dtype), f"{quantizer}.planted")
        )
        for reader in graph.node:
            if reader is node or node.input[0] in reader.output:
                reader.input[slot] = f"{quantizer}.planted"

    return edit


def node_of(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    """The node called `name`."""
    found: onnx.NodeProto = next(node for node in graph.node if node.name == name)
    return found


def remove_node(name: str) -> Edit:
    """Take out a node of one input and one output; its readers read its input."""

    def edit(graph: onnx.GraphProto) -> None:
        node = node_of(graph, name)
        for reader in graph.node:
            for index, tensor in enumerate(reader.input):
                if tensor == node.output[0]:
                    reader.input[index] = node.input[0]
        graph.node.remove(node)

    return edit


def swap_weight_axis(quantizer: str) -> Edit:
    """Let the channels of a matrix's DequantizeLinear run along the other axis."""

    def edit(graph: onnx.GraphProto) -> None:
        (axis,) = (attribute.i for attribute in node_of(graph, quantizer).attribute if attribute.name == "axis")
        set_attribute(quantizer, "axis", 1 - axis)(graph)

    return edit


def store_transposed(layer: str, weight: str) -> Edit:
    """Store a Gemm's weight [in, out] instead of [out, in]: another file that computes the same."""

    def edit(graph: onnx.GraphProto) -> None:
        change_constant(f"{weight}.codes", np.transpose)(graph)
        swap_weight_axis(f"{weight}_fq")(graph)
        set_attribute(layer, "transB", 0)(graph)

    return edit


def set_attribute(name: str, key: str, value: object) -> Edit:
    """Set an attribute of a node."""

    def edit(graph: onnx.GraphProto) -> None:
        node = node_of(graph, name)
        kept = [attribute for attribute in node.attribute if attribute.name != key]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(key, value)])

    return edit
