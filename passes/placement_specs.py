"""The specs that the sections of a placement file give to values and parameters.

symmetric, strict, per channel      as the sections say; bits and estimator as the pass's own specs say
encoding_constraints                {min, max}: fixed, symmetric if max = -min; {min}: no grid goes below it
hw_version                          second factor of a product: 8 bits and symmetric up to V69, symmetric at 16 bits
                                    from V73 on; embedding and group norm weights: activations' bits from V73 on;
                                    layer norm weight: symmetric from 16 bits on
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from fxquant.graph.program import input_slots, value_type
from fxquant.ops.activation import activation_bounds
from fxquant.ops.base import Role
from fxquant.placement.sections import EncodingConstraints, ParamSettings, Sections
from fxquant.spec import Granularity, Limits, QuantSpec

from .absorb_activation import limits_of
from .placed_values import PlacedValues
from .placement_switches import Board, Verdict, entry_of
from .values import channel_axis

_LAST_OLD_VERSION = 69
_WIDE_BITS = 16


@dataclass(frozen=True)
class PlacementSpecs:
    """Specs of one program's values and parameters.

    Arguments:
        values: the program.
        sections: the file.
        activation, weight: what the sections change.
        symmetric: what op_type says of the symmetry of single values.
    """

    values: PlacedValues
    sections: Sections
    activation: QuantSpec
    weight: QuantSpec
    symmetric: Board

    @cached_property
    def version(self) -> int | None:
        """The number in hw_version; None for what is no version of that accelerator."""
        found = re.fullmatch(r"[vV](\d+)", self.sections.defaults.hw_version or "")
        return None if found is None else int(found.group(1))

    def of_value(self, value: fx.Node) -> QuantSpec:
        """The spec of an activation."""
        operation = self.values.operation(value)
        _, entry = entry_of(self.sections, self.values.types(operation))
        definition, constraint = self.values.definition(operation), entry.encoding_constraints
        spec = self._scheme(self.activation, self._is_symmetric(value) or _is_even(constraint))
        if spec.symmetric and self.sections.defaults.unsigned_symmetric and self._is_never_negative(operation):
            spec = replace(spec, signed=False, strict=False, limits=Limits(0.0, None, 0))
        if constraint is not None and constraint.max is not None:
            spec = replace(spec, fixed=(constraint.min, constraint.max), estimator=QuantSpec.estimator)
        elif constraint is not None:
            spec = spec.limited(Limits(low=constraint.min))
        elif definition is not None and definition.output_range is not None:
            spec = spec.limited(definition.output_range)
        return self._as_factor(spec) if value in self._second_factors else spec

    def deciders(self, value: fx.Node) -> list[str]:
        """The places, besides defaults, that an activation's spec comes from."""
        verdict = self.symmetric.verdicts.get(value)
        op_type, entry = entry_of(self.sections, self.values.types(self.values.operation(value)))
        found = [] if verdict is None else [verdict.place]
        if entry.encoding_constraints is not None:
            found.append(f"op_type.{op_type}.encoding_constraints")
        if value in self._second_factors and self._as_factor(self.activation) != self.activation:
            found.append("defaults.hw_version")
        return found

    def parameter(self, node: fx.Node, name: str) -> tuple[Verdict, QuantSpec]:
        """Whether the parameter called `name` of an operation is quantized, and its spec, per tensor."""
        defaults = self.sections.defaults.params
        on, symmetric = Verdict(bool(defaults.is_quantized), "defaults.params.is_quantized"), defaults.is_symmetric
        for place, settings in self._settings(node, name):
            if settings.is_quantized is not None:
                on = Verdict(settings.is_quantized, f"{place}.is_quantized")
            symmetric = symmetric if settings.is_symmetric is None else settings.is_symmetric
        bits, symmetric = self._exceptions(node, self.weight.symmetric if symmetric is None else symmetric)
        strict = self.weight.strict and symmetric
        spec = replace(self.weight, bits=bits, signed=symmetric, symmetric=symmetric, strict=strict)
        return on, self._scheme(spec, symmetric)  # u8 where a zero point is free, as in the files' own terms

    def granularity(self, node: fx.Node, spec: QuantSpec) -> tuple[Granularity, str]:
        """That of an operation's weight; and, where it is wanted per channel and cannot be, why not."""
        _, entry = entry_of(self.sections, self.values.types(node))
        wanted = entry.per_channel_quantization
        if not (self.sections.defaults.per_channel_quantization if wanted is None else wanted):
            return spec.granularity, ""
        if not spec.symmetric:
            return spec.granularity, "its spec is asymmetric"
        axis, obstacle = self._channel_axis(node)
        return (spec.granularity, obstacle) if axis is None else (Granularity(axis), "")

    def within_activation(self, value: fx.Node, spec: QuantSpec) -> QuantSpec:
        """The spec behind a relu or clip whose input is not quantized, so that onnxruntime can remove it.

        A symmetric grid stays as it is, unless it is unsigned because of the same bounds.
        """
        definition = self.values.definition(value)
        if definition is None or definition.role_for(value) is not Role.ACTIVATION or spec.fixed is not None:
            return spec
        bounds = activation_bounds(value)
        if bounds is None or bounds[0] > 0 or bounds[1] <= 0 or (spec.symmetric and spec.limits.zero_point is None):
            return spec
        return spec.limited(limits_of(bounds, spec))

    def _settings(self, node: fx.Node, name: str) -> list[tuple[str, ParamSettings]]:
        op_type, entry = entry_of(self.sections, self.values.types(node))
        places = [("params", self.sections.params), (f"op_type.{op_type}.params", entry.params)]
        return [(f"{place}.{name}", params[name]) for place, params in places if name in params]

    def _is_symmetric(self, value: fx.Node) -> bool:
        verdict, default = self.symmetric.verdicts.get(value), self.sections.defaults.ops.is_symmetric
        if verdict is not None:
            return verdict.value
        return self.activation.symmetric if default is None else default

    def _scheme(self, spec: QuantSpec, symmetric: bool) -> QuantSpec:
        """Symmetric or not; strict on signed grids only, as a quantizer uses the lowest unsigned code all the same."""
        if not symmetric:
            return replace(spec, symmetric=False, strict=False)
        strict = self.sections.defaults.strict_symmetric
        return replace(spec, symmetric=True, strict=spec.signed and (spec.strict if strict is None else strict))

    def _is_never_negative(self, node: fx.Node) -> bool:
        definition = self.values.definition(node)
        if definition is None:
            return False
        if definition.role_for(node) is Role.ACTIVATION:
            bounds = activation_bounds(node)
            return bounds is not None and bounds[0] >= 0
        return definition.output_range is not None and definition.output_range.low == 0.0

    @cached_property
    def _second_factors(self) -> frozenset[fx.Node]:
        """The values that products of two activations read on their right."""
        if self.version is None:
            return frozenset()
        pairs = [self.values.inputs(node) for node in self.values.operations if "MatMul" in self.values.types(node)]
        return frozenset(self.values.owner(pair[1][1]) for pair in pairs if len(pair) == 2)

    def _as_factor(self, spec: QuantSpec) -> QuantSpec:
        assert self.version is not None
        if self.version <= _LAST_OLD_VERSION:
            return self._scheme(replace(spec, bits=8), symmetric=True)
        return self._scheme(spec, symmetric=True) if spec.bits == _WIDE_BITS else spec

    def _exceptions(self, node: fx.Node, symmetric: bool) -> tuple[int, bool]:
        """Bits and symmetry of a weight, by hw_version."""
        definition = self.values.definition(node)
        name = "" if definition is None else definition.name
        if self.version is None:
            return self.weight.bits, symmetric
        if name == "layer_norm":
            return self.weight.bits, symmetric or self.weight.bits >= _WIDE_BITS
        is_like_output = self.version > _LAST_OLD_VERSION and name in ("embedding", "group_norm")
        return (self.activation.bits if is_like_output else self.weight.bits), symmetric

    def _channel_axis(self, node: fx.Node) -> tuple[int | None, str]:
        definition = self.values.definition(node)
        if definition is not None and definition.name == "prelu":
            return 0, ""
        return (None, "no channel axis") if definition is None else channel_axis(node, definition)


def decided_fields(sections: Sections, option: str) -> dict[str, tuple[bool, str]]:
    """What the sections say of fields of `activation` or `weight` whatever that option says: the value, and where."""
    defaults = sections.defaults
    kind = defaults.ops if option == "activation" else defaults.params
    place = f"defaults.{'ops' if option == 'activation' else 'params'}.is_symmetric"
    found: dict[str, tuple[bool, str]] = {}
    if kind.is_symmetric is not None:
        found["symmetric"] = (kind.is_symmetric, place)
        if option == "weight":
            found["signed"] = (kind.is_symmetric, place)
    if defaults.strict_symmetric is not None:
        found["strict"] = (defaults.strict_symmetric, "defaults.strict_symmetric")
    return found


def is_constant_scale(values: PlacedValues, node: fx.Node) -> bool:
    """Whether an operation multiplies or divides by one number that is known now."""
    if not {"Mul", "Div"}.intersection(values.types(node)):
        return False
    tensors = [value for _, value in values.inputs(node) if values.is_value(value)]
    others = [value for value in input_slots(node) if value not in tensors]
    return len(tensors) == 1 and all(_is_single(value) and values.is_constant(value) for value in others)


def _is_single(node: fx.Node) -> bool:
    kind = value_type(node)
    return kind is not None and all(size == 1 for size in kind.shape)


def _is_even(constraint: EncodingConstraints | None) -> bool:
    return constraint is not None and constraint.max is not None and constraint.min == -constraint.max
