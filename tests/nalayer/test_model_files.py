import hashlib
import json
import os
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load as load_arrays
from safetensors.numpy import load_file, save_file

import nalayer
from nalayer import (
    CModel,
    NoiseAdaptationClassifier,
    PlainModel,
    SModel,
    SoftTargetModel,
    cnn,
    tensor_file,
)
from nalayer.image_layers import Conv2d, MaxPool2d
from nalayer.layers import Dense, Dropout, ReLU
from nalayer.model_files import load, save
from nalayer.network import Network
from nalayer.tensor_file import ModelFileError
from tests.cases import MODEL_NAMES, point, point_of

P = point_of("sparse-c", backend=None)
NAMES = ["ant", "bee", "cat", "dog"]
IMAGES = Network(
    (
        Conv2d((6, 6, 2), 3),
        ReLU(),
        MaxPool2d((4, 4, 3), 2),
        Dropout(0.5),
        Dense(12, 4),
    )
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def saved(path, p=P, classes=NAMES):
    save(path, p.model, p.parameters, classes)
    return path


def random_parameters(model, dtype=np.float64):
    return np.random.default_rng(0).normal(size=model.n_parameters).astype(dtype)


# --- what is written is read ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MODEL_NAMES, "plain"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_model_comes_back_to_the_bit(name, dtype, path):
    p = point_of("s" if name == "plain" else name, backend=None)
    model = PlainModel(p.network) if name == "plain" else p.model
    parameters = p.parameters[: model.n_parameters].astype(dtype)
    save(path, model, parameters, NAMES)
    found = load(path)
    assert type(found.model) is type(model)
    assert found.model.network == model.network
    assert found.parameters.dtype == dtype
    assert (found.parameters == parameters).all()
    assert found.classes.tolist() == NAMES
    if name.startswith("sparse"):
        assert (found.model.links.support == p.links.support).all()
    assert found.model.loss(found.parameters, p.x.astype(dtype), p.noisy_labels) == model.loss(
        parameters, p.x.astype(dtype), p.noisy_labels
    )


@pytest.mark.parametrize("network", [cnn((12, 12, 1), 4), IMAGES], ids=["cnn", "every layer"])
@pytest.mark.parametrize("kind", [SModel, CModel])
def test_networks_for_images_come_back(network, kind, path):
    model = kind(network)
    parameters = random_parameters(model, np.float32)
    save(path, model, parameters)
    found = load(path, backend="numpy")
    assert found.classes is None
    assert (found.parameters == parameters).all()
    assert found.model.backend == "numpy"
    assert {getattr(layer, "backend", "numpy") for layer in found.model.network.layers} == {"numpy"}
    assert load(path).model == model


def test_pseudo_counts_and_zeros_of_theta_come_back(path):
    p = point()
    model = SModel(p.network, 2.5, 60)
    parameters = p.parameters.copy()
    parameters[-1] = -np.inf
    save(path, model, parameters)
    found = load(path)
    assert (found.model.pseudo_count, found.model.n_samples) == (2.5, 60)
    assert (found.parameters == parameters).all()


@pytest.mark.parametrize(
    "classes",
    [
        NAMES,
        np.array(NAMES, dtype=object),
        ["ä", "", " x\n", "\0b"],
        [-1, 2**60, 3, 4],
        np.arange(4, dtype=np.uint8),
        [0.1, 1e300, 5e-324, -2.5],
        np.arange(4, dtype=np.float32) / 3,
    ],
)
def test_classes_come_back_in_their_dtype(classes, path):
    found = load(saved(path, classes=classes)).classes
    assert found.dtype == np.asarray(classes).dtype
    assert (found == np.asarray(classes)).all()


def test_the_file_explains_itself_to_other_programs(path):
    saved(path)
    arrays = load_file(path)
    assert set(arrays) == {
        *(f"layers.{i}.{name}" for i in range(3) for name in ("weight", "bias")),
        "channel_weights",
        "channel_logits",
        "support",
    }
    assert (arrays["channel_weights"] == P.channel_weights).all()
    description = json.loads(header_of(path)["__metadata__"]["description"])
    assert description["model"] == "c"
    assert description["dtype"] == "float64"
    assert "rows true class, columns observed class" in description["convention"]
    assert description["layers"][0] == {"kind": "Hidden", "n_in": 5, "n_out": 7, "rate": 0.0}
    assert description["classes"]["values"] == NAMES


# --- what cannot be kept -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: save(f, P.model, P.parameters[1:]), ValueError, "parameters must have shape"),
        (lambda f: save(f, P.model, P.parameters, NAMES[1:]), ValueError, "network's 4 classes"),
        (
            lambda f: save(f, SoftTargetModel(P.network), P.weights),
            TypeError,
            "model must be a PlainModel, SModel or CModel; found SoftTargetModel",
        ),
        (
            lambda f: save(f, P.model, P.parameters, np.array([b"a", b"b", b"c", b"d"])),
            TypeError,
            r"classes must be integers, floats, booleans or strings .* found \|S1",
        ),
        (
            lambda f: save(f, P.model, P.parameters, np.array([1, "a", None, 2.0], dtype=object)),
            TypeError,
            "classes must be .* found object",
        ),
        (
            lambda f: save(f, P.model, P.parameters, np.arange(4).astype("datetime64[D]")),
            TypeError,
            "classes must be .* found datetime64",
        ),
        (lambda f: save(f, P.model, P.parameters, [0, 1, 2, np.nan]), ValueError, "finite"),
        (lambda f: save(f, P.model, P.parameters, np.eye(4)), ValueError, "one dimension"),
    ],
)
def test_what_a_file_cannot_keep_is_refused_and_nothing_is_written(call, error, message, path):
    with pytest.raises(error, match=message):
        call(path)
    assert list(path.parent.iterdir()) == []


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    saved(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(os, step, full)
            with pytest.raises(OSError, match="No space left"):
                save(path, PlainModel(P.network), P.weights)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]
    save(path, PlainModel(P.network), P.weights)
    assert path.read_bytes() != before
    assert path.stat().st_mode & 0o777 == 0o644


# --- damaged and foreign files -------------------------------------------------------------------


def header_of(path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def rewrite(path, header: dict | bytes, data: bytes | None = None) -> None:
    """Put another header in front of a file's arrays."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + (content[start:] if data is None else data)
    )


def refused(path, message: str = "found") -> None:
    with pytest.raises(ModelFileError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: found ")
    assert "; expected " in str(error.value)


def test_a_file_cut_short_at_any_place_is_refused(path):
    content = saved(path).read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    lengths = {*range(20), *range(0, len(content), 97), header_end - 1, header_end, header_end + 1}
    for length in sorted(lengths | {len(content) - 1}):
        path.write_bytes(content[:length])
        refused(path)
    path.write_bytes(content + b"\0")
    refused(path)


def test_a_byte_changed_anywhere_is_refused(path):
    content = saved(path).read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    places = {*range(0, header_end), *range(header_end, len(content), 13), len(content) - 1}
    rng = np.random.default_rng(0)
    for place in sorted(places):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        refused(path)


@pytest.mark.parametrize("length", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_a_header_length_is_compared_with_the_file_before_memory_is_taken(path, length):
    content = saved(path).read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + content[8:])
    tracemalloc.start()
    refused(path, f"begin with a header length of {length}")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_header_longer_than_the_limit_is_refused(path, monkeypatch):
    saved(path)
    monkeypatch.setattr(tensor_file, "MAX_HEADER", 100)
    refused(path, "header length")


def test_foreign_files_are_refused(path):
    contents = [
        b"",
        b"hello",
        b"x" * 1000,
        pickle.dumps(P.parameters),
        b"\x93NUMPY\x01\x00" + b"v" * 200,
        b"PK\x03\x04" + b"\0" * 300,
        (10).to_bytes(8, "little") + b"{}        ",
        (10).to_bytes(8, "little") + b"[1, 2, 3]x",
    ]
    for content in contents:
        path.write_bytes(content)
        refused(path)
    save_file({"weight": np.ones(3)}, path)
    refused(path, "a safetensors file of another kind; expected one of format 'nalayer model'")
    with pytest.raises(FileNotFoundError):
        load(path.with_name("missing"))


def test_nothing_is_executed(path, tmp_path):
    witness = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return open, (str(witness), "w")

    path.write_bytes(pickle.dumps(Trap()))
    refused(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_offsets": [0, 2**40]}, "an array 'layers.0.bias' with"),
        ({"data_offsets": [-8, 48]}, "an array 'layers.0.bias' with"),
        ({"data_offsets": [0]}, "an array 'layers.0.bias' with"),
        ({"data_offsets": [0.0, 56.0]}, "an array 'layers.0.bias' with"),
        ({"data_offsets": "ab"}, "an array 'layers.0.bias' with"),
        ({"shape": [2**62, 4]}, "an array 'layers.0.bias' with"),
        ({"shape": [8]}, "an array of 64 bytes"),
        ({"shape": [7, 1, 1, 1, 1]}, "an array 'layers.0.bias' with"),
        ({"shape": [True]}, "an array 'layers.0.bias' with"),
        ({"shape": 7}, "an array 'layers.0.bias' with"),
        ({"dtype": "O"}, "an array 'layers.0.bias' with"),
        ({"dtype": "F32"}, "an array of 28 bytes"),
        ({"dtype": ["F64"]}, "an array 'layers.0.bias' with"),
    ],
)
def test_a_header_that_claims_what_is_not_there_is_refused(path, change, message):
    saved(path)
    header = header_of(path)
    header["layers.0.bias"] |= change
    rewrite(path, header)
    refused(path, message)


def test_gaps_overlaps_and_doubles_are_refused(path):
    saved(path)
    header = header_of(path)
    del header["layers.0.bias"]
    rewrite(path, header)
    refused(path)
    text = json.dumps(header_of(saved(path))).encode()
    rewrite(path, text + b" ")
    load(path)
    rewrite(path, text + b"\t")
    refused(path, "a header that is no JSON object")
    rewrite(path, text[:-1] + b"," + text[1:])  # every key twice
    refused(path, "a header that is no JSON object")
    rewrite(saved(path), b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    refused(path, "a header that is no JSON object")


def test_another_version_is_refused(path):
    saved(path)
    header = header_of(path)
    header["__metadata__"]["version"] = "2"
    rewrite(path, header)
    refused(path, "found version '2'; expected version '1'")


def consistent(path, description: dict, arrays: dict) -> None:
    """Write a file whose checksum is right, whatever it says."""
    tensor_file.write(path, description, arrays)


def contents(path) -> tuple[dict, dict]:
    return json.loads(header_of(path)["__metadata__"]["description"]), load_arrays(
        path.read_bytes()
    )


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("model",), "z"),
        (("model",), "s"),
        (("dtype",), "float16"),
        (("dtype",), "float32"),
        (("layers",), []),
        (("layers",), "Dense"),
        (("layers", 0), {"kind": "os.system", "n_in": 1}),
        (("layers", 0, "kind"), "Dense"),
        (("layers", 0, "n_in"), 6),
        (("layers", 0, "n_in"), 10**15),
        (("layers", 0, "n_in"), -5),
        (("layers", 0, "n_in"), 5.0),
        (("layers", 0, "n_in"), "5"),
        (("layers", 1, "n_in"), 6),
        (("layers", 0, "rate"), 1.0),
        (("layers", 0, "rate"), "x"),
        (("layers", 0, "backend"), "numpy"),
        (("settings",), {"links": None}),
        (("settings",), {"backend": None}),
        (("classes", "values"), ["a"] * 3),
        (("classes", "values"), [1, 2, 3, 4]),
        (("classes", "dtype"), "U1000000000"),
        (("classes",), 4),
    ],
)
def test_a_consistent_file_that_makes_no_sense_is_refused(path, where, value):
    description, arrays = contents(saved(path))
    *outer, last = where
    place = description
    for key in outer:
        place = place[key]
    place[last] = value
    consistent(path, description, arrays)
    refused(path, "a model that cannot be")


@pytest.mark.parametrize(
    "change",
    [
        {"support": np.zeros((4, 3), np.int64)},
        {"support": np.zeros((4, 3))},
        {"channel_logits": np.zeros((4, 4))},
        {"channel_logits": np.zeros((4, 3), np.float32)},
        {"surprise": np.zeros(3)},
    ],
)
def test_arrays_that_do_not_fit_the_model_are_refused(path, change):
    description, arrays = contents(saved(path))
    consistent(path, description, arrays | change)
    refused(path, "a model that cannot be")
    del arrays["channel_weights"]
    consistent(path, description, arrays)
    refused(path, "a model that cannot be")


def test_the_checksum_covers_arrays_and_description(path):
    saved(path)
    header, content = header_of(path), path.read_bytes()
    description = json.loads(header["__metadata__"]["description"])
    text, arrays = header["__metadata__"]["description"], load_arrays(content)
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.tobytes())
    assert digest.hexdigest() == header["__metadata__"]["sha256"]
    description["classes"]["values"][0] = "owl"
    header["__metadata__"]["description"] = json.dumps(description)
    rewrite(path, header)
    refused(path, "arrays or a description that do not match")


# --- the estimator -------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 4))
Y = (X[:, 0] > 0).astype(int) + (X[:, 1] > 0)
FAST = {"n_baseline_epochs": 3, "n_epochs": 2, "hidden_layer_sizes": (8,), "random_state": 0}


def fitted(y=Y, **settings):
    return NoiseAdaptationClassifier(**(FAST | settings)).fit(X, y)


@pytest.mark.parametrize(
    ("settings", "y"),
    [
        ({}, Y),
        ({"noise_model": "complex", "n_kept": np.int64(2)}, np.array(["a", "bb", "c"])[Y]),
        ({"noise_model": "none", "dtype": "float32"}, Y > 0),
        ({"missing_label": -1, "random_state": np.int64(3)}, np.where(X[:, 2] > 1, -1, Y)),
        ({"missing_label": np.nan}, np.where(X[:, 2] > 1, np.nan, Y)),
        ({"missing_label": "?"}, np.where(X[:, 2] > 1, "?", np.array(list("abc"))[Y])),
        ({"hidden_layer_sizes": [6, 5], "method": "em", "backend": "numpy"}, Y.astype(np.int16)),
    ],
)
def test_an_estimator_comes_back_with_all_it_knows(path, settings, y):
    clf = fitted(y, **settings)
    clf.save(path)
    found = NoiseAdaptationClassifier.load(path)
    for name, value in found.get_params().items():
        expected = clf.get_params()[name]
        if isinstance(expected, list):
            expected = tuple(expected)
        assert value == expected or (value != value and expected != expected), name
    assert (found.parameters_ == clf.parameters_).all()
    assert found.classes_.dtype == clf.classes_.dtype
    assert (found.predict(X) == clf.predict(X)).all()
    assert (found.predict_noisy_proba(X) == clf.predict_noisy_proba(X)).all()
    assert (found.noise_matrix_ == clf.noise_matrix_).all()
    for name in ("log_likelihood_", "certificate_", "history_", "n_iter_", "n_features_in_"):
        assert getattr(found, name) == getattr(clf, name), name
    assert (load(path).parameters == clf.parameters_).all()
    again = clf.partial_fit(X, y).parameters_
    assert (found.partial_fit(X, y).parameters_ == again).all()
    assert (found.fit(X, y).parameters_ == clf.fit(X, y).parameters_).all()


def test_feature_names_come_back(path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("wxyz"))
    NoiseAdaptationClassifier(**FAST).fit(frame, Y).save(path)
    found = NoiseAdaptationClassifier.load(path)
    assert found.feature_names_in_.tolist() == list("wxyz")
    with pytest.raises(ValueError, match="feature names"):
        found.predict(frame.rename(columns={"w": "v"}))


def test_what_an_estimator_cannot_keep_is_refused(path):
    with pytest.raises(TypeError, match="random_state must be an integer or None to be kept"):
        fitted(random_state=np.random.RandomState(0)).save(path)
    with pytest.raises(TypeError, match="missing_label must be integers, floats, booleans or str"):
        fitted(missing_label=b"x").save(path)
    with pytest.raises(Exception, match="not fitted yet"):
        NoiseAdaptationClassifier().save(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("settings",), {}),
        (("settings",), []),
        (("settings", "noise_model"), "s"),
        (("settings", "batch_size"), "64"),
        (("settings", "missing_label"), 3),
        (("settings", "surprise"), 3),
        (("seed",), -1),
        (("seed",), "x"),
        (("feature_names",), ["a"]),
        (("feature_names",), [1, 2, 3, 4]),
        (("history",), None),
        (("log_likelihood",), "0"),
        (("n_iter",), 1.5),
    ],
)
def test_an_estimator_that_makes_no_sense_is_refused(path, where, value):
    fitted().save(path)
    description, arrays = contents(path)
    *outer, last = ("estimator", *where)
    place = description
    for key in outer:
        place = place[key]
    place[last] = value
    consistent(path, description, arrays)
    with pytest.raises(ModelFileError, match=r"what no estimator has|a model that cannot be"):
        NoiseAdaptationClassifier.load(path)


def test_a_model_alone_is_no_estimator(path):
    with pytest.raises(ModelFileError, match="a model alone; expected one that an estimator saved"):
        NoiseAdaptationClassifier.load(saved(path))
    fitted().save(path)
    description, arrays = contents(path)
    consistent(path, description, {n: a for n, a in arrays.items() if n != "noise_matrix"})
    with pytest.raises(ModelFileError, match="noise_matrix"):
        NoiseAdaptationClassifier.load(path)
    consistent(path, description | {"classes": None}, arrays)
    with pytest.raises(ModelFileError, match="no classes"):
        NoiseAdaptationClassifier.load(path)


def test_layers_that_do_not_fit_onto_each_other_are_refused(path):
    model = PlainModel(Network((Dense(5, 7), ReLU(), Dense(6, 4))))
    save(path, model, random_parameters(model))
    refused(path, "a model that cannot be .*n_in is 6")


def test_links_are_those_of_the_file(path):
    """A sparse model saved and loaded is not the dense one with the same shapes."""
    other = replace(P, links=nalayer.models.kernels.link_index(np.sort(P.links.support)[:, ::-1]))
    assert (load(saved(path, other)).model.links.support == other.links.support).all()
