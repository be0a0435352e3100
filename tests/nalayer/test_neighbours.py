"""Another package named ``kernels`` in front of ours is found out, whatever way it got there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, cwd: Path, first_on_path: list[Path]) -> subprocess.CompletedProcess:
    paths = [str(path) for path in first_on_path]
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the stranger was imported')\n")
    return package


@pytest.mark.parametrize("room", ["nalayer", "em_baseline", "benchmarks.__main__"])
def test_a_stranger_named_kernels_is_named_and_not_imported(stranger, tmp_path, room):
    run = run_python(f"import {room}", tmp_path, [stranger.parent, ROOT])
    assert run.returncode == 1
    assert "the stranger was imported" not in run.stderr
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: nalayer needs its own package 'kernels'")
    assert str(stranger / "__init__.py") in message
    assert "pip uninstall kernels" in message


def test_a_stranger_that_was_imported_before_is_found_out_too(tmp_path):
    run = run_python(
        "import types; sys.modules['kernels'] = types.ModuleType('kernels')\nimport nalayer",
        tmp_path,
        [ROOT],
    )
    assert run.returncode == 1
    assert "finds no such file" in run.stderr.strip().splitlines()[-1]


def test_our_own_kernels_pass(tmp_path):
    run = run_python("import nalayer; print(nalayer.__version__)", tmp_path, [ROOT])
    assert run.returncode == 0, run.stderr
