"""Cells of the accuracy grid: what one is, and a folder that keeps the finished ones.

A finished cell is one file, written beside its place and moved there in one step: a run that is
killed leaves whole cells or none. Files are NumPy archives without pickles: the row of results as
JSON, and the parameters where another method starts from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import Row

# What NumPy and zipfile raise for archives with wrong bytes, NotImplementedError (a RuntimeError)
# among them
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


_LATER = ("start", "channel_step", "plain_weight", "damping", "pull")


class CellError(Exception):
    """A finished cell cannot be read or written; says what to do."""


@dataclass(frozen=True)
class Cell:
    """One training run: all that its result depends on, but for the code.

    ``inner_epochs`` and what follows it are None for methods that do not read them. ``network`` is
    "cnn" or "mlp", the paper's, or names other hidden layers, such as "mlp-512-256" or
    "mlp-16-no-dropout".
    """

    dataset: str
    network: str
    method: str
    noise: float
    noise_kind: str
    fraction: float
    seed: int
    epochs: int
    patience: int
    batch_size: int
    dtype: str = "float32"
    backend: str | None = None
    threads: int = 1
    inner_epochs: int | None = None
    n_kept: int | None = None
    missing: float | None = None
    start: str | None = None
    """where theta starts: one of :data:`benchmarks.methods.STARTS`; None is "hard" """
    channel_step: float | None = None
    """factor on theta's steps; None is 1, 0 leaves it where it starts"""
    plain_weight: float | None = None
    """share of the plain loss mixed in; None is 0"""
    damping: float | None = None
    """share of EM's step that theta takes; None is 1"""
    pull: float | None = None
    """weight of a prior that pulls theta to its start, in samples per sample; None is 0"""

    @property
    def settings(self) -> Row:
        """All of them, by name; the later ones only where they are set: older cells stay valid."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None or name not in _LATER
        }

    @property
    def name(self) -> str:
        """A file name: some of the settings to read, and a fingerprint of all."""
        settings = json.dumps(self.settings, sort_keys=True)
        fingerprint = hashlib.sha256(settings.encode()).hexdigest()[:10]
        return (
            f"{self.dataset}-{self.network}-{self.noise_kind}-{self.noise:g}-{self.fraction:g}-"
            f"seed{self.seed}-{self.method}-{fingerprint}"
        )


@dataclass
class Finished:
    """What came of a cell."""

    row: Row
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """what later methods start from"""


class Store:
    """Finished cells in a folder.

    Raises
    ------
    CellError
        From every method, naming the file and what to do: for a damaged cell, a full disk, a
        folder that is not there to be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CellError(f"cannot make the folder {folder}: {error.strerror}") from None

    def path(self, cell: Cell) -> Path:
        """Return where a cell is kept."""
        return self.folder / f"{cell.name}.npz"

    def has(self, cell: Cell) -> bool:
        """Return whether a cell is finished."""
        return self.path(cell).exists()

    def save(self, cell: Cell, finished: Finished) -> None:
        """Keep a finished cell."""
        members: dict[str, Any] = dict(finished.arrays)
        members["cell"] = np.array(json.dumps(cell.settings))
        members["row"] = np.array(json.dumps(finished.row))
        part = None
        try:
            with tempfile.NamedTemporaryFile(
                dir=self.folder, prefix=".", suffix=".part", delete=False
            ) as part:
                np.savez(part, **members)
                part.flush()
                os.fsync(part.fileno())
            Path(part.name).chmod(0o644)
            os.replace(part.name, self.path(cell))
        except BaseException as error:
            if part is not None:
                Path(part.name).unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            raise CellError(
                f"cannot keep {self.path(cell)}: {error.strerror or error}. The cells finished "
                "before are whole; make room and give the same command again"
            ) from None

    def load(self, cell: Cell) -> Finished:
        """Return a finished cell, every byte of it checked against the archive's checksums."""
        path = self.path(cell)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                members = {name: archive[name] for name in archive.files}
            row = json.loads(str(members.pop("row")))
            settings = json.loads(str(members.pop("cell")))
        except FileNotFoundError:
            raise CellError(f"{path} is not there; give the same command again") from None
        except _DAMAGE as error:
            raise CellError(
                f"{path} is damaged ({error}); delete it and give the same command again: only "
                "this cell is run anew"
            ) from None
        if settings != cell.settings:
            raise CellError(
                f"{path} holds another cell ({settings}); delete it and give the same command again"
            )
        return Finished(row, members)
