"""What :class:`nalayer.NoiseAdaptationClassifier` asks of this package, by name.

The estimator lies below this package and cannot import it; it looks this module up when it is told
to fit by EM, and for its certificate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from em_baseline import partial
from em_baseline.alternating import EMFit, HalfStep, LikelihoodDropWarning, fit
from em_baseline.steps import MiniBatches
from nalayer.models import CModel, SModel
from nalayer.optimisers import Adam


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
    """Return :func:`em_baseline.partial.certificate`, in float64: a difference of large sums."""
    parameters, x = (values.astype(np.float64, copy=False) for values in (parameters, x))
    return partial.certificate(partial.e_step_statistics(model, parameters, x, targets))
