"""The six sections of a placement file, as AIMET divides them: which values and parameters are quantized, and how.

    defaults < params < op_type < supergroups < model_input < model_output

Everything is off until a section turns it on, and a later section overrides an earlier one; None says nothing.
passes/apply_placement.py applies them; TOML says them with these names, fxquant/placement/aimet_json.py reads JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import onnx.defs

from fxquant.errors import ConfigError, clipped, nearest
from fxquant.limits import bound_text, check_bound
from fxquant.ops.table import TABLE

# Types that AIMET's files name and ONNX does not have.
_FOREIGN_TYPES = ("ChannelShuffle", "CropAndResize", "CustomMarker", "Embedding", "MatmulAdd", "Permute")
_WHOLE_OPS = ("LayerNormalization", "MatmulAdd", "RMSNormalization")
_PARAMETER = re.compile(r"(weight|bias)(_[a-z0-9_]+)?|running_mean|running_var")


@dataclass(frozen=True)
class OpSettings:
    """defaults.ops: the activations of every operation."""

    is_input_quantized: bool | None = None
    is_output_quantized: bool | None = None
    is_symmetric: bool | None = None


@dataclass(frozen=True)
class ParamSettings:
    """One kind of parameter."""

    is_quantized: bool | None = None
    is_symmetric: bool | None = None


@dataclass(frozen=True)
class KernelType:
    """What one side of a kernel computes in."""

    bitwidth: Literal[4, 8, 16, 32]
    dtype: Literal["int", "float"] = "int"

    def __post_init__(self) -> None:
        if self.dtype == "float" and self.bitwidth < 16:
            raise ConfigError("bitwidth of dtype float", expected="16 or 32", got=str(self.bitwidth))


@dataclass(frozen=True)
class SupportedKernel:
    """A pair of types that the hardware has a kernel for."""

    activation: KernelType
    param: KernelType | None = None


@dataclass(frozen=True)
class EncodingConstraints:
    """The range of an operation's output: [min, max] fixed, or no value below `min`. 0 is always in it."""

    min: float
    max: float | None = None

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.min, self.max) if bound is not None]
        for bound in bounds:
            check_bound(bound, "encoding_constraints")
        shown = f"[{self.min:g}, {bound_text(self.max)}]"
        if self.max is not None and self.min >= self.max:
            raise ConfigError("encoding_constraints", expected="min < max", got=shown)
        if self.min > 0 or (self.max is not None and self.max < 0):
            raise ConfigError("encoding_constraints", expected="a range that holds 0, as every grid does", got=shown)


@dataclass(frozen=True)
class Defaults:
    """What holds for all operations and parameters.

    Arguments:
        ops, params: activations and parameters.
        strict_symmetric: symmetric grids leave out their lowest code.
        unsigned_symmetric: symmetric values that cannot be negative use codes from 0 up only.
        per_channel_quantization: weights have a scale for each output channel.
        supported_kernels: what the hardware computes; a spec that is not among them gets a note.
        hw_version: the generation of Qualcomm's accelerator whose exceptions hold ("V73").
    """

    ops: OpSettings = OpSettings()
    params: ParamSettings = ParamSettings()
    strict_symmetric: bool | None = None
    unsigned_symmetric: bool | None = None
    per_channel_quantization: bool | None = None
    supported_kernels: tuple[SupportedKernel, ...] = ()
    hw_version: str | None = None


@dataclass(frozen=True)
class OpType:
    """What holds for the operations of one ONNX type.

    Arguments:
        is_input_quantized: the values that it reads, whoever makes them and whoever else reads them.
        is_output_quantized: the values that it makes.
        is_symmetric: the grids of the values that the two above speak of; its output's in any case.
        params: its parameters, by name ("weight", "bias").
        per_channel_quantization: whether its weight has a scale for each output channel.
        supported_kernels: see Defaults.
        encoding_constraints: the range of its output.
    """

    is_input_quantized: bool | None = None
    is_output_quantized: bool | None = None
    is_symmetric: bool | None = None
    params: dict[str, ParamSettings] = field(default_factory=dict)
    per_channel_quantization: bool | None = None
    supported_kernels: tuple[SupportedKernel, ...] = ()
    encoding_constraints: EncodingConstraints | None = None


@dataclass(frozen=True)
class Supergroup:
    """Types of operations that the hardware runs as one, in a line: nothing is quantized between them."""

    op_list: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.op_list) < 2:
            got = ", ".join(self.op_list) or "none"
            raise ConfigError("op_list", expected="at least 2 operator types", got=got)

    def __str__(self) -> str:
        return " + ".join(self.op_list)


@dataclass(frozen=True)
class ModelInput:
    """The inputs of the model."""

    is_input_quantized: bool | None = None


@dataclass(frozen=True)
class ModelOutput:
    """The outputs of the model."""

    is_output_quantized: bool | None = None


@dataclass(frozen=True)
class Sections:
    """A whole placement file.

    Arguments:
        defaults, params, op_type, supergroups, model_input, model_output: the six sections.
        supergroup_pass_list: what counts as one operation: "LayerNormalization" and "RMSNormalization" are one here
            anyway, "MatmulAdd" makes one of a product and the constant that is added to it.

    Raises ConfigError, naming the place, for an operator type or parameter that nothing has.
    """

    defaults: Defaults = Defaults()
    params: dict[str, ParamSettings] = field(default_factory=dict)
    op_type: dict[str, OpType] = field(default_factory=dict)
    supergroups: tuple[Supergroup, ...] = ()
    supergroup_pass_list: tuple[str, ...] = ()
    model_input: ModelInput = ModelInput()
    model_output: ModelOutput = ModelOutput()

    def __post_init__(self) -> None:
        _check_params(self.params, "params")
        for name, entry in self.op_type.items():
            _check_type(name, f"op_type.{clipped(name)}")
            _check_params(entry.params, f"op_type.{name}.params")
        for index, group in enumerate(self.supergroups):
            for position, name in enumerate(group.op_list):
                _check_type(name, f"supergroups[{index}].op_list[{position}]")
        for index, name in enumerate(self.supergroup_pass_list):
            if name not in _WHOLE_OPS:
                thing = f"supergroup_pass_list[{index}]: '{clipped(name)}' is unknown"
                raise ConfigError(thing, remedy=nearest(name, _WHOLE_OPS))


def _check_type(name: str, path: str) -> None:
    if name not in known_types():
        raise ConfigError(f"{path}: operator type '{clipped(name)}' is unknown", remedy=_suggest(name, known_types()))


def _check_params(params: Iterable[str], path: str) -> None:
    for name in params:
        if not _PARAMETER.fullmatch(name):
            remedy = nearest(name, ("weight", "bias", "running_mean", "running_var", "weight_ih", "bias_hh"))
            thing = f"{path}.{clipped(name)}: parameter '{clipped(name)}' is unknown"
            raise ConfigError(thing, remedy=remedy)


def _suggest(name: str, accepted: Iterable[str]) -> str:
    """The nearest type; two hundred of them are no help."""
    close = nearest(name, accepted).partition("Accepted:")[0]
    return f"{close}Accepted: the operator types of ONNX, as they are spelt there."


def known_types() -> frozenset[str]:
    """The operator types of ONNX, of AIMET's files and of our table, which may have grown."""
    return _onnx_types() | types_of_table()


@cache
def _onnx_types() -> frozenset[str]:
    found = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    return frozenset({*found, *_FOREIGN_TYPES})


def types_of_table() -> frozenset[str]:
    """The operator types that some operation of ours matches."""
    return frozenset(name for definition in TABLE for name in definition.onnx_types)
