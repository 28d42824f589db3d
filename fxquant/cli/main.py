"""The command line: demo, show, diff, quantize, parity, analyze, autoquant, tune."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version

from fxquant.cli import analyze, auto_quant, commands, tune
from fxquant.cli.parsing import MODEL_HELP, Subparsers, add_command, add_config, add_data, add_output, named, positive
from fxquant.errors import FxquantError
from fxquant.numerics.runtime import Level
from fxquant.parity.simulation import SIMULATIONS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 1 when a check fails, 2 on an error (one line on standard error)."""
    options = make_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except FxquantError as err:
        return _failed(f"{err}{_advice(err, options)}")
    except BrokenPipeError:
        _abandon_output()
        return 0
    except OSError as err:
        if err.filename is None:  # files are named, or their error is an FxquantError already
            _abandon_output()
        place = f"'{err.filename}' cannot be read or written" if err.filename else "standard output cannot be written"
        return _failed(f"{place}; got {err.strerror or err}")


def _failed(message: str) -> int:
    print(f"fxquant: {message}", file=sys.stderr)
    return 2


def _advice(err: FxquantError, options: argparse.Namespace) -> str:
    """What the command line can do about a batch of another size than the model's: --batch-size."""
    if not hasattr(options, "batch_size") or not any(mark in err.got for mark in ("(axis 0)", "shape[0]")):
        return ""
    return " If the model's batch is fixed, give that size as --batch-size, and as many samples as fill whole batches."


def _abandon_output() -> None:
    """Send what is left to nowhere, so that Python does not stumble over it again when it ends."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="fxquant",
        description="Quantize PyTorch models to integer ONNX models, and check that what was simulated is what runs.",
    )
    parser.add_argument("--version", action="version", version=f"fxquant {version('fxquant')}")
    commands_ = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands_)
    _add_show(commands_)
    _add_diff(commands_)
    _add_quantize(commands_)
    _add_parity(commands_)
    analyze.add(commands_)
    auto_quant.add(commands_)
    tune.add(commands_)
    return parser


def _add_demo(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = add_command(
        subparsers,
        "demo",
        "train a small net on handwritten digits, quantize it, run it in onnxruntime and compare",
        "  fxquant demo\n  fxquant demo --out /tmp/demo --epochs 20 --seed 3",
    )
    parser.add_argument(
        "--out",
        default="fxquant-demo",
        help="folder for model.onnx, graph.svg, passes/ and report.json (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=positive, default=5, help="training epochs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, split and order (default: %(default)s)")
    add_config(parser)
    parser.set_defaults(run=commands.demo)


def _add_show(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = add_command(
        subparsers,
        "show",
        "print a program's graph, or a model's captured and prepared graph; or what is quantized and why",
        "  fxquant show out/model.fxq\n"
        "  fxquant show out/model.fxq --coverage --json coverage.json\n"
        "  fxquant show mypackage.models:make_net --data images.npy\n"
        "  fxquant show model.py:make_net --data images.npy --config int8_per_channel --draw graph.svg\n"
        "  fxquant show model.py:make_net --data images.npy --config my_rules.toml --coverage",
    )
    parser.add_argument("program", help=f"a .fxq file, or a model: {MODEL_HELP}")
    add_data(parser, required=False)
    parser.add_argument("--config", type=named, help="prepare the model with this pipeline before printing")
    parser.add_argument(
        "--passes", action="store_true", help="print what each prepare pass did and declined (needs --config)"
    )
    parser.add_argument(
        "--coverage",
        action="store_true",
        help="instead of the graph, print each value with its spec, its encoding and the rule that decided it, "
        "or the reason why it stays in float",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the coverage to FILE; '-' prints JSON alone")
    parser.add_argument("--draw", metavar="FILE", help="also draw the graph to FILE (.svg or .dot)")
    parser.set_defaults(run=commands.show)


def _add_diff(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = add_command(
        subparsers,
        "diff",
        "print the difference of two programs' graphs, or what one pass changed",
        "  fxquant diff before.fxq after.fxq\n"
        "  fxquant diff mypackage.models:make_net --data images.npy --config int8_per_channel --pass fold-batch-norm",
    )
    parser.add_argument("before", help=f"a .fxq file, or a model: {MODEL_HELP}")
    parser.add_argument("after", nargs="?", help="a .fxq file")
    add_data(parser, required=False)
    parser.add_argument(
        "--config", type=named, default="int8_per_channel", help="pipeline whose pass is shown (default: %(default)s)"
    )
    parser.add_argument("--pass", dest="pass_name", metavar="PASS", help="name of the pass; without it all of prepare")
    parser.set_defaults(run=commands.diff)


def _add_quantize(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = add_command(
        subparsers,
        "quantize",
        "capture, calibrate and lower a model to an integer ONNX model",
        "  fxquant quantize mypackage.models:make_net --data images.npy --out out\n"
        "  fxquant quantize ./model.py:make_net --data images/ --config int8_per_tensor --max-batches 32 --out out\n"
        "  fxquant quantize net.pt2 --data mypackage.data:batches --config my_pipeline.toml --out out",
    )
    parser.add_argument("model", help=MODEL_HELP)
    add_data(parser, required=True)
    add_config(parser)
    add_output(
        parser,
        "folder for model.onnx and model.fxq, and for runtimes with a quantizer of their own model_float.onnx, "
        "model.encodings and model_state_dict.pth",
    )
    parser.set_defaults(run=commands.quantize)


def _add_parity(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = add_command(
        subparsers,
        "parity",
        "run model.onnx in onnxruntime and compare its integers with the program's simulation",
        "  fxquant parity out/model.onnx --data images.npy\n"
        "  fxquant parity out/model.onnx out/model.fxq --data images.npy --level EXTENDED --json report.json\n"
        "  fxquant parity out/model.onnx --data images.npy --simulation float --threads 2",
    )
    parser.add_argument("onnx", help="the ONNX file that fxquant wrote")
    parser.add_argument(
        "program_place",
        nargs="?",
        metavar="program",
        help="the program it was lowered from (default: the .fxq beside it)",
    )
    parser.add_argument("--program", metavar="FILE", help="the same")
    add_data(parser, required=True)
    parser.add_argument(
        "--simulation",
        default="exact",
        choices=tuple(SIMULATIONS),
        help="what is compared with onnxruntime; exact and integer promise every code of certified nodes "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--level",
        type=str.upper,
        default=Level.ALL.value,
        choices=tuple(level.value for level in Level),
        help="onnxruntime's graph optimisation (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive, default=1, help="onnxruntime's threads (default: %(default)s)")
    parser.add_argument(
        "--tolerance",
        type=int,
        default=1,
        metavar="STEPS",
        help="largest local difference that passes where no code is promised (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the report to FILE; '-' prints JSON alone")
    parser.set_defaults(run=commands.parity)
