"""EM's completed data and the sums over them that both methods need: counts, regressions, -Q.

With the posterior taken at the very same parameters, the gradient of -Q is the joint gradient
(Fisher's identity, V3). EM raises Q with the posterior held fixed; :mod:`nalayer.weighting` takes
the gradient of a *weighted* likelihood from here, with a posterior that counts every sample as
often as its weight says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import kernels
from kernels import LinkIndex, checks, counts_by_label, log_softmax
from kernels.links import links_of_samples
from nalayer.buffers import Buffers
from nalayer.models import CModel, NoiseModel


def expected_counts(
    posterior: np.ndarray, noisy_labels: np.ndarray, links: LinkIndex | None = None
) -> np.ndarray:
    """Return N_ij = sum_t c_ti 1{z_t=j}: (n, K), (n,) -> (K, K), or (K, l) of the links; float64.

    Row i, column j: how often true class i was seen as j, as far as the posterior can tell.
    """
    checks.check_floats("posterior", posterior, ("n", "K"))
    checks.check_finite("posterior", posterior)
    checks.check_labels("noisy_labels", noisy_labels, *posterior.shape)
    if links is not None:
        checks.check_array("posterior", posterior, ("n", links.support.shape[0]))
    return counts_by_label(posterior, noisy_labels, links, check_values=False)


@dataclass(frozen=True)
class Completed:
    """EM's completed data: what was observed, and what the E-step believes of the rest."""

    noisy_labels: np.ndarray
    """(n,) integer, z_t"""
    posterior: np.ndarray
    """(n, K), c_ti, held fixed; zero where a sparse model has no link from i to z_t"""
    weights: np.ndarray | None = None
    """(n,), what ``posterior`` was multiplied by where samples have weights: its row sums"""

    @classmethod
    def of(
        cls, noisy_labels: np.ndarray, posterior: np.ndarray, weights: np.ndarray | None
    ) -> Completed:
        """Return the data with every sample counted as often as its weight says."""
        if weights is None:
            return cls(noisy_labels, posterior)
        weights = weights.astype(posterior.dtype)
        return cls(noisy_labels, weights[:, None] * posterior, weights)

    def __getitem__(self, samples: Any) -> Completed:
        """Return the same for some of the samples: a mini-batch."""
        weights = None if self.weights is None else self.weights[samples]
        return Completed(self.noisy_labels[samples], self.posterior[samples], weights)


# One true class: its index i, its samples t, their c_ti log theta_t,i,z_t and the gradient of -Q
# with respect to their scores, c_ti (theta_t,ij - 1{j=z_t}).
Regression = tuple[int, np.ndarray | slice, np.ndarray, np.ndarray]


def regressions(
    hidden: np.ndarray, channel: Sequence[np.ndarray], data: Completed, links: LinkIndex | None
) -> Iterator[Regression]:
    """Yield the k weighted softmax regressions of z on h (Eq. 8), one true class at a time."""
    channel_weights, channel_logits = channel
    for i, (t, z_link) in enumerate(_samples_of_class(data, channel_logits.shape[0], links)):
        rows, c_t = np.arange(z_link.size, like=z_link), data.posterior[t, i]
        log_theta_tj = log_softmax(
            hidden[t] @ channel_weights[i].T + channel_logits[i], check_values=False
        )
        # A dead link has c_ti = 0 and log 0: it contributes nothing.
        log_theta_z_t = np.where(c_t > 0, log_theta_tj[rows, z_link], 0)
        d_score_tj = np.exp(log_theta_tj)
        d_score_tj[rows, z_link] -= 1
        yield i, t, c_t * log_theta_z_t, c_t[:, None] * d_score_tj


def _samples_of_class(
    data: Completed, k: int, links: LinkIndex | None
) -> list[tuple[np.ndarray | slice, np.ndarray]]:
    """Return for every true class the samples it can have produced, and its link to their z_t."""
    if links is None:
        return [(slice(None), data.noisy_labels)] * k
    sample_p, link_p = links_of_samples(links, data.noisy_labels)
    n_kept = links.support.shape[1]
    class_p, place_p = link_p // n_kept, link_p % n_kept
    order = np.argsort(class_p, kind="stable")
    # The sizes of the parts have to be known on the CPU: on a GPU this waits.
    n_pairs_i = np.bincount(class_p, minlength=k).tolist()
    cuts = list(itertools.accumulate(n_pairs_i))[:-1]
    return list(zip(np.split(sample_p[order], cuts), np.split(place_p[order], cuts), strict=True))


def network_part(model: NoiseModel, logits: np.ndarray, data: Completed) -> kernels.SoftmaxNLL:
    """Return -S(w)/n of Eq. 5 and its gradient with respect to the logits, (q - c)/n (Eq. 6).

    With weights, which c then holds already, (w q - c)/n.
    """
    if data.weights is not None:
        log_q_ti, n = log_softmax(logits, check_values=False), len(logits)
        s = np.where(data.posterior > 0, data.posterior * log_q_ti, 0).sum(dtype=np.float64)
        d_logits = (data.weights[:, None] * np.exp(log_q_ti) - data.posterior) / n
        return kernels.SoftmaxNLL(-s / n, d_logits)
    return kernels.soft_target_nll(
        logits, data.posterior, backend=model.backend, check_values=False
    )


def expected_matrix(
    model: NoiseModel, channel_logits: np.ndarray, data: Completed
) -> tuple[Any, np.ndarray]:
    """Return an s-model's -(1/n) sum_ij N_ij log theta_ij and (n_i theta_ij - N_ij)/n."""
    n = data.noisy_labels.size
    counts_ij = expected_counts(data.posterior, data.noisy_labels, model.links)
    log_theta_ij = log_softmax(channel_logits, check_values=False)
    terms_ij = counts_ij * np.where(counts_ij > 0, log_theta_ij, 0)
    n_i = counts_ij.sum(axis=1, keepdims=True)
    return -terms_ij.sum() / n, (n_i * np.exp(log_theta_ij) - counts_ij) / n


def expected_backward(
    model: NoiseModel,
    parameters: np.ndarray,
    outputs: Sequence[np.ndarray],
    caches: Any,
    data: Completed,
    buffers: Buffers,
) -> tuple[Any, np.ndarray]:
    """Return -Q/n and its gradient for weights and channel, after ``model.forward``.

    On a GPU -Q/n is a scalar there.
    """
    weights, *channel = model.unpack(parameters)
    logits, *hidden = outputs
    gradient = buffers.take("gradient", parameters.shape, parameters.dtype, like=parameters)
    d_weights, *d_channel = model.unpack(gradient)
    nll, d_logits = network_part(model, logits, data)
    backward = model.network.backward
    if not isinstance(model, CModel):
        noise, d_channel[0][...] = expected_matrix(model, channel[0], data)
        backward(weights, caches, d_logits, out=d_weights, buffers=buffers)
        return nll + noise, gradient

    (h,), n, noise = hidden, len(logits), 0.0
    d_h = np.zeros(h.shape, like=h)
    for i, t, term_t, d_score_tj in regressions(h, channel, data, model.links):
        noise = noise - term_t.sum(dtype=np.float64) / n
        d_channel[0][i] = d_score_tj.T @ h[t] / n
        d_channel[1][i] = d_score_tj.sum(axis=0) / n
        d_h[t] += d_score_tj @ channel[0][i] / n
    d_h = d_h.astype(parameters.dtype)
    backward(weights, caches, d_logits, d_h, out=d_weights, buffers=buffers)
    return nll + noise, gradient
