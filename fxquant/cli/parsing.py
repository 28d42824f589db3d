"""What subcommands share: their frame, and the options for models and data."""

from __future__ import annotations

import argparse

from fxquant.encodings import VERSIONS

MODEL_HELP = "package.module:callable, file.py:callable (an nn.Module, or what returns one), or an exported .pt2 file"
DATA_HELP = (
    "a .npy or .npz file (samples on axis 0; .npz keys are the model's keywords), a folder of them, "
    "or a callable that gives batches"
)

Subparsers = argparse._SubParsersAction  # argparse names no public type for what add_subparsers returns


def add_command(
    subparsers: Subparsers[argparse.ArgumentParser], name: str, text: str, examples: str
) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_data(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--data", required=required, help=DATA_HELP)
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="samples in a batch cut from files (default: %(default)s)"
    )
    parser.add_argument(
        "--max-batches",
        type=positive,
        help="use no more than so many batches; where they are read more than once, they are held in memory",
    )


def add_config(parser: argparse.ArgumentParser, purpose: str = "") -> None:
    parser.add_argument(
        "--config",
        type=named,
        default="int8_per_channel",
        help=f"pipeline{purpose}: packaged name or path (default: %(default)s)",
    )


def add_output(parser: argparse.ArgumentParser, text: str) -> None:
    """--out, whose help is `text`, and what decides about the files in it."""
    parser.add_argument("--out", required=True, metavar="FOLDER", help=text)
    parser.add_argument("--opset", type=positive, default=21, help="ONNX opset, 13 or later (default: %(default)s)")
    parser.add_argument(
        "--encodings",
        default="1.0.0",
        choices=VERSIONS,
        metavar="VERSION",
        help=f"version of model.encodings: {', '.join(VERSIONS)} (default: %(default)s)",
    )


def named(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must be the name of a packaged pipeline or a path, is empty")
    return text


def positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {value}")
    return value


def not_negative(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, is {value}")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, is '{text}'") from None
