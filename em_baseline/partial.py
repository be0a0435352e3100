r"""EM's sufficient statistics as sums: over batches, over files, over machines.

Of an E-step (Eq. 3) the noise matrix's M-step (Eq. 4) needs only the counts
:math:`N_{ij} = \sum_t c_{ti} 1\{z_t=j\}`, and its certificate (V11) the gradient
:math:`g_{ij} = \partial L/\partial\theta_{ij}`. Both add up over any parts of the data:

>>> import numpy as np
>>> from nalayer import SModel, mlp
>>> rng = np.random.default_rng(0)
>>> model = SModel(mlp(3, (), 2))
>>> parameters = rng.normal(size=model.n_parameters)
>>> x, z = rng.normal(size=(10, 3)), rng.integers(2, size=10)
>>> whole = e_step_statistics(model, parameters, x, z)
>>> cuts = slice(4), slice(4, 10)
>>> parts = sum_of(e_step_statistics(model, parameters, x[part], z[part]) for part in cuts)
>>> bool(np.abs(whole.counts - parts.counts).max() < 1e-14)
True
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from em_baseline.steps import e_step, noise_matrix_m_step
from kernels import checks, counts_by_label, log_softmax
from nalayer.buffers import SLICE, Buffers, slices
from nalayer.completed import Completed, expected_counts
from nalayer.models import NoiseModel, SModel
from nalayer.noise_layer import log_with_zeros, noise_matrix
from nalayer.weighting import WeightedModel, parts_of

POSTERIOR_BYTES = 64 * 2**20
"""what (samples, K) in float64 may take: with very many classes a slice is a few samples"""


@dataclass(frozen=True)
class Statistics:
    """What one E-step over a part of the data leaves for the noise matrix's M-step."""

    counts: np.ndarray
    """(K, K), or (K, l) of the links; float64: N_ij"""
    d_theta: np.ndarray | None
    """the same shape: g_ij = sum_t 1{z_t=j} q_ti/m_t, so that theta_ij g_ij = N_ij; None of a
    c-model, where every sample has a theta of its own"""
    log_likelihood: float
    """L of Eq. 2 at the parameters of the E-step: nats, sum over the part's samples"""
    n_samples: int

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of both parts together; refuse an s-model's beside a c-model's."""
        checks.check_array("counts", other.counts, self.counts.shape)
        if self.d_theta is not None and other.d_theta is not None:
            d_theta = self.d_theta + other.d_theta
        elif self.d_theta is other.d_theta:
            d_theta = None
        else:
            raise TypeError("statistics of an SModel and of a CModel must not be added up")
        return Statistics(
            self.counts + other.counts,
            d_theta,
            self.log_likelihood + other.log_likelihood,
            self.n_samples + other.n_samples,
        )


def sum_of(parts: Iterable[Statistics]) -> Statistics:
    """Return the statistics of all parts together; raise ValueError where there are none."""
    found = list(parts)
    if not found:
        raise ValueError("parts must hold the statistics of one part or more; found none")
    return reduce(add, found)


def e_step_statistics(
    model: NoiseModel, parameters: np.ndarray, x: np.ndarray, noisy_labels: np.ndarray
) -> Statistics:
    """Run the E-step over a part of the data, slice by slice.

    Parameters
    ----------
    model : SModel or CModel, dense or sparse
        A c-model's counts are what its posterior says; it has no M-step in closed form.
    parameters : (model.n_parameters,)
    x : (n, n_in)
        May be a memory-mapped file: a slice is read at a time.
    noisy_labels : (n,) integer, or what :func:`nalayer.weighting.weighted_labels` makes of them
        With weights, of mean one over all parts, every sample counts in all sums as its weight
        says.

    Returns
    -------
    Statistics

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit; for weights with a model that has pseudo-counts.
    FloatingPointError
        If the likelihood is not finite.

    Notes
    -----
    A slice holds, beside what its network needs, its logits, the posterior (with weights a second
    one) and for an s-model log q and q/m in float64: (samples, K) each, none of them larger than
    ``POSTERIOR_BYTES``. q/m may be as large as 1/theta: beyond float32's range where that is below
    e^-88, and infinite, with the certificate, where it is below e^-709.
    """
    is_weighted = parts_of(noisy_labels)[1] is not None
    (WeightedModel(model) if is_weighted else model).check(parameters, x, noisy_labels)
    weights, *channel = model.unpack(parameters)
    counts, log_likelihood = np.zeros(channel[-1].shape, like=parameters), 0.0
    d_theta = np.zeros(counts.shape, like=parameters) if isinstance(model, SModel) else None
    buffers = Buffers()
    fitting = POSTERIOR_BYTES // (model.network.n_classes * 8)
    for part in slices(len(x), int(np.clip(fitting, 1, SLICE))):
        z, sample_weights = parts_of(noisy_labels[part])
        outputs, _ = model.forward(weights, x[part], buffers=buffers)
        found = e_step(model, outputs, channel, z, check_values=False)
        log_m_t = found.log_likelihood_t
        scores_t = log_m_t if sample_weights is None else sample_weights * log_m_t
        likelihood = float(scores_t.sum(dtype=np.float64))
        if not np.isfinite(likelihood):
            raise FloatingPointError(
                f"the log-likelihood is {likelihood} in samples {part.start}..{part.stop - 1}"
            )
        data = Completed.of(z, found.posterior, sample_weights)
        counts += expected_counts(data.posterior, z, model.links)
        if d_theta is not None:
            log_q_ti = log_softmax(outputs[0].astype(np.float64), check_values=False)
            with np.errstate(over="ignore"):
                g_ti = np.exp(log_q_ti - log_m_t.astype(np.float64)[:, None])
            if sample_weights is not None:
                g_ti *= sample_weights[:, None]
            d_theta += counts_by_label(g_ti, z, model.links, check_values=False)
        log_likelihood += likelihood
    return Statistics(counts, d_theta, log_likelihood, len(x))


def with_m_step(model: SModel, parameters: np.ndarray, statistics: Statistics) -> np.ndarray:
    """Return the parameters with the noise matrix of Eq. 4; the network's weights stay.

    Raises
    ------
    TypeError, ValueError
        For a c-model, which has no such step, or statistics of another shape.
    """
    _require_s_model(model)
    weights, channel_logits = model.unpack(parameters)
    checks.check_array("statistics.counts", statistics.counts, channel_logits.shape)
    previous = noise_matrix(channel_logits.astype(np.float64))
    theta = noise_matrix_m_step(statistics.counts, previous, model.pseudo_counts)
    return model.pack(weights, log_with_zeros(theta).astype(parameters.dtype))


def certificate(statistics: Statistics) -> float:
    r"""Return V11's bound: what a better noise matrix could gain for this network at the most.

    L is concave in theta, a weighted L as well. With g = dL/dtheta and :math:`n_i = \sum_j N_{ij}`

    .. math:: 0 \le (L^* - L(\theta)) / n \le \sum_i (\max_j g_{ij} - n_i) / n

    among the noise matrices with the same links. Zeros of theta count too: g says what they would
    gain by growing. :func:`em_baseline.statements.certificate` is the same from the formulas as
    they are printed, which hold n x K x K.

    Of an E-step in float32 it is right to float32's rounding: its log m_t has that.

    Parameters
    ----------
    statistics : Statistics
        Of an s-model, dense or sparse.

    Returns
    -------
    float
        Nats per sample.

    Raises
    ------
    TypeError
        For statistics of a c-model, whose L is not concave in U and B.
    """
    if statistics.d_theta is None:
        raise TypeError("statistics must be those of an SModel; found a c-model's")
    # A mean of g_i, by theta_i, is n_i: only rounding can make the largest of them smaller.
    gain_i = (statistics.d_theta.max(axis=1) - statistics.counts.sum(axis=1)).clip(min=0)
    return float(gain_i.sum()) / statistics.n_samples


def _require_s_model(model: NoiseModel) -> None:
    if not isinstance(model, SModel):
        raise TypeError(f"model must be an SModel, which Eq. 4 is for; found {model.name}")
