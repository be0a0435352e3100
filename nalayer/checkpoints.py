"""A file from which a killed run goes on, to end bit for bit where it would have ended.

The container is :mod:`nalayer.tensor_file`, with its checksum: a flipped bit in a moment of Adam
would go on unseen. Everything but the arrays is JSON. It is written beside its place and moved
there in one step, so what is there is always whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kernels.checks import check_array, is_on_gpu
from nalayer.devices import to_host
from nalayer.tensor_file import ModelFileError, encoded, read

FORMAT = "nalayer checkpoint"
_FACTS = "facts"
_LAST_POSITION = 624
"""of a bit generator in its table: MT19937's words; the others' tables are smaller"""

Restored = TypeVar("Restored")


class CheckpointError(ValueError):
    """A checkpoint that cannot be gone on from, or cannot be written; says what to do."""


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


def _require_state(name: str, generator: np.random.Generator, state: Any) -> None:
    """Refuse what is no state of this kind of generator."""
    _require_like(name, state, _plain(generator.bit_generator.state))
    type(generator.bit_generator)().state = state  # refuses numbers that are too large


def _require_like(name: str, found: Any, own: Any) -> None:
    """Refuse what is not built like a generator's own state: NumPy does not look at all of it."""
    if type(found) is not type(own):
        raise TypeError(f"{name} is a {type(found).__name__}")
    if isinstance(own, dict):
        if found.keys() != own.keys():
            raise ValueError(f"{name} has {sorted(found)}")
        for key, value in own.items():
            _require_like(f"{name}.{key}", found[key], value)
    elif isinstance(own, list):
        if len(found) != len(own):
            raise ValueError(f"{name} has {len(found)} parts")
        for part, value in zip(found, own, strict=True):
            _require_like(name, part, value)
    elif name.endswith("pos") and not 0 <= found <= _LAST_POSITION:  # read there without a look
        raise ValueError(f"{name} is {found}")


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

    def load(
        self, state: Any, restore: Callable[[Any, dict[str, Any]], Restored]
    ) -> Restored | None:
        """Return what was saved last, or None; turn the random streams to where they were.

        Parameters
        ----------
        state
            One that is built like the saved one, with arrays of the same shapes and dtypes.
        restore : callable
            Makes what is returned of the saved state and facts. The checksum says that they are
            what somebody wrote, not that they make sense: it may refuse them by a ValueError.

        Raises
        ------
        CheckpointError
            For a damaged file, one with a content that cannot be, and one of another run, naming
            the settings that differ. Then no stream has been turned.
        """
        advice = "name another file, or delete this one to start anew"
        try:
            _, arrays = read(self.path, FORMAT)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"cannot read checkpoint {self.path}: {error.strerror}") from None
        except ModelFileError as error:
            raise CheckpointError(f"checkpoint {error}; {advice}") from None
        try:
            facts = json.loads(arrays.pop(_FACTS).tobytes())
            run, streams = facts.pop("run"), facts.pop("streams")
            differing = sorted(key for key in run | self.run if run.get(key) != self.run.get(key))
            if not differing:
                found = restore(self._state_of(state, arrays), facts)
                for name, generator in self._generators():
                    _require_state(name, generator, streams[name])
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"checkpoint {self.path}: found a run that cannot be ({reason}); {advice}"
            ) from None
        if differing:
            raise CheckpointError(
                f"checkpoint {self.path} is of another run, with other {', '.join(differing)}; "
                f"{advice}"
            )
        for name, generator in self._generators():
            generator.bit_generator.state = streams[name]
        return found

    def _generators(self) -> list[tuple[str, np.random.Generator]]:
        return [(name, rng) for name, rng in self.generators.items() if rng is not None]

    def _state_of(self, state: Any, arrays: Mapping[str, np.ndarray]) -> Any:
        """Return a state built like ``state`` from arrays that are just what it consists of."""
        own = dict(_leaves("state", state))
        if arrays.keys() != own.keys():
            raise ValueError(f"arrays {sorted(arrays.keys() ^ own.keys())} too many or too few")
        for name, value in own.items():
            check_array(name, arrays[name], value.shape)
            if arrays[name].dtype != value.dtype:
                raise TypeError(f"{name} is of {arrays[name].dtype}")
        # What was read shares the file's bytes, which must not be written.
        return _refilled("state", state, {name: array.copy() for name, array in arrays.items()})

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
        arrays = dict(_leaves("state", state))
        # As an array, for a header's length is limited and a history's is not.
        arrays[_FACTS] = np.frombuffer(words.encode(), np.uint8)
        content = encoded({}, arrays, FORMAT)
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoint {self.path}: {error.strerror or error}"
            ) from None
