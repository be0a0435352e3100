from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

import kernels
from em_baseline import (
    LBFGS,
    Completed,
    ExpectedModel,
    MiniBatches,
    NetworkHalf,
    NoiseRegressions,
    OneGradientStep,
    e_step,
    expected_counts,
    expected_log_likelihood,
    minimise,
    noise_matrix_m_step,
)
from em_baseline.statements import Literal
from em_baseline.steps import polish
from nalayer import SGD, Adam, CModel, PlainModel, SModel, check_gradient, gather_links, stream
from tests.cases import MODEL_NAMES, kept, point, point_of, soft_targets, zeros_outside

P = point()


def flat_channel(p) -> np.ndarray:
    return np.concatenate([values.ravel() for values in p.channel])


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_e_step_of_every_model_is_eq_3(name):
    p = point_of(name)
    found = e_step(p.model, p.outputs(), p.channel, p.noisy_labels)
    literal = Literal.at(p)
    assert np.abs(found.posterior - literal.c).max() <= 1e-14
    assert np.abs(found.log_likelihood_t - np.log(literal.m)).max() <= 1e-13


def test_expected_counts_are_the_sums_of_eq_4():
    c, z = soft_targets(30, 4), np.random.default_rng(0).integers(4, size=30)
    loops = np.zeros((4, 4))
    for t in range(30):
        for i in range(4):
            for j in range(4):
                loops[i, j] += c[t, i] * (z[t] == j)
    assert np.abs(expected_counts(c, z) - loops).max() <= 1e-14


def test_expected_counts_over_links_are_those_of_the_dense_model_at_the_links():
    p = point_of("sparse-s")
    c = p.e_step().posterior
    dense = expected_counts(c, p.noisy_labels)
    sparse = expected_counts(c, p.noisy_labels, p.links)
    assert np.abs(sparse - gather_links(dense, p.links)).max() <= 1e-14
    # the posterior knows the links: no mass is lost
    assert abs(sparse.sum() - p.n) <= 1e-12
    with pytest.raises(ValueError, match=r"posterior must have shape \(n, 4\); found \(60, 5\)"):
        expected_counts(np.full((60, 5), 0.2), p.noisy_labels, p.links)


def test_closed_form_of_a_sparse_model_is_that_of_the_dense_one_with_zeros_outside():
    sparse = point_of("sparse-s")
    dense = zeros_outside(sparse)
    after, dense_after = sparse.m_step().channel_logits, dense.m_step().channel_logits
    assert np.abs(np.exp(gather_links(dense_after, sparse.links)) - np.exp(after)).max() <= 1e-15
    assert np.array_equal(np.isneginf(dense_after), np.isneginf(dense.channel_logits))


def test_closed_form_is_n_ij_over_n_i():
    counts = np.array([[3.0, 1.0], [0.0, 2.0]])
    assert noise_matrix_m_step(counts, np.eye(2)).tolist() == [[0.75, 0.25], [0.0, 1.0]]


def test_what_is_no_posterior_or_no_label_is_refused_and_nan_is_not_hidden():
    with pytest.raises(ValueError, match=r"noisy_labels must lie in 0\.\.1; found -1"):
        expected_counts(np.full((2, 2), 0.5), np.array([0, -1]))
    with pytest.raises(ValueError, match=r"noisy_labels must lie in 0\.\.3"):
        e_step(P.model, P.outputs(), P.channel, P.noisy_labels + 4)
    with pytest.raises(ValueError, match="counts_ij must be finite; found nan"):
        noise_matrix_m_step(np.full((2, 2), np.nan), np.eye(2))


def test_settings_that_do_nothing_are_refused():
    for settings in ((0, 16), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1; found 0"):
            MiniBatches(*settings)


def test_an_unfinished_minimisation_is_warned_of():
    with pytest.warns(RuntimeWarning, match="L-BFGS stopped after 3 iterations with a gradient of"):
        minimise(PlainModel(P.network), P.weights, P.x, P.noisy_labels, max_iterations=3)


def test_polishing_takes_the_gradient_to_rounding():
    p = point(n=400, hidden_sizes=(), k=3)
    rough, _ = minimise(PlainModel(p.network), p.weights, p.x, p.noisy_labels, tolerance=1e-4)
    fine = polish(PlainModel(p.network), rough, p.x, p.noisy_labels, tolerance=1e-13)
    _, gradient = PlainModel(p.network).loss_and_gradient(fine, p.x, p.noisy_labels)
    assert np.linalg.norm(gradient) <= 1e-13


def test_a_class_without_samples_keeps_its_row():
    previous = np.array([[0.5, 0.5], [0.25, 0.75]])
    theta = noise_matrix_m_step(np.array([[1.0, 3.0], [0.0, 0.0]]), previous)
    assert theta.tolist() == [[0.25, 0.75], [0.25, 0.75]]
    assert previous.tolist() == [[0.5, 0.5], [0.25, 0.75]]


def test_pseudo_counts_enter_the_closed_form_and_maximise_the_penalised_q():
    counts, alpha = np.array([[3.0, 1.0], [0.0, 2.0]]), 2.0
    theta = noise_matrix_m_step(counts, np.eye(2), alpha)
    assert theta.tolist() == [[5 / 8, 3 / 8], [2 / 6, 4 / 6]]

    def penalised(t):
        return ((counts + alpha) * np.log(t)).sum()

    rng = np.random.default_rng(0)
    assert all(penalised(theta) > penalised(rng.dirichlet([1, 1], size=2)) for _ in range(100))
    with pytest.raises(ValueError, match="pseudo_count must be finite and at least 0; found nan"):
        noise_matrix_m_step(counts, np.eye(2), np.nan)
    with pytest.raises(ValueError, match=r"pseudo_count must have shape \(2, 2\); found \(2, 1\)"):
        noise_matrix_m_step(counts, np.eye(2), np.ones((2, 1)))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_q_is_what_the_literal_formula_says(name):
    p = point_of(name)
    # not the posterior of these parameters, so that its normalisation hides nothing
    c = replace(p, weights=0.7 * p.weights).e_step().posterior
    literal = Literal.at(p)
    q = expected_log_likelihood(p.model, p.parameters, p.x, p.noisy_labels, c)
    assert abs(q - literal.expected(c).real) <= 1e-13 * abs(q)
    loss, gradient = ExpectedModel(p.model).loss_and_gradient(
        p.parameters, p.x, Completed(p.noisy_labels, c)
    )
    assert abs(-p.n * loss - q) <= 1e-13 * abs(q)
    check = check_gradient(
        lambda at: -Literal.of(p.model, at, p.x, p.noisy_labels).expected(c) / p.n,
        gradient,
        p.parameters,
        method="complex-step",
    )
    assert check.relative_error <= 1e-13


@pytest.mark.parametrize("name", ["s", "c"])
def test_q_skips_impossible_terms(name):
    identity = np.where(np.eye(4) > 0, 0.0, -np.inf)
    p = replace(point_of(name), channel_logits=identity)
    one_hot = np.eye(4)[p.noisy_labels]
    q = expected_log_likelihood(p.model, p.parameters, p.x, p.noisy_labels, one_hot)
    plain = PlainModel(p.network).nll(p.weights, p.x, p.noisy_labels)
    assert abs(q + p.n * plain) <= 1e-12 * abs(q)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_halves_of_q_are_its_parts(name):
    """Each half's gradient is Q's in its own parameters, with a posterior from elsewhere."""
    p = point_of(name)
    c = replace(p, weights=0.7 * p.weights).e_step().posterior
    data, model = Completed(p.noisy_labels, c), p.model
    _, whole = ExpectedModel(model).loss_and_gradient(p.parameters, p.x, data)
    n_weights = p.network.n_weights
    half = NetworkHalf(model, p.channel)
    loss, d_weights = half.loss_and_gradient(p.weights, p.x, data)
    assert loss == half.loss(p.weights, p.x, data)
    assert np.abs(d_weights - whole[:n_weights]).max() <= 1e-16
    if isinstance(model, CModel):
        noise = NoiseRegressions(model)
        loss, d_channel = noise.loss_and_gradient(flat_channel(p), p.outputs()[1], data)
        assert loss == noise.loss(flat_channel(p), p.outputs()[1], data)
        assert np.abs(d_channel - whole[n_weights:]).max() <= 1e-16


def test_the_noise_half_of_a_c_model_is_k_weighted_softmax_regressions_of_scikit_learn():
    p = point_of("c", n=400, hidden_sizes=(), n_in=3)
    after = p.m_step()
    c, (_, hidden) = p.e_step().posterior, p.outputs()
    for i in range(4):
        theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
        theirs.fit(hidden, p.noisy_labels, sample_weight=c[:, i])
        scores = hidden @ after.channel_weights[i].T + after.channel_logits[i]
        assert np.abs(softmax(scores, axis=1) - theirs.predict_proba(hidden)).max() <= 1e-5


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_one_gradient_step_on_the_whole_of_q_is_the_joint_step(name):
    p = point_of(name)
    _, gradient = p.model.loss_and_gradient(p.parameters, p.x, p.noisy_labels)
    step = OneGradientStep(SGD(0.1))
    moved, _ = step.run(
        ExpectedModel(p.model),
        p.parameters,
        p.x,
        p.completed(),
        step.initial_state(p.parameters),
        stream(0, "shuffling"),
        None,
    )
    assert np.abs(moved - (p.parameters - 0.1 * gradient)).max() <= 1e-15


def test_one_gradient_step_is_the_joint_step_of_the_network_to_the_bit():
    """EM with one gradient step per E-step moves the weights exactly as joint training does."""
    for backend in kernels.CPU_BACKENDS:
        joint = SModel(P.network, backend=backend)
        _, gradient = joint.loss_and_gradient(P.parameters, P.x, P.noisy_labels)
        d_weights, _ = joint.unpack(gradient)
        step = OneGradientStep(SGD(0.1))
        posterior = e_step(joint, P.outputs(), P.channel, P.noisy_labels).posterior
        moved, n_gradients = step.run(
            NetworkHalf(joint, P.channel),
            P.weights,
            P.x,
            Completed(P.noisy_labels, posterior),
            step.initial_state(P.weights),
            stream(0, "shuffling"),
            None,
        )
        assert np.array_equal(moved, P.weights - 0.1 * d_weights)
        assert n_gradients == 1


@pytest.mark.parametrize("optimiser", [SGD(0.1), Adam()], ids=["SGD", "Adam"])
def test_em_with_one_gradient_step_for_everything_is_joint_training_for_100_steps(optimiser):
    """To the bit where both sum in the same order (NumPy), to rounding elsewhere (Numba)."""
    for backend in kernels.CPU_BACKENDS:
        model = SModel(P.network, backend=backend)
        expected = ExpectedModel(model)
        joint, em = P.parameters.copy(), P.parameters.copy()
        states = [optimiser.initial_state(joint) for _ in range(2)]
        for _ in range(100):
            _, gradient = model.loss_and_gradient(joint, P.x, P.noisy_labels)
            optimiser.update(joint, gradient, states[0])
            weights, *channel = model.unpack(em)
            outputs, _ = model.forward(weights, P.x)
            posterior = e_step(model, outputs, channel, P.noisy_labels).posterior
            data = Completed(P.noisy_labels, posterior)
            _, gradient = expected.loss_and_gradient(em, P.x, data)
            optimiser.update(em, gradient, states[1])
        assert np.abs(joint - P.parameters).max() > 0.01
        if backend == "numpy":
            assert np.array_equal(joint, em)
        assert np.abs(joint - em).max() <= 1e-13


STEPS = [MiniBatches(3, 16), OneGradientStep(SGD(0.05)), LBFGS()]


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("step", STEPS, ids=lambda s: type(s).__name__)
def test_network_steps_raise_q_and_leave_their_inputs_alone(step, name):
    p = point_of(name, hidden_sizes=())
    model, data = NetworkHalf(p.model, p.channel), p.completed()
    before = p.weights.copy()
    weights, n_gradients = step.run(
        model, p.weights, p.x, data, step.initial_state(p.weights), stream(0, "shuffling"), None
    )
    assert model.loss(weights, p.x, data) < model.loss(p.weights, p.x, data)
    assert np.array_equal(p.weights, before)
    assert n_gradients >= 1


@pytest.mark.parametrize("name", ["c", "sparse-c"])
@pytest.mark.parametrize("step", STEPS, ids=lambda s: type(s).__name__)
def test_noise_steps_raise_q_and_leave_their_inputs_alone(step, name):
    p = point_of(name)
    objective, data, hidden = NoiseRegressions(p.model), p.completed(), p.outputs()[1]
    channel = flat_channel(p)
    moved, n_gradients = step.run(
        objective, channel, hidden, data, step.initial_state(channel), stream(0, "shuffling"), None
    )
    assert objective.loss(moved, hidden, data) < objective.loss(channel, hidden, data)
    assert np.array_equal(channel, flat_channel(p))
    assert n_gradients >= 1


def test_lbfgs_leaves_zeros_of_the_noise_matrices_alone():
    sparse = point_of("sparse-c")
    dense = zeros_outside(sparse)
    after, dense_after = sparse.m_step(), dense.m_step()
    assert np.array_equal(np.isneginf(dense_after.channel_logits), ~_is_link(sparse))
    # Two ways to the same maximum of Q, which a channel does not determine but theta does.
    theta, dense_theta = Literal.at(after).theta, Literal.at(dense_after).theta
    weight = sparse.e_step().posterior[:, :, None]
    assert (weight * np.abs(theta - dense_theta)).max() <= 1e-4


def _is_link(p) -> np.ndarray:
    is_link = np.zeros((4, 4), dtype=bool)
    np.put_along_axis(is_link, p.links.support, True, axis=1)
    return is_link


def test_a_class_whose_only_link_was_never_seen_keeps_its_regression():
    p = kept(point_of("c"), np.arange(4)[:, None])
    p = replace(p, noisy_labels=np.minimum(p.noisy_labels, 2))
    assert np.array_equal(p.m_step().channel_weights, p.channel_weights)


def test_mini_batches_count_their_gradients_and_carry_the_optimiser_s_state():
    step = MiniBatches(3, 16)
    state = step.initial_state(P.weights)
    for total in (12, 24):
        _, n_gradients = step.run(
            NetworkHalf(P.model, P.channel),
            P.weights,
            P.x,
            P.completed(),
            state,
            stream(0, "shuffling"),
            None,
        )
        assert n_gradients == 12
        assert state.n_steps == total


def test_lbfgs_finds_the_maximum_that_scikit_learn_finds():
    """Softmax regression on noisy labels: probabilities as LogisticRegression has them."""
    p = point(n=400, hidden_sizes=())
    weights, _ = minimise(PlainModel(p.network), p.weights, p.x, p.noisy_labels)
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(p.x, p.noisy_labels)
    ours = softmax(p.network.logits(weights, p.x), axis=1)
    assert np.abs(ours - theirs.predict_proba(p.x)).max() <= 1e-6
