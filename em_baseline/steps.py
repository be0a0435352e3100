"""The two halves of an EM iteration for the s-model (Bekker & Goldberger 2016; Eqs. 3-6).

Counts and Q are sums over samples, as the paper prints them; losses that are minimised, and the
tolerances on their gradients, are means.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from scipy.optimize import minimize

import kernels
from kernels import checks, counts_by_label, log_softmax
from nalayer.models import SoftTargetModel, check_pseudo_count
from nalayer.network import Network
from nalayer.optimisers import Adam, Optimiser
from nalayer.training import require_at_least, run_epoch


def e_step(
    logits: np.ndarray,
    channel_logits: np.ndarray,
    noisy_labels: np.ndarray,
    backend: str | None = None,
    check_values: bool = True,
) -> kernels.Posterior:
    """Return each sample's log-likelihood and the posterior c_ti (Eq. 3).

    This is :func:`kernels.s_model_posterior` under the name that EM has for it.
    """
    return kernels.s_model_posterior(
        logits, channel_logits, noisy_labels, backend=backend, check_values=check_values
    )


def expected_counts(posterior: np.ndarray, noisy_labels: np.ndarray) -> np.ndarray:
    """Return N_ij = sum_t c_ti 1{z_t=j}: (n, K), (n,) -> (K, K), in float64.

    Row i, column j: how often true class i was seen as j, as far as the posterior can tell.
    """
    checks.check_floats("posterior", posterior, ("n", "K"))
    checks.check_labels("noisy_labels", noisy_labels, *posterior.shape)
    return counts_by_label(posterior, noisy_labels)


def noise_matrix_m_step(
    counts_ij: np.ndarray, previous: np.ndarray, pseudo_count: float = 0.0
) -> np.ndarray:
    r"""Return the noise matrix that maximises Q (Eq. 4): theta_ij = N_ij / n_i.

    Parameters
    ----------
    counts_ij : (K, K)
        From :func:`expected_counts`.
    previous : (K, K)
        The noise matrix so far. A class that no sample is believed to have (n_i = 0) says nothing
        about its row, which is then kept.
    pseudo_count : float
        Dirichlet pseudo-count alpha: theta_ij = (N_ij + alpha) / (n_i + K alpha). 0 is the paper.

    Returns
    -------
    (K, K)
        Row-stochastic.
    """
    check_pseudo_count(pseudo_count)
    smoothed_ij = counts_ij + pseudo_count
    n_i = smoothed_ij.sum(axis=1, keepdims=True)
    return np.divide(smoothed_ij, n_i, out=previous.astype(np.float64), where=n_i != 0)


class NetworkStep(Protocol):
    """A way to do the network's half of the M-step: raise S(w) of Eq. 5."""

    def initial_state(self, weights: np.ndarray) -> Any:
        """Return what is carried from one M-step to the next."""

    def run(
        self,
        model: SoftTargetModel,
        weights: np.ndarray,
        x: np.ndarray,
        posterior: np.ndarray,
        state: Any,
        shuffling: np.random.Generator,
        dropout: np.random.Generator | None,
    ) -> tuple[np.ndarray, int]:
        """Return new weights and the number of gradients taken; move ``state`` in place."""


@dataclass(frozen=True)
class MiniBatches:
    """``n_epochs`` inner epochs of mini-batches: the network retrained in every M-step.

    The optimiser's state lives on from one M-step to the next.
    """

    n_epochs: int = 1
    batch_size: int = 256
    optimiser: Optimiser = field(default_factory=Adam)

    def __post_init__(self) -> None:
        """Refuse settings that would do nothing."""
        require_at_least(1, n_epochs=self.n_epochs, batch_size=self.batch_size)

    def initial_state(self, weights: np.ndarray) -> Any:
        """Return the optimiser's state."""
        return self.optimiser.initial_state(weights)

    def run(
        self,
        model: SoftTargetModel,
        weights: np.ndarray,
        x: np.ndarray,
        posterior: np.ndarray,
        state: Any,
        shuffling: np.random.Generator,
        dropout: np.random.Generator | None,
    ) -> tuple[np.ndarray, int]:
        """Go through the samples ``n_epochs`` times."""
        weights = weights.copy()
        n_gradients = sum(
            run_epoch(
                model,
                weights,
                x,
                posterior,
                self.optimiser,
                state,
                batch_size=self.batch_size,
                shuffling=shuffling,
                dropout=dropout,
            )
            for _ in range(self.n_epochs)
        )
        return weights, n_gradients


@dataclass(frozen=True)
class OneGradientStep:
    """One full-batch gradient step: generalised EM with the least possible M-step."""

    optimiser: Optimiser

    def initial_state(self, weights: np.ndarray) -> Any:
        """Return the optimiser's state."""
        return self.optimiser.initial_state(weights)

    def run(
        self,
        model: SoftTargetModel,
        weights: np.ndarray,
        x: np.ndarray,
        posterior: np.ndarray,
        state: Any,
        shuffling: np.random.Generator,
        dropout: np.random.Generator | None,
    ) -> tuple[np.ndarray, int]:
        """Take one step."""
        weights = weights.copy()
        _, gradient = model.loss_and_gradient(weights, x, posterior, dropout)
        self.optimiser.update(weights, gradient, state)
        return weights, 1


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS on the full batch until the largest gradient entry is below ``tolerance``.

    For small networks without dropout. On softmax regression, whose S(w) is concave, this is the
    exact M-step.
    """

    tolerance: float = 1e-9
    max_iterations: int = 20_000

    def initial_state(self, weights: np.ndarray) -> None:
        """Return nothing: every M-step starts afresh from the weights."""

    def run(
        self,
        model: SoftTargetModel,
        weights: np.ndarray,
        x: np.ndarray,
        posterior: np.ndarray,
        state: None,
        shuffling: np.random.Generator,
        dropout: np.random.Generator | None,
    ) -> tuple[np.ndarray, int]:
        """Maximise S(w)."""
        return minimise(model, weights, x, posterior, self.tolerance, self.max_iterations)


def minimise(
    model: Any,
    parameters: np.ndarray,
    x: np.ndarray,
    targets: np.ndarray,
    tolerance: float = 1e-9,
    max_iterations: int = 20_000,
) -> tuple[np.ndarray, int]:
    """Minimise any model's loss by SciPy's L-BFGS on the full batch.

    Returns the parameters and the number of gradients taken. Stops when the largest entry of the
    gradient (of the mean loss) is at most ``tolerance``, or when rounding allows no progress.

    Warns
    -----
    RuntimeWarning
        If it ran out of iterations first, saying how large the gradient still is.
    """
    result = minimize(
        model.loss_and_gradient,
        parameters,
        args=(x, targets),
        jac=True,
        method="L-BFGS-B",
        options={
            "gtol": tolerance,
            "ftol": 0.0,
            "maxiter": max_iterations,
            "maxfun": 2 * max_iterations,
            "maxcor": 30,
        },
    )
    if result.status == 1:
        warnings.warn(
            f"L-BFGS stopped after {result.nit} iterations with a gradient of "
            f"{np.abs(result.jac).max():.2g}; wanted {tolerance:g}",
            RuntimeWarning,
            stacklevel=2,
        )
    return result.x.astype(parameters.dtype), int(result.nfev)


def polish(
    model: Any,
    parameters: np.ndarray,
    x: np.ndarray,
    targets: np.ndarray,
    tolerance: float = 1e-10,
    max_steps: int = 20,
) -> np.ndarray:
    """Take damped Newton steps near a minimum until the gradient's norm is ``tolerance``.

    L-BFGS compares function values, which stop changing when the gradient is still about the root
    of the rounding error; this looks at the gradient alone. The Hessian is measured by differences
    of the gradient, so it is for small networks. Among several dampings (Levenberg 1944), which
    tame the flat directions, the one that shrinks the gradient most is taken; if none does, this
    is as far as it gets.
    """

    def gradient(at: np.ndarray) -> np.ndarray:
        return model.loss_and_gradient(at, x, targets)[1]

    g, h = gradient(parameters), 1e-5
    for _ in range(max_steps):
        if np.linalg.norm(g) <= tolerance:
            break
        columns = [
            (gradient(parameters + h * e) - gradient(parameters - h * e)) / (2 * h)
            for e in np.eye(parameters.size)
        ]
        hessian = (np.array(columns) + np.array(columns).T) / 2
        curvatures, axes = np.linalg.eigh(hessian)
        along = axes.T @ g
        trials = [
            parameters - axes @ (along / (np.abs(curvatures) + damping * curvatures[-1]))
            for damping in np.geomspace(1e-12, 1e-2, 11)
        ]
        gradients = [gradient(trial) for trial in trials]
        best = int(np.argmin([np.linalg.norm(trial) for trial in gradients]))
        if not np.linalg.norm(gradients[best]) < np.linalg.norm(g):
            break
        parameters, g = trials[best], gradients[best]
    return parameters


def expected_log_likelihood(
    network: Network,
    weights: np.ndarray,
    channel_logits: np.ndarray,
    x: np.ndarray,
    noisy_labels: np.ndarray,
    posterior: np.ndarray,
) -> float:
    """Return Q = sum_t sum_i c_ti (log q_ti + log theta_i,z_t), nats, summed over samples.

    The first part is S(w) of Eq. 5; the second is what Eq. 4 maximises. Entries with c_ti = 0
    contribute nothing.
    """
    log_q_ti = log_softmax(network.logits(weights, x))
    log_theta_ij = log_softmax(channel_logits)
    log_joint_ti = log_q_ti + log_theta_ij.T[noisy_labels]
    return float((posterior * np.where(posterior > 0, log_joint_ti, 0.0)).sum())
