"""Say which values and parameters are quantized, and how, as the sections of a placement file do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from fxquant.errors import ConfigError
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.program import Note, NoteKind, Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.ops.table import TABLE
from fxquant.placement import Rule, check_rules
from fxquant.placement.aimet_json import read_sections
from fxquant.placement.sections import Sections
from fxquant.spec import QuantSpec, SpecOverride

from .masks import mask_islands
from .placed_values import PlacedValues
from .placement_notes import bias_notes, placement_notes
from .placement_run import PlacementRun
from .placement_specs import PlacementSpecs, decided_fields
from .placement_switches import place_values, symmetric_values
from .rule_report import report_rules
from .supergroups import match_supergroups
from .wishes import Wishes


@dataclass(frozen=True)
class ApplyPlacement(Sections, Pass):
    """Turn values and parameters on and off as six sections say (fxquant/placement/sections.py), then rules.

    1. Each value is on or off for all who read it, by the last section that speaks of it (placement_switches.py).
    2. What only moves codes is no quantizer of its own: where its source is quantized it passes the codes on.
    3. A product or quotient with one known number is off, as a runtime can fold it into a scale; rules may turn it on.
    4. What lies between attention scores and a masked softmax stays in float, whatever the file says: a mask holds
       -1e9 or -inf, from which no range can be read.
    5. A relu or clip whose input is off gets a grid that makes it redundant, so that onnxruntime can remove it.
    6. "weight" and "bias" are those of whichever operation has them. A bias that an integer kernel adds is never
       quantized on a grid of its own (quantize-bias gives it int32 codes, whatever the file says: a note).
    7. Constants that are no parameter of an operation are quantized where `is_input_quantized` speaks of its reader.
    8. Rules come last: module rules beat operation rules, node rules beat both. They reach the weights and inputs of
       what stands inside a supergroup, too. What they say of its output goes to the end of the supergroup, if only
       relus and clips lie between: each takes the spec over, and its own rules change it.

    What the file says and the program has not is a note. Refuses sections that contradict themselves, and rules as
    assign-specs does. Contract: PRESERVES (it only annotates).

    Options, besides the sections:
        activation: spec of activations, of which the sections decide the symmetry.
        weight: spec of parameters, of which the sections decide the symmetry and the granularity.
        rules: placement rules, see fxquant.placement.
    """

    name: ClassVar[str] = "apply-placement"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    leaves: ClassVar[Stage | None] = Stage.ASSIGNED
    contract: ClassVar[Contract] = Contract.PRESERVES

    activation: QuantSpec = QuantSpec(bits=8)
    weight: QuantSpec = QuantSpec(bits=8, signed=True, symmetric=True)
    rules: tuple[Rule, ...] = field(default=())
    place: str = field(default="", init=False, compare=False, repr=False)

    def placed(self, place: str) -> ApplyPlacement:
        """This pass, knowing where its sections were read."""
        object.__setattr__(self, "place", place)
        return self

    def with_file(self, text: str, file: str) -> ApplyPlacement:
        """This pass with the sections of AIMET's JSON; raises ConfigError."""
        sections = read_sections(text, file)
        found: dict[str, Any] = {item.name: getattr(sections, item.name) for item in fields(Sections)}
        return replace(self, **found).placed(file)

    def check_override(self, given: Mapping[str, SpecOverride]) -> None:
        """Refuse to change what the sections decide; raises ConfigError."""
        for option, change in given.items():
            for name, (said, place) in decided_fields(self, option).items():
                wanted = getattr(change, name)
                if wanted is not None and wanted != said:
                    raise ConfigError(
                        f"{option}.{name} cannot be overridden",
                        place=self.place or self.name,
                        expected=f"{name} {said}, which {place} decides",
                        got=f"{name} {wanted}",
                        remedy=f"Change {place} in the file, or give apply-placement a rule.",
                    )

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        """Decide every value in graph order, then every parameter."""
        check_rules(self.rules, program, TABLE)
        values = PlacedValues(program)
        lines = match_supergroups(values, self)
        specs = PlacementSpecs(values, self, self.activation, self.weight, symmetric_values(values, self, self.place))
        board = place_values(values, self, lines, self.place)
        run = PlacementRun(values, specs, board, Wishes(program, rewriter, self.rules), mask_islands(program))
        run.inner = {node for line in lines for node in line.nodes[:-1]}
        run.lines = {line.nodes[-1]: line for line in lines}
        for value in values.values:
            run.decide_value(value)
        for node in values.operations:
            run.decide_operands(node)
        run.wishes.agree()
        report_rules(run.wishes)
        for text in (*placement_notes(self, values, specs, lines), *bias_notes(run.biases)):
            rewriter.note(Note(NoteKind.OTHER, self.place or self.name, text))
