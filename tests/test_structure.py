"""The layers, the package list and the packaged pipelines are as ARCHITECTURE.md and setup.cfg say."""

from __future__ import annotations

import ast
import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lower layers first; modules of one row may import each other.
LAYERS = (
    (
        "fxquant.errors",
        "fxquant.files",
        "fxquant.limits",
        "fxquant.progress",
        "fxquant.range_methods",
        "fxquant.schedule",
        "fxquant.spec",
    ),
    ("fxquant.numerics",),
    ("fxquant.ops",),
    ("fxquant.graph",),
    ("fxquant.capture", "fxquant.calibration", "fxquant.placement"),
    ("fxquant.training", "fxquant.reconstruction"),
    ("fxquant.lowering",),
    ("fxquant.encodings", "fxquant.simulation"),
    ("fxquant.parity",),
    ("fxquant.evaluation", "fxquant.trials"),
    ("fxquant.sim", "fxquant.analysis"),
    ("fxquant.train", "fxquant.tuning", "fxquant.demo", "fxquant.cli", "fxquant.__main__", "fxquant"),
)


def layer_of(module: str) -> int:
    """Row of LAYERS that a module belongs to, by its longest listed prefix."""
    best = max(
        ((len(prefix), row) for row, prefixes in enumerate(LAYERS) for prefix in prefixes if covers(prefix, module)),
        default=None,
    )
    assert best is not None, f"{module} is in no layer"
    return best[1]


def covers(prefix: str, module: str) -> bool:
    """Whether `module` is `prefix` or lies in it; the bare package is covered by name only."""
    return module == prefix or (prefix != "fxquant" and module.startswith(prefix + "."))


def imports_of(source: str) -> list[str]:
    """Absolute fxquant modules that a source file imports."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.append(node.module)
            if node.module == "fxquant":
                found[-1:] = [f"fxquant.{alias.name}" for alias in node.names]
    return [name for name in found if name == "fxquant" or name.startswith("fxquant.")]


def violations(module: str, source: str) -> list[str]:
    """What a module imports from above its own layer, or from the passes."""
    found = []
    for name in imports_of(source):
        if name.startswith("fxquant.passes") or layer_of(name) > layer_of(module):
            found.append(f"{module} imports {name}")
    return found


def engine_files() -> list[Path]:
    return sorted((ROOT / "fxquant").rglob("*.py"))


@pytest.mark.parametrize("path", engine_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert violations(module, path.read_text(encoding="utf-8")) == []


def test_import_check_finds_a_planted_fault() -> None:
    assert violations("fxquant.ops.base", "from fxquant.lowering.writer import Writer") != []
    assert violations("fxquant.graph.program", "import fxquant.passes") != []
    assert violations("fxquant.lowering.writer", "from fxquant.ops.base import OpDef") == []


def test_passes_import_siblings_relatively() -> None:
    for path in (ROOT / "passes").glob("*.py"):
        assert not [
            name for name in imports_of(path.read_text(encoding="utf-8")) if name.startswith("fxquant.passes")
        ], path


def test_package_list_matches_the_tree() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    listed = set(parser["options"]["packages"].split())
    folders = {path.parent for path in engine_files() if path.name == "__init__.py"}
    tree = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"fxquant.passes", "fxquant.configs"}
    assert listed == tree
