"""Malformed placement files: one error each, that names the file, the path in it, and what is accepted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import ConfigError
from fxquant.graph.pipeline import load_pipeline, parse_pipeline

GOOD: dict[str, Any] = {
    "defaults": {"ops": {"is_output_quantized": "True"}, "params": {"is_quantized": "True"}},
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {"Conv": {"is_output_quantized": "True"}, "Relu": {"encoding_constraints": {"min": 0.0}}},
    "supergroups": [{"op_list": ["Conv", "Relu"]}],
    "model_input": {"is_input_quantized": "True"},
    "model_output": {"is_output_quantized": "True"},
}
BOOLEAN = 'expected the string "True" or "False"'
SECTIONS = "defaults, params, op_type, supergroups, model_input, model_output"


def changed(path: str, value: Any) -> str:
    """GOOD as text, with the value at a dotted path replaced or added; None takes it out."""
    content = copy.deepcopy(GOOD)
    *way, last = path.split(".")
    place: Any = content
    for key in way:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    if value is None:
        del place[last]
    elif isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value
    return json.dumps(content)


CONSTRAINTS = "op_type.Relu.encoding_constraints"
# The text, the path in the message (after the file's name), and what else it says.
MALFORMED: dict[str, tuple[str, str, str]] = {
    "empty": ("", "", f"placement file is empty (bad.json); expected an object with the sections {SECTIONS}"),
    "blank": (" \n ", "", "placement file is empty"),
    "syntax": ('{"defaults": {,}}', "line 1, column 15", "placement file is not JSON"),
    "unclosed": (json.dumps(GOOD)[:-1], "line 1, column", "placement file is not JSON"),
    "trailing comma": ('{\n  "params": {},\n}', "line ", "placement file is not JSON"),
    "two objects": (json.dumps(GOOD) + "{}", "line 1, column", "placement file is not JSON"),
    "single quotes": ("{'defaults': {}}", "line 1, column 2", "placement file is not JSON"),
    "list": ("[]", "", f"expected an object with the sections {SECTIONS}; got a list, []"),
    "string": ('"Conv"', "", 'got a string, "Conv"'),
    "null": ("null", "", "got null"),
    "nan": (changed(CONSTRAINTS, {"min": float("nan")}), f"{CONSTRAINTS}.min", "expected finite numbers; got NaN"),
    "infinity in a list": (
        changed("supergroups.0.op_list", ["Conv", float("inf")]),
        "supergroups[0].op_list[1]",
        "expected finite numbers; got Infinity",
    ),
    "nested too deeply": ("[" * 100_000, "", "placement file is nested too deeply"),
    "duplicate key": ('{"params": {}, "params": {"bias": {}}}', "", "key 'params' is there twice (bad.json)"),
    "duplicate key deep inside": (
        changed("op_type.Conv", {"X": 1}).replace('{"X": 1}', '{"params": {}, "params": {"bias": {}}}'),
        "op_type.Conv",
        "key 'params' is there twice",
    ),
    "duplicate key in a list": (
        changed("supergroups.0", {"X": 1}).replace('{"X": 1}', '{"op_list": [], "op_list": ["Conv"]}'),
        "supergroups[0]",
        "key 'op_list' is there twice",
    ),
    "key of two lines": (changed("op_type.Conv.a\nb", "True"), r"op_type.Conv.a\nb", r"unknown key 'a\nb'"),
    "type of two lines": (changed("op_type.Co\nv", {}), "", r"op_type.Co\nv: operator type 'Co\nv' is unknown"),
    "type of two lines in a supergroup": (
        changed("supergroups.0.op_list", ["Conv", "Re\nlu"]),
        "",
        r"operator type 'Re\nlu' is unknown",
    ),
    "parameter of two lines": (changed("params.bi\nas", {}), "", r"params.bi\nas: parameter 'bi\nas' is unknown"),
    "pass of two lines": (changed("supergroup_pass_list", ["Matmul\nAdd"]), "", r"'Matmul\nAdd' is unknown"),
    "endless key": (changed("k" * 100_000, {}), "kkk", f"unknown key '{'k' * 57}...'"),
    "endless type": (changed(f"op_type.{'T' * 100_000}", {}), "", f"operator type '{'T' * 57}...' is unknown"),
    "no sections": ("{}", "", f"none of {SECTIONS}"),
    "no model_output": (changed("model_output", None), "", "got no 'model_output'. Add \"model_output\": {}."),
    "misspelt section": (changed("op_types", {}), "op_types", "unknown key 'op_types'"),
    "unknown section": (changed("quantizer", {}), "quantizer", "unknown key 'quantizer'"),
    "section is a list": (changed("op_type", []), "op_type", "expected an object; got a list, []"),
    "supergroups is an object": (changed("supergroups", {}), "supergroups", "expected a list; got an object, {}"),
    "defaults is null": ('{"defaults": null}', "defaults", "expected an object; got null"),
    "boolean": (changed("model_input.is_input_quantized", True), "model_input.is_input_quantized", BOOLEAN),
    "number": (changed("defaults.ops.is_symmetric", 1), "defaults.ops.is_symmetric", f"{BOOLEAN}; got a number, 1"),
    "lower case": (
        changed("op_type.Conv.is_output_quantized", "true"),
        "op_type.Conv.is_output_quantized",
        f'{BOOLEAN}; got a string, "true". Write "True", with quotes.',
    ),
    "list as boolean": (changed("defaults.strict_symmetric", ["True"]), "defaults.strict_symmetric", BOOLEAN),
    "null as boolean": ('{"model_input": {"is_input_quantized": null}}', "model_input.is_input_quantized", BOOLEAN),
    "misspelt setting": (
        changed("op_type.Conv.is_output_quantised", "True"),
        "op_type.Conv.is_output_quantised",
        "Did you mean 'is_output_quantized'? Accepted: encoding_constraints, is_input_quantized",
    ),
    "setting of another section": (
        changed("model_output.is_input_quantized", "True"),
        "model_output.is_input_quantized",
        "Accepted: is_output_quantized.",
    ),
    "misspelt type": (
        changed("op_type.Cnov", {}),
        "",
        "op_type.Cnov: operator type 'Cnov' is unknown (bad.json). Did you",
    ),
    "torch's name for a type": (
        changed("op_type.Conv2d", {}),
        "",
        "op_type.Conv2d: operator type 'Conv2d' is unknown (bad.json). Did you mean 'Conv'?",
    ),
    "misspelt type in a supergroup": (
        changed("supergroups.0.op_list", ["Conv", "ReLU"]),
        "",
        "supergroups[0].op_list[1]: operator type 'ReLU' is unknown (bad.json). Did you mean",
    ),
    "misspelt parameter": (changed("params.weigth", {}), "", "params.weigth: parameter 'weigth' is unknown (bad.json)"),
    "misspelt parameter of a type": (
        changed("op_type.Conv.params", {"baias": {}}),
        "",
        "op_type.Conv.params.baias: parameter 'baias' is unknown (bad.json). Did you mean 'bias'?",
    ),
    "parameter is a string": (
        changed("params.bias", "False"),
        "params.bias",
        'expected an object; got a string, "False"',
    ),
    "supergroup of one": (
        changed("supergroups.0.op_list", ["Conv"]),
        "supergroups[0]",
        "expected at least 2 operator types; got Conv",
    ),
    "supergroup of none": (changed("supergroups.0.op_list", []), "supergroups[0]", "got none"),
    "supergroup without list": (changed("supergroups.0.op_list", None), "supergroups[0]", "key 'op_list' is missing"),
    "supergroup is a list": (changed("supergroups.0", ["Conv", "Relu"]), "supergroups[0]", "expected an object"),
    "type is a number": (
        changed("supergroups.0.op_list", ["Conv", 3]),
        "supergroups[0].op_list[1]",
        "expected a string",
    ),
    "unknown pass": (
        changed("supergroup_pass_list", ["MatMulAdd"]),
        "",
        "supergroup_pass_list[0]: 'MatMulAdd' is unknown (bad.json). Did you mean 'MatmulAdd'?",
    ),
    "min above max": (changed(CONSTRAINTS, {"min": 1.0, "max": -1.0}), CONSTRAINTS, "expected min < max; got [1, -1]"),
    "min is max": (changed(CONSTRAINTS, {"min": 0, "max": 0}), CONSTRAINTS, "expected min < max; got [0, 0]"),
    "max above float32": (
        changed(CONSTRAINTS, {"min": 0, "max": 1e39}),
        CONSTRAINTS,
        "expected a finite number of at most 1e+38; got 1e+39",
    ),
    "min below float32": (changed(CONSTRAINTS, {"min": -1e39}), CONSTRAINTS, "at most 1e+38; got -1e+39"),
    "range above 0": (
        changed(CONSTRAINTS, {"min": 1, "max": 6}),
        CONSTRAINTS,
        "expected a range that holds 0, as every grid does; got [1, 6]",
    ),
    "range below 0": (changed(CONSTRAINTS, {"min": -6, "max": -1}), CONSTRAINTS, "holds 0, as every grid does; got"),
    "min above 0": (changed(CONSTRAINTS, {"min": 5}), CONSTRAINTS, "holds 0, as every grid does; got [5, free]"),
    "no min": (changed(CONSTRAINTS, {"max": 6.0}), CONSTRAINTS, "key 'min' is missing"),
    "min is a string": (changed(CONSTRAINTS, {"min": "0"}), f"{CONSTRAINTS}.min", "expected a finite number"),
    "min is too large": (changed(CONSTRAINTS, {"min": "X"}).replace('"X"', "-1e999"), f"{CONSTRAINTS}.min", "finite"),
    "min is a huge integer": (
        changed(CONSTRAINTS, {"min": -(10**400)}),
        f"{CONSTRAINTS}.min",
        "expected a finite number",
    ),
    "min is a boolean": (changed(CONSTRAINTS, {"min": False}), f"{CONSTRAINTS}.min", "expected a finite number"),
    "bitwidth": (
        changed("defaults.supported_kernels", [{"activation": {"bitwidth": 7}}]),
        "defaults.supported_kernels[0].activation.bitwidth",
        "expected 4 or 8 or 16 or 32; got a number, 7",
    ),
    "bitwidth of float": (
        changed("defaults.supported_kernels", [{"activation": {"bitwidth": 8, "dtype": "float"}}]),
        "defaults.supported_kernels[0].activation",
        "expected 16 or 32; got 8",
    ),
    "dtype": (
        changed("defaults.supported_kernels", [{"activation": {"bitwidth": 8, "dtype": "uint8"}}]),
        "defaults.supported_kernels[0].activation.dtype",
        'expected "int" or "float"; got a string, "uint8"',
    ),
    "kernel without activation": (
        changed("op_type.Conv.supported_kernels", [{"param": {"bitwidth": 8}}]),
        "op_type.Conv.supported_kernels[0]",
        "key 'activation' is missing",
    ),
    "hw_version is a number": (
        changed("defaults.hw_version", 73),
        "defaults.hw_version",
        "expected a string; got a number",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_gives_one_error_that_names_file_and_path(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, path, said = MALFORMED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_pipeline("bad.json")
    message = str(caught.value)
    assert "bad.json" in caught.value.place
    assert (f"(bad.json: {path}" if path else "(bad.json)") in message
    assert said in message
    assert "\n" not in message and len(message) < 1000


SAID_IN_TOML = {
    "op_type.Relu.encoding_constraints = { min = 0.0, max = inf }": "encoding_constraints); expected a finite number",
    "op_type.Relu.encoding_constraints = { min = nan }": "encoding_constraints); expected a finite number",
    "op_type.Relu.encoding_constraints = { min = 0, max = 1e39 }": "encoding_constraints); expected a finite number",
    "op_type.Relu.encoding_constraints = { min = 5 }": "encoding_constraints); expected a range that holds 0",
    'rules = [{ op = "Relu", output = { fixed = [0.0, inf] } }]': "rules[0].output); expected a finite number",
    'rules = [{ op = "Relu", output = { fixed = [0.0, 1e39] } }]': "rules[0].output); expected a finite number",
    'rules = [{ op = "Relu", output = { fixed = [1, 2] } }]': "rules[0].output); expected a range that holds 0",
    'rules = [{ op = "Relu", output = { "fi\\nxed" = 1 } }]': r"unknown key 'fi\nxed'",
    f'rules = [{{ op = "Relu", output = {{ {"k" * 100_000} = 1 }} }}]': f"unknown key '{'k' * 57}...'",
    f'rules = [{{ op = "Relu", quantize = "{"k" * 100_000}" }}]': f"got the string '{'k' * 56}...",
}


@pytest.mark.parametrize("case", range(len(SAID_IN_TOML)))
def test_malformed_pass_in_toml_gives_one_short_error_that_names_its_place(case: int) -> None:
    text, said = list(SAID_IN_TOML.items())[case]
    with pytest.raises(ConfigError) as caught:
        parse_pipeline(f'[[prepare]]\npass = "apply-placement"\n{text}\n', "bad", place="bad.toml")
    message = str(caught.value)
    assert "bad.toml: prepare[0] apply-placement" in message and said in message
    assert "\n" not in message and len(message) < 1000


def test_good_file_loads(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(GOOD), encoding="utf-8")
    assert load_pipeline(tmp_path / "good.json").name == "good"


def test_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pipeline cannot be read \(.*none.json\); expected a JSON file"):
        load_pipeline(tmp_path / "none.json")


def test_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ConfigError, match=r"pipeline cannot be read \(.*binary.json\)"):
        load_pipeline(tmp_path / "binary.json")
