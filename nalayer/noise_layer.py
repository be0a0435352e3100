"""The s-model's noise layer: theta as a softmax of channel logits, and where to start it.

theta_ij = p(z=j | y=i): **rows are the true class and sum to one, columns are the observed
class**. The channel logits B are its parameters, theta_i = softmax(B_i) (Eqs. 10 and 13).
"""

from __future__ import annotations

import numpy as np

from kernels import checks, counts_by_label, log_softmax
from nalayer.label_noise import symmetric_noise

AUTHORS_FLOOR = 1e-8


def noise_matrix(channel_logits: np.ndarray) -> np.ndarray:
    """Return theta = softmax of each row of the channel logits: (K, K) -> (K, K).

    A sparse s-model's, (K, l) -> (K, l), are the probabilities of its links;
    :func:`~nalayer.scatter_links` makes the whole matrix of them.

    Raises TypeError or ValueError for what has no softmax, such as a row of -inf.
    """
    checks.check_floats("channel_logits", channel_logits, ("K", "l"))
    checks.check_rows_are_log_weights("channel_logits", channel_logits)
    return np.exp(log_softmax(channel_logits))


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
    return np.log(symmetric_noise(n_classes, init_noise)).astype(dtype)


def confusion_start(
    probabilities: np.ndarray,
    noisy_labels: np.ndarray,
    kind: str = "hard",
    floor: float = AUTHORS_FLOOR,
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

    Returns
    -------
    (K, K)
        Finite. A class that is never predicted gets a uniform row: nothing is known of it.

    Raises
    ------
    TypeError, ValueError
        For arrays that do not fit, labels out of range, or an unknown kind.
    """
    checks.check_floats("probabilities", probabilities, ("n", "K"))
    checks.check_samples_and_classes("probabilities", probabilities)
    checks.check_probability_rows("probabilities", probabilities)
    n, k = probabilities.shape
    checks.check_labels("noisy_labels", noisy_labels, n, k)
    if kind not in ("hard", "soft"):
        raise ValueError(f"kind must be 'hard' or 'soft'; found {kind!r}")
    if not floor > 0:
        raise ValueError(f"floor must be positive; found {floor}")

    q_ti = np.eye(k)[probabilities.argmax(axis=1)] if kind == "hard" else probabilities
    counts_ij = counts_by_label(q_ti, noisy_labels)
    n_i = counts_ij.sum(axis=1, keepdims=True)
    share_ij = np.divide(counts_ij, n_i, out=np.zeros((k, k)), where=n_i > 0)
    return log_softmax(np.log(share_ij + floor)).astype(probabilities.dtype)


def noise_matrix_error(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean over true classes of the total variation distance between the two rows.

    0 means equal, 1 means that every row puts its mass elsewhere. Both (K, K), rows stochastic.
    """
    checks.check_noise_matrix("truth", truth)
    checks.check_noise_matrix("estimate", estimate)
    checks.check_array("estimate", estimate, truth.shape)
    return float(0.5 * np.abs(estimate - truth).sum(axis=1).mean())
