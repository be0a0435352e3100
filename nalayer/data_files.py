"""Readers of the published data files: idx (MNIST) and the records of binary CIFAR-100.

A file says how much there is of it; that is believed only as far as the bytes are there.
"""

from __future__ import annotations

import gzip
import math
import tarfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

CIFAR_PIXELS = (3, 32, 32)
CIFAR_RECORD = 2 + math.prod(CIFAR_PIXELS)
N_COARSE, N_FINE = 20, 100
_IDX_BYTES = 0x08  # the type code of unsigned bytes
_MOST_DIMENSIONS = 4
_CHUNK = 1 << 20


class DataFileError(ValueError):
    """A data file that is not what it should be; the message names it and says what to do."""

    def __init__(self, path: Any, found: str) -> None:
        super().__init__(
            f"{path}: {found}. The file is damaged or another one: replace it by the published "
            "file, or delete it, so that it is downloaded again"
        )


def _read(stream: IO[bytes], n: int) -> bytes:
    """Return up to n bytes, taking memory only for those that are there."""
    pieces, left = [], n
    while left > 0:
        piece = stream.read(min(left, _CHUNK))
        if not piece:
            break
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _open(path: Path) -> Any:
    """Open a file, unpacked as it is read if its name ends in ``.gz``."""
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


class _Careful:
    """A stream for tarfile, which asks for as many bytes at once as a header promises."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, n: int) -> bytes:
        """Return up to n bytes, taking memory only for those that are there."""
        return _read(self._stream, n)


_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)


def read_idx(path: Path, n_dimensions: int) -> np.ndarray:
    """Return the unsigned bytes of an idx file, packed (.gz) or not.

    Parameters
    ----------
    path : Path
    n_dimensions : int
        How many it should have: 1 for labels, 3 for images.

    Returns
    -------
    ndarray of uint8
        Read-only.

    Raises
    ------
    DataFileError
        For another kind of file, one that is too short or too long, or damaged.

    Notes
    -----
    Format (LeCun, Cortes & Burges): two zero bytes, a type code, the number of dimensions, each
    size as a big-endian 32-bit number, then the numbers.
    """
    try:
        with _open(path) as stream:
            head = _read(stream, 4)
            if len(head) < 4 or head[:3] != bytes([0, 0, _IDX_BYTES]):
                raise DataFileError(path, f"it starts with {head!r}, not as an idx file of bytes")
            if head[3] != n_dimensions or not 1 <= n_dimensions <= _MOST_DIMENSIONS:
                raise DataFileError(path, f"it has {head[3]} dimensions, not {n_dimensions}")
            sizes = _read(stream, 4 * n_dimensions)
            if len(sizes) < 4 * n_dimensions:
                raise DataFileError(path, "it ends within its header")
            shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
            expected = math.prod(shape)
            data = _read(stream, expected + 1)
    except _DAMAGED as error:
        raise DataFileError(path, f"it cannot be unpacked ({error})") from None
    if len(data) != expected:
        found = f"{len(data)} are there" if len(data) < expected else "there are more"
        raise DataFileError(path, f"its header promises {expected} bytes ({shape}), {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_cifar100(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images and fine labels of a binary CIFAR-100 file, packed (.gz) or not, of any length.

    Returns
    -------
    images : (n, 32, 32, 3) uint8
        Rows, columns, channels; read-only.
    labels : (n,) uint8
        Fine labels, 0..99.

    Raises
    ------
    DataFileError
        For a file that is damaged, empty, or does not consist of whole records with valid labels.

    Notes
    -----
    Format (Krizhevsky 2009): records of 3074 bytes: coarse label, fine label, then 1024 bytes of
    red, green and blue each, row by row.
    """
    try:
        with _open(path) as stream:
            return _records(path, stream)
    except _DAMAGED as error:
        raise DataFileError(path, f"it cannot be unpacked ({error})") from None


def read_cifar100_archive(path: Path, member: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images and fine labels of one file in the published archive; see read_cifar100."""
    try:
        with _open(path) as file:
            careful: Any = _Careful(file)
            with tarfile.open(fileobj=careful, mode="r:") as archive:
                stream = archive.extractfile(member)
                if stream is None:
                    raise DataFileError(path, f"it holds no file {member}")
                return _records(f"{path} ({member})", stream)
    except KeyError:
        raise DataFileError(path, f"it holds no file {member}") from None
    except (*_DAMAGED, tarfile.TarError) as error:
        raise DataFileError(path, f"it cannot be unpacked ({error})") from None


def _records(path: Any, stream: IO[bytes]) -> tuple[np.ndarray, np.ndarray]:
    pieces = []
    while piece := stream.read(_CHUNK):
        pieces.append(piece)
    data = np.frombuffer(b"".join(pieces), np.uint8)
    if data.size == 0 or data.size % CIFAR_RECORD:
        raise DataFileError(
            path, f"it holds {data.size} bytes, which are no whole records of {CIFAR_RECORD}"
        )
    records = data.reshape(-1, CIFAR_RECORD)
    coarse, fine = records[:, 0], records[:, 1]
    bad = np.flatnonzero((coarse >= N_COARSE) | (fine >= N_FINE))
    if bad.size:
        t = int(bad[0])
        raise DataFileError(path, f"record {t} has labels {coarse[t]}, {fine[t]}")
    return records[:, 2:].reshape(-1, *CIFAR_PIXELS).transpose(0, 2, 3, 1), fine
