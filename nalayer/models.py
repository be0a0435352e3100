"""What is minimised: a network with a loss on top, as a function of one flat parameter vector.

A model holds no parameters. It maps (parameters, samples, targets) to a loss in nats per sample
and its gradient, so a trainer, an optimiser from SciPy and the gradient check all take it as is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import kernels
from kernels import checks, log_softmax
from nalayer.network import Network


class Model(Protocol):
    """What the trainer needs: a loss of a flat vector, with its gradient."""

    @property
    def n_parameters(self) -> int:
        """Length of the flat vector."""

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, once per data set."""

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: np.ndarray,
        rng: np.random.Generator | None = None,
    ) -> tuple[float, np.ndarray]:
        """Return the loss (nats, mean over samples) and its gradient, a flat vector."""

    def loss(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the loss alone, without dropout."""

    def nll(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the loss without dropout and without penalties: what held-out data judge."""


def check_features(network: Network, parameters: np.ndarray, x: np.ndarray, n_parameters: int):
    """Refuse parameters or features that do not fit the network: shape, dtype, NaN, no samples."""
    checks.check_floats("parameters", parameters, (n_parameters,))
    checks.check_finite("parameters", parameters[: network.n_weights])
    network.check_features(x, parameters.dtype)


@dataclass(frozen=True)
class PlainModel:
    """The baseline: a network trained as if the labels were clean. Targets are labels (n,)."""

    network: Network
    backend: str | None = None

    @property
    def n_parameters(self) -> int:
        """The network's weights."""
        return self.network.n_weights

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, once per data set."""
        check_features(self.network, parameters, x, self.n_parameters)
        checks.check_labels("labels", targets, x.shape[0], self.network.n_classes)

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: np.ndarray,
        rng: np.random.Generator | None = None,
    ) -> tuple[float, np.ndarray]:
        """Return the mean cross-entropy and its gradient."""
        logits, caches = self.network.forward(parameters, x, rng)
        nll, d_logits = self._nll(logits, targets)
        return float(nll), self.network.backward(parameters, caches, d_logits)

    def loss(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the mean cross-entropy, without dropout."""
        return self.nll(parameters, x, targets)

    def nll(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the same as :meth:`loss`: there is no penalty."""
        return float(self._nll(self.network.logits(parameters, x), targets).nll)

    def _nll(self, logits: np.ndarray, targets: np.ndarray) -> kernels.SoftmaxNLL:
        return kernels.softmax_nll(logits, targets, backend=self.backend, check_values=False)


@dataclass(frozen=True)
class SoftTargetModel(PlainModel):
    """The network's part of EM's M-step (Eq. 5): targets are posteriors c_ti (n, K)."""

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, once per data set."""
        check_features(self.network, parameters, x, self.n_parameters)
        shape = (x.shape[0], self.network.n_classes)
        checks.check_floats("targets", targets, shape, parameters.dtype)
        checks.check_probability_rows("targets", targets)

    def _nll(self, logits: np.ndarray, targets: np.ndarray) -> kernels.SoftmaxNLL:
        return kernels.soft_target_nll(logits, targets, backend=self.backend, check_values=False)


@dataclass(frozen=True)
class SModel:
    """A network with the simple noise adaptation layer on top (Eqs. 10-12), trained jointly.

    Parameters
    ----------
    network : Network
    pseudo_count : float
        Dirichlet pseudo-count alpha: adds ``alpha * sum_ij log theta_ij`` to the likelihood
        (a sum over samples). 0 is the paper.
    n_samples : int, optional
        Size of the training set over which alpha is spread; every mini-batch of b samples then
        carries b / n_samples of the pseudo-counts. Needed where alpha is positive.
    backend : {"numpy", "numba"}, optional

    Notes
    -----
    The flat vector is the network's weights followed by the channel logits, row by row.
    Targets are the noisy labels (n,). The loss is the mean negative log-likelihood (Eq. 12 with
    its sign turned) minus ``pseudo_count / n_samples * sum_ij log theta_ij``.
    """

    network: Network
    pseudo_count: float = 0.0
    n_samples: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        """Refuse a negative pseudo-count, or one to be spread over nothing."""
        check_pseudo_count(self.pseudo_count)
        if self.pseudo_count and not (self.n_samples and self.n_samples >= 1):
            raise ValueError(
                f"n_samples must be the size of the training set where pseudo_count is positive; "
                f"found {self.n_samples}"
            )

    @property
    def n_parameters(self) -> int:
        """The network's weights and the K x K channel logits."""
        return self.network.n_weights + self.network.n_classes**2

    def pack(self, weights: np.ndarray, channel_logits: np.ndarray) -> np.ndarray:
        """Return one flat vector, a copy; raises TypeError for two different dtypes."""
        checks.check_floats("weights", weights, (self.network.n_weights,))
        k = self.network.n_classes
        checks.check_floats("channel_logits", channel_logits, (k, k), weights.dtype)
        return np.concatenate([weights, channel_logits.ravel()])

    def unpack(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the weights and the channel logits (K, K) as views."""
        k = self.network.n_classes
        return parameters[: -k * k], parameters[-k * k :].reshape(k, k)

    def step_factors(self, channel_step: float) -> np.ndarray:
        """Return each parameter's step factor: ``channel_step`` for the noise layer, else 1."""
        k = self.network.n_classes
        return self.pack(np.ones(self.network.n_weights), np.full((k, k), float(channel_step)))

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, once per data set."""
        check_features(self.network, parameters, x, self.n_parameters)
        _, channel_logits = self.unpack(parameters)
        checks.check_rows_are_log_weights("channel_logits", channel_logits)
        checks.check_labels("noisy_labels", targets, x.shape[0], self.network.n_classes)
        checks.check_labels_reachable("noisy_labels", targets, "channel_logits", channel_logits)
        if self.pseudo_count and not np.isfinite(channel_logits).all():
            raise ValueError("channel_logits must be finite where pseudo_count is positive")

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: np.ndarray,
        rng: np.random.Generator | None = None,
    ) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient with respect to weights and channel logits."""
        weights, channel_logits = self.unpack(parameters)
        logits, caches = self.network.forward(weights, x, rng)
        nll, d_logits, d_channel_logits = self._nll(logits, channel_logits, targets)
        penalty, d_penalty = self.penalty(channel_logits)
        d_weights = self.network.backward(weights, caches, d_logits)
        return float(nll) + penalty, self.pack(d_weights, d_channel_logits + d_penalty)

    def loss(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the loss, without dropout."""
        _, channel_logits = self.unpack(parameters)
        return self.nll(parameters, x, targets) + self.penalty(channel_logits)[0]

    def nll(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the mean negative log-likelihood (Eq. 12), without dropout or pseudo-counts."""
        weights, channel_logits = self.unpack(parameters)
        return float(self._nll(self.network.logits(weights, x), channel_logits, targets).nll)

    def _nll(
        self, logits: np.ndarray, channel_logits: np.ndarray, labels: Any
    ) -> kernels.SModelNLL:
        return kernels.s_model_nll(
            logits, channel_logits, labels, backend=self.backend, check_values=False
        )

    def penalty(self, channel_logits: np.ndarray) -> tuple[float, np.ndarray | float]:
        """Return -(alpha/n) sum_ij log theta_ij and its gradient -(alpha/n) (1 - K theta_ij)."""
        if not self.pseudo_count or not self.n_samples:
            return 0.0, 0.0
        share = self.pseudo_count / self.n_samples
        log_theta_ij = log_softmax(channel_logits)
        k = channel_logits.shape[0]
        return -share * float(log_theta_ij.sum()), -share * (1 - k * np.exp(log_theta_ij))


def check_pseudo_count(pseudo_count: float) -> None:
    """Refuse a pseudo-count that is negative or no number."""
    if not 0 <= pseudo_count < np.inf:
        raise ValueError(f"pseudo_count must be finite and at least 0; found {pseudo_count}")
