"""What the package promises about itself: four dependencies, no pickle but in one command, no network, no machine's paths."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "nano_adrpo").rglob("*.py"))
ALLOWED = {"torch", "safetensors", "tokenizers", "numpy", "nano_adrpo"} | sys.stdlib_module_names
FORBIDDEN = {"pickle", "marshal", "shelve", "socket", "urllib", "http", "ftplib", "ssl"}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module.split(".")[0]


def test_the_package_imports_four_libraries_and_the_standard_one():
    assert len(SOURCES) > 10
    used = {name: file for file in SOURCES for name in imports(file)}
    assert not {name: str(file) for name, file in used.items() if name not in ALLOWED or name in FORBIDDEN}
    assert {"torch", "safetensors", "tokenizers"} <= used.keys()


def test_nothing_unpickles_or_evaluates_text():
    readers = []
    for file in [*SOURCES, *ROOT.glob("train_*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"torch.save", "eval", "exec", "compile", "__import__"}, f"{file}: {name}"
                if name == "torch.load":
                    assert "weights_only=True" in map(ast.unparse, node.keywords), f"{file}: torch.load of any pickle"
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.serialization"}:
                readers.append((file.name, ast.unparse(node)))  # called, or kept under another name
            elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "torch":
                assert not {"load", "save", "serialization"} & {name.name for name in node.names}, file
    # `python -m nano_adrpo.weights convert` is the one command that reads a pickle.
    assert readers == [("weights.py", "torch.load")]


def test_only_plots_names_a_library_beyond_the_four():
    # plots.py finds matplotlib by name, because it is optional; nobody else may.
    assert [file.name for file in SOURCES if "import_module(" in file.read_text(encoding="utf-8")] == ["plots.py"]


def test_pins_stand_in_one_place():
    pinned = re.compile(r"torch\s*==")
    files = [
        ROOT / ".ci" / "run",
        *ROOT.glob("*.*"),
        *(f for part in ("nano_adrpo", "tests", "bench") for f in (ROOT / part).rglob("*.*")),
    ]
    files = [f for f in files if f.suffix in {".py", ".toml", ".txt", ".md", ""} and f.is_file() and f != Path(__file__)]
    holders = [f for f in files if pinned.search(f.read_text(encoding="utf-8"))]
    assert [f.name for f in holders] == ["constraints.txt"]


def test_the_readmes_file_tree_is_true():
    folder, seen = ROOT, set()
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("```text\nnano_adrpo/")[2].partition("```")[0]
    for line in f"nano_adrpo/{tree}".splitlines():
        indent, name, *rest = len(line) - len(line.lstrip()), *line.split()
        folder = ROOT if indent == 0 else ROOT / "nano_adrpo" if indent == 2 else folder
        if name.endswith("/"):
            folder = folder / name if indent else ROOT / name
            assert folder.is_dir(), name
        elif name.endswith(".py"):
            file = folder / name
            count = len(file.read_text(encoding="utf-8").splitlines())
            assert abs(count - int(rest[0])) <= 20, f"README says {rest[0]} lines of {file}, which has {count}"
            seen.add(file)
    assert {file for file in [*SOURCES, *ROOT.glob("train_*.py")] if file.name != "__init__.py"} <= seen
