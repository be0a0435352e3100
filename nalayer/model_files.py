"""Trained models as files: architecture, parameters and classes, self-describing, never a pickle.

The container is :mod:`nalayer.tensor_file`. Arrays are named after what they are
(``layers.0.weight``, ``channel_logits``); the description says the rest, the convention of the
noise matrix included, so a file can be read without this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

import kernels
from kernels import checks
from nalayer.image_layers import Conv2d, ConvBlock, MaxPool2d
from nalayer.layers import Dense, Dropout, Hidden, ReLU
from nalayer.models import CModel, NoiseModel, PlainModel, SModel
from nalayer.network import Network
from nalayer.tensor_file import ModelFileError, read, write

CONVENTION = "noise matrix: rows true class, columns observed class; rows sum to one"
MODELS = {"plain": PlainModel, "s": SModel, "c": CModel}
LAYERS = {
    layer.__name__: layer for layer in (Dense, Hidden, ReLU, Dropout, Conv2d, ConvBlock, MaxPool2d)
}
NOT_KEPT = ("backend", "parameter_shapes")  # the machine's business; derived
PARAMETER_NAMES = ("weight", "bias")
SETTINGS: dict[str, tuple[type, ...]] = {
    "pseudo_count": (int, float),
    "n_samples": (int, type(None)),
}
LABEL_TYPES: dict[str, type] = {
    **{f"{sign}int{bits}": int for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": float for bits in (16, 32, 64)},
    "bool": bool,
    "str": str,
    "object": str,
}
"""what labels of a dtype are in JSON; objects are strings, and a string's length is its own"""


@dataclass(frozen=True)
class SavedModel:
    """What :func:`load` returns."""

    model: Any
    """PlainModel, SModel or CModel, dense or sparse"""
    parameters: np.ndarray
    """(n_parameters,), float32 or float64"""
    classes: np.ndarray | None
    """(K,), what class 0..K-1 is called"""


def save(path: str | Path, model: Any, parameters: np.ndarray, classes: Any = None) -> None:
    """Write a model and its parameters to a file, in one step.

    Parameters
    ----------
    path : path
        Replaced if it is there.
    model : PlainModel, SModel or CModel
        Dense or sparse. Its backend is not kept.
    parameters : (n_parameters,) float32 or float64
    classes : (K,), optional
        Integers, floats, booleans or strings.

    Raises
    ------
    TypeError, ValueError
        For another model, parameters that do not fit, and classes of another type or number.
    """
    description, arrays = describe(model, parameters, classes)
    write(path, description, arrays)


def load(path: str | Path, backend: str | None = None) -> SavedModel:
    """Return the model, parameters and classes of a file, an estimator's included.

    Parameters
    ----------
    path : path
    backend : {"numpy", "numba"}, optional
        Of the model and its layers.

    Raises
    ------
    ModelFileError
        For a file that :func:`save` did not write, or that is damaged.
    OSError
        If it cannot be read at all.
    """
    return restore(path, *read(path), backend)


def describe(
    model: Any, parameters: np.ndarray, classes: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the description and the arrays that a model's file holds."""
    kinds = [name for name, kind in MODELS.items() if type(model) is kind]
    if not kinds:
        raise TypeError(
            f"model must be a PlainModel, SModel or CModel; found {type(model).__name__}"
        )
    checks.check_floats("parameters", parameters, (model.n_parameters,))
    settings = {name: getattr(model, name) for name in SETTINGS if hasattr(model, name)}
    description: dict[str, Any] = {
        "model": kinds[0],
        "settings": settings,
        "layers": [_describe_layer(layer) for layer in model.network.layers],
        "dtype": parameters.dtype.name,
        "convention": CONVENTION,
        "classes": None if classes is None else describe_labels("classes", classes),
    }
    if classes is not None and len(classes) != model.network.n_classes:
        raise ValueError(
            f"classes must name the network's {model.network.n_classes} classes; "
            f"found {len(classes)}"
        )
    arrays = dict(_named(model, parameters))
    if getattr(model, "links", None) is not None:
        arrays["support"] = model.links.support
    return description, arrays


def restore(
    path: str | Path,
    description: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    backend: str | None = None,
) -> SavedModel:
    """Return what :func:`describe` described. ``path`` is named where it cannot be.

    The checksum says that the content is what somebody wrote, not that it makes sense; so all of
    it is checked before it is used.
    """
    try:
        return _restore(description, arrays, backend)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelFileError(path, f"a model that cannot be ({reason})", "a model") from None


def _restore(
    description: Mapping[str, Any], arrays: Mapping[str, np.ndarray], backend: str | None
) -> SavedModel:
    layers = [_restore_layer(layer, backend) for layer in description["layers"]]
    _check_sizes(layers)
    network, kind = Network(tuple(layers)), MODELS[description["model"]]
    settings = dict(description["settings"])
    for name, value in settings.items():
        _require(type(value) in SETTINGS[name], name, value)
    if "support" in arrays:
        settings["links"] = kernels.link_index(arrays["support"])
    model = kind(network, backend=backend, **settings)
    dtype = {"float32": np.float32, "float64": np.float64}[description["dtype"]]
    shapes = dict(_shapes(model))
    strange = arrays.keys() - shapes.keys() - {"support", "noise_matrix"}
    if strange:
        raise ValueError(f"no place for {sorted(strange)}")
    for name, shape in shapes.items():  # before memory is taken for what was only said
        checks.check_floats(name, arrays[name], shape, dtype)
    parameters = np.concatenate([arrays[name].ravel() for name in shapes])
    names = description["classes"]
    classes = None if names is None else restore_labels(names)
    if classes is not None and classes.shape != (network.n_classes,):
        raise ValueError(f"{classes.size} names for {network.n_classes} classes")
    return SavedModel(model, parameters, classes)


# --- parameters ----------------------------------------------------------------------------------


def _shapes(model: PlainModel | NoiseModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every parameter, in the order of the flat vector."""
    for index, layer in enumerate(model.network.layers):
        for name, shape in zip(PARAMETER_NAMES, layer.parameter_shapes, strict=False):
            yield f"layers.{index}.{name}", shape
    if isinstance(model, NoiseModel):
        yield from model.channel_shapes.items()


def _named(
    model: PlainModel | NoiseModel, parameters: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    start = 0
    for name, shape in _shapes(model):
        yield name, parameters[start : start + prod(shape)].reshape(shape)
        start += prod(shape)


# --- layers --------------------------------------------------------------------------------------


def _describe_layer(layer: Any) -> dict[str, Any]:
    if LAYERS.get(type(layer).__name__) is not type(layer):
        raise TypeError(f"layers must be of {sorted(LAYERS)}; found {type(layer).__name__}")
    kept = (field.name for field in fields(layer) if field.name not in NOT_KEPT)
    return {"kind": type(layer).__name__} | {name: getattr(layer, name) for name in kept}


def _restore_layer(description: Mapping[str, Any], backend: str | None) -> Any:
    kind = LAYERS[description["kind"]]
    known = {field.name for field in fields(kind)}
    values = {name: value for name, value in description.items() if name != "kind"}
    if values.keys() & set(NOT_KEPT) or not values.keys() <= known:
        raise ValueError(f"a {description['kind']} with {sorted(values)}")
    for name, value in values.items():
        if name == "rate":
            _require(type(value) in (int, float), name, value)
        elif name == "padding":
            _require(isinstance(value, str), name, value)
        elif name == "image_shape":
            _require(isinstance(value, list) and all(map(_is_size, value)), name, value)
            values[name] = tuple(value)
        else:
            _require(_is_size(value), name, value)
    if "backend" in known:
        values["backend"] = backend
    return kind(**values)


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value < 1 << 40


def _require(condition: bool, name: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}")


def _check_sizes(layers: Sequence[Any]) -> None:
    """Refuse layers that do not fit onto each other."""
    size: int | None = None
    for layer in layers:
        if not hasattr(layer, "n_in"):
            continue
        _require(size is None or layer.n_in == size, "n_in", layer.n_in)
        size = layer.n_out if hasattr(layer, "n_out") else prod(layer.out_shape)


# --- labels --------------------------------------------------------------------------------------


def describe_labels(name: str, labels: Any) -> dict[str, Any]:
    """Return labels as JSON; refuse what is neither number, boolean nor string.

    ``name`` is the argument's, for the message.
    """
    array = np.asarray(labels)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension; found shape {array.shape}")
    values = array.tolist()
    dtype = "str" if array.dtype.kind == "U" else array.dtype.name
    if dtype not in LABEL_TYPES or not all(type(value) is LABEL_TYPES[dtype] for value in values):
        raise TypeError(
            f"{name} must be integers, floats, booleans or strings to be kept in a file; "
            f"found {array.dtype}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite to be kept in a file; found {array}")
    return {"dtype": dtype, "values": values}


def restore_labels(description: Mapping[str, Any]) -> np.ndarray:
    """Return the labels, in the dtype that they had."""
    values, dtype = description["values"], description["dtype"]
    if not isinstance(values, list) or not all(type(v) is LABEL_TYPES[dtype] for v in values):
        raise ValueError(f"labels of {dtype} are no list of {LABEL_TYPES[dtype].__name__}")
    return np.array(values, dtype)
