"""program.quantizers: groups of quantizers off for a while, and back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.nn import functional

import fxquant
from fxquant.errors import FxquantError
from fxquant.graph.program import Program
from fxquant.numerics.fake_quant import Mode
from fxquant.sim import QuantSim
from tests.passes.harness import captured
from tests.training.exactness import Recipe, batches, compare, optimizer_of, prepared
from tests.training.nets import examples, net

RECIPE = Recipe("residual", "lsq+")
FORMS = ("float", "exact")


class Without(fx.Interpreter):
    """Computes a program without some of its quantizers; a bias is quantized where its two sources are."""

    def __init__(self, program: Program, *, weights: bool, activations: bool) -> None:
        super().__init__(program.module)
        self._program = program
        self._off = {
            module for _, module in program.fake_quant_nodes() if not (weights if module.follows else activations)
        }

    def run_node(self, n: fx.Node) -> Any:
        bias = self._program.bias_fake_quant(n)
        is_off = self._program.fake_quant(n) in self._off or (bias is not None and bool(self._off & {*bias.sources}))
        return self.fetch_args_kwargs_from_env(n)[0][0] if is_off else super().run_node(n)


def modes(program: Program) -> list[Mode]:
    """The modes, in graph order."""
    return [module.mode for _, module in program.fake_quant_nodes()]


def outputs(sim: QuantSim, form: str = "float") -> torch.Tensor:
    """Outputs in eval mode."""
    images, _ = examples("residual", 32)
    sim.program.simulate = form
    with torch.no_grad():
        return torch.as_tensor(sim.model.eval()(images))


@pytest.mark.parametrize("weights, activations", [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("recipe", [RECIPE, Recipe("residual", bits="W4A4")], ids=str)
def test_outputs_are_those_of_a_graph_without_the_quantizers_when_they_are_off(
    recipe: Recipe, weights: bool, activations: bool
) -> None:
    sim = prepared(recipe)
    images, _ = examples("residual", 32)
    everything = outputs(sim)
    with torch.no_grad():
        expected = Without(sim.program, weights=weights, activations=activations).run(images)
    with sim.program.quantizers(weights=weights, activations=activations):
        found = outputs(sim)
        assert torch.equal(found, expected) and not torch.equal(found, everything)
        assert torch.allclose(outputs(sim, "exact"), found, atol=0.1 * float(found.abs().max()))
    assert torch.equal(outputs(sim), everything)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_those_of_the_float_model_when_all_are_off(form: str) -> None:
    sim = prepared(RECIPE)
    images, _ = examples("residual", 32)
    with torch.no_grad():
        expected = net("residual")(images)
    with sim.program.quantizers(weights=False, activations=False):
        assert torch.allclose(outputs(sim, form), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", ["weights", "activations"])
def test_outputs_are_those_of_a_program_prepared_without_them(group: str) -> None:
    images, _ = examples("residual", 64)
    sim = QuantSim(net("residual"), (images[:2],))
    sim.compute_encodings([images], progress=False)
    other = captured(net("residual"), images[:2])
    fxquant.load_pipeline("int8_per_channel").prepare(other)
    for _, module in other.fake_quant_nodes():
        if module.follows == (group == "weights"):
            module.mode = Mode.OFF
    fxquant.calibrate(other, [images], progress=False)
    with torch.no_grad(), sim.program.quantizers(**{group: False}):
        assert torch.equal(sim.model(images), other.module.eval()(images))


@pytest.mark.parametrize("ranges", ["static", "moving-average", "lsq+"])
def test_modes_come_back_when_left_by_an_exception(ranges: str) -> None:
    sim = prepared(Recipe("residual", ranges))
    first, second = (module for _, module in list(sim.program.fake_quant_nodes())[:2])
    first.mode, second.mode = Mode.OFF, Mode.FROZEN
    before = modes(sim.program)
    with pytest.raises(KeyError), sim.program.quantizers(weights=False, activations=False):
        assert set(modes(sim.program)) == {Mode.OFF}
        raise KeyError
    assert modes(sim.program) == before


def test_quantizers_that_were_changed_inside_stay_as_they_are() -> None:
    sim = prepared(RECIPE)
    chosen = [module for _, module in sim.program.fake_quant_nodes()]
    before = modes(sim.program)
    with sim.program.quantizers(weights=False, activations=False):
        chosen[0].mode = Mode.FROZEN
    assert modes(sim.program) == [Mode.FROZEN, *before[1:]]


def test_names_must_match_in_full() -> None:
    sim = prepared(RECIPE)
    name = max((str(node.args[0]) for node, _ in sim.program.fake_quant_nodes()), key=len)
    with pytest.raises(FxquantError, match="no quantizer is called"), sim.program.quantizers(only=name[:-1]):
        pass


def test_modes_come_back_when_it_still_observes() -> None:
    images, _ = examples("residual", 32)
    sim = QuantSim(net("residual"), (images[:2],))
    with sim.program.quantizers(activations=False):
        sim.model(images)
        assert Mode.OBSERVE in modes(sim.program)  # of weights
    assert set(modes(sim.program)) == {Mode.OBSERVE}
    assert not any(m.estimator.has_range for _, m in sim.program.fake_quant_nodes() if not m.follows)


Switch = tuple[bool, bool, str]
SWITCHES = st.tuples(st.booleans(), st.booleans(), st.sampled_from([".*", "stem.*", "a1_.*"]))


@given(switches=st.lists(SWITCHES, max_size=4))
def test_contexts_nest(switches: list[Switch]) -> None:
    program = _shared().program

    def enter(rest: list[Switch]) -> None:
        if not rest:
            return
        (weights, activations, only), *others = rest
        before = modes(program)
        with program.quantizers(weights=weights, activations=activations, only=only):
            inside = modes(program)
            assert all(new in (old, Mode.OFF) for new, old in zip(inside, before, strict=True))
            assert inside == before if weights and activations else only != ".*" or Mode.OFF in inside
            enter(others)
            assert modes(program) == inside
        assert modes(program) == before

    enter(switches)


_SIMS: list[QuantSim] = []


def _shared() -> QuantSim:
    if not _SIMS:
        _SIMS.append(prepared(RECIPE))
    return _SIMS[0]


def test_only_those_that_match_are_off_when_a_pattern_is_given() -> None:
    program = _shared().program
    with program.quantizers(weights=False, only=r"a1_weight.*"):
        (off,) = [str(node.args[0]) for node, module in program.fake_quant_nodes() if module.mode is Mode.OFF]
        assert off.startswith("a1_weight")
    with program.quantizers(weights=False, activations=False, only="fc"):
        off_nodes = [str(node.args[0]) for node, module in program.fake_quant_nodes() if module.mode is Mode.OFF]
    assert off_nodes and all(name.startswith("fc") for name in off_nodes)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    program = _shared().program
    with pytest.raises(FxquantError, match="no quantizer is called 'stem_weigth'.*Did you mean 'stem_weight"):
        program.quantizers(weights=False, only="stem_weigth").__enter__()
    with pytest.raises(FxquantError, match="only; expected a regular expression; got '\\('"):
        program.quantizers(only="(").__enter__()
    bare = captured(net("residual"), examples("residual", 2)[0])
    with pytest.raises(FxquantError, match="Run the pipeline's prepare passes first"):
        bare.quantizers(weights=False).__enter__()


def test_training_is_that_of_the_float_weights_when_weights_are_off() -> None:
    sim = prepared(RECIPE)
    sim.model.train()
    images, labels = next(batches(RECIPE))
    with sim.program.quantizers(weights=False):
        functional.cross_entropy(sim.model(images), labels).backward()
    for _, module in sim.program.fake_quant_nodes():
        assert module.range is not None
        assert all((parameter.grad is None) == module.follows for parameter in module.range.parameters())
    assert all(p.grad is not None for name, p in sim.model.named_parameters() if "fake_quants" not in name)


@pytest.mark.parametrize("recipe", [RECIPE, Recipe("all gammas 0", "static", "folded")], ids=str)
def test_program_is_exact_when_it_was_evaluated_without_quantizers_after_training(
    recipe: Recipe, tmp_path: Path
) -> None:
    sim = prepared(recipe)
    optimizer = optimizer_of(recipe, sim)
    for images, labels in batches(recipe, 3):
        sim.model.train()
        optimizer.zero_grad()
        functional.cross_entropy(sim.model(images), labels).backward()
        optimizer.step()
    with torch.no_grad(), sim.program.quantizers(weights=False):
        sim.model.eval()(images)
    sim.program.simulate = "exact"
    assert compare(sim, images, tmp_path).total == 0
