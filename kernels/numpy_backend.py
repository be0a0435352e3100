"""The kernels in plain NumPy: the version to read beside the paper.

Index letters in the names give the shapes: ``t`` sample, ``i`` true class, ``j`` observed
class. Everything stays in the log domain, so nothing needs an epsilon.
"""

from __future__ import annotations

import numpy as np

from kernels.results import Posterior, SModelNLL, SoftmaxNLL


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Return the log of the softmax of each row: (r, K) -> (r, K)."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _log_sum_exp(scores: np.ndarray) -> np.ndarray:
    """Return log sum_i exp(s_i) of each row: (r, K) -> (r,); a row of -inf gives -inf."""
    top = scores.max(axis=1)
    shift = np.where(top > -np.inf, top, 0)
    with np.errstate(divide="ignore"):
        return shift + np.log(np.exp(scores - shift[:, None]).sum(axis=1))


def _log_posterior(
    log_q_ti: np.ndarray, log_theta_ij: np.ndarray, noisy_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return log m_t (Eqs. 1, 11) and log c_ti (Eq. 3); both from one reduction."""
    # Only column z_t of theta is needed: a gather, not a product with theta.
    log_joint_ti = log_q_ti + log_theta_ij.T[noisy_labels]
    log_m_t = _log_sum_exp(log_joint_ti)
    with np.errstate(invalid="ignore"):  # an unreachable label has no posterior: NaN
        return log_m_t, log_joint_ti - log_m_t[:, None]


def counts_by_label(weights_ti: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return N_ij = sum_t w_ti 1{z_t=j}: (n, K), (n,) -> (K, K), summed in float64."""
    k = weights_ti.shape[1]
    counts_ji = np.zeros((k, k))
    np.add.at(counts_ji, labels, weights_ti)
    return counts_ji.T


def _mean(values_t: np.ndarray) -> np.floating:
    """Average in float64, round once to the dtype that came in."""
    return values_t.dtype.type(values_t.mean(dtype=np.float64))


def softmax_nll(logits: np.ndarray, labels: np.ndarray) -> SoftmaxNLL:
    """See :func:`kernels.softmax_nll`."""
    n = logits.shape[0]
    samples = np.arange(n)
    log_q_ti = log_softmax(logits)
    d_logits = np.exp(log_q_ti)
    d_logits[samples, labels] -= 1
    d_logits /= n
    return SoftmaxNLL(_mean(-log_q_ti[samples, labels]), d_logits)


def soft_target_nll(logits: np.ndarray, targets: np.ndarray) -> SoftmaxNLL:
    """See :func:`kernels.soft_target_nll`."""
    log_q_ti = log_softmax(logits)
    with np.errstate(invalid="ignore"):  # 0 * -inf, replaced by 0 log 0 = 0
        terms_ti = np.where(targets > 0, targets * log_q_ti, 0)
    return SoftmaxNLL(_mean(-terms_ti.sum(axis=1)), (np.exp(log_q_ti) - targets) / logits.shape[0])


def s_model_nll(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> SModelNLL:
    """See :func:`kernels.s_model_nll`."""
    n = logits.shape[0]
    log_q_ti = log_softmax(logits)  # Eq. 7
    log_theta_ij = log_softmax(channel_logits)  # Eq. 10
    log_m_t, log_c_ti = _log_posterior(log_q_ti, log_theta_ij, noisy_labels)
    c_ti = np.exp(log_c_ti)

    counts_ij = counts_by_label(c_ti, noisy_labels)
    n_i = counts_ij.sum(axis=1, keepdims=True)

    d_logits = (np.exp(log_q_ti) - c_ti) / n
    d_channel_logits = (n_i * np.exp(log_theta_ij) - counts_ij) / n
    return SModelNLL(_mean(-log_m_t), d_logits, d_channel_logits.astype(logits.dtype))


def s_model_posterior(
    logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray
) -> Posterior:
    """See :func:`kernels.s_model_posterior`."""
    log_m_t, log_c_ti = _log_posterior(
        log_softmax(logits), log_softmax(channel_logits), noisy_labels
    )
    return Posterior(log_m_t, np.exp(log_c_ti))
