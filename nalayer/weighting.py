"""Likelihoods in which samples have weights: a weighted mean in place of the mean.

The kernels know no weights. So the gradient is put together from the E-step's kernel: by Fisher's
identity (V3) the gradient of ``log m_t`` is that of ``sum_i c_ti log(q_ti theta_i,z_t)`` with c_t
held fixed, and a sum over samples is weighted by weighting each c_t.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels import checks, log_softmax
from nalayer.buffers import FRESH, Buffers
from nalayer.completed import Completed, expected_backward
from nalayer.models import NoiseModel, PlainModel, SModel, mean_over_slices

WEIGHTED_LABEL = np.dtype([("label", np.int64), ("weight", np.float64)])
"""of targets with weights: one array that can be indexed, shuffled and cut like plain labels"""


def weighted_labels(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return labels and weights as one array: (n,) of :data:`WEIGHTED_LABEL`.

    Parameters
    ----------
    labels : (n,) integer
    weights : (n,)
        Finite and positive. A loss is sum_t w_t loss_t / n: scale them to a mean of one over the
        whole data set, and mini-batches have unbiased gradients of the weighted mean.

    Raises
    ------
    TypeError, ValueError
        For arrays of other shapes, and weights that are not positive numbers.
    """
    checks.check_array("labels", labels, ("n",))
    checks.check_floats("weights", weights, labels.shape)
    if checks.is_on_gpu(labels) or checks.is_on_gpu(weights):
        raise TypeError(
            "labels and weights must be NumPy arrays: CuPy has no arrays of records, and training "
            "with weights does not run on a GPU"
        )
    if not ((weights > 0) & np.isfinite(weights)).all():
        raise ValueError(f"weights must be finite and positive; found {weights.min()}")
    targets = np.empty(labels.shape, WEIGHTED_LABEL)
    targets["label"], targets["weight"] = labels, weights
    return targets


def parts_of(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return labels, and the weights of those that have some."""
    if getattr(targets, "dtype", None) != WEIGHTED_LABEL:
        return targets, None
    return np.ascontiguousarray(targets["label"]), np.ascontiguousarray(targets["weight"])


@dataclass(frozen=True)
class WeightedModel:
    """Another model with a weighted mean over samples. Targets are :func:`weighted_labels`.

    Parameters
    ----------
    model : PlainModel, SModel or CModel
        Dense or sparse; without pseudo-counts.
    """

    model: PlainModel | NoiseModel

    def __post_init__(self) -> None:
        """Refuse pseudo-counts, which would need to know the sum of the weights."""
        if isinstance(self.model, SModel) and self.model.pseudo_count:
            raise ValueError(f"model must have no pseudo_count; found {self.model.pseudo_count}")

    @property
    def n_parameters(self) -> int:
        """Those of the model."""
        return self.model.n_parameters

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, once per data set."""
        checks.check_array("targets", targets, ("n",))
        if targets.dtype != WEIGHTED_LABEL:
            raise TypeError(
                f"targets must be labels with weights, such as weighted_labels gives; "
                f"found {targets.dtype}"
            )
        self.model.check(parameters, x, parts_of(targets)[0])

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: np.ndarray,
        rng: np.random.Generator | None = None,
        buffers: Buffers = FRESH,
    ) -> tuple[float, np.ndarray]:
        """Return sum_t w_t loss_t / n and its gradient."""
        model, (labels, weights) = self.model, parts_of(targets)
        assert weights is not None
        if isinstance(model, PlainModel):
            logits, caches = model.network.forward(parameters, x, rng, buffers)
            d_logits = model._nll(logits, labels).d_logits
            d_logits *= weights.astype(d_logits.dtype)[:, None]
            gradient = buffers.take("gradient", parameters.shape, parameters.dtype)
            model.network.backward(parameters, caches, d_logits, out=gradient, buffers=buffers)
            return -_mean(_log_q(logits, labels), weights), gradient
        network_weights, *channel = model.unpack(parameters)
        outputs, caches = model.forward(network_weights, x, rng, buffers)
        found = model.posterior(outputs, channel, labels)
        data = Completed.of(labels, found.posterior, weights)
        _, gradient = expected_backward(model, parameters, outputs, caches, data, buffers)
        return -_mean(found.log_likelihood_t, weights), gradient

    def loss(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the weighted mean loss, without dropout."""
        return self.nll(parameters, x, targets)

    def validation_loss(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return :meth:`nll`."""
        return self.nll(parameters, x, targets)

    def nll(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the same: there is no penalty."""

        def of(part: slice, buffers: Buffers) -> float:
            labels, weights = parts_of(targets[part])
            assert weights is not None
            if isinstance(self.model, PlainModel):
                logits, _ = self.model.network.forward(parameters, x[part], buffers=buffers)
                return -_mean(_log_q(logits, labels), weights)
            network_weights, *channel = self.model.unpack(parameters)
            outputs, _ = self.model.forward(network_weights, x[part], buffers=buffers)
            return -_mean(self.model.posterior(outputs, channel, labels).log_likelihood_t, weights)

        return mean_over_slices(of, x.shape[0])


def _log_q(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return log_softmax(logits, check_values=False)[np.arange(labels.size), labels]


def _mean(score_t: np.ndarray, weights: np.ndarray) -> float:
    return float((weights * score_t).mean())
