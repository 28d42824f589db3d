"""A random program as data: printable, comparable, kept as JSON, and rebuilt from it.

description = read_description(text)        RandomNet(description), batches_of(description), pipeline_of(description)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import FxquantError
from fxquant.graph.options import decode_dataclass, encode
from fxquant.graph.passes import Pass
from fxquant.graph.pipeline import Pipeline
from fxquant.passes.absorb_activation import AbsorbActivation
from fxquant.passes.assign_specs import AssignSpecs
from fxquant.passes.select_per_block import SelectPerBlock
from fxquant.passes.share_encodings import ShareEncodings
from tests.fuzz import layers, plain_layers
from tests.fuzz.layer import Layer, Values, Weights
from tests.fuzz.layers import Again, BatchNorm, Operand

KINDS: Mapping[str, type[Layer]] = {
    name: kind
    for module in (layers, plain_layers)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, Layer) and kind is not Layer
}


@dataclass(frozen=True)
class Source:
    """An input of the net: its shape without the batch, and what its numbers are.

    Arguments:
        shape: sizes behind the batch.
        magnitude: power of ten that normal noise is multiplied by.
        constant: every number is this one instead.
    """

    shape: tuple[int, ...]
    magnitude: int = 0
    constant: float | None = None

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """A batch of it."""
        noise = torch.randn(batch, *self.shape, generator=generator)
        return noise * 10.0**self.magnitude if self.constant is None else torch.full_like(noise, self.constant)


@dataclass(frozen=True)
class Recipe:
    """How the net is quantized: a packaged pipeline, with these bits, and grids shared by concatenations or not.

    `block`: weights that blocks of so many fill are quantized in blocks; 0: none.
    """

    pipeline: str = "int8_per_channel"
    weight_bits: int = 8
    activation_bits: int = 8
    shares_concat: bool = False
    block: int = 0


@dataclass(frozen=True)
class Description:
    """A net and its data. `seed` is that of weights and inputs; its outputs are all values that no layer reads."""

    sources: tuple[Source, ...]
    layers: tuple[Layer, ...]
    batch: int = 2
    is_dynamic: bool = True
    recipe: Recipe = Recipe()
    seed: int = 0

    def to_json(self) -> str:
        """Text that `read_description` reads back."""
        table = encode(replace(self, layers=()))
        table["layers"] = [{"op": type(layer).__name__, **encode(layer)} for layer in self.layers]
        return json.dumps(table, indent=1) + "\n"

    def __str__(self) -> str:
        head = f"{self.recipe}, batch {self.batch}{'' if self.is_dynamic else ' static'}, seed {self.seed}"
        return "\n".join([head, *map(str, self.sources), *map(str, self.layers)])


def read_description(text: str) -> Description:
    """A description from its JSON; FxquantError names what is wrong with it."""
    table = json.loads(text)
    found = decode_dataclass(Description, {**table, "layers": []}, "description")
    assert isinstance(found, Description)
    return replace(found, layers=tuple(map(_read_layer, table.get("layers", []))))


def _read_layer(table: Mapping[str, Any]) -> Layer:
    options = dict(table)
    name = options.pop("op", "")
    if name not in KINDS:
        raise FxquantError("description", expected=f"a layer of {', '.join(KINDS)}", got=str(name))
    layer = decode_dataclass(KINDS[name], options, name)
    assert isinstance(layer, Layer)
    return layer


class RandomNet(nn.Module):
    """The net of a description, in eval mode. It returns one value, or a tuple."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self._layers = description.layers
        self._owners: list[int] = []  # whose module, and arguments, each layer uses
        values = [torch.empty(2, *source.shape, device="meta") for source in description.sources]
        for index, layer in enumerate(self._layers):
            owner = layer.layer if isinstance(layer, Again) else index
            self._owners.append(owner)
            inputs = tuple(values[read] for read in layer.reads)
            if owner == index:
                self._build(index, inputs, description.seed)
            values += outputs_on_meta(self._layers[owner], inputs)
        read = {value for layer in self._layers for value in layer.reads}
        self._outputs = [value for value in range(len(description.sources), len(values)) if value not in read]
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor | Values:
        """All values that no layer reads."""
        values = list(inputs)
        for layer, owner in zip(self._layers, self._owners, strict=True):
            module = self._modules.get(_path(owner, self._layers[owner]))
            values += self._layers[owner].run(tuple(values[read] for read in layer.reads), module)
        found = tuple(values[output] for output in self._outputs)
        return found[0] if len(found) == 1 else found

    def _build(self, index: int, inputs: Values, seed: int) -> None:
        layer = self._layers[index]
        module = layer.build(inputs)
        if module is None:
            return
        generator = torch.Generator().manual_seed(seed * 1000 + index)
        weights = getattr(layer, "weights", None)
        assert isinstance(weights, Weights)
        weights.fill(module, generator)
        if isinstance(layer, BatchNorm):
            module.running_mean = torch.randn(inputs[0].shape[1], generator=generator)
            module.running_var = torch.rand(inputs[0].shape[1], generator=generator) + 0.1
        if isinstance(module, Operand):
            module.mask = torch.rand(module.weight.shape, generator=generator) < 0.5
        self.add_module(_path(index, layer), module)


def _path(index: int, layer: Layer) -> str:
    return f"{type(layer).__name__.lower()}{index}"


def outputs_on_meta(layer: Layer, inputs: Values) -> Values:
    """What a layer gives, without numbers."""
    module = layer.build(inputs)
    with torch.no_grad():
        return layer.run(inputs, None if module is None else module.to("meta"))


def batches_of(description: Description, count: int = 2) -> list[Values]:
    """So many batches of inputs, each of its own numbers."""
    generator = torch.Generator().manual_seed(description.seed)
    return [tuple(source.draw(description.batch, generator) for source in description.sources) for _ in range(count)]


def pipeline_of(description: Description) -> Pipeline:
    """The pipeline that the recipe names, with its bits."""
    return _pipeline(description.recipe)


@cache
def _pipeline(recipe: Recipe) -> Pipeline:
    packaged = fxquant.load_pipeline(recipe.pipeline)
    prepare = [_with(item, recipe) for item in packaged.prepare_passes]
    if recipe.block:
        place = next(index for index, item in enumerate(prepare) if isinstance(item, AbsorbActivation))
        prepare.insert(place, SelectPerBlock(block=recipe.block))
    return Pipeline(fxquant.PassManager(prepare), packaged.finalize_passes, packaged.target, recipe.pipeline)


def _with(item: Pass, recipe: Recipe) -> Pass:
    if isinstance(item, AssignSpecs):
        weight = replace(item.weight, bits=recipe.weight_bits)
        assigning: Pass = replace(item, weight=weight, activation=replace(item.activation, bits=recipe.activation_bits))
        return assigning
    if isinstance(item, ShareEncodings):
        sharing: Pass = replace(item, concat=recipe.shares_concat)
        return sharing
    return item
