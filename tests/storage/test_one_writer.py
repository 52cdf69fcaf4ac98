"""Files appear whole: what the library and its benchmarks write goes through `icl.storage.files`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRITING = {"write_text", "write_bytes", "to_csv", "to_json", "tofile", "savez", "savetxt"}
OF_MODULES = {("os", "replace"), ("shutil", "copy"), ("shutil", "copyfile")}
ELSEWHERE = ("sys.stdout", "'/proc/")  # what is no file of anybody's
MODULES = sorted(
    path.relative_to(ROOT)
    for room in ("icl", "benchmarks")
    for path in (ROOT / room).rglob("*.py")
    if (ROOT / "icl" / "storage") not in path.parents
)


def writes(call: ast.Call) -> bool:
    """Whether a call writes a file under its own name, or moves one there."""
    function, text = call.func, ast.unparse(call)
    if any(place in text for place in ELSEWHERE) or (".to_csv(" in text and not call.args):
        return False
    if isinstance(function, ast.Attribute):
        owner = function.value.id if isinstance(function.value, ast.Name) else ""
        if function.attr in WRITING or (owner, function.attr) in OF_MODULES:
            return True
        if function.attr != "open" or owner in ("os", "Image", "gzip"):
            return False
        modes = call.args[:1]
    elif isinstance(function, ast.Name) and function.id == "open":
        modes = call.args[1:2]
    else:
        return False
    modes += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    return any(set("wax+") & set(str(getattr(mode, "value", "w"))) for mode in modes)


@pytest.mark.parametrize("call", ["p.write_text(t)", "open(p, 'w')", "p.open('ab')", "os.replace(a, b)", "t.to_csv(p)"])
def test_what_counts_as_writing(call):
    (found,) = (node for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Call))
    assert writes(found)


@pytest.mark.parametrize(
    "call", ["t.to_csv(sys.stdout)", "t.to_csv(index=False)", "Path('/proc/self/x').write_text(t)"]
)
def test_what_does_not(call):
    (statement,) = ast.parse(call).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Call)
    assert not writes(statement.value)


def test_no_module_writes_files_beside_the_atomic_writer():
    found = [
        f"{path}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Call) and writes(node)
    ]
    assert found == []
