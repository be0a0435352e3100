import tracemalloc

import numpy as np
import pytest

import kernels
from kernels import CPU_BACKENDS
from nalayer import check_gradient, mlp
from nalayer.buffers import SLICE, Buffers
from nalayer.layers import Dense, Dropout, Hidden, ReLU
from nalayer.network import Network
from nalayer.streams import stream


class FixedMask:
    """Stands in for a Generator so that a layer with dropout becomes one fixed function."""

    def __init__(self, seed: int):
        self.seed = seed

    def integers(self, high):
        return np.random.default_rng(self.seed).integers(high)


@pytest.mark.parametrize(
    "layer", [Dense(5, 3), ReLU(), Dropout(0.4), Hidden(5, 3), Hidden(5, 3, 0.4)], ids=repr
)
def test_layer_backward_is_the_derivative_of_its_forward(layer):
    rng = np.random.default_rng(0)
    parameters = tuple(p + rng.normal(size=p.shape) for p in layer.initial(rng))
    x = rng.normal(size=(4, 5))
    out, cache = layer.forward(parameters, x, FixedMask(1))
    weights = rng.normal(size=out.shape)  # of a scalar that depends on every output
    d_x, d_parameters = layer.backward(parameters, cache, weights)
    sizes = [x.size, *[p.size for p in parameters]]

    def scalar(flat: np.ndarray) -> complex:
        first, *rest = np.split(flat, np.cumsum(sizes)[:-1])
        views = tuple(r.reshape(p.shape) for r, p in zip(rest, parameters, strict=True))
        return (layer.forward(views, first.reshape(x.shape), FixedMask(1))[0] * weights).sum()

    at = np.concatenate([x.ravel(), *[p.ravel() for p in parameters]])
    claim = np.concatenate([d_x.ravel(), *[d.ravel() for d in d_parameters]])
    assert check_gradient(scalar, claim, at, method="complex-step").relative_error <= 1e-14
    assert check_gradient(lambda p: scalar(p).real, claim, at).relative_error <= 1e-10


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("n", [1, 5, 300])
def test_hidden_layer_is_dense_relu_and_dropout_in_sequence(backend, dtype, rate, n):
    rng = np.random.default_rng(2)
    hidden, dense = Hidden(9, 131, rate, backend), Dense(9, 131)
    parameters = tuple((p + rng.normal(size=p.shape)).astype(dtype) for p in hidden.initial(rng))
    x, d_out = rng.normal(size=(n, 9)).astype(dtype), rng.normal(size=(n, 131)).astype(dtype)
    out, cache = hidden.forward(parameters, x, FixedMask(3))
    d_x, (d_weight, d_bias) = hidden.backward(parameters, cache, d_out)

    affine, dense_cache = dense.forward(parameters, x, None)
    active, relu_cache = ReLU().forward((), affine, None)
    want, dropout_cache = Dropout(rate).forward((), active, FixedMask(3))
    d_active, _ = Dropout(rate).backward((), dropout_cache, d_out)
    d_affine, _ = ReLU().backward((), relu_cache, d_active)
    want_d_x, (want_d_weight, want_d_bias) = dense.backward(parameters, dense_cache, d_affine)

    eps = np.finfo(dtype).eps
    assert np.array_equal(out == 0, want == 0)
    assert np.abs(out - want).max() <= 4 * eps * np.abs(want).max()
    assert np.abs(d_bias - want_d_bias).max() <= 4 * eps * np.abs(d_affine).sum(axis=0).max()
    for found, wanted, terms in ((d_x, want_d_x, 131), (d_weight, want_d_weight, n)):
        assert np.abs(found - wanted).max() <= 4 * eps * np.sqrt(terms) * max(
            1.0, np.abs(wanted).max()
        )


def test_dropout_of_two_seeds_rows_or_columns_has_nothing_in_common():
    kept = np.stack([kernels.dropout_kept((300, 200), 0.5, seed) for seed in (1, 2, 1 << 40)])
    signs = 2.0 * kept - 1
    # Means of products of independent signs: standard deviation 1 / sqrt(count).
    for a, b in ((signs[0], signs[1]), (signs[0], signs[2]), (signs[1], signs[2])):
        assert abs((a * b).mean()) < 5 / np.sqrt(a.size)
    for lag in (1, 7, 64):
        assert abs((signs[:, lag:] * signs[:, :-lag]).mean()) < 5 / np.sqrt(signs.size)
        assert abs((signs[:, :, lag:] * signs[:, :, :-lag]).mean()) < 5 / np.sqrt(signs.size)


def test_buffers_give_the_same_gradient_and_no_new_memory():
    rng = np.random.default_rng(4)
    network, buffers = mlp(6, (8, 7), 3, dropout=0.5), Buffers()
    weights = network.initial_weights(rng)
    out = np.empty_like(weights)
    addresses = []
    for n in (16, 5, 16):  # a smaller batch gets the same memory
        x, d_logits = rng.normal(size=(n, 6)), rng.normal(size=(n, 3))
        logits, caches = network.forward(weights, x, FixedMask(n), buffers)
        network.backward(weights, caches, d_logits, out=out, buffers=buffers)
        plain_logits, plain_caches = network.forward(weights, x, FixedMask(n))
        assert np.array_equal(logits, plain_logits)
        assert np.array_equal(out, network.backward(weights, plain_caches, d_logits))
        addresses.append(logits.ctypes.data)
    assert len(set(addresses)) == 1


@pytest.mark.parametrize("hidden_sizes", [(), (6,), (7, 5)])
def test_network_backward_is_the_derivative_of_its_forward(hidden_sizes):
    rng = np.random.default_rng(1)
    network = mlp(4, hidden_sizes, 3)
    weights = network.initial_weights(rng) + 0.3 * rng.normal(size=network.n_weights)
    x, d_logits = rng.normal(size=(9, 4)), rng.normal(size=(9, 3))
    _, caches = network.forward(weights, x)
    check = check_gradient(
        lambda w: (network.logits(w, x) * d_logits).sum(),
        network.backward(weights, caches, d_logits),
        weights,
        method="complex-step",
    )
    assert check.relative_error <= 1e-14


def test_unpack_gives_views_of_the_whole_vector_in_order():
    network = mlp(3, (4,), 2)
    weights = np.arange(network.n_weights, dtype=np.float64)
    parts = [part for parameters in network.unpack(weights) for part in parameters]
    assert [part.shape for part in parts] == [(3, 4), (4,), (4, 2), (2,)]
    assert np.array_equal(np.concatenate([part.ravel() for part in parts]), weights)
    assert all(np.shares_memory(part, weights) for part in parts)


def test_dropout_keeps_the_mean_and_does_nothing_in_evaluation():
    x = np.ones((400, 500))
    out, factor = Dropout(0.5).forward((), x, stream(0, "dropout"))
    assert set(np.unique(out)) == {0.0, 2.0}
    # 200,000 coins of variance 1: five standard deviations of their mean
    assert abs(out.mean() - 1) < 5 / np.sqrt(out.size)
    same, nothing = Dropout(0.5).forward((), x, None)
    assert same is x
    assert nothing is None
    assert factor.shape == x.shape


def test_float32_stays_float32_through_forward_and_backward():
    rng = np.random.default_rng(0)
    network = mlp(4, (5,), 3, dropout=0.5)
    weights = network.initial_weights(rng, np.float32)
    logits, caches = network.forward(weights, rng.normal(size=(2, 4)).astype(np.float32), rng)
    assert logits.dtype == np.float32
    assert network.backward(weights, caches, logits).dtype == np.float32


def test_initial_weights_are_glorot_uniform_and_repeatable():
    network = mlp(300, (200,), 10)
    weights = network.initial_weights(stream(3, "initialisation"))
    assert np.array_equal(weights, network.initial_weights(stream(3, "initialisation")))
    (weight, bias), *_ = network.unpack(weights)
    limit = np.sqrt(6 / 500)
    assert limit * 0.99 < np.abs(weight).max() <= limit
    assert not bias.any()


def test_predict_is_the_arg_max_of_the_classifier():
    network = mlp(2, (), 3)
    weights = np.array([1.0, 0, 0, 0, 1, 0, 0, 0, 0.5])  # logits = (x_0, x_1, 0.5)
    assert network.predict(weights, np.array([[2.0, 1], [0, 3], [0, 0]])).tolist() == [0, 1, 2]


def test_logits_of_many_samples_need_memory_for_a_slice_of_them():
    rng = np.random.default_rng(6)
    network, n = mlp(3, (100,), 2), 10 * SLICE + 3
    weights, x = network.initial_weights(rng), rng.normal(size=(n, 3))
    one_piece, _ = network.forward(weights, x)
    tracemalloc.start()
    logits = network.logits(weights, x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.abs(logits - one_piece).max() <= 1e-14 * np.abs(one_piece).max()
    assert np.array_equal(network.predict(weights, x), one_piece.argmax(axis=1))
    assert peak <= logits.nbytes + 2 * SLICE * 100 * 8  # the hidden layer of all: ten slices


def test_predict_refuses_what_does_not_fit():
    network, x = mlp(2, (), 3), np.zeros((4, 2))
    for weights, features, message in (
        (np.zeros(10), x, r"weights must have shape \(9,\); found \(10,\)"),
        (np.zeros(9), x * np.nan, "x must be finite"),
        (np.zeros(9), x[:, :1], r"x must have shape \(n, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            network.predict(weights, features)


def test_a_network_may_begin_with_dropout():
    network = Network((Dropout(0.2), *mlp(5, (3,), 2).layers))
    assert network.n_in == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(3, (4,), 1), "n_classes must be at least 2; found 1"),
        (lambda: Dropout(1.0), r"rate must lie in \[0, 1\); found 1.0"),
        (lambda: Network((Dense(2, 2), ReLU())), "layers must end in a Dense layer"),
        (lambda: Network(()), "layers must end in a Dense layer"),
    ],
)
def test_impossible_networks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
