import numpy as np
import pytest
from scipy.special import log_softmax

import kernels
from em_baseline.statements import Literal
from nalayer import PlainModel, SModel, SoftTargetModel, check_gradient, mlp
from tests.cases import point, soft_targets

BACKENDS = tuple(kernels.BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pseudo_count", [0.0, 2.5])
def test_s_model_gradient_is_the_derivative_of_the_literal_likelihood(backend, pseudo_count):
    p = point()
    model = SModel(p.network, pseudo_count, p.n, backend)
    loss, gradient = model.loss_and_gradient(p.parameters, p.x, p.noisy_labels)

    def literal_loss(parameters: np.ndarray) -> complex:
        weights, channel_logits = model.unpack(parameters)
        literal = Literal(p.network.logits(weights, p.x), channel_logits, p.noisy_labels)
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


def test_pack_and_unpack_are_inverse_and_step_factors_hit_the_channel_only():
    p = point()
    weights, channel = p.model.unpack(p.parameters)
    assert np.array_equal(weights, p.weights)
    assert np.array_equal(channel, p.channel_logits)
    network_factors, channel_factors = p.model.unpack(p.model.step_factors(0.25))
    assert set(network_factors) == {1.0}
    assert set(channel_factors.ravel()) == {0.25}


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
        ({1: P.x.tolist()}, TypeError, "x must be a NumPy array"),
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
