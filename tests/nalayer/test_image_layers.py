"""Layers for images: gradients, shapes, the authors' network, and the statements on top of one."""

from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from em_baseline import statements
from nalayer import PlainModel, SModel, check_gradient, cnn, stream, train
from nalayer.buffers import Buffers
from nalayer.datasets import load_digits
from nalayer.image_layers import Conv2d, ConvBlock, MaxPool2d
from nalayer.layers import Dense, Dropout, Hidden, ReLU
from nalayer.network import Network
from tests.cases import JIT, MODEL_NAMES, point_of

# Loops over all pixels of large layers take minutes in Python.
BACKEND = "numba" if JIT else "numpy"

LAYERS = (
    Conv2d((5, 4, 2), 3),
    Conv2d((4, 3, 1), 2, padding="same"),
    Conv2d((4, 4, 2), 2, size=2),
    MaxPool2d((4, 4, 2)),
    MaxPool2d((5, 7, 1), size=3),
    Conv2d((4, 5, 2), 3, padding="same", backend="numpy"),
    MaxPool2d((4, 4, 2), backend="numpy"),
    ConvBlock((5, 4, 2), 3),
    ConvBlock((7, 6, 2), 3, padding="same", pool=2),
    ConvBlock((7, 6, 1), 2, pool=3, backend="numpy"),
)


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_backward_is_the_derivative_of_forward(layer):
    rng = np.random.default_rng(0)
    parameters = tuple(p + rng.normal(size=p.shape) for p in layer.initial(rng))
    x = rng.normal(size=(3, int(np.prod(layer.image_shape))))
    out, cache = layer.forward(parameters, x, None)
    assert out.shape == (3, int(np.prod(layer.out_shape)))
    weights = rng.normal(size=out.shape)  # of a scalar that depends on every output
    d_x, d_parameters = layer.backward(parameters, cache, weights)
    sizes = [x.size, *[p.size for p in parameters]]

    def scalar(flat: np.ndarray) -> complex:
        first, *rest = np.split(flat, np.cumsum(sizes)[:-1])
        views = tuple(r.reshape(p.shape) for r, p in zip(rest, parameters, strict=True))
        return (layer.forward(views, first.reshape(x.shape), None)[0] * weights).sum()

    at = np.concatenate([x.ravel(), *[p.ravel() for p in parameters]])
    claim = np.concatenate([d_x.ravel(), *[d.ravel() for d in d_parameters]])
    assert check_gradient(scalar, claim, at, method="complex-step").relative_error <= 1e-14
    assert check_gradient(lambda p: scalar(p).real, claim, at).relative_error <= 1e-10


@pytest.mark.parametrize("backend", [BACKEND, "numpy"])
@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_a_block_equals_its_layers_one_after_the_other(padding, pool, rate, backend):
    block = ConvBlock((7, 9, 2), 5, padding=padding, backend=backend, pool=pool, rate=rate)
    convolution = Conv2d((7, 9, 2), 5, padding=padding, backend=backend)
    layers = (convolution, ReLU(), MaxPool2d(convolution.out_shape, pool, backend), Dropout(rate))
    n_features = int(np.prod(block.out_shape))
    rng = np.random.default_rng(0)
    one = Network((block, Dense(n_features, 3)))
    many = Network((*layers, Dense(n_features, 3)))
    weights = rng.normal(size=one.n_weights)
    x, d_logits = rng.normal(size=(10, one.n_in)), rng.normal(size=(10, 3))
    buffers, found = Buffers(), []
    for network in (one, many):
        logits, caches = network.forward(
            weights, x, np.random.default_rng(5), buffers.part(network)
        )
        found += [logits, network.backward(weights, caches, d_logits)]
    assert np.array_equal(found[0], found[2])
    assert np.abs(found[1] - found[3]).max() <= 1e-14 * np.abs(found[3]).max()


def test_pixels_keep_their_places():
    """A filter that is 1 at one place shifts the image: rows, columns, channels stay apart."""
    rows, columns = 4, 5
    layer = Conv2d((rows, columns, 2), 1)
    image = np.arange(rows * columns * 2.0).reshape(rows, columns, 2)
    weight = np.zeros((3, 3, 2, 1))
    weight[2, 0, 1, 0] = 1
    out, _ = layer.forward((weight, np.array([0.5])), image.reshape(1, -1), None)
    assert np.array_equal(out.reshape(rows - 2, columns - 2), image[2:, :-2, 1] + 0.5)


def test_what_cannot_be_is_refused():
    for make, words in (
        (lambda: Conv2d((2, 5, 1), 3), "must fit into the image"),
        (lambda: Conv2d((5, 5, 1), 0), "n_filters must be at least 1"),
        (lambda: Conv2d((5, 5, 1), 3, padding="full"), "padding must be one of"),
        (lambda: Conv2d((5, 5, 1), 3, size=2, padding="same"), "must be odd"),
        (lambda: Conv2d((5, 0, 1), 3), "image_shape must be rows"),
        (lambda: MaxPool2d((1, 4, 1)), "fit into the image"),
        (lambda: ConvBlock((5, 5, 1), 3, pool=4), "pool must lie between 1 and 16 and fit"),
        (lambda: ConvBlock((5, 5, 1), 3, rate=1.0), "rate must lie in"),
        (lambda: cnn((28, 28, 1), 1), "n_classes"),
        (lambda: cnn((8, 8, 1), 10), "must fit into the image"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_the_network_of_the_authors():
    """Counted by hand from the published architecture, and every layer takes part in a gradient."""
    network = cnn((28, 28, 1), 10)
    convolutions = 9 * (32 + 32 * 32 + 32 * 64 + 64 * 64) + 2 * 32 + 2 * 64
    assert network.n_weights == convolutions + (5 * 5 * 64 + 1) * 512 + 513 * 10
    assert network.n_in == 784
    assert network.n_hidden == 512
    rng = np.random.default_rng(0)
    network = cnn((12, 12, 1), 3, backend=BACKEND)
    model = SModel(network)
    weights = network.initial_weights(rng) + 0.01 * rng.normal(size=network.n_weights)
    parameters = model.pack(weights, rng.normal(size=(3, 3)))
    x, labels = rng.random((6, 144)), rng.integers(3, size=6)
    _, gradient = model.loss_and_gradient(parameters, x, labels)
    assert all(
        np.abs(part).max() > 0
        for layer in network.unpack(gradient[: weights.size])
        for part in layer
    )

    def loss(p: np.ndarray) -> float:
        return float(model.loss_and_gradient(p, x, labels)[0])

    directions = [rng.normal(size=parameters.size) / 300 for _ in range(3)]
    for direction in directions:
        slope = check_slope(loss, parameters, direction)
        assert abs(slope - gradient @ direction) <= 1e-8 * np.abs(gradient).max()


def check_slope(loss, at: np.ndarray, direction: np.ndarray, h: float = 1e-4) -> float:
    """Return the fourth-order central difference along a direction."""
    far = loss(at + 2 * h * direction) - loss(at - 2 * h * direction)
    near = loss(at + h * direction) - loss(at - h * direction)
    return (8 * near - far) / (12 * h)


def test_a_network_takes_what_its_first_layer_takes():
    pool = MaxPool2d((4, 6, 2))
    assert Network((pool, Dense(12, 3))).n_in == 48
    assert Network((Conv2d((4, 6, 2), 5), Dense(40, 3))).n_in == 48


def small_cnn() -> Network:
    convolution = Conv2d((6, 6, 1), 2)
    pool = MaxPool2d(convolution.out_shape)
    return Network((convolution, ReLU(), pool, Hidden(8, 6), Dense(6, 4)))


@pytest.mark.parametrize("model", MODEL_NAMES)
def test_v1_to_v3_hold_on_a_cnn(model):
    """The network under the noise layer makes no difference to what ties joint training to EM."""
    rng = np.random.default_rng(3)
    network = small_cnn()
    weights = network.initial_weights(rng) + 0.3 * rng.normal(size=network.n_weights)
    p = point_of(model)
    p = replace(p, network=network, weights=weights, x=rng.normal(size=(p.n, 36)))
    rows = [
        *statements.same_function(p),
        *statements.backward_is_e_step(p, rng),
        *statements.fisher_identity(p, rng),
    ]
    assert {row.statement for row in rows} == {"V1", "V2", "V3"}
    assert {row.model for row in rows} == {model}
    assert not [row for row in rows if not row.holds]


@pytest.mark.skipif(not JIT, reason="loops over all pixels take minutes in Python")
def test_a_cnn_learns_the_digits():
    digits = load_digits(np.float32)
    convolution = Conv2d(digits.image_shape, 8)
    pool = MaxPool2d(convolution.out_shape)
    network = Network((convolution, ReLU(), pool, Hidden(72, 32), Dense(32, 10)))
    trained = train(
        PlainModel(network),
        network.initial_weights(stream(0, "initialisation"), np.float32),
        digits.x_train,
        digits.labels_train,
        n_epochs=20,
        batch_size=32,
        shuffling=stream(0, "shuffling"),
    )
    accuracy = (network.predict(trained.parameters, digits.x_test) == digits.labels_test).mean()
    assert accuracy > 0.93


@pytest.mark.skipif(not JIT, reason="convolution as Python loops")
def test_blas_has_one_thread_between_convolutions_and_its_own_number_afterwards(monkeypatch):
    seen = []

    def look(real):
        def called(self, *arguments, **options):
            seen.append({i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"})
            return real(self, *arguments, **options)

        return called

    monkeypatch.setattr(Dense, "forward", look(Dense.forward))
    monkeypatch.setattr(Dense, "backward", look(Dense.backward))
    x, labels = np.zeros((2, 144)), np.array([0, 1])
    with threadpool_limits(2, user_api="blas"):
        before = {i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}
        for backend, expected in (("numba", {1}), ("numpy", before)):
            model = PlainModel(cnn((12, 12, 1), 3, backend=backend), backend)
            weights = model.network.initial_weights(np.random.default_rng(0))
            model.loss_and_gradient(weights, x, labels)
            assert seen == [expected] * 2
            seen.clear()
        after = {i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}
    assert after == before


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_weights_and_images_may_lie_anywhere_in_memory(backend):
    network, rng = cnn((12, 12, 1), 3, backend), np.random.default_rng(0)
    weights, x = network.initial_weights(rng), rng.random((4, 144))
    apart = np.repeat(weights, 2)[::2], np.asfortranarray(x)
    assert np.array_equal(network.logits(*apart), network.logits(weights, x))
