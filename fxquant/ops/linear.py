"""Matrix products: linear, addmm, mm, bmm, matmul, baddbmm, einsum.

linear(x, w, b) = x w^T + b with w: [out, in] is a Gemm with transB = 1 on rank 2: the weight keeps its layout and its
channel axis 0. On a higher rank it is Reshape, Gemm, Reshape: onnxruntime takes the codes through the Reshapes and
runs QGemm with the int32 bias, where MatMul and Add fuse only if every size is known (1.31: with a symbolic batch they
become MatMulIntegerToFloat and a float Add). Without a bias, or for a target that fuses MatMul and Add, it is MatMul
with w^T stored (QLinearMatMul).

A product with a rank-2 parameter on the right counts as a layer with a weight: x w with w: [in, out], channel axis 1.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

from fxquant.ops._emit import argument, optional_value, reshape
from fxquant.ops.base import OpDef, Role, Writer
from fxquant.ops.kernels import ProductKernel

aten = torch.ops.aten


def parameter_source(value: object) -> fx.Node | None:
    """The get_attr node that a value is, or that the quantizer it comes from reads."""
    if isinstance(value, fx.Node) and value.op == "call_module" and value.args:
        value = value.args[0]
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _rank(node: fx.Node) -> int | None:
    kind = node.meta.get("type")
    return None if kind is None else len(kind.shape)


def _has_weight(node: fx.Node, position: int) -> bool:
    source = parameter_source(node.args[position])
    return source is not None and _rank(source) == 2


def _weight_of_product(node: fx.Node) -> int | None:
    return 1 if _has_weight(node, 1) else None


def _role_of_product(node: fx.Node) -> Role:
    return Role.WEIGHTED if _has_weight(node, 1) else Role.COMPUTE


def _is_scaled(node: fx.Node) -> bool:
    return bool(argument(node, "alpha") != 1 or argument(node, "beta") != 1)


def _role_of_addmm(node: fx.Node) -> Role:
    """QGemm has neither alpha nor beta, and adds a vector of int32 only."""
    bias = node.args[0]
    is_vector = isinstance(bias, fx.Node) and _rank(bias) == 1
    return Role.WEIGHTED if _has_weight(node, 2) and is_vector and not _is_scaled(node) else Role.FLOAT


def _why_addmm_declines(node: fx.Node) -> str:
    return "" if _role_of_addmm(node) is Role.WEIGHTED else "QGemm has neither alpha nor beta, and a bias vector only"


def _weight_of_addmm(node: fx.Node) -> int | None:
    return 2 if _role_of_addmm(node) is Role.WEIGHTED else None


def _emit_linear(node: fx.Node, writer: Writer) -> ir.Value:
    weight, bias = argument(node, "weight"), argument(node, "bias")
    rank, weight_rank = len(writer.shape(node)), len(writer.shape(weight))
    x = writer.operand(node.args[0])
    if weight_rank == 2 and (rank == 2 or (rank > 2 and bias is not None and writer.flattens_linear)):
        return _gemm(node, x, writer)
    perm = (1, 0) if weight_rank == 2 else None  # a weight of rank 1: x . w
    value: ir.Value = writer.op("MatMul", [x, writer.weight(weight, perm)])
    if bias is not None:
        value = writer.op("Add", [value, writer.operand(bias)])
    return value


def _gemm(node: fx.Node, x: ir.Value, writer: Writer) -> ir.Value:
    """x w^T + b over the last axis of x, all others taken together."""
    weight, shape = argument(node, "weight"), writer.shape(node)
    outside, inside = (int(size) for size in writer.shape(weight))
    flat = x if len(shape) == 2 else reshape(writer, x, [-1, inside])
    value: ir.Value = writer.op("Gemm", [flat, writer.weight(weight), optional_value(node, "bias", writer)], transB=1)
    if len(shape) == 2:
        return value
    if sum(isinstance(size, str) for size in shape) <= 1 and 0 not in shape:
        return reshape(writer, value, [-1 if isinstance(size, str) else size for size in shape])
    leading = writer.op("Slice", [writer.op("Shape", [x]), writer.sizes([0]), writer.sizes([-1])])
    sizes = writer.op("Concat", [leading, writer.sizes([outside])], axis=0)
    result: ir.Value = writer.op("Reshape", [value, sizes])
    return result


def _emit_addmm(node: fx.Node, writer: Writer) -> ir.Value:
    c, a, b = (argument(node, key) for key in ("self", "mat1", "mat2"))
    inputs = [writer.operand(a), writer.weight(b), writer.operand(c)]
    alpha, beta = (float(argument(node, key)) if _is_scaled(node) else None for key in ("alpha", "beta"))
    value: ir.Value = writer.op("Gemm", inputs, alpha=alpha, beta=beta)
    return value


def _emit_product(node: fx.Node, writer: Writer) -> ir.Value:
    left, right = node.args[:2]
    assert isinstance(right, fx.Node)
    value: ir.Value = writer.op("MatMul", [writer.operand(left), writer.weight(right)])
    return value


def _emit_baddbmm(node: fx.Node, writer: Writer) -> ir.Value:
    dtype = writer.dtype(node)
    product: ir.Value = writer.op("MatMul", [writer.operand(argument(node, key)) for key in ("batch1", "batch2")])
    added = writer.operand(argument(node, "self"))
    if argument(node, "alpha") != 1:
        product = writer.op("Mul", [product, writer.operand(argument(node, "alpha"), like=dtype)])
    if argument(node, "beta") != 1:
        added = writer.op("Mul", [added, writer.operand(argument(node, "beta"), like=dtype)])
    value: ir.Value = writer.op("Add", [product, added])
    return value


def _emit_einsum(node: fx.Node, writer: Writer) -> ir.Value:
    equation = str(argument(node, "equation")).replace(" ", "")
    tensors = [writer.operand(tensor) for tensor in argument(node, "tensors")]
    value: ir.Value = writer.op("Einsum", tensors, equation=equation)
    return value


LINEAR: tuple[OpDef, ...] = (
    OpDef(
        name="linear",
        targets=(aten.linear.default,),
        role=Role.WEIGHTED,
        emit=_emit_linear,
        onnx_types=("Gemm", "MatMul"),
        weight=1,
        bias=2,
        channel_axis=lambda node: 0,
        kernel=ProductKernel("QGemm", right_axis=-1),
    ),
    OpDef(
        name="addmm",
        targets=(aten.addmm.default,),
        role=Role.WEIGHTED,
        emit=_emit_addmm,
        onnx_types=("Gemm",),
        weight=2,
        bias=0,
        channel_axis=lambda node: 1,
        kernel=ProductKernel("QGemm", _why_addmm_declines, left=1, right=2, optional_bias=False),
        role_of=_role_of_addmm,
        weight_of=_weight_of_addmm,
    ),
    OpDef(
        name="matmul",
        targets=(aten.matmul.default, aten.mm.default, aten.bmm.default),
        role=Role.COMPUTE,
        emit=_emit_product,
        onnx_types=("MatMul",),
        channel_axis=lambda node: 1,
        kernel=ProductKernel("QLinearMatMul"),
        role_of=_role_of_product,
        weight_of=_weight_of_product,
    ),
    OpDef(
        name="baddbmm",
        targets=(aten.baddbmm.default,),
        role=Role.FLOAT,
        emit=_emit_baddbmm,
        onnx_types=("MatMul", "Add"),
    ),
    OpDef(name="einsum", targets=(aten.einsum.default,), role=Role.FLOAT, emit=_emit_einsum, onnx_types=("Einsum",)),
)
