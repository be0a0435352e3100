"""Every other method's gradient against the formula of its own paper, written out once more."""

from dataclasses import replace

import numpy as np
import pytest

from em_baseline.statements import Literal
from em_baseline.steps import noise_matrix_m_step
from nalayer import Adam, PlainModel, SModel, check_gradient, mlp, train
from nalayer.losses import (
    DirichletPriorModel,
    EntropyModel,
    FixedChannelModel,
    LinearChannelModel,
    MixedModel,
    OneParameterModel,
    ReedModel,
    UnbiasedModel,
    nearest_distributions,
)
from nalayer.noise_layer import log_with_zeros
from nalayer.optimisers import SGD, Projected
from tests.cases import asymmetric_noise_matrix, point

P = point()
K = P.network.n_classes
THETA = asymmetric_noise_matrix(K, np.random.default_rng(3))
WITH_MISSING = np.where(np.arange(P.n) % 3 == 0, -1, P.noisy_labels)


def log_q_of(weights: np.ndarray) -> np.ndarray:
    """Return log q_ti by plain loops over layers: works for complex weights."""
    h = P.x
    layers = list(P.network.unpack(weights))
    for weight, bias in layers[:-1]:
        h = h @ weight + bias
        h = h * (h.real > 0)
    logits = h @ layers[-1][0] + layers[-1][1]
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def literal_reed(weights, kind, beta):
    log_q = log_q_of(weights)
    total = 0
    for t, z in enumerate(P.noisy_labels):
        row = log_q[t]
        own = row[row.real.argmax()] if kind == "hard" else (np.exp(row) * row).sum()
        total += beta * row[z] + (1 - beta) * own
    return -total / P.n


def literal_entropy(weights, lam):
    log_q = log_q_of(weights)
    total = 0
    for t, z in enumerate(WITH_MISSING):
        total += lam * (np.exp(log_q[t]) * log_q[t]).sum() if z == -1 else log_q[t, z]
    return -total / P.n


def literal_unbiased(weights):
    log_q, inverse = log_q_of(weights), np.linalg.inv(THETA)
    return sum(inverse[z] @ -log_q[t] for t, z in enumerate(P.noisy_labels)) / P.n


def literal_channel(weights, theta):
    q = np.exp(log_q_of(weights))
    return -sum(np.log(q[t] @ theta[:, z]) for t, z in enumerate(P.noisy_labels)) / P.n


def literal_larsen(parameters):
    epsilon = 1 / (1 + np.exp(-parameters[-1]))
    theta = (1 - epsilon) * np.eye(K) + epsilon / (K - 1) * (1 - np.eye(K))
    return literal_channel(parameters[:-1], theta)


def literal_linear(parameters, trace_weight):
    theta = parameters[-K * K :].reshape(K, K)
    return literal_channel(parameters[: -K * K], theta) + trace_weight * np.trace(theta) / K


def literal_mixed(parameters, beta):
    weights, channel = parameters[: -K * K], parameters[-K * K :].reshape(K, K)
    theta = np.exp(channel) / np.exp(channel).sum(axis=1, keepdims=True)
    plain = -sum(log_q_of(weights)[t, z] for t, z in enumerate(P.noisy_labels)) / P.n
    return (1 - beta) * literal_channel(weights, theta) + beta * plain


LARSEN = OneParameterModel(P.network)
LINEAR = LinearChannelModel(P.network, trace_weight=0.7)
CASES = {
    "Reed soft": (
        ReedModel(P.network, kind="soft"),
        P.weights,
        P.noisy_labels,
        lambda w: literal_reed(w, "soft", 0.95),
    ),
    "Reed soft, half": (
        ReedModel(P.network, kind="soft", label_weight=0.5),
        P.weights,
        P.noisy_labels,
        lambda w: literal_reed(w, "soft", 0.5),
    ),
    "Reed hard": (
        ReedModel(P.network),
        P.weights,
        P.noisy_labels,
        lambda w: literal_reed(w, "hard", 0.8),
    ),
    "s-model with a share of the plain loss": (
        MixedModel(P.network, plain_weight=0.3),
        P.parameters,
        P.noisy_labels,
        lambda w: literal_mixed(w, 0.3),
    ),
    "Grandvalet & Bengio": (
        EntropyModel(P.network, certainty_weight=0.6),
        P.weights,
        WITH_MISSING,
        lambda w: literal_entropy(w, 0.6),
    ),
    "Natarajan": (
        UnbiasedModel(P.network, theta=THETA),
        P.weights,
        P.noisy_labels,
        literal_unbiased,
    ),
    "Mnih & Hinton": (
        FixedChannelModel(P.network, theta=THETA),
        P.weights,
        P.noisy_labels,
        lambda w: literal_channel(w, THETA),
    ),
    "Larsen": (LARSEN, LARSEN.start(P.weights, 0.3), P.noisy_labels, literal_larsen),
    "Sukhbaatar & Fergus": (
        LINEAR,
        LINEAR.pack(P.weights, THETA),
        P.noisy_labels,
        lambda p: literal_linear(p, 0.7),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_derivative_of_the_literal_loss(name):
    model, parameters, targets, literal = CASES[name]
    model.check(parameters, P.x, targets)
    loss, gradient = model.loss_and_gradient(parameters, P.x, targets)
    assert abs(loss - literal(parameters).real) <= 1e-14 * abs(loss)
    assert abs(loss - model.loss(parameters, P.x, targets)) <= 1e-14 * abs(loss)
    check = check_gradient(literal, gradient, parameters, method="complex-step")
    assert check.relative_error <= 1e-13
    if name == "Sukhbaatar & Fergus":
        return  # a step along theta leaves the simplex, which the model itself refuses
    directions = check_gradient(
        lambda p: model.loss(p, P.x, targets),
        gradient,
        parameters,
        n_directions=5,
        rng=np.random.default_rng(0),
        step=1e-5,  # small enough not to cross a kink of the ReLUs here
    )
    assert directions.relative_error <= 1e-8


@pytest.mark.parametrize("name", CASES)
def test_float32_loses_rounding_only(name):
    model, parameters, targets, _ = CASES[name]
    loss, gradient = model.loss_and_gradient(parameters, P.x, targets)
    loss_32, gradient_32 = model.loss_and_gradient(
        parameters.astype(np.float32), P.x.astype(np.float32), targets
    )
    assert gradient_32.dtype == np.float32
    assert abs(loss_32 - loss) <= 1e-5 * abs(loss)
    assert np.abs(gradient_32 - gradient).max() <= 1e-5 * np.abs(gradient).max()


def test_reed_with_all_weight_on_the_label_is_the_baseline():
    loss, gradient = PlainModel(P.network).loss_and_gradient(P.weights, P.x, P.noisy_labels)
    for kind in ("soft", "hard"):
        model = ReedModel(P.network, kind=kind, label_weight=1.0)
        same, d_same = model.loss_and_gradient(P.weights, P.x, P.noisy_labels)
        assert abs(same - loss) <= 1e-15 * abs(loss)
        assert np.abs(d_same - gradient).max() <= 1e-15


def test_unbiased_loss_has_the_clean_loss_as_its_mean_over_noisy_labels():
    # Every sample once with every label, weighted by what its true class makes likely.
    model, true = UnbiasedModel(P.network, theta=THETA), P.noisy_labels
    losses_tj = np.array(
        [
            [model.loss(P.weights, P.x[t : t + 1], np.array([j])) for j in range(K)]
            for t in range(P.n)
        ]
    )
    mean = (THETA[true] * losses_tj).sum() / P.n
    clean = PlainModel(P.network).loss(P.weights, P.x, true)
    assert abs(mean - clean) <= 1e-13 * clean


def test_fixed_channel_takes_the_steps_of_the_s_model_whose_noise_layer_stands_still():
    s_model = SModel(P.network)
    _, gradient = s_model.loss_and_gradient(
        s_model.pack(P.weights, np.log(THETA)), P.x, P.noisy_labels
    )
    _, fixed = FixedChannelModel(P.network, theta=THETA).loss_and_gradient(
        P.weights, P.x, P.noisy_labels
    )
    assert np.array_equal(fixed, gradient[: P.network.n_weights])


def test_linear_channel_at_the_identity_is_the_baseline_and_leaves_it_when_pulled():
    model = LinearChannelModel(P.network, trace_weight=0.0)
    start = model.start(P.weights)
    assert model.nll(start, P.x, P.noisy_labels) == pytest.approx(
        PlainModel(P.network).nll(P.weights, P.x, P.noisy_labels), rel=1e-14
    )
    pulled = replace(model, trace_weight=5.0)
    result = train(
        pulled,
        start,
        P.x,
        P.noisy_labels,
        shuffling=np.random.default_rng(0),
        n_epochs=3,
        optimiser=Projected(SGD(0.1), pulled.project),
    )
    theta = pulled.noise_matrix(pulled.unpack(result.parameters)[1:])
    assert np.abs(theta.sum(axis=1) - 1).max() <= 1e-14
    assert theta.min() >= 0
    assert np.diag(theta).max() < 1


def test_linear_channel_leaves_the_identity_where_the_pull_exceeds_the_noise():
    """The network has learned the noisy labels' probabilities: p = .4 of a class go elsewhere."""
    rates = np.array([[0.6, 0.4, 0.0], [0.0, 0.6, 0.4], [0.4, 0.0, 0.6]])
    labels = np.concatenate(
        [np.repeat([0, 1, 2], np.round(100 * row).astype(int)) for row in rates]
    )
    logits = np.log(np.repeat(rates, 100, axis=0) + 1e-12)
    network = mlp(2, (), 3)
    for pull, stays in ((0.3, True), (0.5, False), (1.0, False)):
        model = LinearChannelModel(network, trace_weight=pull)
        theta = np.eye(3)
        d_theta = model.joint([logits], [theta], labels).d_channel + model.penalty(theta)[1]
        assert np.abs(np.diag(d_theta) + (1 - pull) / 3).max() <= 1e-9
        assert abs(d_theta[0, 1] + (1 - 0.4) / 3) <= 1e-9
        parameters = model.start(np.zeros(network.n_weights))
        model.unpack(parameters)[1][...] -= 0.1 * d_theta
        model.project(parameters)
        moved = 1 - np.diag(model.unpack(parameters)[1]).min()
        assert (moved < 1e-5) == stays, pull
    # Where two classes swap labels, those that the other one has kept count as well.
    swap = np.array([[0.6, 0.4], [0.4, 0.6]])
    found = LinearChannelModel(mlp(2, (), 2)).joint(
        [np.log(swap).repeat(5, axis=0)], [np.eye(2)], np.array([0, 0, 0, 1, 1, 0, 0, 1, 1, 1])
    )
    assert np.abs(found.d_channel + 1 / 2).max() <= 1e-9


def test_early_stopping_of_the_linear_channel_watches_the_pull_too():
    start = LINEAR.start(P.weights)
    result = train(
        LINEAR,
        start,
        P.x,
        P.noisy_labels,
        shuffling=np.random.default_rng(0),
        validation=(P.x, P.noisy_labels),
        n_epochs=1,
        with_loss=False,
    )
    first = result.history[0].validation_loss
    assert first == pytest.approx(LINEAR.nll(start, P.x, P.noisy_labels) + 0.7, rel=1e-12)


def test_sgd_cuts_the_largest_gradients():
    parameters = np.zeros(3)
    SGD(0.5, clip=1.0).update(parameters, np.array([-7.0, 0.5, 3.0]), None)
    assert parameters.tolist() == [0.5, -0.25, -0.5]
    for clip in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="clip must be positive"):
            SGD(0.5, clip=clip)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_projection_is_the_nearest_distribution(dtype):
    rng = np.random.default_rng(0)
    rows = (2 * rng.normal(size=(50, 6))).astype(dtype)
    nearest = nearest_distributions(rows)
    assert nearest.dtype == dtype
    eps = np.finfo(dtype).eps
    assert nearest.min() >= 0
    assert np.abs(nearest.sum(axis=1) - 1).max() <= 8 * eps
    # Optimality: no corner of the simplex lies in the direction from the projection to the row.
    away = rows - nearest
    towards = away.max(axis=1) - (away * nearest).sum(axis=1)
    assert towards.max() <= 50 * eps
    assert np.abs(nearest_distributions(nearest) - nearest).max() <= 8 * eps


def test_larsen_starts_where_it_is_told():
    model = OneParameterModel(P.network)
    theta = model.noise_matrix(model.unpack(model.start(P.weights, 0.3))[1:])
    assert np.abs(np.diag(theta) - 0.7).max() <= 1e-15
    assert np.abs(theta.sum(axis=1) - 1).max() <= 1e-15


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="kind must be"):
        ReedModel(P.network, kind="medium")
    with pytest.raises(ValueError, match="label_weight must lie"):
        ReedModel(P.network, label_weight=1.5)
    with pytest.raises(ValueError, match="certainty_weight must be"):
        EntropyModel(P.network, certainty_weight=-1)
    with pytest.raises(ValueError, match="trace_weight must be"):
        LinearChannelModel(P.network, trace_weight=np.nan)
    with pytest.raises(ValueError, match="noise must lie"):
        LARSEN.start(P.weights, 1.0)
    swap = np.full((K, K), 1 / K)
    with pytest.raises(ValueError, match="theta must be invertible"):
        UnbiasedModel(P.network, theta=swap)
    with pytest.raises(ValueError, match="theta"):
        FixedChannelModel(P.network, theta=THETA.T)
    with pytest.raises(ValueError, match="theta must have shape"):
        FixedChannelModel(P.network, theta=np.eye(K + 1))
    with pytest.raises(ValueError, match="labels"):
        ReedModel(P.network).check(P.weights, P.x, WITH_MISSING)
    with pytest.raises(ValueError, match="labels"):
        EntropyModel(P.network).check(P.weights, P.x, WITH_MISSING - 1)
    covered = np.zeros((K, K))
    covered[:, 0] = 1
    with pytest.raises(ValueError, match="labels"):
        FixedChannelModel(P.network, theta=covered).check(P.weights, P.x, P.noisy_labels)


def test_missing_labels_alone_make_the_network_surer():
    model = EntropyModel(P.network, certainty_weight=1.0)
    nobody = np.full(P.n, -1)
    before = model.loss(P.weights, P.x, nobody)
    after = train(
        model,
        P.weights,
        P.x,
        nobody,
        shuffling=np.random.default_rng(0),
        n_epochs=5,
        optimiser=Adam(),
    )
    assert after.history[-1].loss < before


def test_prior_moves_theta_by_its_gradient_and_by_em_s_step():
    alpha, counts = 7.0, np.random.default_rng(0).uniform(size=(K, K))
    model = DirichletPriorModel(P.network, alpha, P.n, prior_mode=THETA)

    def literal(parameters):
        found = Literal.of(model, parameters, P.x, P.noisy_labels)
        prior = alpha * (THETA * np.log(found.theta[0])).sum()
        return -(found.log_likelihood + prior) / P.n

    loss, gradient = model.loss_and_gradient(P.parameters, P.x, P.noisy_labels)
    assert abs(loss - literal(P.parameters)) <= 1e-13
    found = check_gradient(literal, gradient, P.parameters, method="complex-step")
    assert found.relative_error <= 1e-12
    # Where Eq. 4 has put theta, nothing is left of the gradient of Q and the prior together.
    theta = noise_matrix_m_step(counts, THETA, model.pseudo_counts)
    n_i = counts.sum(axis=1, keepdims=True)
    left = counts - n_i * theta - P.n * model.penalty(np.log(theta))[1]
    assert np.abs(left).max() <= 1e-13
    assert np.abs(theta - (counts + alpha * THETA) / (n_i + alpha)).max() <= 1e-15


def test_prior_without_pseudo_counts_where_theta_is_zero():
    model, theta = DirichletPriorModel(P.network, 7.0, P.n, prior_mode=np.eye(K)), np.eye(K)
    penalty, d_penalty = model.penalty(log_with_zeros(theta))
    assert penalty == 0
    assert np.abs(d_penalty).max() == 0
    half = np.where(np.eye(K) > 0, 0.5, 0.5 / (K - 1))
    half[0] = theta[0]
    parameters = model.pack(P.weights, log_with_zeros(half))
    model.check(parameters, P.x, P.noisy_labels)
    expected = -7 * (K - 1) * np.log(0.5) / P.n
    assert abs(model.penalty(log_with_zeros(half))[0] - expected) <= 1e-15
    half[0] = np.roll(theta[0], 1)
    with pytest.raises(ValueError, match="channel_logits must be finite where pseudo_count is"):
        model.check(model.pack(P.weights, log_with_zeros(half)), P.x, P.noisy_labels)


def test_prior_whose_mode_is_no_noise_matrix_is_refused():
    with pytest.raises(ValueError, match="prior_mode must have non-negative rows that sum to one"):
        DirichletPriorModel(P.network, 1.0, P.n, prior_mode=2 * THETA)
    with pytest.raises(ValueError, match="prior_mode must have shape"):
        DirichletPriorModel(P.network, 1.0, P.n, prior_mode=THETA[:, :2])
