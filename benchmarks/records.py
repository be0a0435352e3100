"""Results files: JSON Lines, one flat object a line, written so that a kill loses nothing."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("numpy", "scipy", "numba", "scikit-learn")
PEERS = ("torch", "jax")


def _commit() -> str:
    """Return the commit the code runs from, "-dirty" if it was edited, "unknown" without git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _processor() -> str:
    """Return the processor's name as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "missing"


def provenance(
    benchmark: str,
    command: str,
    backend: str,
    threads: int,
    blas_threads: int,
    libraries: Sequence[str] = LIBRARIES,
) -> Row:
    """Return what every row says of where it comes from."""
    return {
        "benchmark": benchmark,
        "command": command,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {_processor()}, {os.cpu_count()} cores",
        "device": "cpu",
        "backend": backend,
        "threads": threads,
        "blas_threads": blas_threads,
        "versions": ", ".join(
            [f"python {platform.python_version()}"]
            + [f"{name} {_version(name)}" for name in libraries]
        ),
    }


def require_writable(path: Path) -> None:
    """Make the folder of a results file; raise OSError, naming the file, if it cannot be written.

    A file that is there already stays as it is until the first rows replace it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to {path}: {error.strerror} ({error.filename})") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"cannot write to {path}: it is a folder, or its folder is not writable")


def unfinished(path: Path) -> Path:
    """Return where the rows of a run that is still going on are kept, beside their final place."""
    return path.with_name(path.name + ".unfinished")


def _storable(value: Any) -> Any:
    """Return null for NaN and infinities, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_rows(path: Path, rows: list[Row]) -> None:
    """Replace the file by these rows in one step: a reader sees the old or the new, never half."""
    lines = [
        json.dumps({key: _storable(value) for key, value in row.items()}, allow_nan=False) + "\n"
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, suffix=".part", delete=False
    ) as part:
        part.writelines(lines)
        part.flush()
        os.fsync(part.fileno())
    # The temporary file is private to its owner; results are for everyone the folder is for.
    Path(part.name).chmod(0o644)
    os.replace(part.name, path)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a results file.

    Raises
    ------
    ValueError
        Naming the file and the line that is no JSON object.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, found {line[:40]!r}")
        rows.append(row)
    return rows
