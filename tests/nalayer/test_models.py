import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import log_softmax

import kernels
from em_baseline.statements import Literal
from nalayer import (
    SGD,
    CModel,
    PlainModel,
    SModel,
    SoftTargetModel,
    c_start,
    check_gradient,
    gather_links,
    mlp,
    noise_matrix,
    sparse_start,
    stream,
    top_support,
    train,
)
from nalayer.buffers import SLICE
from tests.cases import MODEL_NAMES, point, point_of, soft_targets, zeros_outside

BACKENDS = tuple(kernels.CPU_BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pseudo_count", [0.0, 2.5])
def test_s_model_gradient_is_the_derivative_of_the_literal_likelihood(backend, pseudo_count):
    p = point()
    model = SModel(p.network, pseudo_count, p.n, backend)
    loss, gradient = model.loss_and_gradient(p.parameters, p.x, p.noisy_labels)

    def literal_loss(parameters: np.ndarray) -> complex:
        literal = Literal.of(model, parameters, p.x, p.noisy_labels)
        return -(literal.log_likelihood + pseudo_count * np.log(literal.theta).sum()) / p.n

    assert abs(loss - literal_loss(p.parameters).real) <= 1e-14 * abs(loss)
    assert loss == model.loss(p.parameters, p.x, p.noisy_labels)
    check = check_gradient(literal_loss, gradient, p.parameters, method="complex-step")
    assert check.relative_error <= 1e-13
    directions = check_gradient(
        lambda q: model.loss(q, p.x, p.noisy_labels),
        gradient,
        p.parameters,
        n_directions=5,
        rng=np.random.default_rng(0),
        step=1e-5,  # small enough not to cross a kink of the ReLUs here
    )
    assert directions.relative_error <= 1e-8


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_gradient_of_every_model_is_the_derivative_of_the_literal_likelihood(name):
    p = point_of(name)
    loss, gradient = p.model.loss_and_gradient(p.parameters, p.x, p.noisy_labels)

    def literal_loss(parameters: np.ndarray) -> complex:
        return -Literal.of(p.model, parameters, p.x, p.noisy_labels).log_likelihood / p.n

    assert p.model.name == name
    assert abs(loss - literal_loss(p.parameters).real) <= 1e-14 * abs(loss)
    assert abs(loss - p.model.loss(p.parameters, p.x, p.noisy_labels)) <= 1e-14 * abs(loss)
    check = check_gradient(literal_loss, gradient, p.parameters, method="complex-step")
    assert check.relative_error <= 1e-13
    directions = check_gradient(
        lambda q: p.model.loss(q, p.x, p.noisy_labels),
        gradient,
        p.parameters,
        n_directions=5,
        rng=np.random.default_rng(0),
        step=1e-5,  # small enough not to cross a kink of the ReLUs here
    )
    assert directions.relative_error <= 1e-8


def test_pseudo_counts_of_a_sparse_model_are_on_its_links():
    p, alpha = point_of("sparse-s"), 2.5
    model = SModel(p.network, alpha, p.n, "numpy", p.links)
    loss, gradient = model.loss_and_gradient(p.parameters, p.x, p.noisy_labels)

    def literal_loss(parameters: np.ndarray) -> complex:
        literal = Literal.of(model, parameters, p.x, p.noisy_labels)
        theta = np.take_along_axis(literal.theta[0], p.links.support, axis=1)
        return -(literal.log_likelihood + alpha * np.log(theta).sum()) / p.n

    assert abs(loss - literal_loss(p.parameters).real) <= 1e-14 * abs(loss)
    check = check_gradient(literal_loss, gradient, p.parameters, method="complex-step")
    assert check.relative_error <= 1e-13


@pytest.mark.parametrize("name", ["sparse-s", "sparse-c"])
def test_a_sparse_model_is_the_dense_one_with_zeros_outside_its_links(name):
    sparse = point_of(name)
    dense = zeros_outside(sparse)
    (a, d_sparse), (b, d_dense) = (
        p.model.loss_and_gradient(p.parameters, p.x, p.noisy_labels) for p in (sparse, dense)
    )
    assert abs(a - b) <= 1e-15 * p_scale(sparse)
    d_weights, *d_channel = sparse.model.unpack(d_sparse)
    d_dense_weights, *d_dense_channel = dense.model.unpack(d_dense)
    assert np.abs(d_weights - d_dense_weights).max() <= 1e-15 * p_scale(sparse)
    for kept, whole in zip(d_channel, d_dense_channel, strict=True):
        assert np.abs(gather_links(whole, sparse.links) - kept).max() <= 1e-15 * p_scale(sparse)
        # dead links get no gradient at all
        assert np.count_nonzero(whole) == np.count_nonzero(gather_links(whole, sparse.links))


def p_scale(p) -> float:
    """Return the largest number that enters a gradient, for bounds in roundings."""
    return 10 * max(1.0, *(float(np.abs(array).max()) for array in p.outputs()))


@pytest.mark.parametrize("name", ["s", "sparse-s"])
def test_the_c_model_starts_as_the_function_that_the_s_model_ended_with(name):
    p = point_of(name)
    model, parameters = c_start(p.model, p.parameters)
    weights, channel_weights, channel_logits = model.unpack(parameters)
    assert isinstance(model, CModel)
    assert model.name == {"s": "c", "sparse-s": "sparse-c"}[name]
    assert np.array_equal(weights, p.weights)
    assert np.array_equal(channel_logits, p.channel_logits)
    assert channel_weights.shape == (*p.channel_logits.shape, p.network.n_hidden)
    assert not channel_weights.any()
    model.check(parameters, p.x, p.noisy_labels)
    s_loss, s_gradient = p.model.loss_and_gradient(p.parameters, p.x, p.noisy_labels)
    c_loss, c_gradient = model.loss_and_gradient(parameters, p.x, p.noisy_labels)
    assert abs(c_loss - s_loss) <= 1e-15
    d_weights, d_channel_weights, d_channel_logits = model.unpack(c_gradient)
    shared = np.concatenate([d_weights, d_channel_logits.ravel()])
    assert np.abs(shared - s_gradient).max() <= 1e-15
    assert np.abs(d_channel_weights).max() > 1e-3  # so it leaves the s-model at once


def test_a_c_model_trained_from_its_start_goes_below_the_s_model_s_loss():
    p = point_of("s")
    s = train(p.model, p.parameters, p.x, p.noisy_labels, n_epochs=3, **by_sgd())
    model, parameters = c_start(p.model, s.parameters)
    c = train(model, parameters, p.x, p.noisy_labels, n_epochs=20, **by_sgd())
    assert abs(c.history[0].loss - s.history[-1].loss) <= 1e-15
    assert c.history[-1].loss < c.history[0].loss - 0.01
    assert model.unpack(c.parameters)[1].any()


def by_sgd():
    return {"optimiser": SGD(0.05), "batch_size": 60, "shuffling": stream(0, "shuffling")}


@pytest.mark.parametrize("name", ["s", "c"])
def test_a_sparse_start_keeps_the_dense_channel_s_links_and_shares_out_the_rest(name):
    p = point_of(name)
    theta = noise_matrix(p.channel_logits)
    links = kernels.link_index(top_support(theta, 2))
    model, parameters = sparse_start(p.model, p.parameters, links)
    weights, *_, channel_logits = model.unpack(parameters)
    assert model.name == f"sparse-{name}"
    assert np.array_equal(weights, p.weights)
    model.check(parameters, p.x, p.noisy_labels)
    kept = gather_links(theta, links)
    expected = kept / kept.sum(axis=1, keepdims=True)
    assert np.abs(noise_matrix(channel_logits) - expected).max() <= 1e-15
    if name == "c":
        assert np.array_equal(model.unpack(parameters)[1], gather_links(p.channel_weights, links))
    with pytest.raises(ValueError, match=f"model must be dense; found sparse-{name}"):
        sparse_start(model, parameters, links)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_and_soft_target_gradients_are_derivatives_of_their_losses(backend):
    p = point()
    k = p.network.n_classes
    for model, targets, one_hot in (
        (PlainModel(p.network, backend), p.noisy_labels, np.eye(k)[p.noisy_labels]),
        (SoftTargetModel(p.network, backend), c := soft_targets(p.n, k), c),
    ):
        loss, gradient = model.loss_and_gradient(p.weights, p.x, targets)

        def literal_loss(weights: np.ndarray, weight_of=one_hot) -> complex:
            q = Literal._softmax(p.network.logits(weights, p.x))
            return -(weight_of * np.log(q)).sum() / p.n

        assert loss == model.loss(p.weights, p.x, targets)
        assert abs(loss - literal_loss(p.weights).real) <= 1e-14 * loss
        check = check_gradient(literal_loss, gradient, p.weights, method="complex-step")
        assert check.relative_error <= 1e-13


def test_mini_batches_share_out_the_pseudo_counts():
    """The batches' losses, weighted by their size, add up to the loss of the whole set."""
    p = point()
    model = SModel(p.network, 3.0, p.n)
    whole, gradient = model.loss_and_gradient(p.parameters, p.x, p.noisy_labels)
    parts = [
        model.loss_and_gradient(p.parameters, p.x[b], p.noisy_labels[b])
        for b in (np.arange(0, 25), np.arange(25, 60))
    ]
    assert abs(whole - (25 * parts[0][0] + 35 * parts[1][0]) / 60) <= 1e-14
    assert np.abs(gradient - (25 * parts[0][1] + 35 * parts[1][1]) / 60).max() <= 1e-15


def test_the_penalty_of_a_saturated_channel_stays_finite():
    p = point()
    channel = np.where(np.eye(4) > 0, 400.0, -400.0)
    model = SModel(p.network, 1.0, p.n)
    loss, gradient = model.loss_and_gradient(model.pack(p.weights, channel), p.x, p.noisy_labels)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    # the penalty alone: 12 entries of theta = exp(-800), each costs 800 / n
    assert loss > 12 * 800 / p.n


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_pack_and_unpack_are_inverse_and_step_factors_hit_the_channel_only(name):
    p = point_of(name)
    weights, *channel = p.model.unpack(p.parameters)
    assert np.array_equal(weights, p.weights)
    assert len(channel) == len(p.channel)
    for found, expected in zip(channel, p.channel, strict=True):
        assert np.array_equal(found, expected)
    network_factors, *channel_factors = p.model.unpack(p.model.step_factors(0.25))
    assert set(network_factors) == {1.0}
    assert {factor for factors in channel_factors for factor in factors.ravel()} == {0.25}


def test_log_likelihood_of_the_baseline_is_the_cross_entropy_of_scikit_learn():
    from sklearn.metrics import log_loss

    p = point()
    q = np.exp(log_softmax(p.logits(), axis=1))
    ours = PlainModel(p.network).loss(p.weights, p.x, p.noisy_labels)
    assert abs(ours - log_loss(p.noisy_labels, q, labels=range(4))) <= 1e-14


P = point()
GOOD = (P.parameters, P.x, P.noisy_labels)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({0: P.parameters[:-1]}, ValueError, "parameters must have shape"),
        ({0: P.parameters.astype(np.float32)}, TypeError, "x must be float32.*found float64"),
        (
            {0: np.where(np.arange(P.parameters.size) == 3, np.nan, P.parameters)},
            ValueError,
            "finite",
        ),
        ({1: P.x[:, :2]}, ValueError, r"x must have shape \(n, 5\); found \(60, 2\)"),
        ({1: P.x[:0], 2: P.noisy_labels[:0]}, ValueError, "x must hold at least one sample"),
        ({1: np.where(P.x == P.x[4, 1], np.inf, P.x)}, ValueError, r"found inf at \(4, 1\)"),
        ({1: P.x.tolist()}, TypeError, "x must be a NumPy"),
        ({2: P.noisy_labels + 1}, ValueError, r"noisy_labels must lie in 0\.\.3"),
        ({2: P.noisy_labels[:-1]}, ValueError, "noisy_labels must have shape"),
    ],
)
def test_data_that_do_not_fit_the_s_model_are_refused(changes, error, message):
    arguments = [changes.get(i, value) for i, value in enumerate(GOOD)]
    with pytest.raises(error, match=message):
        P.model.check(*arguments)


def test_channels_without_a_distribution_or_a_label_are_refused():
    for channel, message in (
        (np.where(np.arange(4)[:, None] == 2, -np.inf, P.channel_logits), "row 2 holds only -inf"),
        (np.where(np.arange(4) == 2, -np.inf, P.channel_logits), "label 2, but column 2"),
        (P.channel_logits * np.nan, "holds NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            P.model.check(P.model.pack(P.weights, channel), P.x, P.noisy_labels)


def test_data_that_do_not_fit_a_c_model_or_a_sparse_model_are_refused():
    c, sparse = point_of("c"), point_of("sparse-c", n_kept=1)
    wild = c.model.pack(c.weights, c.channel_weights * np.inf, c.channel_logits)
    with pytest.raises(ValueError, match="channel_weights must be finite"):
        c.model.check(wild, c.x, c.noisy_labels)
    dead = sparse.channel_logits.copy()
    sparse.model.check(sparse.parameters, sparse.x, sparse.noisy_labels)
    dead[2] = -np.inf
    with pytest.raises(ValueError, match="row 2 holds only -inf"):
        sparse.model.check(replace(sparse, channel_logits=dead).parameters, c.x, c.noisy_labels)
    one_way = kernels.link_index(np.array([[0], [1], [1], [3]]))
    for model in (SModel(c.network, links=one_way), CModel(c.network, links=one_way)):
        with pytest.raises(ValueError, match="noisy_labels contains label 2, but no row of links"):
            model.check(np.zeros(model.n_parameters), c.x, c.noisy_labels)
    with pytest.raises(ValueError, match=r"channel_weights must have shape \(4, 4, 6\)"):
        c.model.pack(c.weights, c.channel_weights[:, :3], c.channel_logits)
    for start in (c_start, lambda *a: sparse_start(*a, one_way)):
        with pytest.raises(ValueError, match="parameters must have shape"):
            start(P.model, P.parameters[1:])


@pytest.mark.parametrize("model", [SModel, CModel])
def test_links_that_are_none_or_for_other_classes_are_refused(model):
    support = np.array([[0, 1], [1, 2], [0, 2]])
    with pytest.raises(TypeError, match=r"links must be None or a kernels\.LinkIndex.*ndarray"):
        model(P.network, links=support)
    with pytest.raises(ValueError, match="links must be for the network's 4 classes; found 3 rows"):
        model(P.network, links=kernels.link_index(support))


def test_a_c_model_has_no_pseudo_counts():
    with pytest.raises(TypeError, match="unexpected keyword argument 'pseudo_count'"):
        CModel(P.network, pseudo_count=1.0)


def test_pseudo_counts_have_to_be_sensible():
    with pytest.raises(ValueError, match="pseudo_count must be finite and at least 0; found -1"):
        SModel(P.network, -1)
    for n_samples in (None, 0):
        with pytest.raises(ValueError, match="n_samples must be the size of the training set"):
            SModel(P.network, 1.0, n_samples)
    zero = P.channel_logits.copy()
    zero[0, 1] = -np.inf
    with pytest.raises(ValueError, match="finite where pseudo_count is positive"):
        SModel(P.network, 1.0, P.n).check(P.model.pack(P.weights, zero), P.x, P.noisy_labels)


def test_a_label_out_of_range_is_refused_even_by_the_unchecked_path():
    """A compiled kernel would touch memory that is not its own."""
    for model, parameters in ((P.model, P.parameters), (PlainModel(P.network), P.weights)):
        for label in (-1, 4, 10**6):
            with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3"):
                model.loss_and_gradient(parameters, P.x, np.full(60, label))


def test_weights_and_channel_of_two_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"channel_logits must be float32.*found float64"):
        P.model.pack(P.weights.astype(np.float32), P.channel_logits)


def test_posteriors_that_are_no_distributions_are_refused():
    model = SoftTargetModel(mlp(5, (), 4))
    with pytest.raises(ValueError, match="targets must have non-negative rows"):
        model.check(np.zeros(24), P.x, np.ones((60, 4)))


def models_and_data(n: int):
    """Return every model with parameters, n samples (some of a few, again and again), targets."""
    sample_t = np.random.default_rng(0).integers(point().n, size=n)
    for name in MODEL_NAMES:
        p = point_of(name)
        yield p.model, p.parameters, p.x[sample_t], p.noisy_labels[sample_t]
    p = point()
    posterior = soft_targets(p.n, p.network.n_classes)
    yield PlainModel(p.network), p.weights, p.x[sample_t], p.noisy_labels[sample_t]
    yield SoftTargetModel(p.network), p.weights, p.x[sample_t], posterior[sample_t]


@pytest.mark.parametrize("n", [SLICE, SLICE + 1, 5 * SLICE - 7])
def test_slices_give_the_loss_of_one_piece(n):
    for model, parameters, x, targets in models_and_data(n):
        in_one_piece, _ = model.loss_and_gradient(parameters, x, targets)
        assert abs(model.loss(parameters, x, targets) - in_one_piece) <= 1e-14 * in_one_piece


def test_memory_for_the_loss_does_not_grow_with_the_data_set():
    def peak(model, *arguments) -> int:
        tracemalloc.start()
        model.loss(*arguments)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = models_and_data(SLICE), models_and_data(20 * SLICE)
    for (model, *small), (_, *large) in zip(few, many, strict=True):
        model.loss(*small)  # what is compiled at the first call is not counted
        assert peak(model, *large) <= 1.5 * peak(model, *small)
