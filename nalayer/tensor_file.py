"""Named arrays with a JSON description in one safetensors file: written whole, read with distrust.

A safetensors file is the header's length (8 bytes, little-endian), the header (JSON: for each array
dtype, shape and place, and a table of strings), and the bytes of the arrays. The strings here are
``format``, ``version``, ``description`` (JSON) and ``sha256``, the checksum of description and
arrays. Nothing in it can be executed. What a header claims is compared with the file's size before
any memory is taken for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as _decode
from safetensors.numpy import save as _encode

FORMAT = "nalayer model"
VERSION = "1"
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("bool"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
MAX_HEADER = 1 << 26
"""bytes; a hundred thousand classes with long names take a tenth of it"""
MAX_DIMENSIONS = 4


class ModelFileError(ValueError):
    """A file that is no model file, or a damaged one; the message names it and what is wrong."""

    def __init__(self, path: Any, found: str, expected: str) -> None:
        super().__init__(f"{path}: found {found}; expected {expected}")


class _WrongError(Exception):
    """What was found and what was expected, where the file's name is not known."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found, expected)


def write(path: str | Path, description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]):
    """Write arrays and what they are in one step: a reader sees the old file or the new one.

    Parameters
    ----------
    path : path
        A temporary file beside it is written, flushed to the disk, and renamed.
    description : mapping
        Of what JSON has, without NaN and infinities.
    arrays : mapping
        Of a dtype of :data:`DTYPES`.
    """
    path = Path(path)
    content = encoded(description, arrays)
    part = tempfile.NamedTemporaryFile(  # noqa: SIM115 - it has to outlive the block to be renamed
        dir=path.parent, prefix=f".{path.name}.", suffix=".unfinished", delete=False
    )
    try:
        with part:
            part.write(content)
            part.flush()
            os.fsync(part.fileno())
        # The temporary file is private to its owner; a model is for everyone the folder is for.
        Path(part.name).chmod(0o644)
        os.replace(part.name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(part.name)
        raise


def encoded(
    description: Mapping[str, Any], arrays: Mapping[str, np.ndarray], kind: str = FORMAT
) -> bytes:
    """Return the content of a file of this kind; raise TypeError for an array of another dtype."""
    text = json.dumps(description, allow_nan=False, sort_keys=True)
    own = {name: np.array(a, a.dtype.newbyteorder("<"), order="C") for name, a in arrays.items()}
    for name, array in own.items():
        if array.dtype not in DTYPES.values():
            known = ", ".join(dtype.name for dtype in DTYPES.values())
            raise TypeError(f"{name} must be of dtype {known}; found {array.dtype}")
    strings = {
        "format": kind,
        "version": VERSION,
        "description": text,
        "sha256": _checksum(text, own),
    }
    return _encode(own, strings)


def read(path: str | Path, kind: str = FORMAT) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return description and arrays of a file of this kind, as :func:`encoded` made it.

    Raises
    ------
    ModelFileError
        For any other file, of a later version, cut short, or changed since it was written.
    OSError
        If it cannot be read at all.
    """
    with open(path, "rb") as stream:
        try:
            return _read(stream, os.fstat(stream.fileno()).st_size, kind)
        except _WrongError as wrong:
            raise ModelFileError(path, *wrong.args) from None


def _read(stream: IO[bytes], size: int, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
        raise _WrongError(
            f"{size} bytes that begin with a header length of {length}",
            "a safetensors file, whose header is no longer than the file",
        )
    header = stream.read(length)
    entries = _header(header)
    strings = entries.pop("__metadata__", {})
    if not isinstance(strings, dict) or strings.get("format") != kind:
        raise _WrongError("a safetensors file of another kind", f"one of format {kind!r}")
    if strings.get("version") != VERSION:
        raise _WrongError(f"version {strings.get('version')!r}", f"version {VERSION!r}")
    n_bytes = size - 8 - length
    _check_places(entries, n_bytes)
    content = length.to_bytes(8, "little") + header + stream.read(n_bytes)
    try:
        arrays = _decode(content)
    except SafetensorError as error:
        raise _WrongError(f"arrays that cannot be read ({error})", "a whole file") from None
    text = strings.get("description")
    if not isinstance(text, str) or strings.get("sha256") != _checksum(text, arrays):
        raise _WrongError("arrays or a description that do not match", "those of the checksum")
    return _parse("description", text.encode()), arrays


def _header(content: bytes) -> dict[str, Any]:
    # Nothing but spaces may follow the JSON: they fill up to a multiple of eight bytes.
    if not content.startswith(b"{") or not content.rstrip(b" ").endswith(b"}"):
        raise _WrongError("a header that is no JSON object", "a safetensors file")
    return _parse("header", content)


def _parse(name: str, content: bytes) -> dict[str, Any]:
    """Return a JSON object in which no key stands twice."""
    try:
        found = json.loads(content, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _WrongError(f"a {name} that is no JSON object", "a whole file")
    return found


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _check_places(entries: dict[str, Any], n_bytes: int) -> None:
    """Refuse arrays that do not lie one after the other in just the bytes that are there."""
    places = []
    for name, entry in entries.items():
        try:
            start, stop = entry["data_offsets"]
            shape, itemsize = entry["shape"], DTYPES[entry["dtype"]].itemsize
            numbers = [start, stop, *shape]
        except (KeyError, TypeError, ValueError):
            numbers = [-1]
        if len(numbers) > 2 + MAX_DIMENSIONS or not all(
            type(number) is int and 0 <= number <= n_bytes for number in numbers
        ):
            raise _WrongError(
                f"an array {name!r} with {json.dumps(entry)[:200]}",
                f"a dtype of {sorted(DTYPES)}, a shape, and a place within {n_bytes} bytes",
            )
        places.append((start, stop, itemsize * prod(shape)))
    end = 0
    for start, stop, needed in sorted(places):
        if start != end or stop - start != needed:
            raise _WrongError(
                f"an array of {needed} bytes at {start} to {stop}", f"one that starts at {end}"
            )
        end = stop
    if end != n_bytes:
        raise _WrongError(f"{n_bytes} bytes of arrays", f"{end}, by the header")


def _checksum(description: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Return SHA-256 of the description and of every array's name, dtype, shape and bytes."""
    found = hashlib.sha256(description.encode())
    for name in sorted(arrays):
        array = arrays[name]
        found.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
