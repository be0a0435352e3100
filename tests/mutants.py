"""Deliberately wrong variants, most of them found in published code. Every one must be rejected.

A kernel mutant has the signature of ``s_model_nll``, or of the kernel it is a mutant of (checks and
backend swallowed), so that it can stand in for it anywhere.
"""

import numpy as np

from em_baseline.statements import Literal
from kernels import link_index, numpy_backend
from kernels.numpy_backend import log_softmax
from kernels.results import Posterior, SModelNLL
from nalayer import SoftTargetModel
from nalayer.buffers import FRESH


def _parts(logits, channel_logits, noisy_labels):
    """Return q, theta, q_ti theta_i,z_t and the one-hot labels."""
    q, theta = np.exp(log_softmax(logits)), np.exp(log_softmax(channel_logits))
    return q, theta, q * theta[:, noisy_labels].T, np.eye(q.shape[1])[noisy_labels]


def theta_transposed(logits, channel_logits, noisy_labels, **_):
    """Columns are read as the true class."""
    theta_t = np.exp(log_softmax(channel_logits)).T
    with np.errstate(divide="ignore"):
        log_theta_t = np.log(theta_t)
    log_joint = log_softmax(logits) + log_theta_t.T[noisy_labels]
    c = np.exp(log_softmax(log_joint))
    q = np.exp(log_softmax(logits))
    n = len(noisy_labels)
    counts = c.T @ np.eye(q.shape[1])[noisy_labels]
    nll = -np.log(np.exp(log_joint).sum(axis=1)).mean()
    d_channel = (counts.sum(axis=1, keepdims=True) * theta_t - counts) / n
    return SModelNLL(nll, (q - c) / n, d_channel.T)


def logits_fed_where_probabilities_belong(logits, channel_logits, noisy_labels, **_):
    """The noise layer multiplies the raw scores, and another softmax makes it look right."""
    _, theta, _, one_hot = _parts(logits, channel_logits, noisy_labels)
    n = len(noisy_labels)
    scores = logits @ theta
    d_scores = (np.exp(log_softmax(scores)) - one_hot) / n
    d_theta = logits.T @ d_scores
    d_channel = theta * (d_theta - (theta * d_theta).sum(axis=1, keepdims=True))
    nll = -log_softmax(scores)[np.arange(n), noisy_labels].mean()
    return SModelNLL(nll, d_scores @ theta.T, d_channel)


def k_binary_log_losses(logits, channel_logits, noisy_labels, **_):
    """Every class gets a log loss of its own, as if labels did not exclude each other."""
    q, theta, _, one_hot = _parts(logits, channel_logits, noisy_labels)
    n = len(noisy_labels)
    p = q @ theta
    nll = -(one_hot * np.log(p) + (1 - one_hot) * np.log1p(-p)).sum(axis=1).mean()
    d_p = -(one_hot / p - (1 - one_hot) / (1 - p)) / n
    d_q, d_theta = d_p @ theta.T, q.T @ d_p
    return SModelNLL(
        nll,
        q * (d_q - (q * d_q).sum(axis=1, keepdims=True)),
        theta * (d_theta - (theta * d_theta).sum(axis=1, keepdims=True)),
    )


def posterior_not_normalised(logits, channel_logits, noisy_labels, **_):
    """c_ti = q_ti theta_i,z_t, without the division by m_t."""
    q, theta, joint, one_hot = _parts(logits, channel_logits, noisy_labels)
    n = len(noisy_labels)
    counts = joint.T @ one_hot
    d_channel = (counts.sum(axis=1, keepdims=True) * theta - counts) / n
    return SModelNLL(-np.log(joint.sum(axis=1)).mean(), (q - joint) / n, d_channel)


def log_of_p_plus_1e_8(logits, channel_logits, noisy_labels, **_):
    """The usual epsilon in the loss, and its gradient."""
    q, theta, joint, one_hot = _parts(logits, channel_logits, noisy_labels)
    n = len(noisy_labels)
    m = joint.sum(axis=1) + 1e-8
    c = joint / m[:, None]
    counts = c.T @ one_hot
    d_channel = (counts.sum(axis=1, keepdims=True) * theta - counts) / n
    return SModelNLL(-np.log(m).mean(), (q * c.sum(axis=1, keepdims=True) - c) / n, d_channel)


def last_sample_lost(logits, channel_logits, noisy_labels, **_):
    """The loop ends one sample early."""
    short = numpy_backend.s_model_nll(logits[:-1], channel_logits, noisy_labels[:-1])
    d_logits = np.concatenate([short.d_logits, np.zeros_like(logits[-1:])])
    return SModelNLL(short.nll, d_logits, short.d_channel_logits)


def sum_where_the_mean_belongs(logits, channel_logits, noisy_labels, **_):
    """Everything n times too large."""
    right = numpy_backend.s_model_nll(logits, channel_logits, noisy_labels)
    n = len(noisy_labels)
    return SModelNLL(*(value * logits.dtype.type(n) for value in right))


def gradients_swapped_in_sign(logits, channel_logits, noisy_labels, **_):
    """Climbs where it should descend: c - q, as the paper maximises and code minimises."""
    right = numpy_backend.s_model_nll(logits, channel_logits, noisy_labels)
    return SModelNLL(right.nll, -right.d_logits, -right.d_channel_logits)


KERNELS = {
    mutant.__name__: mutant
    for mutant in (
        theta_transposed,
        logits_fed_where_probabilities_belong,
        k_binary_log_losses,
        posterior_not_normalised,
        log_of_p_plus_1e_8,
        last_sample_lost,
        sum_where_the_mean_belongs,
        gradients_swapped_in_sign,
    )
}


def hidden_gradient_lost(*arrays, **_):
    """The c-model's second path to the network is cut: h hears of the logits only."""
    right = _any_c_model(arrays)
    return right._replace(d_hidden=np.zeros_like(right.d_hidden))


def hidden_gradient_with_the_wrong_sign(*arrays, **_):
    """h climbs where everything else descends."""
    right = _any_c_model(arrays)
    return right._replace(d_hidden=-right.d_hidden)


def _any_c_model(arrays):
    kernel = "c_model_nll" if len(arrays) == 5 else "sparse_c_model_nll"
    return getattr(numpy_backend, kernel)(*_with_index(arrays))


def _with_index(arrays):
    """Return a kernel's arguments with the support, if it is a plain array, as an index."""
    *others, support, labels = arrays
    is_support = isinstance(support, np.ndarray) and support.dtype.kind in "iu"
    return (*others, link_index(support) if is_support else support, labels)


def _sparse(arrays):
    kernel = "sparse_s_model_nll" if len(arrays) == 4 else "sparse_c_model_nll"
    return getattr(numpy_backend, kernel)


def last_kept_link_dropped(*arrays, **_):
    """The loop over the links of a row ends one early."""
    *others, index, labels = _with_index(arrays)
    others[-1] = others[-1].copy()
    others[-1][:, -1] = -np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        return _sparse(arrays)(*others, index, labels)


def transposed_index_stale(*arrays, **_):
    """The support was changed, the links sorted by label are still those of the one before."""
    *others, index, labels = _with_index(arrays)
    before = link_index(np.roll(index.support, 1, axis=0))
    stale = before._replace(support=index.support)
    return _sparse(arrays)(*others, stale, labels)


# Mutants of the other models' kernels, with the models they are mutants of.
OTHER_KERNELS = {
    hidden_gradient_lost: ("c_model", "sparse_c_model"),
    hidden_gradient_with_the_wrong_sign: ("c_model", "sparse_c_model"),
    last_kept_link_dropped: ("sparse_s_model", "sparse_c_model"),
    transposed_index_stale: ("sparse_s_model", "sparse_c_model"),
}


def network_half_without_h(self, weights, x, targets, rng=None, buffers=FRESH):
    """A c-model's network M-step by Eq. 6 alone, as if theta did not depend on the network."""
    by_eq_6 = SoftTargetModel(self.model.network, self.model.backend)
    return by_eq_6.loss_and_gradient(weights, x, targets.posterior, rng)


# The E-steps have the signature of em_baseline.steps.e_step.


def e_step_not_normalised(model, outputs, channel, noisy_labels, check_values=True):
    """The E-step without the division by m_t."""
    joint = Literal(outputs, channel, noisy_labels, model.links).joint_ti
    return Posterior(np.log(joint.sum(axis=1)), joint)


def e_step_returns_the_prior(model, outputs, channel, noisy_labels, check_values=True):
    """p(y|x) in place of p(y|x,z): Eq. 4 then counts what the network says without the label."""
    literal = Literal(outputs, channel, noisy_labels, model.links)
    return Posterior(np.log(literal.m), literal.q)


def e_step_with_theta_transposed(model, outputs, channel, noisy_labels, check_values=True):
    """Row z_t in place of column z_t."""
    literal = Literal(outputs, channel, noisy_labels, model.links)
    theta = np.broadcast_to(literal.theta, (len(literal.q), *literal.theta.shape[1:]))
    joint = literal.q * theta[np.arange(len(literal.q)), noisy_labels]
    return Posterior(np.log(joint.sum(axis=1)), joint / joint.sum(axis=1, keepdims=True))


def rows_normalised_by_dividing_columns(counts_ij, previous, pseudo_count=0.0):
    """``T / T.sum(1)`` without keepdims."""
    return counts_ij / counts_ij.sum(1)


def m_step_forgets_to_store(counts_ij, previous, pseudo_count=0.0):
    """The new noise matrix is computed and dropped."""
    _new = counts_ij / counts_ij.sum(axis=1, keepdims=True)
    return previous
