"""The shape of the project, read from its files: which way imports run, and who owns what."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from latent_rl.backends import OPS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "latent_rl"

# Rooms from the outside in: a room may import those further down, never one above or beside it.
LAYERS = (
    ("cli",),
    ("config", "demo"),
    ("train",),
    ("search",),
    ("eval", "data", "rewards"),
    ("decode",),
    ("models",),
    ("nn",),
    ("ops",),
    ("backends",),
    ("reference", "native", "kernels"),
    ("_C", "_version"),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# Rewards and data are plain functions and rows; trainers and evaluation sit on both.
BESIDE = {("eval", "data"), ("eval", "rewards"), ("rewards", "data"), ("config", "demo")}
# Data and rewards know models as types alone, so that they work without one.
TYPES_ONLY = {(room, target) for room in ("data", "rewards") for target in ("models", "decode")}
MAX_LINES = 450


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(room, line) of every import of latent_rl anywhere in a module, lazy ones included."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "latent_rl":
                names = [f"latent_rl.{alias.name}" for alias in node.names]
            else:
                names = [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "latent_rl" and len(parts) > 1:
                yield parts[1], node.lineno


def names_only_for_types(tree: ast.AST) -> set[int]:
    """Lines inside ``if TYPE_CHECKING:``, which never run."""
    return {
        inner.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
        if hasattr(inner, "lineno")
    }


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    tree = ast.parse(path.read_text())
    skipped = names_only_for_types(tree)
    for target, line in imported_rooms(tree):
        if target == "__version__" or target == room or line in skipped:
            continue
        assert target in LEVEL, f"{path}:{line} imports unknown room {target}"
        down = LEVEL[target] > LEVEL[room] or (room, target) in BESIDE
        assert down, f"{path}:{line}: {room} must not import {target}"
        allowed = (room, target) not in TYPES_ONLY
        assert allowed, f"{path}:{line}: {room} may import {target} for types only"


def test_every_room_has_a_layer() -> None:
    rooms = {room_of(path) for path in modules()} - {"__init__"}
    assert rooms <= set(LEVEL)


@pytest.mark.parametrize("op", OPS)
def test_an_op_owns_one_thing_in_every_room(op) -> None:
    for name in (
        f"latent_rl/reference/{op}.py",
        f"latent_rl/native/{op}.py",
        f"latent_rl/ops/{op}.py",
        f"tests/ops/test_{op}.py",
        f"benchmarks/ops/{op}.py",
        f"kernels/{op}/README.md",
    ):
        assert (ROOT / name).is_file(), f"{op} lacks {name}"
    assert f"`{op}`" in (ROOT / "docs/ops.md").read_text()


def test_kernels_is_no_package() -> None:
    # A top-level `kernels` package would shadow Hugging Face's.
    assert not list((ROOT / "kernels").rglob("__init__.py"))


@pytest.mark.parametrize("folder", ["latent_rl", "kernels", "benchmarks"])
def test_no_file_has_two_things_in_it(folder) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= MAX_LINES, f"{path} has {lines} lines"


def test_importing_the_package_is_light() -> None:
    import subprocess
    import sys

    script = "import sys, latent_rl; print(latent_rl.__version__, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert done.stdout.split()[1] == "False"
