"""Every packaged pipeline gives files that run; each preset has the structure that its runtime demands."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxquant
from fxquant.errors import ExportError
from fxquant.graph.manager import PassManager
from fxquant.graph.pipeline import CONFIGS, Pipeline, packaged_pipelines
from fxquant.numerics.runtime import Level, optimised_graph
from fxquant.passes import AssignSpecs, NarrowFirstWeights
from fxquant.spec import SpecOverride, Target
from tests.preset_files import Array, Grid, Structure
from tests.preset_nets import NETS, ONE_THREAD, Export, batches, export, packaged

# What these presets reach on the nets here is 4 dB more or better; others are only to be no nonsense.
FLOORS = {
    "int8_per_tensor": 30.0,
    "int8_per_tensor_dfq": 30.0,
    "int8_per_channel": 33.0,
    "int8_reduced_range": 33.0,
    "w4a8": 20.0,
    "w4a8_adaround": 20.0,
    "w4a4_lsq_qat": 3.0,
    "int16_activations": 43.0,
    "tensorrt": 33.0,
    "openvino": 33.0,
    "xnnpack": 33.0,
    "qnn_htp": 33.0,
}
ON_CPU = ("int8_per_tensor", "int8_per_tensor_dfq", "int8_per_channel", "int8_reduced_range", "w4a8", "w4a8_adaround")
CONVOLUTIONAL = ("plain", "residual", "depthwise", "dense")
TARGETS = {"tensorrt": Target.TENSORRT, "openvino": Target.OPENVINO, "xnnpack": Target.XNNPACK}
TARGETS |= {"qnn_htp": Target.QNN_HTP}
FLOAT_PRODUCTS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
INT16_MAX = 32767


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("presets")


@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.parametrize("preset", packaged_pipelines())
def test_file_is_valid_and_runs_close_to_the_float_net(preset: str, name: str, folder: Path) -> None:
    found = packaged(preset, name, folder)
    onnx.checker.check_model(found.model, full_check=True)
    assert Structure(found.model).nodes("QuantizeLinear")
    assert found.sqnr() > FLOORS.get(preset, 15.0)


@pytest.mark.parametrize("preset", packaged_pipelines())
def test_grouped_transposed_convolution_with_a_bias_runs_close_to_the_float_net(preset: str, folder: Path) -> None:
    assert packaged(preset, "upsampler", folder).sqnr() > FLOORS.get(preset, 15.0)


@pytest.mark.parametrize("level", list(Level))
@pytest.mark.parametrize("preset", packaged_pipelines())
@pytest.mark.parametrize("name", ["flat", "dead"])
def test_onnxruntime_agrees_on_a_flat_softmax_and_on_the_bias_behind_a_dead_value(
    name: str, preset: str, level: Level, folder: Path
) -> None:
    found = packaged(preset, name, folder)
    with torch.no_grad():
        simulated = found.program.module(found.inputs)
    difference = np.abs(found.run(level) - simulated.numpy())
    share = 0.1 if preset == "w4a4_lsq_qat" else 0.03  # one step of a 4-bit grid is a tenth of the largest value here
    assert difference.max() <= share * float(simulated.abs().max())


@pytest.mark.parametrize("preset", packaged_pipelines())
def test_preset_says_when_to_use_it_and_for_which_target(preset: str) -> None:
    lines = resources.files(CONFIGS).joinpath(f"{preset}.toml").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("target = "))
    comment = [line for line in lines[:start] if line]
    assert len(comment) >= 2 and all(line.startswith("#") for line in comment)
    family = preset.removesuffix("_qat")
    assert fxquant.load_pipeline(preset).target is TARGETS.get(family, Target.ONNXRUNTIME_X64)
    if preset in TARGETS:
        assert "Not certified on onnxruntime" in " ".join(line.removeprefix("# ") for line in comment)


def test_every_preset_of_the_issue_is_packaged() -> None:
    assert set(FLOORS) <= set(packaged_pipelines())


@pytest.mark.parametrize("preset", FLOORS)
def test_file_for_another_runtime_says_that_it_is_not_certified(preset: str, folder: Path) -> None:
    metadata = {item.key: item.value for item in packaged(preset, "plain", folder).model.metadata_props}
    assert metadata["fxquant.target"] == TARGETS.get(preset, Target.ONNXRUNTIME_X64).value
    assert ("fxquant.note" in metadata) == (preset in TARGETS)


# --- onnxruntime on the CPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVOLUTIONAL)
@pytest.mark.parametrize("preset", ON_CPU)
def test_everything_is_fused_and_no_code_differs_on_the_cpu(preset: str, name: str, folder: Path) -> None:
    found = packaged(preset, name, folder)
    report = fxquant.check_parity(
        found.program, found.path, batches(name), options=ONE_THREAD, simulation="exact", progress=False
    )
    assert report.fusion.leftover == 0 and report.fusion.unfused == ()
    assert not FLOAT_PRODUCTS & set(dict(report.fusion.operators))
    assert all(row.overall.compared > 0 and row.overall.differing == 0 for row in report.rows) and not report.fault


@pytest.mark.parametrize("preset", ON_CPU)
def test_no_product_is_float_where_islands_are(preset: str, folder: Path) -> None:
    found = packaged(preset, "attention", folder)
    operators = {node.op_type for node in optimised_graph(found.path, ONE_THREAD).graph.node}
    assert not FLOAT_PRODUCTS & operators and {"QGemm", "QLinearMatMul"} <= operators


def assert_fast_structure(structure: Structure, largest: int, *, per_channel: bool) -> None:
    """u8 activations; s8 weights of zero point 0 that use codes up to `largest`; int32 biases at scale sx * sw."""
    assert {grid.dtype for grid in structure.activations()} == {"uint8"}
    weights = structure.weights()
    assert len(weights) == len(structure.nodes("Conv", "Gemm")) and not structure.float_weights()
    for grid in weights.values():
        assert_symmetric(grid, largest, per_channel=per_channel)
    assert_integer_biases(structure)


def assert_symmetric(grid: Grid, largest: int, *, per_channel: bool, axis: int = 0) -> None:
    """An INT8 weight of zero point 0 whose largest code, of each channel if it has a scale each, is `largest`."""
    assert grid.codes is not None and grid.codes.dtype == np.int8 and not grid.zero_point.any()
    magnitudes = np.abs(grid.codes.astype(np.int64))
    if not per_channel:
        assert grid.scale.shape == () and magnitudes.max() == largest
        return
    assert grid.axis == axis and grid.scale.shape == (grid.codes.shape[axis],)
    others = tuple(number for number in range(grid.codes.ndim) if number != axis)
    assert (magnitudes.max(axis=others) == largest).all()


def assert_integer_biases(structure: Structure) -> None:
    """Every bias of a convolution or Gemm is INT32 with zero point 0, at its layer's scales multiplied."""
    biases = structure.biases()
    assert biases
    for node in structure.nodes("Conv", "ConvTranspose", "Gemm"):
        grid, weight = biases[node.output[0]], structure.grid_of(node.input[1])
        assert grid is not None and weight is not None and grid.dtype == "int32" and not grid.zero_point.any()
        x = structure.grid_of(behind_reshape(structure, node.input[0]))
        assert x is not None
        np.testing.assert_array_equal(grid.scale, x.scale * weight.scale)


def behind_reshape(structure: Structure, tensor: str) -> str:
    """What a Reshape reads that writes `tensor`, else `tensor`: a linear on three axes is Reshape, Gemm, Reshape."""
    for node in structure.nodes("Reshape"):
        if node.output[0] == tensor:
            return str(node.input[0])
    return tensor


@pytest.mark.parametrize("name", CONVOLUTIONAL)
@pytest.mark.parametrize(
    ("preset", "largest", "per_channel"),
    [
        ("int8_per_tensor", 127, False),
        ("int8_per_tensor_dfq", 127, False),
        ("int8_per_channel", 127, True),
        ("int8_reduced_range", 63, True),
        ("w4a8", 7, True),
        ("w4a8_adaround", 7, True),
    ],
)
def test_structure_is_that_of_the_fast_kernels(
    preset: str, largest: int, per_channel: bool, name: str, folder: Path
) -> None:
    structure = Structure(packaged(preset, name, folder).model)
    assert_fast_structure(structure, largest, per_channel=per_channel)


def weight_codes(preset: str) -> tuple[int, int]:
    """Lowest and highest code that a preset gives to weights."""
    (assign,) = [item for item in fxquant.load_pipeline(preset).prepare_passes if isinstance(item, AssignSpecs)]
    return assign.weight.qmin, assign.weight.qmax


def add_pairs(x: Array, w: Array) -> Array:
    """vpmaddubsw: products of u8 and s8, added in pairs, saturated to 16 bits."""
    sums = (x.astype(np.int64) * w.astype(np.int64)).reshape(-1, 2).sum(axis=1)
    saturated: Array = np.clip(sums, -INT16_MAX - 1, INT16_MAX)
    return saturated


@settings(deadline=None)
@given(st.data())
def test_pair_sums_of_reduced_weights_never_saturate(data: st.DataObject) -> None:
    low, high = weight_codes("int8_reduced_range")
    x = np.array(data.draw(st.lists(st.integers(0, 255), min_size=8, max_size=8)), np.uint8)
    w = np.array(data.draw(st.lists(st.integers(low, high), min_size=8, max_size=8)), np.int8)
    exact = (x.astype(np.int64) * w).reshape(-1, 2).sum(axis=1)
    np.testing.assert_array_equal(add_pairs(x, w), exact)


@pytest.mark.parametrize(
    ("preset", "fits"), [("int8_reduced_range", True), ("w4a8", True), ("int8_per_channel", False)]
)
def test_largest_pair_sum_fits_16_bits_only_for_narrow_weights(preset: str, fits: bool) -> None:
    low, high = weight_codes(preset)
    assert (2 * 255 * max(-low, high) <= INT16_MAX) is fits
    full = np.full(2, 255, np.uint8)
    found = int(add_pairs(full, np.full(2, high, np.int8))[0])
    assert (found == 2 * 255 * high) is fits
    assert 2 * 255 * 64 < INT16_MAX  # the bound that the preset's comment and onnxruntime's reduce_range go by


def test_16_bit_activations_have_their_structure_and_run_in_float(folder: Path) -> None:
    found = packaged("int16_activations", "residual", folder)
    structure = Structure(found.model)
    assert {grid.dtype for grid in structure.activations()} == {"uint16"}
    for grid in structure.weights().values():
        assert_symmetric(grid, 127, per_channel=True)
    assert set(structure.biases().values()) == {None}
    assert found.model.opset_import[0].version >= 21
    report = fxquant.check_parity(found.program, found.path, batches("residual"), options=ONE_THREAD, progress=False)
    islands = {kernel.node for kernel in report.fusion.unfused}
    assert {"stem", "a1", "a2", "b1", "b2", "down", "fc", "add", "add_1"} <= islands and not report.fault


def test_16_bit_activations_want_opset_21(folder: Path) -> None:
    found = packaged("int16_activations", "plain", folder)
    with pytest.raises(ExportError, match="opset 21"):
        fxquant.export_onnx(found.program, folder / "old.onnx", opset=19)


# --- TensorRT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETS))
def test_tensorrt_has_symmetric_signed_grids_and_float_biases(name: str, folder: Path) -> None:
    structure = Structure(packaged("tensorrt", name, folder).model)
    grids = structure.activations()
    assert grids and all(grid.dtype == "int8" and grid.zero_point.shape == () for grid in grids)
    assert not any(grid.zero_point.any() for grid in grids)
    assert not structure.float_weights() and set(structure.biases().values()) <= {None}
    for kind, axis in (("Conv", 0), ("ConvTranspose", 1), ("Gemm", 0), ("MatMul", 1)):
        for grid in structure.weights(kind).values():
            assert_symmetric(grid, 127, per_channel=True, axis=axis)
    assert all(grid.dtype == "int8" for grid in map(structure.grid_of, dequantized(structure)) if grid is not None)


def dequantized(structure: Structure) -> list[str]:
    return [str(node.output[0]) for node in structure.nodes("DequantizeLinear")]


@pytest.mark.parametrize("name", list(NETS))
def test_tensorrt_quantizes_the_inputs_of_products_and_no_output(name: str, folder: Path) -> None:
    structure = Structure(packaged("tensorrt", name, folder).model)
    for node in structure.nodes("Conv", "ConvTranspose", "Gemm", "MatMul"):
        assert structure.is_quantized(node.input[0]) and structure.is_quantized(node.input[1])
    for node in structure.nodes("Mul", "Sigmoid", "Softmax", "AveragePool", "GlobalAveragePool", "Relu", "Gelu"):
        assert not any(structure.is_quantized(tensor) for tensor in node.input)
    assert not any(structure.is_quantized(value.name) for value in structure.graph.output)


def test_tensorrt_quantizes_the_residual_addend_alone(folder: Path) -> None:
    structure = Structure(packaged("tensorrt", "residual", folder).model)
    identity, projected = structure.nodes("Add")
    assert list(identity.input) == ["a2", "relu_fq"] and structure.producer("a2") == "Conv"
    assert list(projected.input) == ["b2", "down_fq"] and structure.producer("b2") == "Conv"
    assert structure.quantizer_behind("a2") is None and structure.quantizer_behind("b2") is None
    (mobile,) = Structure(packaged("tensorrt", "depthwise", folder).model).nodes("Add")
    assert list(mobile.input) == ["project", "hardtanh_fq"]


# --- OpenVINO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETS))
def test_openvino_has_unsigned_activations_and_signed_weights(name: str, folder: Path) -> None:
    structure = Structure(packaged("openvino", name, folder).model)
    assert {grid.dtype for grid in structure.activations()} == {"uint8"}
    first = structure.nodes("Conv", "ConvTranspose", "Gemm", "MatMul")[0]
    for output, grid in structure.weights("Conv").items():
        narrow = output == first.output[0] and first.op_type == "Conv"
        assert_symmetric(grid, 63 if narrow else 127, per_channel=True)
    for output, grid in structure.weights("Gemm", "MatMul", "ConvTranspose").items():
        assert grid.dtype == "int8" and not grid.zero_point.any() and grid.scale.ndim == 1, output
    assert set(structure.biases().values()) <= {None} and not structure.float_weights()


@pytest.mark.parametrize("name", list(NETS))
def test_openvino_quantizes_what_runs_on_integers_and_no_output(name: str, folder: Path) -> None:
    structure = Structure(packaged("openvino", name, folder).model)
    for node in structure.nodes("Conv", "ConvTranspose", "Gemm", "MatMul", "AveragePool", "GlobalAveragePool"):
        assert structure.is_quantized(node.input[0])
    for node in structure.nodes("Add"):
        if structure.producer(node.input[0]) != "MatMul":  # a layer's own bias
            assert all(structure.is_quantized(tensor) for tensor in node.input)
    for node in structure.nodes("Relu", "Clip", "Softmax", "Sigmoid", "Gelu", "Tanh"):
        assert not structure.is_quantized(node.input[0])
    assert not any(structure.is_quantized(value.name) for value in structure.graph.output)


def test_openvino_keeps_full_range_where_the_option_says_so(folder: Path) -> None:
    pipeline = fxquant.load_pipeline("openvino")
    passes = [
        NarrowFirstWeights(bits=8) if item.name == "narrow-first-weights" else item for item in pipeline.prepare_passes
    ]
    wide = Pipeline(PassManager(passes), pipeline.finalize_passes, pipeline.target)
    (folder / "wide").mkdir(exist_ok=True)
    structure = Structure(export(wide, "residual", folder / "wide").model)
    assert_symmetric(structure.weights("Conv")["stem"], 127, per_channel=True)


# --- XNNPACK ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETS))
def test_xnnpack_has_signed_grids_and_integer_biases(name: str, folder: Path) -> None:
    structure = Structure(packaged("xnnpack", name, folder).model)
    grids = structure.activations()
    assert {grid.dtype for grid in grids} == {"int8"} and any(grid.zero_point.any() for grid in grids)
    for kind, axis in (("Conv", 0), ("ConvTranspose", 1), ("Gemm", 0), ("MatMul", 1)):
        for grid in structure.weights(kind).values():
            assert_symmetric(grid, 127, per_channel=True, axis=axis)
    if name != "attention":
        assert_integer_biases(structure)
    assert not structure.float_weights()


def test_xnnpack_adds_the_biases_of_matrix_products_as_integers(folder: Path) -> None:
    structure = Structure(packaged("xnnpack", "attention", folder).model)
    sums = [node for node in structure.nodes("Add") if structure.producer(node.input[0]) == "MatMul"]
    grids = [structure.grid_of(node.input[1]) for node in sums]
    assert len(grids) == 4 and all(grid is not None and grid.dtype == "int32" for grid in grids)


@pytest.mark.parametrize("name", list(NETS))
def test_xnnpack_quantizes_both_sides_of_what_it_computes(name: str, folder: Path) -> None:
    structure = Structure(packaged("xnnpack", name, folder).model)
    for node in structure.nodes("Conv", "ConvTranspose", "Gemm", "Mul", "Concat", "AveragePool", "Sigmoid", "Tanh"):
        tensors = node.input if node.op_type == "Concat" else node.input[:1]
        assert all(structure.is_quantized(tensor) for tensor in tensors)
        assert structure.quantizer_behind(node.output[0]) is not None


def test_xnnpack_relu_starts_at_the_lowest_code(folder: Path) -> None:
    structure = Structure(packaged("xnnpack", "residual", folder).model)
    grids = [structure.quantizer_behind(node.output[0]) for node in structure.nodes("Relu")]
    assert len(grids) == 5 and all(grid is not None and grid.zero_point == -128 for grid in grids)


@pytest.mark.parametrize(
    ("name", "kind", "scale", "zero_point"),
    [("depthwise", "Sigmoid", 2**-8, -128), ("attention", "Softmax", 2**-8, -128), ("decoder", "Tanh", 2**-7, 0)],
)
def test_xnnpack_has_the_grids_of_fixed_ranges(
    name: str, kind: str, scale: float, zero_point: int, folder: Path
) -> None:
    structure = Structure(packaged("xnnpack", name, folder).model)
    (node,) = structure.nodes(kind)
    grid = structure.quantizer_behind(node.output[0])
    assert grid is not None and grid.scale == np.float32(scale) and grid.zero_point == zero_point


@pytest.mark.parametrize("preset", ["xnnpack", "tensorrt", "openvino"])
def test_concatenations_are_on_one_grid(preset: str, folder: Path) -> None:
    structure = Structure(packaged(preset, "dense", folder).model)
    joined = [node for node in structure.nodes("Concat") if structure.is_quantized(node.input[0])]
    assert len(joined) == (2 if preset == "xnnpack" else 1)
    for node in joined:
        output = structure.quantizer_behind(node.output[0])
        grids = [structure.grid_of(tensor) for tensor in node.input]
        assert output is not None and all(grid is not None and grid.equals(output) for grid in grids)


def test_xnnpack_average_pooling_keeps_its_grid(folder: Path) -> None:
    structure = Structure(packaged("xnnpack", "plain", folder).model)
    (node,) = structure.nodes("AveragePool")
    before, behind = structure.grid_of(node.input[0]), structure.quantizer_behind(node.output[0])
    assert before is not None and behind is not None and before.equals(behind)


# --- QNN on the Hexagon tensor processor -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wide(folder: Path) -> dict[str, Export]:
    """The 16-bit variant of qnn_htp."""
    pipeline = fxquant.load_pipeline("qnn_htp").override(activation=SpecOverride(bits=16))
    (folder / "qnn16").mkdir()
    return {name: export(pipeline, name, folder / "qnn16") for name in ("depthwise", "decoder", "attention")}


def assert_qnn_weights(structure: Structure) -> None:
    """Signed and per channel for convolutions; unsigned and per tensor for matrix products; int32 biases."""
    for kind, axis in (("Conv", 0), ("ConvTranspose", 1)):
        for grid in structure.weights(kind).values():
            assert_symmetric(grid, 127, per_channel=True, axis=axis)
    for grid in structure.weights("Gemm", "MatMul").values():
        assert grid.dtype == "uint8" and grid.scale.shape == () and 0 < grid.zero_point < 255
        assert grid.codes is not None and (grid.codes.min(), grid.codes.max()) == (0, 255)
    assert_integer_biases(structure)
    assert not structure.float_weights()


@pytest.mark.parametrize("name", list(NETS))
def test_qnn_has_unsigned_activations_and_its_weights(name: str, folder: Path) -> None:
    structure = Structure(packaged("qnn_htp", name, folder).model)
    grids = structure.activations()
    assert {grid.dtype for grid in grids} == {"uint8"} and any(0 < grid.zero_point < 255 for grid in grids)
    assert_qnn_weights(structure)
    assert bool(structure.weights("Gemm")) == (name in ("plain", "residual", "attention"))
    assert all(structure.is_quantized(value.name) for value in structure.graph.output)


@pytest.mark.parametrize("name", ["depthwise", "decoder", "attention"])
def test_qnn_takes_16_bit_activations_by_override(name: str, wide: dict[str, Export], folder: Path) -> None:
    structure = Structure(wide[name].model)
    onnx.checker.check_model(wide[name].model, full_check=True)
    assert {grid.dtype for grid in structure.activations()} == {"uint16"}
    assert_qnn_weights(structure)
    assert wide[name].sqnr() > packaged("qnn_htp", name, folder).sqnr() + 3


@pytest.mark.parametrize(
    ("name", "kind", "scale", "zero_point"),
    [("depthwise", "Sigmoid", 2**-16, 0), ("decoder", "Tanh", 2**-15, 2**15)],
)
def test_qnn_has_the_16_bit_grids_of_fixed_ranges(
    name: str, kind: str, scale: float, zero_point: int, wide: dict[str, Export]
) -> None:
    structure = Structure(wide[name].model)
    (node,) = structure.nodes(kind)
    grid = structure.quantizer_behind(node.output[0])
    assert grid is not None and grid.scale == np.float32(scale) and grid.zero_point == zero_point
