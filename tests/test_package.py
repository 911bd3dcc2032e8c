"""What the package promises about itself: its libraries, its rooms, no pickle but in one command, no network, a whole wheel."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "nano_adrpo").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("train_*.py"))
ALLOWED = {"torch", "safetensors", "tokenizers", "numpy", "nano_adrpo"} | sys.stdlib_module_names
# Libraries beyond these, each imported by one file: torch brings jinja2, an extra brings math_verify.
EXTRAS = {"template.py": {"jinja2"}, "expressions.py": {"math_verify"}}
FORBIDDEN = {"pickle", "marshal", "shelve", "socket", "urllib", "http", "ftplib", "ssl"}

# The rooms, from the bottom of the house to its top. A file imports rooms below its own, and its own.
FLOORS = (
    ("errors",),
    ("adrpo", "rivals", "ode", "metrics"),
    ("files",),
    ("lora",),
    ("models",),
    ("rewards", "language", "text_to_image"),
    ("evaluation", "training"),
    ("demo", "when"),
    ("sample", "evaluate", "evaluate_mmau", "compare", "train_flow", "train_grpo"),
)
# The one exception: a decoder has `generate` for a method. The sampler knows no model.
EXCEPTIONS = {("nano_adrpo/models/decoder.py", "nano_adrpo.language.sampling")}


def imports(file):
    """The modules that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def floor(room):
    return next((index for index, rooms in enumerate(FLOORS) if room in rooms), None)


def test_the_package_imports_four_libraries_and_the_standard_one():
    assert len(SOURCES) > 30
    used = {name.split(".")[0]: file for file in SOURCES for name in imports(file)}
    allowed = {file: ALLOWED | EXTRAS.get(file.name, set()) for file in SOURCES}
    assert not {name: str(file) for name, file in used.items() if name not in allowed[file] or name in FORBIDDEN}
    assert {"torch", "safetensors", "tokenizers", "numpy"} <= used.keys()


def test_arrows_point_one_way():
    wrong, seen = [], set()
    for file in [*SOURCES, *SCRIPTS]:
        path = file.relative_to(ROOT)
        room = path.parts[1].removesuffix(".py") if path.parts[0] == "nano_adrpo" else path.stem
        if room == "__init__":
            continue
        assert floor(room) is not None, f"{path} is in no room of FLOORS"
        seen.add(room)
        for name in imports(file):
            if name.split(".")[0] != "nano_adrpo":
                continue
            other = name.split(".")[1]
            allowed = any(str(path) == who and name.startswith(what) for who, what in EXCEPTIONS)
            same_floor = floor(other) == floor(room) and (other == room or floor(room) not in (6, 8))
            if not (floor(other) < floor(room) or same_floor or allowed):
                wrong.append(f"{path} imports {name}")
    assert not wrong
    assert seen == {room for rooms in FLOORS for room in rooms}


def test_nothing_unpickles_or_evaluates_text():
    readers = []
    for file in [*SOURCES, *SCRIPTS]:
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
    # `python -m nano_adrpo.files.convert` is the one command that reads a pickle.
    assert readers == [("convert.py", "torch.load")]


def test_only_plots_names_a_library_beyond_the_four():
    # plots.py finds matplotlib by name, because it is optional; nobody else may.
    assert [file.name for file in SOURCES if "import_module(" in file.read_text(encoding="utf-8")] == ["plots.py"]


def test_no_file_holds_two_ideas():
    long = {str(file.relative_to(ROOT)): count for file in [*SOURCES, *SCRIPTS] if (count := lines_of(file)) > 430}
    assert not long


def test_the_loop_fits_a_page_and_a_half():
    for file in SCRIPTS:
        (main,) = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if getattr(node, "name", "") == "main"]
        assert main.end_lineno - main.lineno + 1 < 90, file


def test_pins_stand_in_one_place():
    pinned = re.compile(r"torch\s*==")
    folders = [ROOT / name for name in ("nano_adrpo", "tests", "bench", "docs", "examples", ".github")]
    files = {ROOT / ".ci" / "run", *ROOT.glob("*.*"), *(file for folder in folders for file in folder.rglob("*.*"))}
    files = [f for f in files if f.suffix in {".py", ".toml", ".txt", ".md", ""} and f.is_file() and f != Path(__file__)]
    holders = [f for f in files if pinned.search(f.read_text(encoding="utf-8"))]
    assert [f.name for f in holders] == ["constraints.txt"]


def lines_of(file):
    return len(file.read_text(encoding="utf-8").splitlines())


def test_the_readmes_file_tree_is_true():
    seen, folders = set(), [ROOT]
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("```text\nnano_adrpo/")[2].partition("```")[0]
    for line in f"nano_adrpo/{tree}".splitlines():
        depth, (name, *rest) = (len(line) - len(line.lstrip())) // 2, line.split()
        path = folders[depth] / name
        if name.endswith("/"):
            folders = [*folders[: depth + 1], path]
            assert path.is_dir(), path
        elif name.endswith(".py"):
            assert abs(lines_of(path) - int(rest[0])) <= 20, (
                f"README says {rest[0]} lines of {path}, which has {lines_of(path)}"
            )
            seen.add(path)
    assert {file for file in [*SOURCES, *SCRIPTS] if file.name != "__init__.py"} <= seen


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, unpacked in a folder of its own; it is built from a copy, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "nano_adrpo", folder / "copy" / "nano_adrpo")
    for file in (ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE", *SCRIPTS):
        shutil.copy(file, folder / "copy")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", ".", "./copy"]
    done = subprocess.run(build, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_every_file_and_runs_outside_the_checkout(wheel, tmp_path):
    kinds = (".safetensors", ".json", ".jsonl", ".txt", ".jinja")
    data = {path for path in (ROOT / "nano_adrpo" / "demo").rglob("*") if path.suffix in kinds}
    for file in {*SOURCES, *SCRIPTS, *(path for path in data if "results" not in path.parts)}:
        assert (wheel / file.relative_to(ROOT)).read_bytes() == file.read_bytes(), file
    environment = {"PYTHONPATH": str(wheel), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    for script, options in (
        ("train_flow", "--rounds 1 --prompts-per-round 1 --group-size 2 --ode-steps 1 --eval-samples 2 --eval-prompts 2"),
        ("train_grpo", "--rounds 1 --no-eval-first --prompts-per-round 1 --group-size 2 --eval-samples 1"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", script, *options.split()], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert str(wheel) in done.stdout  # the demo that ran is the wheel's
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["flow", "grpo"]
