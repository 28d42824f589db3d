"""Pipelines: TOML to typed passes, and errors that name file, key and what is accepted."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant.errors import ConfigError, PassError
from fxquant.graph.manager import PassManager
from fxquant.graph.options import decode, encode
from fxquant.graph.passes import Contract, Pass
from fxquant.graph.pipeline import Pipeline, load_pipeline, packaged_pipelines, parse_pipeline
from fxquant.graph.program import Program, Stage
from fxquant.graph.rewriter import Rewriter
from fxquant.spec import Granularity, Limits, QuantSpec, Target
from tests.helpers import residual_program


class Colour(Enum):
    """An option with names."""

    RED = "red"
    DARK_BLUE = "dark-blue"


@dataclass(frozen=True)
class Inner:
    """A nested option."""

    depth: int
    share: float = 0.5


@dataclass(frozen=True)
class Assign(Pass):
    """A pass with an option of every type."""

    name: ClassVar[str] = "assign"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    leaves: ClassVar[Stage | None] = Stage.ASSIGNED
    contract: ClassVar[Contract] = Contract.PRESERVES

    flag: bool = False
    count: int = 1
    ratio: float = 0.1
    word: str = ""
    colour: Colour = Colour.RED
    names: tuple[str, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    maybe: int | None = None
    spec: QuantSpec = QuantSpec()
    inners: tuple[Inner, ...] = ()
    either: int | str = 0
    choice: Literal["a", "b"] = "a"
    table: dict[str, int] = field(default_factory=dict)

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        rewriter.set_float_reason(program.node("relu"), f"count {self.count}")


@dataclass(frozen=True)
class Fold(Pass):
    """A pass at the first stage that leaves it as it is."""

    name: ClassVar[str] = "fold"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    contract: ClassVar[Contract] = Contract.PRESERVES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        pass


@dataclass(frozen=True)
class Settle(Pass):
    """A last pass."""

    name: ClassVar[str] = "settle"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.ASSIGNED,)
    leaves: ClassVar[Stage | None] = Stage.FINALIZED
    contract: ClassVar[Contract] = Contract.CHANGES

    def rewrite(self, program: Program, rewriter: Rewriter) -> None:
        pass


@pytest.fixture(autouse=True)
def catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """An importable module `their_passes` with a catalogue."""
    module = ModuleType("their_passes")
    module.__dict__["CATALOG"] = {kind.name: kind for kind in (Assign, Fold, Settle)}
    module.__dict__["NOT_ONE"] = {"assign": 3}
    monkeypatch.setitem(sys.modules, "their_passes", module)


HEAD = 'catalogue = "their_passes:CATALOG"\n'


def parse(text: str, head: str = HEAD) -> Pipeline:
    return parse_pipeline(head + text, "mine", place="mine.toml")


def assign(options: str) -> Assign:
    (item,) = parse(f'[[prepare]]\npass = "assign"\n{options}').prepare_passes
    assert isinstance(item, Assign)
    return item


def test_options_of_every_type_are_decoded() -> None:
    item = assign(
        """
        flag = true
        count = 3
        ratio = 2
        word = "x"
        colour = "dark-blue"
        names = ["a", "b"]
        pair = [0, 6.5]
        maybe = 4
        spec = { bits = 4, signed = true, granularity = { axis = 0 }, limits = { low = 0.0, high = 6.0 } }
        inners = [{ depth = 1 }, { depth = 2, share = 1 }]
        either = "word"
        choice = "b"
        table = { one = 1 }
        """
    )
    spec = QuantSpec(bits=4, signed=True, granularity=Granularity(0), limits=Limits(0.0, 6.0))
    expected = Assign(
        True,
        3,
        2.0,
        "x",
        Colour.DARK_BLUE,
        ("a", "b"),
        (0.0, 6.5),
        4,
        spec,
        (Inner(1), Inner(2, 1.0)),
        "word",
        "b",
        {"one": 1},
    )
    assert item == expected
    assert type(item.ratio) is float and type(item.inners[1].share) is float


@pytest.mark.parametrize(
    "options, said",
    [
        (
            "cuont = 3",
            "unknown key 'cuont' (mine.toml: prepare[0] assign). Did you mean 'count'? Accepted: choice, colour,",
        ),
        ("count = 1.5", "wrong type (mine.toml: prepare[0] assign.count); expected an integer; got the number 1.5"),
        ("count = true", "expected an integer; got the boolean True"),
        ("flag = 1", "expected true or false; got the integer 1"),
        ("flag = 'False'", "expected true or false; got the string 'False'"),
        ("word = 3", "expected a string; got the integer 3"),
        ("ratio = '1'", "expected a number; got the string '1'"),
        ("colour = 'blue'", "unknown value 'blue' (mine.toml: prepare[0] assign.colour). Did you mean 'dark-blue'?"),
        ("names = 'a'", "assign.names); expected a list; got the string 'a'"),
        ("names = ['a', 1]", "assign.names[1]); expected a string"),
        ("pair = [1.0]", "assign.pair); expected 2 values; got 1"),
        ("spec = 8", "assign.spec); expected a table of QuantSpec; got the integer 8"),
        ("spec = { bitz = 8 }", "unknown key 'bitz' (mine.toml: prepare[0] assign.spec). Did you mean 'bits'?"),
        ("spec = { bits = 99 }", "QuantSpec.bits (mine.toml: prepare[0] assign.spec); expected 2 to 16"),
        (
            "spec = { granularity = { axis = 'x' } }",
            "assign.spec.granularity.axis); expected an integer; got the string 'x'",
        ),
        ("inners = [{ share = 1.0 }]", "key 'depth' is missing (mine.toml: prepare[0] assign.inners[0])"),
        ("maybe = 'x'", "assign.maybe); expected an integer"),
        ("either = 1.5", "assign.either); expected an integer or a string; got the number 1.5"),
        ("choice = 'c'", "unknown value 'c' (mine.toml: prepare[0] assign.choice)"),
        ("table = { one = 'x' }", "assign.table.one); expected an integer"),
    ],
)
def test_wrong_option_is_refused_with_file_and_key(options: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        assign(options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text, head, said",
    [
        ("targett = 'x'", HEAD, "unknown key 'targett' (mine.toml). Did you mean 'target'?"),
        (
            "target = 'onnxruntime'",
            HEAD,
            "unknown value 'onnxruntime' (mine.toml: target). Did you mean 'onnxruntime-x64'?",
        ),
        ("target = 3", HEAD, "(mine.toml: target)"),
        ("[[prepare]]\npass = 'fodl'", HEAD, "unknown pass 'fodl' (mine.toml: prepare[0]). Did you mean 'fold'?"),
        ("[[prepare]]\npas = 'fold'", HEAD, "prepare[0]); expected a table with pass"),
        ("prepare = 'fold'", HEAD, "key 'prepare' (mine.toml); expected [[prepare]] tables"),
        ("a = ", HEAD, "pipeline is not TOML (mine.toml)"),
        ("", "catalogue = 'their_passes'\n", 'catalogue (mine.toml: catalogue); expected "module:ATTRIBUTE"'),
        ("", "catalogue = 'no_such_module:X'\n", "catalogue 'no_such_module:X' cannot be imported"),
        ("", "catalogue = 'their_passes:NOTHING'\n", "catalogue 'their_passes:NOTHING' cannot be imported"),
        ("", "catalogue = 'their_passes:NOT_ONE'\n", "expected a dict of pass classes by their names"),
        ("[[prepare]]\npass = 'assign'\n[[prepare]]\npass = 'fold'", HEAD, "Move 'fold' before 'assign'"),
        ("[[prepare]]\npass = 'settle'", HEAD, "prepare cannot start with 'settle' (mine.toml)"),
        ("[[prepare]]\npass = 'fold'\n[[finalize]]\npass = 'settle'", HEAD, "finalize cannot start with 'settle'"),
    ],
)
def test_wrong_file_is_refused_with_the_key(text: str, head: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, head)
    assert said in str(caught.value)


def test_misspelt_catalogue_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("", "catalogue = 'their_passes:CATALGO'\n")
    assert str(caught.value) == (
        "catalogue 'their_passes:CATALGO' cannot be imported (mine.toml: catalogue); "
        "got no 'CATALGO' in module 'their_passes'. Did you mean 'CATALOG'? Accepted: CATALOG."
    )


def test_catalogue_module_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raising_passes.py").write_text("CATALOG = {}\n1 / 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"\(mine.toml: catalogue\); got ZeroDivisionError.*Mend 'raising_passes'"):
        parse("", "catalogue = 'raising_passes:CATALOG'\n")


MISTYPED: list[tuple[dict[str, Any], str]] = [
    ({"flag": "yes"}, "option 'flag'; expected bool; got the str 'yes'"),
    ({"flag": 1}, "option 'flag'; expected bool; got the int 1"),
    ({"count": True}, "option 'count'; expected int; got the bool True"),
    ({"count": 1.0}, "option 'count'; expected int; got the float 1.0"),
    ({"ratio": "1"}, "option 'ratio'; expected float; got the str '1'"),
    ({"word": None}, "option 'word'; expected str; got the NoneType None"),
    ({"colour": "red"}, "option 'colour'; expected Colour; got the str 'red'"),
    ({"names": "ab"}, "option 'names'; expected tuple[str, ...]; got the str 'ab'"),
    ({"names": ("a", 1)}, "option 'names'; expected tuple[str, ...]; got the tuple ('a', 1)"),
    ({"pair": (1.0,)}, "option 'pair'; expected tuple[float, float]"),
    ({"maybe": "x"}, "option 'maybe'; expected int | None"),
    ({"spec": 8}, "option 'spec'; expected QuantSpec; got the int 8"),
    ({"inners": (Inner(1), 2)}, "option 'inners'; expected tuple[Inner, ...]"),
    ({"inners": (Inner(1), Inner(2, "x"))}, "option 'inners[1].share'; expected float"),  # type: ignore[arg-type]
    ({"either": 1.5}, "option 'either'; expected int | str"),
    ({"choice": "c"}, "option 'choice'; expected Literal['a', 'b']"),
    ({"table": {"one": "x"}}, "option 'table'; expected dict[str, int]"),
]


@pytest.mark.parametrize("options, said", MISTYPED, ids=[said.split(";")[0] for _, said in MISTYPED])
def test_option_of_a_wrong_type_is_refused_when_the_list_is_built(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PassError) as caught:
        PassManager([Assign(**options)])
    assert f"pass 'assign': {said}" in str(caught.value)


def test_integer_is_accepted_where_a_float_is_wanted() -> None:
    PassManager([Assign(ratio=2, pair=(0, 1))])


def test_unknown_name_lists_the_packaged_pipelines() -> None:
    with pytest.raises(ConfigError, match="pipeline 'int8_per_chanel' is unknown. Did you mean 'int8_per_channel'?"):
        load_pipeline("int8_per_chanel")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pipeline cannot be read \(.*nowhere\.toml\)"):
        load_pipeline(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("name", packaged_pipelines())
def test_packaged_pipeline_loads_and_writes_itself(name: str) -> None:
    pipeline = load_pipeline(name)
    again = parse_pipeline(pipeline.to_toml(), name, place=name)
    assert list(again.prepare_passes) == list(pipeline.prepare_passes)
    assert list(again.finalize_passes) == list(pipeline.finalize_passes)
    assert again.target is pipeline.target


def test_pipeline_from_a_path_runs_and_sets_the_target(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        f"{HEAD}target = 'tensorrt'\n[[prepare]]\npass = 'assign'\ncount = 7\n[[finalize]]\npass = 'settle'\n",
        encoding="utf-8",
    )
    pipeline, program = load_pipeline(path), residual_program()
    trace = pipeline.prepare(program)
    assert [entry.pass_name for entry in trace] == ["assign"]
    assert program.target is Target.TENSORRT
    assert program.node("relu").meta["float_reason"] == "count 7"
    pipeline.finalize(program)
    assert program.stage is Stage.FINALIZED
    assert repr(pipeline) == "Pipeline('mine', tensorrt, 1 + 1 passes)"


def test_finalize_with_another_target_is_refused() -> None:
    program = residual_program()
    Pipeline(PassManager([Assign()]), PassManager([Settle()])).prepare(program)
    other = Pipeline(PassManager([Assign()]), PassManager([Settle()]), Target.QNN_HTP, name="other")
    with pytest.raises(PassError, match="'other' cannot finalize; expected a program prepared for qnn-htp"):
        other.finalize(program)


def test_prepare_that_fails_at_once_leaves_the_target() -> None:
    program = residual_program()
    pipeline = Pipeline(PassManager([Settle()]), PassManager([]), Target.QNN_HTP)
    with pytest.raises(PassError):
        pipeline.prepare(program)
    assert program.target is Target.ONNXRUNTIME_X64


numbers = st.floats(allow_nan=False, allow_infinity=False)
specs = st.builds(
    QuantSpec,
    bits=st.integers(2, 16),
    signed=st.booleans(),
    granularity=st.builds(Granularity, axis=st.none() | st.integers(-3, 3)),
    limits=st.builds(Limits, low=st.none() | st.floats(-9.0, -1.0), high=st.none() | st.floats(0.0, 9.0)),
    fixed=st.none() | st.tuples(st.floats(-9.0, -1.0), st.floats(0.0, 9.0)),
)
assigns = st.builds(
    Assign,
    flag=st.booleans(),
    count=st.integers(-(2**40), 2**40),
    ratio=numbers,
    word=st.text(st.characters(codec="utf-8")),
    colour=st.sampled_from(Colour),
    names=st.lists(st.text(st.characters(codec="utf-8"))).map(tuple),
    pair=st.tuples(numbers, numbers),
    maybe=st.none() | st.integers(0, 9),
    spec=specs,
    inners=st.lists(st.builds(Inner, depth=st.integers(0, 9), share=numbers)).map(tuple),
    either=st.integers(0, 9) | st.text(st.characters(codec="utf-8")),
    choice=st.sampled_from(["a", "b"]),
    table=st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers(0, 9)),
)


@given(item=assigns)
def test_every_pass_reads_back_what_it_wrote(item: Assign) -> None:
    pipeline = Pipeline(PassManager([item]), PassManager([]), catalogue="their_passes:CATALOG")
    (again,) = parse_pipeline(pipeline.to_toml(), "mine", place="mine.toml").prepare_passes
    assert again == item


@given(spec=specs)
def test_spec_survives_encoding(spec: QuantSpec) -> None:
    assert decode(QuantSpec, encode(spec), "spec") == spec
