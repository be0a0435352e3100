import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

import kernels
from em_baseline import (
    LBFGS,
    MiniBatches,
    OneGradientStep,
    e_step,
    expected_counts,
    expected_log_likelihood,
    minimise,
    noise_matrix_m_step,
)
from em_baseline.statements import Literal
from em_baseline.steps import polish
from nalayer import SGD, PlainModel, SModel, SoftTargetModel, stream
from tests.cases import point, soft_targets

P = point()


def test_expected_counts_are_the_sums_of_eq_4():
    c, z = soft_targets(30, 4), np.random.default_rng(0).integers(4, size=30)
    loops = np.zeros((4, 4))
    for t in range(30):
        for i in range(4):
            for j in range(4):
                loops[i, j] += c[t, i] * (z[t] == j)
    assert np.abs(expected_counts(c, z) - loops).max() <= 1e-14


def test_closed_form_is_n_ij_over_n_i():
    counts = np.array([[3.0, 1.0], [0.0, 2.0]])
    assert noise_matrix_m_step(counts, np.eye(2)).tolist() == [[0.75, 0.25], [0.0, 1.0]]


def test_what_is_no_posterior_or_no_label_is_refused_and_nan_is_not_hidden():
    with pytest.raises(ValueError, match=r"noisy_labels must lie in 0\.\.1; found -1"):
        expected_counts(np.full((2, 2), 0.5), np.array([0, -1]))
    with pytest.raises(ValueError, match=r"noisy_labels must lie in 0\.\.3"):
        e_step(P.logits(), P.channel_logits, P.noisy_labels + 4)
    assert np.isnan(noise_matrix_m_step(np.full((2, 2), np.nan), np.eye(2))).all()


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


def test_q_is_what_the_literal_formula_says_and_skips_impossible_terms():
    c = P.e_step().posterior
    literal = Literal.at(P)
    q = expected_log_likelihood(P.network, P.weights, P.channel_logits, P.x, P.noisy_labels, c)
    assert abs(q - literal.expected(c).real) <= 1e-13 * abs(q)
    identity = np.where(np.eye(4) > 0, 0.0, -np.inf)
    one_hot = np.eye(4)[P.noisy_labels]
    assert np.isfinite(
        expected_log_likelihood(P.network, P.weights, identity, P.x, P.noisy_labels, one_hot)
    )


def test_one_gradient_step_is_the_joint_step_of_the_network_to_the_bit():
    """EM with one gradient step per E-step moves the weights exactly as joint training does."""
    for backend in kernels.BACKENDS:
        joint = SModel(P.network, backend=backend)
        _, gradient = joint.loss_and_gradient(P.parameters, P.x, P.noisy_labels)
        d_weights, _ = joint.unpack(gradient)
        step = OneGradientStep(SGD(0.1))
        posterior = e_step(P.logits(), P.channel_logits, P.noisy_labels, backend).posterior
        moved, n_gradients = step.run(
            SoftTargetModel(P.network, backend),
            P.weights,
            P.x,
            posterior,
            step.initial_state(P.weights),
            stream(0, "shuffling"),
            None,
        )
        assert np.array_equal(moved, P.weights - 0.1 * d_weights)
        assert n_gradients == 1


@pytest.mark.parametrize(
    "step",
    [MiniBatches(3, 16), OneGradientStep(SGD(0.05)), LBFGS()],
    ids=lambda s: type(s).__name__,
)
def test_network_steps_raise_s_and_leave_their_inputs_alone(step):
    p = point(hidden_sizes=())
    model, posterior = SoftTargetModel(p.network), p.e_step().posterior
    before = p.weights.copy()
    weights, n_gradients = step.run(
        model,
        p.weights,
        p.x,
        posterior,
        step.initial_state(p.weights),
        stream(0, "shuffling"),
        None,
    )
    assert model.loss(weights, p.x, posterior) < model.loss(p.weights, p.x, posterior)
    assert np.array_equal(p.weights, before)
    assert n_gradients >= 1


def test_mini_batches_count_their_gradients_and_carry_the_optimiser_s_state():
    step = MiniBatches(3, 16)
    state = step.initial_state(P.weights)
    for total in (12, 24):
        _, n_gradients = step.run(
            SoftTargetModel(P.network),
            P.weights,
            P.x,
            P.e_step().posterior,
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
