"""What a placement file says that a program, or fxquant, has nothing for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from fxquant.placement.sections import KernelType, Sections, SupportedKernel
from fxquant.spec import QuantSpec

from .placed_values import PlacedValues
from .placement_specs import PlacementSpecs
from .placement_switches import entry_of
from .supergroups import Line

_NAMED = 6  # layers that a note names


def placement_notes(
    sections: Sections, values: PlacedValues, specs: PlacementSpecs, lines: Iterable[Line]
) -> Iterator[str]:
    """One sentence for each kind of thing that was not applied."""
    unmatched = [*_unmatched_types(sections, values), *_unmatched_groups(sections, lines)]
    if unmatched:
        yield f"matches nothing in this program: {', '.join(unmatched)}"
    without = [path for path in _parameters(sections) if path.rpartition(".")[2] not in ("weight", "bias")]
    if without:
        yield f"no operation has such a parameter here: {', '.join(without)}"
    if sections.defaults.hw_version is not None and specs.version is None:
        yield f"defaults.hw_version: '{sections.defaults.hw_version}' has no exceptions that are known here"
    if sections.defaults.strict_symmetric and not specs.activation.signed and _has_symmetric(sections):
        yield "defaults.strict_symmetric: unsigned symmetric activations keep their lowest code"
    kernels = sections.defaults.supported_kernels
    if kernels and not any(_computes(kernel, specs.activation, specs.weight) for kernel in kernels):
        pair = f"{specs.activation.bits}-bit activations with {specs.weight.bits}-bit parameters"
        yield f"defaults.supported_kernels has none for {pair}"


def bias_notes(biases: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What became of biases that some place in the file wants on a grid of their own: `biases` has their layers."""
    for place, layers in biases.items():
        more = f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
        names = ", ".join(layers[:_NAMED]) + more
        yield f"{place}: biases have int32 codes all the same, as integer kernels add them: {names}"


def _unmatched_types(sections: Sections, values: PlacedValues) -> list[str]:
    used = {entry_of(sections, values.types(node))[0] for node in values.operations}
    return [f"op_type.{name}" for name in sections.op_type if name not in used]


def _unmatched_groups(sections: Sections, lines: Iterable[Line]) -> list[str]:
    used = {line.place for line in lines}
    places = [f"supergroups[{index}]" for index in range(len(sections.supergroups))]
    return [place for place in places if place not in used]


def _has_symmetric(sections: Sections) -> bool:
    """Whether the grids of some activations are symmetric."""
    return bool(sections.defaults.ops.is_symmetric) or any(item.is_symmetric for item in sections.op_type.values())


def _parameters(sections: Sections) -> Iterator[str]:
    yield from (f"params.{name}" for name in sections.params)
    for op_type, entry in sections.op_type.items():
        yield from (f"op_type.{op_type}.params.{name}" for name in entry.params)


def _computes(kernel: SupportedKernel, activation: QuantSpec, weight: QuantSpec) -> bool:
    return _holds(kernel.activation, activation) and (kernel.param is None or _holds(kernel.param, weight))


def _holds(kind: KernelType, spec: QuantSpec) -> bool:
    return kind.dtype == "int" and kind.bitwidth == spec.bits
