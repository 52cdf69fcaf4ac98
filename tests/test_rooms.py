"""The house keeps its order: imports run downward between rooms, and nowhere in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "icl"

ROOMS = (
    *(
        "__main__",
        "__init__",
        "cli",
        "commands",
        "report",
        "execution",
        "estimation",
        "training",
        "figures",
        "analysis",
        "subjects",
    ),
    *("sampling", "tracking", "evals", "engine", "checkpoints", "config"),
    *("model", "baselines", "tasks", "streams", "devices", "native", "storage"),
)
"""From the top floor down: a room may import from those after it."""

MOST_AT_THE_TOP = 10


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            for alias in node.names:  # `from package import name` may name a module of it
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return {name for name in found if name in MODULES}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_imports_between_rooms_run_downward():
    floors = {room: floor for floor, room in enumerate(ROOMS)}
    assert {room_of(module) for module in MODULES} == set(ROOMS)
    upward = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in imports_of(path)
        if room_of(imported) != room_of(module) and floors[room_of(imported)] < floors[room_of(module)]
    ]
    assert upward == []


def test_no_import_runs_in_a_circle():
    TopologicalSorter({module: imports_of(path) - {module} for module, path in MODULES.items()}).prepare()


def test_the_top_level_holds_what_a_reader_meets_first():
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= MOST_AT_THE_TOP


def test_the_tests_mirror_the_package():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} >= rooms
