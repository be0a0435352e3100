r"""EM's sufficient statistics as sums: over batches, over files, over machines.

Of an E-step (Eq. 3) the noise matrix's M-step (Eq. 4) needs only the counts
:math:`N_{ij} = \sum_t c_{ti} 1\{z_t=j\}`, and these add up over any parts of the data:

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
from kernels import checks
from nalayer.buffers import SLICE, Buffers, slices
from nalayer.completed import expected_counts
from nalayer.models import NoiseModel, SModel
from nalayer.noise_layer import log_with_zeros, noise_matrix

POSTERIOR_BYTES = 64 * 2**20
"""what a slice's posterior may take: with very many classes a slice is a few samples"""


@dataclass(frozen=True)
class Statistics:
    """What one E-step over a part of the data leaves for the noise matrix's M-step."""

    counts: np.ndarray
    """(K, K), or (K, l) of the links; float64: N_ij"""
    log_likelihood: float
    """L of Eq. 2 at the parameters of the E-step: nats, sum over the part's samples"""
    n_samples: int

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of both parts together."""
        checks.check_array("counts", other.counts, self.counts.shape)
        return Statistics(
            self.counts + other.counts,
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
        May be a memory-mapped file: a slice is read at a time, and no posterior larger than
        ``POSTERIOR_BYTES`` is held.
    noisy_labels : (n,) integer

    Returns
    -------
    Statistics

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.
    FloatingPointError
        If the likelihood is not finite.
    """
    model.check(parameters, x, noisy_labels)
    weights, *channel = model.unpack(parameters)
    counts, log_likelihood = np.zeros(channel[-1].shape, like=parameters), 0.0
    buffers = Buffers()
    fitting = POSTERIOR_BYTES // (model.network.n_classes * parameters.itemsize)
    for part in slices(len(x), int(np.clip(fitting, 1, SLICE))):
        outputs, _ = model.forward(weights, x[part], buffers=buffers)
        found = e_step(model, outputs, channel, noisy_labels[part], check_values=False)
        likelihood = float(found.log_likelihood_t.sum(dtype=np.float64))
        if not np.isfinite(likelihood):
            raise FloatingPointError(
                f"the log-likelihood is {likelihood} in samples {part.start}..{part.stop - 1}"
            )
        counts += expected_counts(found.posterior, noisy_labels[part], model.links)
        log_likelihood += likelihood
    return Statistics(counts, log_likelihood, len(x))


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


def certificate(model: SModel, parameters: np.ndarray, statistics: Statistics) -> float:
    r"""Return V11's bound from statistics: what a better noise matrix could gain at the most.

    :func:`em_baseline.statements.certificate` for data sets and numbers of classes at which
    nothing of n x K can be held. With g = dL/dtheta, of which :math:`\theta_{ij} g_{ij} = N_{ij}`,

    .. math:: 0 \le L^* - L(\theta) \le \sum_i (\max_j g_{ij} - n_i)

    among the noise matrices with the same links, for this network.

    Parameters
    ----------
    model : SModel, dense or sparse
    parameters : (model.n_parameters,)
        Those of the E-step.
    statistics : Statistics

    Returns
    -------
    float
        Nats per sample.

    Raises
    ------
    TypeError, ValueError
        For a c-model, statistics of another shape, or a noise matrix with a zero: what it would
        gain by growing cannot be seen in the counts.
    """
    _require_s_model(model)
    _, channel_logits = model.unpack(parameters)
    checks.check_array("statistics.counts", statistics.counts, channel_logits.shape)
    theta = noise_matrix(channel_logits.astype(np.float64))
    if not theta.min() > 0:
        raise ValueError("parameters must hold a noise matrix without zeros; found a link with one")
    gain_i = (statistics.counts / theta).max(axis=1) - statistics.counts.sum(axis=1)
    return float(gain_i.sum()) / statistics.n_samples


def _require_s_model(model: NoiseModel) -> None:
    if not isinstance(model, SModel):
        raise TypeError(f"model must be an SModel, which Eq. 4 is for; found {model.name}")
