"""What the subcommands do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TextIO

from fxquant.calibration import calibrate
from fxquant.capture import capture
from fxquant.cli.loading import first_batch, load_batches, load_model, require_model_name
from fxquant.demo.run import DemoResult, run_demo
from fxquant.errors import FxquantError
from fxquant.files import made_folder, write_text
from fxquant.graph.batches import Batch
from fxquant.graph.pipeline import Pipeline, load_pipeline
from fxquant.graph.program import Program
from fxquant.graph.storage import load_program
from fxquant.lowering.lower import check_opset
from fxquant.numerics.runtime import Level, RuntimeOptions
from fxquant.parity import check_parity
from fxquant.reconstruction.unfinished import discard
from fxquant.sim import file_names, write_files

UNFINISHED = "unfinished"  # in the folder of results: what passes have learned so far, until all of it is written


def demo(options: argparse.Namespace) -> int:
    """`fxquant demo`: 0 if the integer model agrees in every code that is certified, and elsewhere within one step."""
    folder = Path(options.out)
    result = run_demo(folder, epochs=options.epochs, seed=options.seed, config=options.config)
    print(result.parity)
    print(_demo_summary(result))
    print(f"\nwrote {folder}: model.onnx, model.fxq, float.onnx, graph.svg, passes/, report.json")
    return 0 if result.parity.worst_local_steps <= 1 and not result.parity.fault else 1


def _demo_summary(result: DemoResult) -> str:
    latencies = ", ".join(f"{ratio:.2f} at batch {size}" for size, ratio in result.latency_ratios.items())
    rows = [
        ("accuracy, float (torch)", f"{result.float_accuracy:.4f}"),
        ("accuracy, simulated (torch)", f"{result.simulated_accuracy:.4f}"),
        ("accuracy, int8 (onnxruntime)", f"{result.int8_accuracy:.4f}"),
        (
            "size, int8 / float",
            f"{result.int8_bytes} / {result.float_bytes} bytes = {result.int8_bytes / result.float_bytes:.2f}",
        ),
        ("latency, int8 / float", f"{latencies} (1 thread, medians)"),
    ]
    return "\n" + "\n".join(f"{name:30} {value}" for name, value in rows)


def show(options: argparse.Namespace) -> int:
    """`fxquant show`."""
    if options.json is not None and not options.coverage:
        raise FxquantError("show", expected="--json with --coverage", got="--json alone", remedy="Add --coverage.")
    program = _program(options.program, options)
    if options.config and not options.program.endswith(".fxq"):
        trace = load_pipeline(options.config).prepare(program)
        if options.passes:
            print(trace)
    elif options.passes or options.config:
        raise FxquantError(
            "show", expected="a model with --config", got="a saved program", remedy="Leave --config and --passes out."
        )
    if options.coverage:
        _print_coverage(program, options)
    else:
        print(program, end="")
    _print_notes(program, sys.stderr if options.json == "-" else sys.stdout)
    if options.draw:
        program.draw(options.draw)
    return 0


def _print_notes(program: Program, file: TextIO) -> None:
    for note in program.notes:
        print(f"note: {note}", file=file)


def _print_coverage(program: Program, options: argparse.Namespace) -> None:
    report = program.coverage()
    text = json.dumps(report.to_dict(), indent=2)
    print(text if options.json == "-" else report)
    if options.json not in (None, "-"):
        write_text(Path(options.json), f"{text}\n")


def _program(name: str, options: argparse.Namespace) -> Program:
    """A saved program, or the capture of a model on the first batch of --data."""
    if name.endswith(".fxq"):
        return load_program(name)
    require_model_name(name, "a .fxq file, ")
    if options.data is None:
        raise FxquantError(f"model '{name}'", expected="--data, whose first batch are the example inputs", got="none")
    batches = load_batches(options.data, options.batch_size)
    return capture(load_model(name), first_batch(batches, options.data))


def diff(options: argparse.Namespace) -> int:
    """`fxquant diff`."""
    if options.after is not None:
        print(load_program(options.before).diff(load_program(options.after)), end="")
        return 0
    if options.before.endswith(".fxq"):
        raise FxquantError("diff", expected="two .fxq files, or a model", got="one .fxq file")
    program = _program(options.before, options)
    before = program.copy()
    trace = load_pipeline(options.config).prepare(program)
    if options.pass_name is None:
        print(before.diff(program), end="")
        return 0
    print(trace.diff(options.pass_name), end="")
    return 0


def quantize(options: argparse.Namespace) -> int:
    """`fxquant quantize`."""
    folder = Path(options.out)
    check_opset(options.opset)
    pipeline = load_pipeline(options.config)
    with made_folder(folder, file_names("model")):
        program = _quantized(pipeline, folder, options)
    _print_notes(program, sys.stdout)
    print(f"wrote {', '.join(str(folder / name) for name in file_names('model'))}")
    print(f"check it: fxquant parity {folder / 'model.onnx'} --data {options.data}")
    return 0


def _quantized(pipeline: Pipeline, folder: Path, options: argparse.Namespace) -> Program:
    """The finalized program, whose files are written."""
    first, batches = _peek(load_batches(options.data, options.batch_size), options.data)
    measures = any(item.needs_data for item in (*pipeline.prepare_passes, *pipeline.optimize_passes))
    if measures:  # several passes over the same batches
        batches = list(islice(batches, options.max_batches))
    program = capture(load_model(options.model), first)
    print(pipeline.prepare(program, batches=batches if measures else None))
    calibrate(program, batches, max_batches=options.max_batches)
    if len(pipeline.optimize_passes):
        print(pipeline.optimize(program, batches if measures else None, folder=folder / UNFINISHED))
    pipeline.finalize(program)
    write_files(program, folder, opset=options.opset, encodings_version=options.encodings)
    discard(folder / UNFINISHED)
    return program


def _peek(batches: Iterable[Batch], name: str) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and all batches: an iterator is not robbed of its first one."""
    iterator = iter(batches)
    if iterator is not batches:
        return first_batch(batches, name), batches
    first = first_batch(iterator, name)

    def again() -> Iterable[Batch]:
        yield first
        yield from iterator

    return first, again()


def _program_path(options: argparse.Namespace, onnx_path: Path) -> Path:
    """The program to compare with: given once, by place or by --program, else the one beside the ONNX file."""
    if options.program_place and options.program and options.program_place != options.program:
        got = f"{options.program_place} and --program {options.program}"
        raise FxquantError("parity", expected="one program", got=got)
    if not onnx_path.is_file():
        remedy = "Check the path and the folder you are in."
        raise FxquantError(f"parity: ONNX file '{onnx_path}' does not exist", remedy=remedy)
    named = options.program_place or options.program
    path = Path(named) if named else onnx_path.with_suffix(".fxq")
    if path.is_file():
        return path
    if named:
        remedy = "Check the path and the folder you are in."
        raise FxquantError(f"parity: program '{path}' does not exist", remedy=remedy)
    raise _no_program_beside(onnx_path)


def _no_program_beside(onnx_path: Path) -> FxquantError:
    expected = f"the program '{onnx_path.with_suffix('.fxq').name}', which it was lowered from"
    integer = onnx_path.with_name(f"{onnx_path.name.removesuffix('_float.onnx')}.onnx")
    if not onnx_path.name.endswith("_float.onnx") or not integer.with_suffix(".fxq").is_file():
        remedy = "Name it after the ONNX file."
        return FxquantError(f"parity: no program lies beside '{onnx_path}'", expected=expected, remedy=remedy)
    return FxquantError(
        f"parity: no program lies beside '{onnx_path}'",
        expected=expected,
        got="the clean float model, for runtimes with a quantizer of their own",
        remedy=f"Give the integer model: {integer}.",
    )


def parity(options: argparse.Namespace) -> int:
    """`fxquant parity`: 0 unless a certified node or stored constant differs, or another node beyond the tolerance."""
    onnx_path = Path(options.onnx)
    program_path = _program_path(options, onnx_path)
    batches: Iterable[Batch] = load_batches(options.data, options.batch_size)
    if options.max_batches is not None:
        batches = list(islice(batches, options.max_batches))
    runtime = RuntimeOptions(level=Level(options.level), threads=options.threads)
    program = load_program(program_path)
    report = check_parity(program, onnx_path, batches, options=runtime, simulation=options.simulation)
    text = json.dumps(report.to_dict(), indent=2)
    if options.json == "-":
        sys.stdout.write(text + "\n")
    else:
        print(report)
    if options.json and options.json != "-":
        write_text(Path(options.json), text)
    return 0 if report.worst_local_steps <= options.tolerance and not report.fault else 1
