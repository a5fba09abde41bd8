"""A file imports only from lower floors, or from its own room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "tools": 8,
    "simipu3d.tools": 8,
    "simipu3d.study": 7,
    "simipu3d.probe": 7,
    "simipu3d.export": 7,
    "simipu3d.benchmark": 7,
    "simipu3d.engine": 6,
    "simipu3d.methods": 5,
    "simipu3d.heads": 5,
    "simipu3d.metrics.files": 5,
    "simipu3d.data": 4,
    "simipu3d.encoders": 4,
    "simipu3d.metrics": 4,
    "simipu3d.weights": 3,
    "simipu3d.matching": 3,
    "simipu3d.pictures": 3,
    "simipu3d.contracts": 2,
    "simipu3d.config": 1,
    "simipu3d.registry": 1,
    "simipu3d.moved_keys": 1,
    "simipu3d.compat": 1,
    "simipu3d.command_line": 1,
    "simipu3d.geometry": 1,
    "simipu3d.contrast": 1,
    "simipu3d.ops": 1,
    "simipu3d.errors": 0,
    "simipu3d": 0,
}
ROOT_FILES = {f"simipu3d.{name}" for name in ("config", "registry", "compat", "command_line", "moved_keys")}
"""One room: they stand in one folder."""
FILES = sorted(path for top in ("simipu3d", "ops", "tools") for path in (ROOT / top).rglob("*.py"))


def room_of(module: str) -> str:
    """The longest known room that a dotted module name lies in."""
    parts = module.split(".")
    while parts:
        name = ".".join(parts)
        if name in FLOORS:
            return name
        parts.pop()
    return ""


def module_of(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    name = ".".join(relative.parts).removesuffix(".__init__")
    return f"simipu3d.{name}" if name.startswith("ops") else name


def imported_modules(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room they reach"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(module: str, tree: ast.AST) -> list[str]:
    own = room_of(module)
    wrong = []
    for name in sorted(imported_modules(tree)):
        top = name.split(".")[0]
        if top in ("ops", "configs"):
            wrong.append(f"{module} imports {name}; it is called simipu3d.{name}")
        if top not in ("simipu3d", "tools"):
            continue
        other = room_of(name)
        if {own, other} <= ROOT_FILES:
            continue
        if other != own and FLOORS[other] >= FLOORS[own]:
            wrong.append(f"{module} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]})")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    assert violations(module_of(path), ast.parse(path.read_text())) == []


def test_every_room_is_known():
    rooms = {path.name for path in (ROOT / "simipu3d").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms <= {name.removeprefix("simipu3d.") for name in FLOORS}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("simipu3d.methods.simipu", "import simipu3d.engine.run"),
        ("simipu3d.matching.projection", "from simipu3d.data import build_reader"),
        ("simipu3d.ops.scatter", "from simipu3d.contracts.batch import Batch"),
        ("simipu3d.encoders.pointnet2", "import ops.ball_query"),
    ],
)
def test_an_import_upwards_is_found(module, source):
    assert violations(module, ast.parse(source))
