"""A file from which a killed run goes on, to end bit for bit where it would have ended.

It is a NumPy archive without pickles, arrays and everything else as JSON, followed by its SHA-256,
which is looked at before anything else: a flipped bit in a moment of Adam would go on unseen. It is
written beside its place and moved there in one step, so what is there is always whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kernels.checks import is_on_gpu
from nalayer.devices import to_host

_FACTS = "facts"
_DIGEST = hashlib.sha256().digest_size


class CheckpointError(ValueError):
    """A checkpoint that cannot be gone on from, or cannot be written; says what to do."""


class Saved(NamedTuple):
    """What :meth:`Checkpoint.load` found."""

    state: Any
    facts: dict[str, Any]


def described(name: str, value: Any) -> Any:
    """Return settings as JSON, the same for the same settings; arrays as their fingerprints.

    Functions are known by their names alone. Raises TypeError, naming the setting, for objects
    that are none of numbers, arrays, generators, functions, and tuples and dataclasses of them.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if is_on_gpu(value):
        return f"on a GPU: {described(name, to_host(value))}"
    if isinstance(value, np.ndarray):
        numbers = hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()[:16]
        return f"{value.dtype.str} {value.shape} {numbers}"
    if isinstance(value, np.random.Generator):
        return _plain(value.bit_generator.state)
    if isinstance(value, list | tuple):
        return [described(name, part) for part in value]
    if is_dataclass(value) and not isinstance(value, type):
        parts = {
            f.name: described(f"{name}.{f.name}", getattr(value, f.name)) for f in fields(value)
        }
        return {"is": f"{type(value).__module__}.{type(value).__qualname__}"} | parts
    if callable(value) and hasattr(value, "__qualname__"):
        owner = described(name, getattr(value, "__self__", None))
        return {"is": f"{value.__module__}.{value.__qualname__}", "of": owner}
    raise TypeError(
        f"{name} must consist of numbers, arrays, functions, tuples and dataclasses where a "
        f"checkpoint is asked for, so that another run's is known; found {type(value).__name__}"
    )


def _plain(value: Any) -> Any:
    """Return a bit generator's state with lists for its arrays; it takes them back as well."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _leaves(name: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays and numbers of a state, by name."""
    if is_on_gpu(value):
        value = to_host(value)
    if isinstance(value, np.ndarray | np.generic | int | float):
        yield name, np.asarray(value)
    elif value is not None:
        for part, inner in _parts(name, value).items():
            yield from _leaves(f"{name}.{part}", inner)


def _parts(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, list | tuple):
        return {str(place): part for place, part in enumerate(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    raise TypeError(
        f"{name} must consist of arrays, numbers, tuples and dataclasses where a checkpoint is "
        f"asked for; found {type(value).__name__}"
    )


def _refilled(name: str, value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return a state built like ``value`` from what :func:`_leaves` made of another one."""
    if value is None:
        return None
    if isinstance(value, np.ndarray) or is_on_gpu(value):
        return np.asarray(arrays[name], like=value)
    if isinstance(value, np.generic | int | float):
        return type(value)(arrays[name][()])
    parts = {
        part: _refilled(f"{name}.{part}", inner, arrays)
        for part, inner in _parts(name, value).items()
    }
    if is_dataclass(value):
        return replace(value, **parts)  # type: ignore[type-var]
    return getattr(value, "_make", type(value))(parts.values())


class Checkpoint:
    """One run's file.

    Parameters
    ----------
    path : str or Path
        In a folder that exists. Of one run at a time.
    generators : dict
        The random streams by name; None where there is none.
    **run
        All that the run's end depends on: model, data, settings.

    Raises
    ------
    TypeError
        For a path that is none, and settings that cannot be compared with another run's.
    """

    def __init__(
        self, path: str | Path, generators: dict[str, np.random.Generator | None], **run: Any
    ) -> None:
        if not isinstance(path, str | Path):
            raise TypeError(f"checkpoint must be a path; found {type(path).__name__}")
        self.path, self.generators = Path(path), generators
        settings = {name: described(name, value) for name, value in (run | generators).items()}
        self.run = json.loads(json.dumps(settings))  # as it comes back: keys are strings

    def load(self, state: Any) -> Saved | None:
        """Return what was saved last, or None; turn the random streams to where they were.

        Parameters
        ----------
        state
            One that is built like the saved one.

        Raises
        ------
        CheckpointError
            For a damaged file, and for one of another run, naming the settings that differ.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"cannot read checkpoint {self.path}: {error.strerror}") from None
        archive, digest = data[:-_DIGEST], data[-_DIGEST:]
        if hashlib.sha256(archive).digest() != digest:
            raise CheckpointError(
                f"checkpoint {self.path} is damaged, or another file: its {len(data)} bytes do not "
                "end in their SHA-256; name another file, or delete this one to start anew"
            )
        with np.load(io.BytesIO(archive), allow_pickle=False) as members:
            arrays = dict(members)
        facts = json.loads(str(arrays.pop(_FACTS)))
        run, streams = facts.pop("run"), facts.pop("streams")
        differing = sorted(name for name in run | self.run if run.get(name) != self.run.get(name))
        if differing:
            raise CheckpointError(
                f"checkpoint {self.path} is of another run, with other {', '.join(differing)}; "
                "name another file, or delete this one to start anew"
            )
        for name, generator in self.generators.items():
            if generator is not None:
                generator.bit_generator.state = streams[name]
        return Saved(_refilled("state", state, arrays), facts)

    def save(self, state: Any, facts: dict[str, Any]) -> None:
        """Replace the file by one with this state, these facts and where the streams are now.

        Raises
        ------
        TypeError
            For a state that is not made of arrays, numbers, tuples and dataclasses.
        CheckpointError
            If the file cannot be written; the last one stays.
        """
        streams = {name: described(name, stream) for name, stream in self.generators.items()}
        words = json.dumps(facts | {"run": self.run, "streams": streams})
        # Always the same name: what a kill leaves behind is overwritten, and does not pile up.
        part = self.path.with_name(self.path.name + ".part")
        arrays: dict[str, Any] = dict(_leaves("state", state))
        arrays[_FACTS] = np.array(words)
        archive = io.BytesIO()
        np.savez(archive, **arrays)
        try:
            with part.open("wb") as file:
                file.write(archive.getbuffer())
                file.write(hashlib.sha256(archive.getbuffer()).digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoint {self.path}: {error.strerror or error}"
            ) from None
