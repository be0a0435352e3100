"""Networks, models and training with CuPy arrays: what the CPU gives, and on the GPU throughout.

Without a GPU on the stand-in for CuPy, which refuses NumPy's arrays beside its own.
"""

import functools

import numpy as np
import pytest

import kernels
import nalayer
from kernels import get_backend, link_index
from nalayer import training
from nalayer.devices import to_device, to_host
from nalayer.image_layers import Conv2d, ConvBlock, MaxPool2d
from nalayer.layers import Dense, Dropout, Hidden, ReLU
from nalayer.losses import nearest_distributions
from nalayer.optimisers import SGD, Split
from nalayer.training import run_epoch
from tests.kernels import host_cuda
from tests.kernels.gpu_fixtures import cases_of, check_returns_at_once

ADAM = nalayer.Adam()
N, K = 21, 3
SUPPORT = np.array([[0, 1], [1, 2], [0, 2]])


def network_of(dropout=0.5):
    return nalayer.mlp(4, (5, 3), K, dropout)


def setting(kind, dtype=np.float64, dropout=0.5):
    """Return a model of that kind, parameters to start from, features and targets."""
    rng = np.random.default_rng(3)
    network = network_of(dropout)
    weights = network.initial_weights(rng, dtype)
    x, labels = rng.normal(size=(N, 4)).astype(dtype), rng.integers(K, size=N)
    channel = rng.normal(size=(K, K)).astype(dtype)
    if kind == "plain":
        return nalayer.PlainModel(network), weights, x, labels
    if kind == "soft":
        targets = nearest_distributions(rng.normal(size=(N, K))).astype(dtype)
        return nalayer.SoftTargetModel(network), weights, x, targets
    counts = {"pseudo_count": 0.5, "n_samples": N} if kind == "s with pseudo-counts" else {}
    model = nalayer.SModel(network, **counts)
    start = model.pack(weights, channel)
    if kind.endswith("c"):
        model, start = nalayer.c_start(model, start)
        start = start + 0.1 * rng.normal(size=start.shape).astype(dtype)
    if kind.startswith("sparse"):
        model, start = nalayer.sparse_start(model, start, link_index(SUPPORT))
    return model, start, x, labels


KINDS = ("plain", "soft", "s", "c", "sparse s", "sparse c")


def trained(arguments, **options):
    streams = {name: nalayer.stream(7, name) for name in ("shuffling", "dropout")}
    return nalayer.train(*arguments, batch_size=8, n_epochs=2, **streams, **options)


def check_close(found, expected):
    """Differ by roundings only, of numbers around one; Adam's quotient blows them up at first."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2**16 * np.finfo(found.dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_cpus_to_rounding(cupy, kind):
    on_cpu = setting(kind)
    on_gpu = to_device(on_cpu)
    held_out = on_cpu[2][:5], on_cpu[3][:5]
    expected = trained(on_cpu, validation=held_out)
    found = trained(on_gpu, validation=to_device(held_out))
    assert isinstance(found.parameters, cupy.ndarray)
    check_close(to_host(found.parameters), expected.parameters)
    assert np.abs(expected.parameters - on_cpu[1]).max() > 1e-3
    assert found.labels_hash == expected.labels_hash
    for a, b in zip(found.history, expected.history, strict=True):
        assert type(a.loss) is type(a.validation_loss) is float
        assert (a.loss, a.validation_loss) == pytest.approx((b.loss, b.validation_loss), rel=1e-11)


def test_float32_and_step_factors_and_other_optimisers(cupy):
    model, *arrays = setting("s", np.float32)
    factors = model.step_factors(3.0)
    expected = trained((model, *arrays), step_factors=factors)
    found = trained((model, *to_device(arrays)), step_factors=factors)
    check_close(to_host(found.parameters), expected.parameters)
    sgd = Split(SGD(0.1), SGD(0.3), model.network.n_weights)
    expected = trained((model, *arrays), optimiser=sgd)
    found = trained((model, *to_device(arrays)), optimiser=sgd)
    check_close(to_host(found.parameters), expected.parameters)


NETWORKS = {
    "layers one by one": (Dense(50, 5), ReLU(), Dropout(0.25), Dense(5, K)),
    "blocks": (
        ConvBlock((5, 5, 2), 3, pool=2, padding="same", rate=0.25),
        ConvBlock((2, 2, 3), 4, size=2),
        Hidden(4, 5, 0.5),
        Dense(5, K),
    ),
    "convolution and pooling": (Conv2d((5, 5, 2), 3), ReLU(), MaxPool2d((3, 3, 3)), Dense(3, K)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_are_trained_as_on_the_cpu(cupy, name):
    rng, network = np.random.default_rng(0), nalayer.Network(NETWORKS[name])
    model = nalayer.PlainModel(network)
    x, labels = rng.normal(size=(N, 50)), rng.integers(K, size=N)
    arguments = model, network.initial_weights(rng), x, labels
    check_close(to_host(trained(to_device(arguments)).parameters), trained(arguments).parameters)


def test_models_are_started_from_each_other(cupy):
    s_model, parameters, *_ = setting("s")
    links = link_index(SUPPORT)
    expected = nalayer.sparse_start(*nalayer.c_start(s_model, parameters), links)[1]
    on_gpu = nalayer.c_start(s_model, to_device(parameters))
    found = nalayer.sparse_start(*on_gpu, to_device(links))[1]
    assert isinstance(found, cupy.ndarray)
    assert to_host(found).tobytes() == expected.tobytes()
    with pytest.raises(TypeError, match="links is a NumPy array"):
        nalayer.sparse_start(*on_gpu, links)


def test_predictions_are_the_cpus(cupy):
    model, weights, x, _ = setting("plain")
    network = model.network
    logits = network.logits(*to_device((weights, x)))
    assert isinstance(logits, cupy.ndarray)
    check_close(to_host(logits), network.logits(weights, x))
    classes = to_host(network.predict(*to_device((weights, x))))
    assert classes.tolist() == network.predict(weights, x).tolist()


def test_a_run_that_was_killed_ends_in_the_same_bits(cupy, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LEAST_RECORDED", 1)
    arguments = to_device(setting("sparse s"))
    whole = trained(arguments, checkpoint=tmp_path / "whole")

    class KilledError(Exception):
        pass

    def killed(epoch, parameters):
        if epoch.number == 1:
            raise KilledError

    with pytest.raises(KilledError):
        trained(arguments, checkpoint=tmp_path / "killed", on_epoch=killed)
    resumed = trained(arguments, checkpoint=tmp_path / "killed")
    assert isinstance(resumed.parameters, cupy.ndarray)
    assert to_host(resumed.parameters).tobytes() == to_host(whole.parameters).tobytes()
    with pytest.raises(nalayer.checkpoints.CheckpointError, match="other model, parameters"):
        trained(to_host(arguments), checkpoint=tmp_path / "killed")


def test_arrays_of_two_kinds_are_refused(cupy):
    model, *arrays = setting("sparse s")
    on_gpu = to_device(arrays)
    for place, words in enumerate(
        (
            "x is a CuPy array and parameters a NumPy array",
            "x is a NumPy array and parameters a CuPy array",
            "targets is a NumPy array and parameters a CuPy array",
        )
    ):
        mixed = [*on_gpu[:place], arrays[place], *on_gpu[place + 1 :]]
        with pytest.raises(TypeError, match=words):
            trained((to_device(model), *mixed))
    with pytest.raises(TypeError, match="links is a NumPy array"):
        trained((model, *on_gpu))


def test_to_device_and_back_leaves_what_is_no_array(cupy):
    model = setting("sparse s")[0]
    value = {"a": (np.arange(3), None, 1.5), "model": model, "list": [np.float32(2)]}
    moved = to_device(value)
    assert isinstance(moved["a"][0], cupy.ndarray)
    assert isinstance(moved["model"].links.support, cupy.ndarray)
    assert moved["model"].network is model.network
    assert moved["a"][1:] == (None, 1.5)
    back = to_host(moved)
    assert back["a"][0].tolist() == [0, 1, 2]
    assert type(back["model"].links.support) is np.ndarray
    assert to_host(cupy.asarray(np.float64(3))) == 3.0
    assert to_host(model) is model


RECORDED_NETWORKS = {
    **NETWORKS,
    "wide windows": (ConvBlock((5, 5, 2), 3, pool=3, rate=0.25), Dense(3, K)),
}
RECORDED = {
    **{kind: (kind, ADAM) for kind in (*KINDS, "s with pseudo-counts")},
    **{name: (name, ADAM) for name in RECORDED_NETWORKS},
    "two optimisers": ("s", Split(ADAM, nalayer.Adam(0.1), network_of().n_weights)),
}


def after_epochs(what, optimiser, dtype, dropout):
    """Return all that two epochs change, with a smaller batch at the end: bytes and numbers."""
    if what in RECORDED_NETWORKS:
        rng, network = np.random.default_rng(0), nalayer.Network(RECORDED_NETWORKS[what])
        weights = network.initial_weights(rng, dtype)
        x, labels = rng.normal(size=(N, 50)).astype(dtype), rng.integers(K, size=N)
        arguments = nalayer.PlainModel(network), weights, x, labels
    else:
        arguments = setting(what, dtype)
    model, parameters, x, targets = to_device(arguments)
    factors = np.linspace(0.5, 2, parameters.size).astype(dtype)
    state = optimiser.initial_state(parameters)
    shuffling, seeds = nalayer.stream(7, "shuffling"), nalayer.stream(7, "dropout")
    options = {"shuffling": shuffling, "dropout": seeds if dropout else None, "batch_size": 4}
    for _ in range(2):
        n_steps = run_epoch(
            model,
            parameters,
            x,
            targets,
            optimiser,
            state,
            step_factors=to_device(factors),
            **options,
        )
        assert n_steps == 6
    states = state if type(state) is tuple else (state,)
    arrays = [parameters, *(array for one in states for array in (one.mean, one.square))]
    places = [rng.bit_generator.state for rng in (shuffling, seeds)]
    return [to_host(a).tobytes() for a in arrays], [one.n_steps for one in states], places


@pytest.mark.parametrize("name", RECORDED)
def test_steps_that_are_recorded_give_the_same_bits(cupy, monkeypatch, name):
    what, optimiser = RECORDED[name]
    replays = []

    def counted(self):
        replays.append(self)
        replay(self)

    graphs = get_backend("cupy").graphs
    replay = graphs.Recording.replay
    monkeypatch.setattr(graphs.Recording, "replay", counted)
    for dtype, dropout in ((np.float32, True), (np.float64, False)):
        expected = after_epochs(what, optimiser, dtype, dropout)
        assert not replays
        with monkeypatch.context() as patch:
            patch.setattr(training, "LEAST_RECORDED", 1)
            assert after_epochs(what, optimiser, dtype, dropout) == expected
        assert len(replays) == 2 * 4
        replays.clear()


def test_what_may_not_be_recorded_is_not(cupy, monkeypatch):
    monkeypatch.setattr(training, "LEAST_RECORDED", 1)
    monkeypatch.setattr(kernels, "recording_stream", None)
    model, *arrays = to_device(setting("plain"))

    class OtherModel(nalayer.PlainModel):
        pass

    class OtherLayer(Hidden):
        pass

    layers = OtherLayer(4, 5), Dense(5, K)
    state = ADAM.initial_state(arrays[0])
    streams = {"shuffling": nalayer.stream(7, "shuffling"), "batch_size": 4}
    other = nalayer.PlainModel(nalayer.Network(layers))
    weights = to_device(other.network.initial_weights(np.random.default_rng(0)))
    run_epoch(OtherModel(model.network), *arrays, ADAM, state, **streams)
    run_epoch(other, weights, *arrays[1:], ADAM, ADAM.initial_state(weights), **streams)
    run_epoch(model, *arrays, SGD(0.1), None, **streams)
    with pytest.raises(TypeError, match="not callable"):  # this one would be
        run_epoch(model, *arrays, ADAM, state, **streams)


def test_a_recording_that_fails_leaves_the_device_as_it_was(cupy):
    values = cupy.asarray(np.arange(3.0))
    with kernels.recording_stream() as record:

        def fails():
            raise KeyError("on purpose")

        def doubles():
            np.multiply(values, 2, out=values)

        with pytest.raises(KeyError, match="on purpose"):
            record(fails)
        doubles()
        recording = record(doubles)
        assert to_host(values).tolist() == [0, 2, 4]
        recording.replay()
        recording.replay()
    assert to_host(values).tolist() == [0, 8, 16]


def epoch_of(kind):
    """Return a function and its arguments: an epoch on the GPU, again and again."""
    model, parameters, x, targets = to_device(setting(kind, np.float32))
    state = ADAM.initial_state(parameters)
    streams = {name: nalayer.stream(7, name) for name in ("shuffling", "dropout")}
    arguments = model, parameters, x, targets, ADAM, state
    return functools.partial(run_epoch, *arguments, batch_size=8, **streams)


@pytest.mark.parametrize("kind", cases_of("device", KINDS))
def test_no_step_waits_for_the_device(device, kind):
    check_returns_at_once(device, epoch_of(kind))


@pytest.mark.parametrize("kind", cases_of("host", (*KINDS, "s with pseudo-counts")))
def test_no_step_looks_at_a_number_on_the_device(host, kind, monkeypatch):
    for least in (1, 100):  # recorded, and not
        monkeypatch.setattr(training, "LEAST_RECORDED", least)
        epoch = epoch_of(kind)
        host_cuda.waits.clear()
        epoch()
        assert host_cuda.waits == []
