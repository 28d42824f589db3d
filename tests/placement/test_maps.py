"""What four placement files turn on in five nets, written down by hand from the grammar."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant.placement.sections import types_of_table
from tests.placement.nets import NETS, on_off, prepared

DATA = Path(__file__).parent / "data"
FILES = {
    "default": "aimet_default.json",
    "per_channel": "aimet_per_channel.json",
    "v66": str(DATA / "htp_v66_like.json"),
    "v73": str(DATA / "htp_v73_like.json"),
}

# Of each net: what every file turns on, what passes codes on, and what a file leaves off, with the reason.
ON = {
    "conv_bn_relu": "x conv_weight relu gap fc_weight fc",
    "residual": "x conv1_weight relu1 conv2_weight conv2 relu2 up_weight up sigmoid",
    "depthwise": "x depthwise_weight act1 pointwise_weight act2",
    "concat": "x left_weight left right_weight right cat mul",
    "encoder": "tokens_weight add query_weight query key_weight key matmul softmax value_weight value matmul_1 add_1 "
    "norm_weight norm wide_weight wide gelu narrow_weight narrow",
}
CODES = {
    "conv_bn_relu": "pool flatten",
    "residual": "",
    "depthwise": "",
    "concat": "pool getitem getitem_1",
    "encoder": "transpose",
}
MOVED = "it only moves what it reads, which is no quantized activation"
NUMBER = "multiplied by one known number"
OFF = {
    ("conv_bn_relu", "default"): {"conv": "supergroups[0]: Conv + Relu"},
    ("conv_bn_relu", "v66"): {},  # no supergroup with Conv: a quantizer between conv and relu
    ("conv_bn_relu", "v73"): {"conv": "supergroups[3]: Conv + Relu"},
    ("residual", "default"): {"conv1": "supergroups[0]: Conv + Relu", "add": "supergroups[3]: Add + Relu"},
    ("residual", "v66"): {"add": "supergroups[0]: Add + Relu"},
    ("residual", "v73"): {"conv1": "supergroups[3]: Conv + Relu", "add": "supergroups[0]: Add + Relu"},
    ("depthwise", "default"): {
        "depthwise": "supergroups[1]: Conv + Clip",
        "pointwise": "supergroups[1]: Conv + Clip",
        "mul": NUMBER,
    },
    ("depthwise", "v66"): {"mul": NUMBER},
    ("depthwise", "v73"): {
        "depthwise": "supergroups[4]: Conv + Clip",
        "pointwise": "supergroups[4]: Conv + Clip",
        "mul": NUMBER,
    },
    **{("concat", file): {} for file in ("default", "v66", "v73")},
    **{("encoder", file): {"tokens": MOVED} for file in ("default", "v66", "v73")},
}
UNFUSED = {("conv_bn_relu", "v66"): "conv", ("residual", "v66"): "conv1", ("depthwise", "v66"): "depthwise pointwise"}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("net", NETS)
def test_map_is_what_the_grammar_implies(net: str, file: str) -> None:
    program = prepared(net, FILES[file])
    column = "default" if file == "per_channel" else file
    wanted = dict.fromkeys(f"{ON[net]} {UNFUSED.get((net, column), '')}".split(), "on")
    wanted |= dict.fromkeys(CODES[net].split(), "codes")
    assert on_off(program) == wanted
    reasons = {node.name: node.meta["float_reason"] for node in program.graph.nodes if "float_reason" in node.meta}
    assert reasons == OFF[net, column]


# Specs that are not "u8 asymmetric" (activations) or "s8 symmetric" (weights).
SPECS = {
    ("conv_bn_relu", "default"): {"relu": "u8 asymmetric per-tensor within [0, free]"},
    ("conv_bn_relu", "per_channel"): {
        "relu": "u8 asymmetric per-tensor within [0, free]",
        "conv_weight": "s8 symmetric per-channel(0)",
        "fc_weight": "s8 symmetric per-channel(0)",
    },
    ("residual", "v73"): {
        "relu1": "u8 asymmetric per-tensor within [0, free]",
        "relu2": "u8 asymmetric per-tensor within [0, free]",
        "conv1_weight": "s8 symmetric per-channel(0)",
        "conv2_weight": "s8 symmetric per-channel(0)",
        "up_weight": "s8 symmetric per-channel(1)",  # a transposed convolution's output channels
        "sigmoid": "u8 asymmetric per-tensor fixed [0, 1]",
    },
    ("residual", "v66"): {
        "relu1": "u8 asymmetric per-tensor within [0, free]",  # encoding_constraints, though its input is on
        "relu2": "u8 asymmetric per-tensor within [0, free]",
        "sigmoid": "u8 asymmetric per-tensor within [0, 1]",
    },
    ("depthwise", "default"): {
        "act1": "u8 asymmetric per-tensor within [0, 6]",
        "act2": "u8 asymmetric per-tensor within [0, 6]",
    },
    ("depthwise", "v66"): {},
    ("encoder", "v66"): {
        "key": "u8 symmetric per-tensor",  # second factors of products
        "value": "u8 symmetric per-tensor",
        "softmax": "u8 asymmetric per-tensor within [0, 1]",
        "norm_weight": "u8 asymmetric per-tensor",
    },
    ("encoder", "per_channel"): {
        "query_weight": "s8 symmetric per-channel(0)",
        "key_weight": "s8 symmetric per-channel(0)",
        "value_weight": "s8 symmetric per-channel(0)",
        "wide_weight": "s8 symmetric per-channel(0)",
        "narrow_weight": "s8 symmetric per-channel(0)",
        "softmax": "u8 asymmetric per-tensor within [0, 1]",
    },
}


@pytest.mark.parametrize(("net", "file"), SPECS)
def test_specs_are_what_the_sections_say(net: str, file: str) -> None:
    program = prepared(net, FILES[file])
    found = {}
    for node, module in program.fake_quant_nodes():
        value = node.all_input_nodes[0]
        plain = "s8 symmetric per-tensor" if value.op == "get_attr" else "u8 asymmetric per-tensor"
        if str(module.spec) != plain and "shares_encoding_with" not in value.meta:
            found[value.name] = str(module.spec)
    assert found == SPECS[net, file]


def test_concat_is_tied_to_its_inputs() -> None:
    program = prepared("concat", FILES["default"])
    shares = {node.name: node.meta.get("shares_encoding_with") for node in program.graph.nodes}
    assert {name: shares[name] for name in ("left", "pool", "right", "getitem", "getitem_1")} == {
        "left": "cat",
        "pool": "right",  # it is on the grid of what it pools, which onnxruntime's QLinearConcat joins
        "right": None,
        "getitem": "cat",
        "getitem_1": "cat",
    }


def test_every_type_that_these_files_name_is_one_of_the_table() -> None:
    named = "Add AveragePool BatchNormalization Cast Clip Concat Conv ConvTranspose Cos Div Gather Gemm "
    named += "GroupNormalization LayerNormalization LeakyRelu MatMul MaxPool Mul Pad PRelu Relu Reshape "
    named += "RMSNormalization Sigmoid Sin Slice Softmax Split Tanh Transpose"
    assert set(named.split()) <= types_of_table()
