"""What :class:`nalayer.NoiseAdaptationClassifier` asks of this package, by name.

The estimator lies below this package and cannot import it; it looks this module up when it is told
to fit by EM, and for its certificate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from em_baseline.alternating import EMFit, HalfStep, LikelihoodDropWarning, fit
from em_baseline.steps import MiniBatches
from kernels import counts_by_label, log_softmax
from nalayer.models import CModel, SModel
from nalayer.optimisers import Adam
from nalayer.weighting import parts_of


def fit_by_em(
    model: SModel | CModel,
    parameters: np.ndarray,
    x: np.ndarray,
    targets: np.ndarray,
    *,
    validation: tuple[np.ndarray, np.ndarray] | None,
    n_rounds: int,
    inner_epochs: int,
    patience: int | None,
    batch_size: int,
    learning_rate: float,
    damping: float,
    shuffling: np.random.Generator,
    dropout: np.random.Generator | None,
    on_half_step: Callable[[HalfStep, np.ndarray], None] | None = None,
) -> EMFit:
    """Alternate as :func:`em_baseline.fit` does, M-steps by mini-batches of Adam.

    ``targets`` are labels or weighted labels. ``damping`` is for the s-models; a c-model's noise
    layer moves at the pace of ``learning_rate``.
    """
    inner = MiniBatches(inner_epochs, batch_size, Adam(learning_rate, backend=model.backend))
    is_c_model = isinstance(model, CModel)
    with warnings.catch_warnings():
        # Dropout and mini-batches make M-steps inexact; that the likelihood may fall is known.
        warnings.simplefilter("ignore", LikelihoodDropWarning)
        return fit(
            model,
            parameters,
            x,
            targets,
            network_step=inner,
            noise_step=inner if is_c_model else None,
            n_rounds=n_rounds,
            patience=patience,
            shuffling=shuffling,
            dropout=dropout,
            validation=validation,
            damping=1.0 if is_c_model else damping,
            on_half_step=on_half_step,
        )


def certificate(model: SModel, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
    r"""Return V11's bound on what a better noise matrix could gain, in nats per sample.

    :func:`em_baseline.statements.certificate` in the memory of a data set, and with weights: a
    weighted L is concave in theta as well, and with
    :math:`g_{ij} = \sum_t w_t 1\{z_t=j\} q_{ti}/m_t` and :math:`n_i = \sum_t w_t c_{ti}`

    .. math:: 0 \le (L^* - L(\theta)) / n \le \sum_i (\max_j g_{ij} - n_i) / n
    """
    labels, sample_weights = parts_of(targets)
    model.check(parameters, x, labels)
    weights, channel_logits = (values.astype(np.float64) for values in model.unpack(parameters))
    logits = model.network.logits(weights, x.astype(np.float64))
    found = model.posterior((logits,), (channel_logits,), labels)
    w_t = np.ones(labels.size) if sample_weights is None else sample_weights
    log_ratio_ti = log_softmax(logits) - found.log_likelihood_t[:, None]
    g_ij = counts_by_label(w_t[:, None] * np.exp(log_ratio_ti), labels, model.links)
    n_i = w_t @ found.posterior
    return float((g_ij.max(axis=1) - n_i).sum() / labels.size)
