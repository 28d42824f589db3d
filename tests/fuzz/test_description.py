"""Descriptions are valid by construction, survive JSON, rebuild the same net, shrink, and are kept as repros."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given

from fxquant.errors import FxquantError
from tests.fuzz.check import Plan, Verdict
from tests.fuzz.description import KINDS, Description, RandomNet, Source, batches_of, pipeline_of, read_description
from tests.fuzz.draft import LARGEST_VALUE, MOST_LAYERS
from tests.fuzz.draw import descriptions, draw_description, random_choices, random_description
from tests.fuzz.layers import Again, Convolution, Linear
from tests.fuzz.plain_layers import Concat, Unary
from tests.fuzz.repro import load_repro, save_repro
from tests.fuzz.shrink import Record, replay, shrink

MANY = 400


def outputs(description: Description) -> tuple[torch.Tensor, ...]:
    """What the net gives on its first batch."""
    with torch.no_grad():
        found = RandomNet(description)(*batches_of(description)[0])
    return found if isinstance(found, tuple) else (found,)


@given(descriptions())
def test_description_is_valid_and_survives_json(description: Description) -> None:
    assert read_description(description.to_json()) == description
    assert 1 <= len(description.layers) <= MOST_LAYERS
    first, again = outputs(description), outputs(read_description(description.to_json()))
    for value, same in zip(first, again, strict=True):
        assert torch.equal(value, same) or bool(torch.isnan(value).any())
        assert len(value) == description.batch and value[0].numel() <= LARGEST_VALUE


def test_all_operations_and_recipes_are_drawn() -> None:
    drawn = [random_description(0, number) for number in range(MANY)]
    names = {type(layer).__name__ for description in drawn for layer in description.layers}
    assert names == set(KINDS)
    recipes = [description.recipe for description in drawn]
    assert {recipe.weight_bits for recipe in recipes} == set(range(2, 9))
    assert {recipe.activation_bits for recipe in recipes} == set(range(4, 9))
    assert {description.batch for description in drawn} == {1, 2, 3, 4}
    assert {len(description.sources) for description in drawn} == {1, 2}


def test_shared_weights_are_one_parameter() -> None:
    layers = (Linear((0,), 4), Unary((1,)), Again((2,), 0))
    net = RandomNet(Description((Source((4,)),), layers))
    assert [name for name, _ in net.named_parameters()] == ["linear0.weight", "linear0.bias"]
    weight, bias = net.get_parameter("linear0.weight"), net.get_parameter("linear0.bias")
    x = torch.ones(1, 4)
    assert torch.equal(net(x), torch.relu(x @ weight.T + bias) @ weight.T + bias)


def test_recipe_sets_bits_and_sharing() -> None:
    description = Description((Source((4,)),), (Linear((0,), 4),))
    recipe = replace(description.recipe, weight_bits=3, activation_bits=5, shares_concat=True)
    text = pipeline_of(replace(description, recipe=recipe)).to_toml()
    assert "bits = 3" in text and "bits = 5" in text and "concat = true" in text


def test_description_with_an_unknown_operation_is_refused() -> None:
    text = Description((Source((4,)),), (Linear((0,), 4),)).to_json().replace("Linear", "Cubic")
    with pytest.raises(FxquantError, match="expected a layer of Convolution.*got Cubic"):
        read_description(text)


def test_replay_repeats_what_was_recorded() -> None:
    for number in range(20):
        record = Record(random_choices(1, number))
        description = draw_description(record)
        assert replay(tuple(record.choices)) == (description, tuple(record.choices))


def test_shrinking_keeps_what_fails_and_little_else() -> None:
    def fails(description: Description) -> bool:
        kinds = {type(layer) for layer in description.layers}
        return Concat in kinds and Convolution in kinds

    records = [Record(random_choices(0, number)) for number in range(60)]
    failing = next(record for record in records if fails(draw_description(record)))
    shrunk, choices = shrink(tuple(failing.choices), fails, most_trials=1000)
    assert fails(shrunk) and len(shrunk.layers) <= 3
    assert replay(choices)[0] == shrunk


def test_repro_holds_all_that_was_made(tmp_path: Path) -> None:
    description = Description((Source((4,)),), (Linear((0,), 4),))
    outcome = save_repro(description, tmp_path / "case", Plan(("float",)))
    assert outcome.verdict is Verdict.PASSED
    names = {path.name for path in (tmp_path / "case").iterdir()}
    assert names == {"description.json", "outcome.txt", "graph.txt", "model.onnx", "parity.txt"}
    assert load_repro(tmp_path / "case") == load_repro(tmp_path / "case" / "description.json") == description
    assert "aten.linear" in (tmp_path / "case" / "graph.txt").read_text()
