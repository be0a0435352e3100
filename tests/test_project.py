"""The house keeps its own rules: import layers, packages, commands, executed equations."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {"kernels": 0, "nalayer": 1, "em_baseline": 2, "benchmarks": 3, "tests": 3}
FILES = sorted(path for room in LAYERS for path in (ROOT / room).rglob("*.py"))
ONLY_IN_KERNELS = {"numba", "cupy"}


def imports(path: Path) -> set[str]:
    """Return the top-level names that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def violations(room: str, imported: set[str]) -> set[str]:
    upwards = {name for name in imported & LAYERS.keys() if LAYERS[name] > LAYERS[room]}
    sideways = {"tests"} & imported if room == "benchmarks" else set()
    misplaced = ONLY_IN_KERNELS & imported if room not in ("kernels", "tests") else set()
    return upwards | sideways | misplaced


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
    assert violations(path.relative_to(ROOT).parts[0], imports(path)) == set()


def test_the_import_rule_would_see_a_violation():
    assert violations("kernels", {"numpy", "nalayer"}) == {"nalayer"}
    assert violations("nalayer", {"numba", "em_baseline"}) == {"numba", "em_baseline"}
    assert violations("benchmarks", {"tests"}) == {"tests"}
    assert violations("kernels", {"numba"}) == set()


def test_the_packages_are_listed_explicitly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"] == [
        "kernels",
        "kernels.cupy_backend",
        "kernels.numba_backend",
        "nalayer",
        "em_baseline",
    ]
    extras = project["project"]["optional-dependencies"]
    assert {"cuda12", "cuda13", "peers", "test", "lint", "dev"} <= extras.keys()
    needed = " ".join(project["project"]["dependencies"])
    assert "torch" not in needed
    assert "cupy" not in needed


def test_versions_agree():
    import nalayer

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == nalayer.__version__
    assert f"version: {nalayer.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {nalayer.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_commands_of_the_readme_are_targets_of_the_makefile():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"make ([a-z]+)", readme))
    assert {"verify", "test"} <= commands
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in commands)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("document", ["README.md"])
def test_python_in_the_documents_runs(document, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)
    assert blocks
    names = {}  # one block goes on where the last one ended
    for block in blocks:
        exec(compile(block, document, "exec"), names)
    printed = capsys.readouterr().out
    baseline, noise_layer = (float(x) for x in re.findall(r"(?:baseline|layer): (0\.\d+)", printed))
    assert noise_layer > baseline + 0.05


def test_every_statement_is_in_the_table_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert all(re.search(rf"\bV{v}\b", readme) for v in range(1, 13))
