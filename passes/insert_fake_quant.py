"""Turn the assigned specs into FakeQuant nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.errors import PassError, SpecError
from fxquant.graph.constants import Constants
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Program, Stage, describe, input_slots, input_spec, output_spec, value_type
from fxquant.graph.rewriter import Rewriter
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.spec import PER_TENSOR, QuantSpec, parse_training

from .share_encodings import owner_of
from .values import wanted_specs
from .wishes import SPEAKS_OF_BOTH


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Insert one FakeQuant behind each value for each distinct spec that is wanted of it.

    1. A value with an output spec: all its readers read the quantized value, as the integer kernel in front writes
       nothing else.
    2. A value with consumers' specs only (a graph input, a float operation's result): the consumers that asked read it.
    3. A parameter, or what is computed from parameters alone, may be wanted with two specs (tied embedding and head): a
       FakeQuant each, whose grid follows the weight.
    4. A value that shares an encoding calls its owner's FakeQuant, and does not observe.

    Refuses, by name, an activation wanted with two specs where the target merges such pairs; one wanted per channel,
    for which no runtime has integer kernels; a weight's moving average; and values that are not float32. Contract:
    QUANTIZES.
    """

    name: ClassVar[str] = "insert-fake-quant"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.ASSIGNED,)
    leaves: ClassVar[Stage | None] = Stage.INSERTED
    contract: ClassVar[Contract] = Contract.QUANTIZES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Visit every value; owners of shared encodings get their module at its first use."""
        constants = Constants(program)
        for value in list(program.graph.nodes):
            wanted = wanted_specs(value)
            if not wanted:
                continue
            if len(wanted) > 1 and not constants.is_constant(value) and program.target.merges_activation_specs:
                raise _two_specs(value, wanted)
            if (kind := value_type(value)) is None or kind.dtype is not torch.float32:
                raise _not_float32(value)
            for number, spec in enumerate(wanted):
                if spec.granularity.axis is not None and not constants.is_constant(value):
                    raise _per_channel(value, spec)
                if _follows_an_average(spec) and constants.is_constant(value):
                    raise _moving_weight(value, spec)
                self._insert(rewriter, value, spec, number, constants.is_constant(value))

    def _insert(self, rewriter: Rewriter, value: fx.Node, spec: QuantSpec, number: int, follows: bool) -> None:
        owner = owner_of(value)
        suffix = f"_{number}" if number else ""
        path = rewriter.fake_quant_path(owner + suffix)
        if not _has_module(rewriter.program, path):
            rewriter.add_module(path, FakeQuant(spec, _encoding_shape(value, spec), follows=follows))
        kwargs = {} if owner == value.name else {"observe": False}  # case 4
        readers = _readers(value, spec)
        before = _first_place_behind(value)
        node = rewriter.call_module(path, (value,), kwargs, name=f"{value.name}_fq{suffix}", before=before, like=value)
        for user, slot in readers:
            rewriter.replace_slot(user, slot, node)


def _readers(value: fx.Node, spec: QuantSpec) -> list[tuple[fx.Node, int]]:
    """The (consumer, slot) pairs that are to read the quantized value: case 1, or cases 2 and 3."""
    everyone = output_spec(value) == spec
    pairs = [(user, slot) for user in value.users for slot, node in enumerate(input_slots(user)) if node is value]
    return [(user, slot) for user, slot in pairs if everyone or input_spec(user, slot) == spec]


def _encoding_shape(value: fx.Node, spec: QuantSpec) -> tuple[int, ...]:
    if spec.granularity == PER_TENSOR:
        return ()
    found = value_type(value)
    assert found is not None
    sizes = tuple(size for size in found.shape if isinstance(size, int))
    assert len(sizes) == len(found.shape), "what is computed from parameters alone has constant sizes"
    try:
        return spec.granularity.encoding_shape(sizes)
    except SpecError as err:
        raise PassError(
            f"insert-fake-quant: value '{value.name}': {err.thing}",
            place=describe(value),
            expected=err.expected,
            got=f"{err.got}, wanted so by {_wanters(value, spec)}",
            remedy="Use another granularity for this value.",
        ) from err


def _has_module(program: Program, path: str) -> bool:
    try:
        program.module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _first_place_behind(value: fx.Node) -> fx.Node:
    """The node before which code that reads `value` may stand; placeholders stay together."""
    place = value.next
    while place.op == "placeholder":
        place = place.next
    return place


def _two_specs(value: fx.Node, wanted: dict[QuantSpec, list[str]]) -> PassError:
    wishes = "; ".join(f"{spec} by {_wanters(value, spec)}" for spec in wanted)
    return PassError(
        f"insert-fake-quant: value '{value.name}' is wanted with {len(wanted)} specs",
        place=describe(value),
        expected="one spec: onnxruntime merges two quantizers on one activation",
        got=wishes,
        remedy=f"{SPEAKS_OF_BOTH} Or leave one of these nodes in float.",
    )


def _wanters(value: fx.Node, spec: QuantSpec) -> str:
    """The nodes that want a value with this spec, each with its rule."""
    return ", ".join(_with_rule(value, name) for name in wanted_specs(value)[spec])


def _with_rule(value: fx.Node, name: str) -> str:
    """A node that wants a value with a spec, and the rule that it wants it by."""
    if name == value.name:
        rule = value.meta.get("rule", "")
    else:
        user = next(user for user in value.users if user.name == name)
        slots = [slot for slot, node in enumerate(input_slots(user)) if node is value]
        rule = next(filter(None, (user.meta.get("input_rules", {}).get(slot, "") for slot in slots)), "")
    return f"{name} ({rule})" if rule else name


def _per_channel(value: fx.Node, spec: QuantSpec) -> PassError:
    return PassError(
        f"insert-fake-quant: activation '{value.name}' is wanted {spec.granularity}",
        place=describe(value),
        expected="one scale for an activation",
        got=f"{spec}, by {_wanters(value, spec)}",
        remedy="Leave 'granularity' out of the activation's spec; weights may have it.",
    )


def _follows_an_average(spec: QuantSpec) -> bool:
    return spec.fixed is None and parse_training(spec.training)[0] == "moving-average"


def _moving_weight(value: fx.Node, spec: QuantSpec) -> PassError:
    return PassError(
        f"insert-fake-quant: weight '{value.name}' is wanted with a moving average",
        place=describe(value),
        expected="training = 'static', by which a weight's grid follows the weight, or a learned range",
        got=f"{spec}, by {_wanters(value, spec)}",
        remedy="Give 'moving-average' to activations only.",
    )


def _not_float32(value: fx.Node) -> PassError:
    return PassError(
        f"insert-fake-quant: value '{value.name}' cannot be quantized",
        place=describe(value),
        expected="float32, in which all grids are",
        got=str(value_type(value)),
        remedy="Capture the model in float32 (model.float()), or leave the value in float by a placement rule.",
    )
