"""Python values to ONNX attributes, typed by the operator's schema (so that `alpha=1` becomes the float it must be)."""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx.defs
import onnx_ir as ir
import torch

Schema = onnx.defs.OpSchema
_Kind = onnx.defs.OpSchema.AttrType


@cache
def schema_of(op_type: str, opset: int) -> Schema:
    """The schema of `op_type` as of `opset`; ValueError says which opset an operator needs, or that ONNX lacks it."""
    versions = [s for s in onnx.defs.get_all_schemas_with_history() if s.name == op_type and s.domain == ""]
    usable = [schema for schema in versions if schema.since_version <= opset]
    if usable:
        return max(usable, key=lambda schema: schema.since_version)
    if not versions:
        raise ValueError(f"ONNX has no operator {op_type}")
    first = min(schema.since_version for schema in versions)
    raise ValueError(f"ONNX has {op_type} from opset {first} on, and the export is at opset {opset}")


def attribute(schema: Schema, name: str, value: Any) -> ir.Attr:
    """The attribute `name` of an operator; ValueError if its schema has no such attribute or takes no such value."""
    if name not in schema.attributes:
        raise ValueError(f"{schema.name} of opset {schema.since_version} has no attribute '{name}'")
    kind = schema.attributes[name].type
    if isinstance(value, torch.dtype):
        value = int(ir.tensor_adapters.from_torch_dtype(value))
    if kind == _Kind.INT:
        return ir.AttrInt64(name, int(value))
    if kind == _Kind.FLOAT:
        return ir.AttrFloat32(name, float(value))
    if kind == _Kind.STRING:
        return ir.AttrString(name, str(value))
    if kind == _Kind.INTS:
        return ir.AttrInt64s(name, [int(item) for item in value])
    if kind == _Kind.FLOATS:
        return ir.AttrFloat32s(name, [float(item) for item in value])
    if kind == _Kind.STRINGS:
        return ir.AttrStrings(name, [str(item) for item in value])
    if kind == _Kind.TENSOR:
        return ir.AttrTensor(name, ir.tensor(value))
    raise ValueError(f"attribute '{name}' of {schema.name} is of a kind that is not written here")
