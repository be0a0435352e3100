import numpy as np
import pytest

from nalayer import (
    best_relabelling,
    channel_logits_of,
    clustered_start,
    confusion_start,
    corrupt_labels,
    from_cleanlab,
    make_noise_matrix,
    noise_matrix,
    noise_matrix_error,
    to_cleanlab,
    uniform_start,
)
from tests.cases import asymmetric_noise_matrix

EPS = np.finfo(np.float64).eps


def test_uniform_start_is_the_paper_s_formula():
    theta = noise_matrix(uniform_start(5, 0.2))
    assert np.abs(theta - (0.8 * np.eye(5) + 0.05 * (1 - np.eye(5)))).max() <= 4 * EPS


Q = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [0.3, 0.7, 0.0]])
Z = np.array([0, 1, 1, 2])


def test_soft_confusion_is_the_formula_as_printed():
    # row 0: (0.9, 0.6 + 0.2, 0.3) / 2.0 ; row 1: (0.1, 0.4 + 0.8, 0.7) / 2.0
    expected = np.array([[0.45, 0.4, 0.15], [0.05, 0.6, 0.35]])
    theta = noise_matrix(confusion_start(Q, Z, "soft", floor=1e-12))
    assert np.abs(theta[:2] - expected).max() <= 1e-11


def test_hard_confusion_counts_arg_maxima_and_keeps_zeros_revivable():
    channel = confusion_start(Q, Z)
    theta = noise_matrix(channel)
    assert np.abs(theta[:2] - [[0.5, 0.5, 0], [0, 0.5, 0.5]]).max() <= 2e-8
    assert np.isfinite(channel).all()
    assert theta.min() > 0


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_class_that_is_never_predicted_gets_a_uniform_row(kind):
    theta = noise_matrix(confusion_start(Q, Z, kind))
    assert np.abs(theta[2] - 1 / 3).max() <= 4 * EPS


def test_rows_are_the_true_class():
    """Everything predicted as class 0 is observed as class 1: the entry is (0, 1), not (1, 0)."""
    theta = noise_matrix(confusion_start(np.array([[0.9, 0.1]] * 5), np.ones(5, int)))
    assert theta[0, 1] > 0.999


def hesitating_outputs(noise: float, n: int = 4000) -> tuple[np.ndarray, ...]:
    """Return outputs of a network that hesitates between a class and the one it is taken for."""
    rng = np.random.default_rng(0)
    theta = make_noise_matrix("permutation", 10, noise, rng)
    true = rng.integers(10, size=n)
    noisy = corrupt_labels(true, theta, rng)
    logits = np.log(theta[true] + 1e-3) + 0.5 * rng.normal(size=(n, 10))
    q = np.exp(logits)
    return theta, q / q.sum(axis=1, keepdims=True), noisy


@pytest.mark.parametrize("noise", [0.3, 0.46, 0.49])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_clusters_find_the_noise_where_the_arg_max_is_a_coin_toss(noise, dtype):
    theta, q, noisy = hesitating_outputs(noise)
    start = clustered_start(q.astype(dtype), noisy, np.random.default_rng(1))
    assert start.dtype == dtype
    assert np.isfinite(start).all()
    clustered = noise_matrix_error(noise_matrix(start.astype(float)), theta)
    assert clustered <= 0.03
    hard = noise_matrix_error(noise_matrix(confusion_start(q, noisy)), theta)
    assert clustered < hard / 2
    assert noise < 0.49 or hard > 0.2


def test_clustered_rows_are_the_true_class():
    """Of class 0 a third is seen as class 1; no other class is seen wrongly."""
    q = np.repeat([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]], 30, axis=0)
    noisy = np.array([0] * 20 + [1] * 10 + [1] * 30 + [2] * 30)
    theta = noise_matrix(clustered_start(q, noisy, np.random.default_rng(0)))
    assert np.abs(theta - [[2 / 3, 1 / 3, 0], [0, 1, 0], [0, 0, 1]]).max() <= 1e-7


def test_clusters_of_a_network_that_says_the_same_of_everything_are_finite():
    q = np.full((30, 3), 1 / 3)
    start = clustered_start(q, np.arange(30) % 3, np.random.default_rng(0))
    assert np.abs(noise_matrix(start) - 1 / 3).max() <= 1e-7


def test_clustered_start_refuses_less_samples_than_classes():
    with pytest.raises(ValueError, match="at least 3 samples"):
        clustered_start(np.full((2, 3), 1 / 3), np.array([0, 1]), np.random.default_rng(0))


def test_channel_logits_of_keeps_zeros_as_minus_infinity():
    theta = np.array([[1.0, 0.0], [0.25, 0.75]])
    channel = channel_logits_of(theta)
    assert channel[0, 1] == -np.inf
    assert np.abs(noise_matrix(channel) - theta).max() <= 4 * EPS


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        (np.array([[0.0, 0.0], [0.5, 0.5]]), "row 0 sums to 0.0"),
        (np.array([[0.9, 0.3], [0.1, 0.7]]), "theta must have non-negative rows that sum to one"),
        (np.array([[1.5, -0.5], [0.5, 0.5]]), "smallest entry -0.5"),
        (np.array([[np.nan, 1.0], [0.5, 0.5]]), "rows that sum to one"),
        (np.ones((1, 1)), "theta must hold at least two classes"),
        (np.full((2, 3), 1 / 3), r"theta must have shape \(2, 2\); found \(2, 3\)"),
    ],
)
def test_what_is_no_noise_matrix_is_refused(theta, message):
    with pytest.raises(ValueError, match=message):
        channel_logits_of(theta)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confusion_start(Q, Z, "medium"), "kind must be 'hard' or 'soft'; found 'medium'"),
        (lambda: confusion_start(Q, Z, floor=0), "floor must be positive; found 0"),
        (lambda: confusion_start(np.log(Q + 1), Z), "probabilities must have non-negative rows"),
        (lambda: confusion_start(Q, Z + 1), r"noisy_labels must lie in 0\.\.2"),
        (lambda: uniform_start(3, 0.0), r"init_noise must lie in \(0, 1\); found 0.0"),
    ],
)
def test_bad_starts_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_has_no_softmax_or_no_rows_is_refused():
    with pytest.raises(ValueError, match="channel_logits: row 1 holds only -inf"):
        noise_matrix(np.array([[0.0, 0.0], [-np.inf, -np.inf]]))
    with pytest.raises(ValueError, match=r"estimate must have shape \(3, 3\); found \(2, 2\)"):
        noise_matrix_error(np.eye(2), np.eye(3))
    with pytest.raises(ValueError, match="n_classes must be at least 2; found 1"):
        uniform_start(1, 0.1)


def test_noise_matrix_error_is_the_mean_total_variation_of_the_rows():
    a, b = np.eye(3), np.eye(3)[[1, 0, 2]]
    assert noise_matrix_error(a, a) == 0
    assert abs(noise_matrix_error(a, b) - 2 / 3) <= EPS


def test_best_relabelling_finds_the_rows_again():
    rng = np.random.default_rng(0)
    truth = 0.6 * np.eye(5) + 0.4 * rng.dirichlet(np.ones(5), size=5)
    order = np.array([3, 0, 4, 2, 1])
    estimate = truth[order]
    found = best_relabelling(estimate, truth)
    np.testing.assert_array_equal(estimate[found], truth)
    assert noise_matrix_error(estimate, truth) > 0.2


def test_cleanlabs_noise_matrix_is_the_transpose_and_nothing_else_passes():
    theta = asymmetric_noise_matrix(4, np.random.default_rng(0))
    theirs = to_cleanlab(theta)
    assert (theirs == theta.T).all()
    assert np.abs(theirs.sum(axis=0) - 1).max() <= 1e-15
    assert (from_cleanlab(theirs) == theta).all()
    theirs[0, 0] = 7
    assert theta[0, 0] < 1  # a copy
    with pytest.raises(ValueError, match="noise_matrix must have non-negative rows that sum to"):
        to_cleanlab(theta.T.copy())
    with pytest.raises(ValueError, match="the transpose of noise_matrix must have non-negative"):
        from_cleanlab(theta)


def test_cleanlab_makes_the_noise_that_the_converted_matrix_stands_for():
    noise_generation = pytest.importorskip("cleanlab.benchmarking.noise_generation")
    theta = np.array([[0.6, 0.4, 0.0], [0.0, 0.9, 0.1], [0.2, 0.0, 0.8]])
    y = np.repeat([0, 1, 2], [200, 300, 500])
    np.random.seed(0)  # noqa: NPY002 - cleanlab draws from NumPy's global generator
    z = noise_generation.generate_noisy_labels(y, to_cleanlab(theta))
    found = np.array([[((y == i) & (z == j)).sum() for j in range(3)] for i in range(3)])
    assert np.abs(found / found.sum(axis=1, keepdims=True) - theta).max() <= 0.01
