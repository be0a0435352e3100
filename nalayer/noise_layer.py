"""The s-model's noise layer: theta as a softmax of channel logits, and where to start it.

theta_ij = p(z=j | y=i): **rows are the true class and sum to one, columns are the observed
class**. The channel logits B are its parameters, theta_i = softmax(B_i) (Eqs. 10 and 13).
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy.optimize import linear_sum_assignment

from kernels import checks, counts_by_label, log_softmax
from nalayer.label_noise import symmetric_noise
from nalayer.memory import require_memory

AUTHORS_FLOOR = 1e-8
USE_LINKS = "use a sparse model: nalayer.confusion_counts, top_support and sparse_confusion_start"


def _require_dense(n_classes: int, dtype: type) -> None:
    """Refuse channel logits (K, K) that would not fit into memory."""
    require_memory("channel_logits", (n_classes, n_classes), dtype, USE_LINKS)


def noise_matrix(channel_logits: np.ndarray) -> np.ndarray:
    """Return theta = softmax of each row of the channel logits: (K, K) -> (K, K).

    A sparse s-model's, (K, l) -> (K, l), are the probabilities of its links;
    :func:`~nalayer.scatter_links` makes the whole matrix of them.

    Raises TypeError or ValueError for what has no softmax, such as a row of -inf.
    """
    checks.check_floats("channel_logits", channel_logits, ("K", "l"))
    checks.check_rows_are_log_weights("channel_logits", channel_logits)
    return np.exp(log_softmax(channel_logits, check_values=False))


def channel_logits_of(theta: np.ndarray) -> np.ndarray:
    """Return channel logits B = log theta for a given noise matrix; its zeros become -inf.

    Parameters
    ----------
    theta : (K, K) float32 or float64
        Row-stochastic: rows are the true class.

    Raises
    ------
    TypeError, ValueError
        If it is not a square row-stochastic matrix, for instance because a row is zero or
        because it is transposed and its rows do not sum to one.
    """
    checks.check_noise_matrix("theta", theta)
    return log_with_zeros(theta)


def log_with_zeros(theta: np.ndarray) -> np.ndarray:
    """Return log theta; its zeros become -inf, without a warning and without a check."""
    with np.errstate(divide="ignore"):
        return np.log(theta)


def uniform_start(n_classes: int, init_noise: float, dtype: type = np.float64) -> np.ndarray:
    """Return B_ij = log((1-e) 1{i=j} + e/(k-1) 1{i!=j}): the paper's small uniform noise.

    Parameters
    ----------
    n_classes : int
    init_noise : float
        The paper's epsilon, in (0, 1).
    """
    if not 0 < init_noise < 1:
        raise ValueError(f"init_noise must lie in (0, 1); found {init_noise}")
    _require_dense(n_classes, np.float64)
    return np.log(symmetric_noise(n_classes, init_noise)).astype(dtype)


def confusion_start(
    probabilities: np.ndarray,
    noisy_labels: np.ndarray,
    kind: str = "hard",
    floor: float = AUTHORS_FLOOR,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    r"""Return channel logits from the confusion matrix of a network trained on the noisy labels.

    .. math:: B_{ij} = \log\Big(\frac{\sum_t 1\{z_t=j\}\,q_{ti}}{\sum_t q_{ti}} + floor\Big)

    Parameters
    ----------
    probabilities : (n, K)
        The network's softmax outputs q_ti on the training samples.
    noisy_labels : (n,) integer
    kind : {"hard", "soft"}
        "soft" is the formula as the paper prints it, plus the floor, with rows that sum to one.
        "hard", the default, replaces q_t by the
        indicator of its arg max, as the authors' published code does.
    floor : float
        Added before the log, in the starting point only and never in a loss: EM and a softmax
        both keep an exact zero for ever. The authors' value.
    weights : (n,), optional
        How often each sample counts in the sums.

    Returns
    -------
    (K, K)
        Finite. A class that is never predicted gets a uniform row: nothing is known of it.

    Raises
    ------
    TypeError, ValueError
        For arrays that do not fit, labels out of range, or an unknown kind.
    MemoryError
        So many classes that (K, K) does not fit; the message says what to use.
    """
    _check_outputs(probabilities, noisy_labels, floor)
    if kind not in ("hard", "soft"):
        raise ValueError(f"kind must be 'hard' or 'soft'; found {kind!r}")
    k = probabilities.shape[1]
    _require_dense(k, np.float64)
    q_ti = np.eye(k)[probabilities.argmax(axis=1)] if kind == "hard" else probabilities
    shares_ij = _shares(q_ti, noisy_labels, weights)
    return log_softmax(np.log(shares_ij + floor)).astype(probabilities.dtype)


def clustered_start(
    probabilities: np.ndarray,
    noisy_labels: np.ndarray,
    rng: np.random.Generator,
    floor: float = AUTHORS_FLOOR,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    r"""Return channel logits from clusters of a network's *soft* outputs, not from its arg max.

    Near one half of cyclically permuted labels, the arg max of a network trained on them is a coin
    toss between two classes, and :func:`confusion_start` tosses the classes together. But the pair
    that it hesitates between still tells the classes apart. So: K clusters (k-means, Lloyd's
    algorithm) of the vectors :math:`\sqrt{q_t}`, whose Euclidean distance is Hellinger's up to a
    factor; each cluster's frequencies of observed labels are a row of theta; clusters become
    classes by the assignment with the largest sum of log frequencies on the diagonal.

    That last step takes it that a class is seen as itself more often than as another one. Without
    that, which row is which cannot be known from the data (the K! equal optima of V7).

    Parameters
    ----------
    probabilities : (n, K)
        The network's softmax outputs q_ti on the training samples, n >= K.
    noisy_labels : (n,) integer
    rng : Generator
        Draws where k-means starts; the best of ten starts is taken.
    floor, weights
        As in :func:`confusion_start`; weights count in k-means, too.

    Returns
    -------
    (K, K)
        Finite. Where there are less than K different outputs, some rows are uniform.

    Raises
    ------
    TypeError, ValueError
        For arrays that do not fit, labels out of range, or fewer samples than classes.
    """
    _check_outputs(probabilities, noisy_labels, floor)
    checks.check_generator("rng", rng)
    n, k = probabilities.shape
    _require_dense(k, np.float64)
    if n < k:
        raise ValueError(f"probabilities must hold at least {k} samples; found {n}")
    # Imported here: most programs need no clusters, and this takes a while.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    k_means = KMeans(k, n_init=10, random_state=int(rng.integers(2**32)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of less than K different outputs
        cluster_t = k_means.fit_predict(np.sqrt(probabilities), sample_weight=weights)
    log_share_aj = np.log(_shares(np.eye(k)[cluster_t], noisy_labels, weights) + floor)
    cluster_i, class_i = linear_sum_assignment(-log_share_aj)
    log_theta_ij = np.empty((k, k))
    log_theta_ij[class_i] = log_share_aj[cluster_i]
    return log_softmax(log_theta_ij).astype(probabilities.dtype)


def _check_outputs(probabilities: np.ndarray, noisy_labels: np.ndarray, floor: float) -> None:
    """Refuse what is no network's output with its labels."""
    checks.check_floats("probabilities", probabilities, ("n", "K"))
    checks.check_samples_and_classes("probabilities", probabilities)
    checks.check_probability_rows("probabilities", probabilities)
    checks.check_labels("noisy_labels", noisy_labels, *probabilities.shape)
    if not floor > 0:
        raise ValueError(f"floor must be positive; found {floor}")


def _shares(q_ti: np.ndarray, noisy_labels: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return each class's frequencies of observed labels; zeros for a class without samples."""
    counted_ti = q_ti if weights is None else weights[:, None] * q_ti
    counts_ij = counts_by_label(counted_ti, noisy_labels)
    n_i = counts_ij.sum(axis=1, keepdims=True)
    return np.divide(counts_ij, n_i, out=np.zeros_like(counts_ij), where=n_i > 0)


def to_cleanlab(noise_matrix: np.ndarray) -> np.ndarray:
    """Return a noise matrix as cleanlab wants its own: the transpose, a copy.

    ============  =====================  ========================  ===============
    whose         rows                   columns                   sum to one
    ============  =====================  ========================  ===============
    nalayer       true class             observed (given) label    rows
    cleanlab      given (noisy) label    true class                columns
    ============  =====================  ========================  ===============

    Both hold p(given label | true class). cleanlab's ``inverse_noise_matrix``, p(true class | given
    label), is something else: it needs the classes' frequencies, too.

    Parameters
    ----------
    noise_matrix : (K, K)
        theta, such as ``NoiseAdaptationClassifier.noise_matrix_``.

    Raises
    ------
    TypeError, ValueError
        For what is not row-stochastic, for instance because it is cleanlab's already.

    Examples
    --------
    >>> to_cleanlab(np.array([[0.9, 0.1], [0.3, 0.7]])).tolist()
    [[0.9, 0.3], [0.1, 0.7]]
    """
    checks.check_noise_matrix("noise_matrix", noise_matrix)
    return noise_matrix.T.copy()


def from_cleanlab(noise_matrix: np.ndarray) -> np.ndarray:
    """Return theta for cleanlab's noise matrix: the other way round than :func:`to_cleanlab`.

    Raises TypeError or ValueError for a matrix whose columns do not sum to one.
    """
    checks.check_floats("noise_matrix", noise_matrix, ("K", "K"))
    checks.check_noise_matrix("the transpose of noise_matrix", noise_matrix.T)
    return noise_matrix.T.copy()


def best_relabelling(estimate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return for each row of the truth the row of the estimate that stands for it: (K,).

    The one-to-one assignment with the least total variation distance between the rows. Likelihood
    does not tell relabelled solutions apart (V7), so a start that knows nothing of the classes may
    end in any of them.
    """
    checks.check_noise_matrix("truth", truth)
    checks.check_noise_matrix("estimate", estimate)
    checks.check_array("estimate", estimate, truth.shape)
    distance_il = np.abs(truth[:, None] - estimate[None]).sum(axis=2)
    return linear_sum_assignment(distance_il)[1]


def noise_matrix_error(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean over true classes of the total variation distance between the two rows.

    0 means equal, 1 means that every row puts its mass elsewhere. Both (K, K), rows stochastic.
    """
    checks.check_noise_matrix("truth", truth)
    checks.check_noise_matrix("estimate", estimate)
    checks.check_array("estimate", estimate, truth.shape)
    return float(0.5 * np.abs(estimate - truth).sum(axis=1).mean())
