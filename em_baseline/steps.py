"""The halves of an EM iteration for the four models (Bekker & Goldberger 2016; Eqs. 3-6).

The E-step gives the posterior c_ti of the true labels (Eq. 3). With c held fixed, the M-step raises

    Q(w, theta) = sum_t sum_i c_ti (log q_ti + log theta_i,z_t),

in which theta belongs to the sample in a c-model. Its halves:

- The noise layer's. For the s-models Eq. 4 in closed form, dense or over the links. For the
  c-models there is none: it is k softmax regressions of z on h, one for each true class i, with
  weights c_ti (:class:`NoiseRegressions`).
- The network's. For the s-models it is S(w) of Eq. 5, whose gradient is Eq. 6. In a c-model theta
  depends on the network too, through h(x_t), so S(w) alone is not the whole of Q(w) and Eq. 6 not
  its whole gradient: :class:`NetworkHalf` adds the part through h. Without it a step could lower Q.

Both halves at once, for any model, are :class:`ExpectedModel`.

Counts and Q are sums over samples, as the paper prints them; losses that are minimised, and the
tolerances on their gradients, are means.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from scipy.optimize import minimize

import kernels
from kernels import checks
from nalayer.buffers import FRESH, Buffers
from nalayer.completed import (
    Completed,
    expected_backward,
    expected_matrix,
    network_part,
    regressions,
)
from nalayer.devices import to_host
from nalayer.models import CModel, Model, NoiseModel, check_pseudo_count
from nalayer.optimisers import Adam, Optimiser
from nalayer.training import require_at_least, run_epoch


def e_step(
    model: NoiseModel,
    outputs: Sequence[np.ndarray],
    channel: Sequence[np.ndarray],
    noisy_labels: np.ndarray,
    check_values: bool = True,
) -> kernels.Posterior:
    """Return each sample's log-likelihood and the posterior c_ti (Eq. 3).

    This is the model's kernel, such as :func:`kernels.s_model_posterior`, under the name that EM
    has for it.

    Parameters
    ----------
    model : SModel or CModel
    outputs : sequence of arrays
        What the noise layer reads: logits (n, K) and, for a c-model, h(x) (n, d). The first that
        ``model.forward(weights, x)`` returns.
    channel : sequence of arrays
        The noise layer's parameters: ``weights, *channel = model.unpack(parameters)``.
    noisy_labels : (n,) integer
    check_values : bool
        See :mod:`kernels.api`.
    """
    return model.posterior(outputs, channel, noisy_labels, check_values)


def noise_matrix_m_step(
    counts_ij: np.ndarray, previous: np.ndarray, pseudo_count: float | np.ndarray = 0.0
) -> np.ndarray:
    r"""Return the noise matrix that maximises Q (Eq. 4): theta_ij = N_ij / n_i.

    Parameters
    ----------
    counts_ij : (K, K), or (K, l) for the links of a sparse model
        From :func:`expected_counts`.
    previous : same shape
        The noise matrix so far. A class that no sample is believed to have (n_i = 0) says nothing
        about its row, which is then kept.
    pseudo_count : float or same shape
        Dirichlet pseudo-count alpha: theta_ij = (N_ij + alpha) / (n_i + l alpha), l = K where the
        model is dense. 0 is the paper. An array has one for each entry:
        theta_ij = (N_ij + alpha_ij) / (n_i + sum_j alpha_ij).

    Returns
    -------
    same shape
        Row-stochastic.

    Raises
    ------
    TypeError, ValueError
        For counts that are no float arrays of one shape, negative or not finite, and for
        pseudo-counts of another shape.

    Notes
    -----
    A zero of theta has posterior zero and count zero, so it stays: EM started with zeros outside a
    support *is* EM of the sparse model.
    """
    check_pseudo_count(np.min(pseudo_count))
    check_pseudo_count(np.max(pseudo_count))
    checks.check_floats("counts_ij", counts_ij, ("K", "l"))
    checks.check_finite("counts_ij", counts_ij)
    if (counts_ij < 0).any():
        raise ValueError(f"counts_ij must not be negative; found {counts_ij.min()}")
    checks.check_floats("previous", previous, counts_ij.shape)
    checks.check_finite("previous", previous)
    if np.ndim(pseudo_count) > 0:
        checks.check_floats("pseudo_count", pseudo_count, counts_ij.shape)
    smoothed_ij = counts_ij.astype(np.float64) + pseudo_count
    n_i = smoothed_ij.sum(axis=1, keepdims=True)
    occurs_i = n_i != 0
    return np.where(occurs_i, smoothed_ij / np.where(occurs_i, n_i, 1), previous.astype(np.float64))


@dataclass(frozen=True)
class ExpectedModel:
    """-Q/n as a function of all of a model's parameters; targets are :class:`Completed` data.

    With the posterior of the very same parameters its gradient is the joint gradient, for every
    parameter (V3). Its minimum, over everything at once, is a full M-step.
    """

    model: NoiseModel

    def loss(self, parameters: np.ndarray, x: np.ndarray, targets: Completed) -> float:
        """Return -Q/n, nats per sample, without dropout."""
        weights, *channel = self.model.unpack(parameters)
        (logits, *hidden), _ = self.model.forward(weights, x)
        if not isinstance(self.model, CModel):
            noise, _ = expected_matrix(self.model, channel[0], targets)
        else:
            classes = regressions(hidden[0], channel, targets, self.model.links)
            noise = -sum(term_t.sum(dtype=np.float64) for _, _, term_t, _ in classes) / len(x)
        return float(network_part(self.model, logits, targets).nll + noise)

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: Completed,
        rng: np.random.Generator | None = None,
        buffers: Buffers = FRESH,
    ) -> tuple[float, np.ndarray]:
        """Return -Q/n and its gradient with respect to weights and channel."""
        weights, *_ = self.model.unpack(parameters)
        outputs, caches = self.model.forward(weights, x, rng, buffers)
        return expected_backward(self.model, parameters, outputs, caches, targets, buffers)


@dataclass(frozen=True)
class NetworkHalf:
    """-Q/n as a function of the network's weights, the noise layer fixed: the network's M-step.

    Targets are :class:`Completed` data. For an s-model this is -S(w)/n of Eq. 5 with the gradient
    of Eq. 6; what the fixed noise matrix adds to Q is constant and left out. For a c-model
    theta_t,i depends on w through h(x_t), so its part of Q is in, and so is the gradient through h.
    """

    model: NoiseModel
    channel: Sequence[np.ndarray]

    def loss(self, weights: np.ndarray, x: np.ndarray, targets: Completed) -> float:
        """Return the loss alone, without dropout."""
        return float(self.loss_and_gradient(weights, x, targets)[0])

    def loss_and_gradient(
        self,
        weights: np.ndarray,
        x: np.ndarray,
        targets: Completed,
        rng: np.random.Generator | None = None,
        buffers: Buffers = FRESH,
    ) -> tuple[float, np.ndarray]:
        """Return the loss (nats per sample) and its gradient with respect to the weights."""
        (logits, *hidden), caches = self.model.forward(weights, x, rng, buffers)
        loss, d_logits = network_part(self.model, logits, targets)
        backward = self.model.network.backward
        gradient = buffers.take("gradient", weights.shape, weights.dtype, like=weights)
        if not isinstance(self.model, CModel):
            return loss, backward(weights, caches, d_logits, out=gradient, buffers=buffers)
        d_hidden = np.zeros(hidden[0].shape, like=hidden[0])
        classes = regressions(hidden[0], self.channel, targets, self.model.links)
        for i, t, term_t, d_score_tj in classes:
            loss = loss - term_t.sum(dtype=np.float64) / len(x)
            d_hidden[t] += d_score_tj @ self.channel[0][i] / len(x)
        narrow = d_hidden.astype(weights.dtype)
        return loss, backward(weights, caches, d_logits, narrow, out=gradient, buffers=buffers)


@dataclass(frozen=True)
class NoiseRegressions:
    r"""A c-model's noise half of the M-step: k weighted softmax regressions of z on h in one loss.

    .. math:: -\frac1n \sum_t \sum_i c_{ti} \log\theta_{t,iz_t}, \qquad
              \theta_{t,i} = \mathrm{softmax}(U_i h_t + B_i) \text{ (Eq. 8)}

    as a function of the channel, U and B in one flat vector. It is convex. "Features" are h(x_t),
    (n, d), of the fixed network and without dropout; targets are :class:`Completed` data. Of a
    sparse model only the links exist: class i regresses over its l classes, on the samples whose
    label it links to.
    """

    model: CModel

    def loss(self, channel: np.ndarray, hidden: np.ndarray, targets: Completed) -> float:
        """Return the loss alone."""
        return float(self.loss_and_gradient(channel, hidden, targets)[0])

    def loss_and_gradient(
        self,
        channel: np.ndarray,
        hidden: np.ndarray,
        targets: Completed,
        rng: np.random.Generator | None = None,
        buffers: Buffers = FRESH,
    ) -> tuple[float, np.ndarray]:
        """Return the loss (nats per sample) and its gradient, a flat vector like ``channel``."""
        gradient = buffers.take("gradient", channel.shape, channel.dtype, like=channel)
        d_channel_weights, d_channel_logits = self.model.unpack_channel(gradient)
        loss: Any = 0.0
        n = len(hidden)
        views = self.model.unpack_channel(channel)
        for i, t, term_t, d_score_tj in regressions(hidden, views, targets, self.model.links):
            loss = loss - term_t.sum(dtype=np.float64) / n
            d_channel_weights[i] = d_score_tj.T @ hidden[t] / n
            d_channel_logits[i] = d_score_tj.sum(axis=0) / n
        return loss, gradient


class Objective(Protocol):
    """What an M-step raises: -Q/n, or a half of it, as a function of one flat vector."""

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: Any,
        rng: np.random.Generator | None = None,
        buffers: Buffers = FRESH,
    ) -> tuple[float, np.ndarray]:
        """Return the loss (nats, mean over samples) and its gradient."""


class MStep(Protocol):
    """A way to do half of the M-step by gradients: the network's, or a c-model's noise layer's."""

    def initial_state(self, parameters: np.ndarray) -> Any:
        """Return what is carried from one M-step to the next."""

    def run(
        self,
        objective: Objective,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: Any,
        state: Any,
        shuffling: np.random.Generator,
        dropout: np.random.Generator | None,
    ) -> tuple[np.ndarray, int]:
        """Return new parameters and the number of gradients taken; move ``state`` in place."""


@dataclass(frozen=True)
class MiniBatches:
    """``n_epochs`` inner epochs of mini-batches, in every M-step.

    The optimiser's state lives on from one M-step to the next.
    """

    n_epochs: int = 1
    batch_size: int = 256
    optimiser: Optimiser = field(default_factory=Adam)

    def __post_init__(self) -> None:
        """Refuse settings that would do nothing."""
        require_at_least(1, n_epochs=self.n_epochs, batch_size=self.batch_size)

    def initial_state(self, parameters: np.ndarray) -> Any:
        """Return the optimiser's state."""
        return self.optimiser.initial_state(parameters)

    def run(
        self,
        objective: Objective,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: Any,
        state: Any,
        shuffling: np.random.Generator,
        dropout: np.random.Generator | None,
    ) -> tuple[np.ndarray, int]:
        """Go through the samples ``n_epochs`` times."""
        parameters = parameters.copy()
        n_gradients = sum(
            run_epoch(
                cast(Model, objective),  # of which an epoch uses the loss and its gradient only
                parameters,
                x,
                cast(np.ndarray, targets),  # of which it uses indexing only
                self.optimiser,
                state,
                batch_size=self.batch_size,
                shuffling=shuffling,
                dropout=dropout,
            )
            for _ in range(self.n_epochs)
        )
        return parameters, n_gradients


@dataclass(frozen=True)
class OneGradientStep:
    """One full-batch gradient step: generalised EM with the least possible M-step."""

    optimiser: Optimiser

    def initial_state(self, parameters: np.ndarray) -> Any:
        """Return the optimiser's state."""
        return self.optimiser.initial_state(parameters)

    def run(
        self,
        objective: Objective,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: Any,
        state: Any,
        shuffling: np.random.Generator,
        dropout: np.random.Generator | None,
    ) -> tuple[np.ndarray, int]:
        """Take one step."""
        parameters = parameters.copy()
        _, gradient = objective.loss_and_gradient(parameters, x, targets, dropout)
        self.optimiser.update(parameters, gradient, state)
        return parameters, 1


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS on the full batch until the largest gradient entry is below ``tolerance``.

    For small networks without dropout. On softmax regression, whose S(w) is concave, and on the
    regressions of a c-model's noise layer, this is the exact M-step.
    """

    tolerance: float = 1e-9
    max_iterations: int = 20_000

    def initial_state(self, parameters: np.ndarray) -> None:
        """Return nothing: every M-step starts afresh from the parameters."""

    def run(
        self,
        objective: Objective,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: Any,
        state: None,
        shuffling: np.random.Generator,
        dropout: np.random.Generator | None,
    ) -> tuple[np.ndarray, int]:
        """Go to the maximum of Q in these parameters."""
        return minimise(objective, parameters, x, targets, self.tolerance, self.max_iterations)


def minimise(
    model: Objective,
    parameters: np.ndarray,
    x: np.ndarray,
    targets: Any,
    tolerance: float = 1e-9,
    max_iterations: int = 20_000,
) -> tuple[np.ndarray, int]:
    """Minimise any model's loss by SciPy's L-BFGS on the full batch.

    Returns the parameters and the number of gradients taken. Stops when the largest entry of the
    gradient (of the mean loss) is at most ``tolerance``, or when rounding allows no progress.
    Parameters of -inf, zeros of a noise matrix, stay as they are. L-BFGS itself works on the CPU;
    loss and gradient are computed where the parameters and the data are.

    Warns
    -----
    RuntimeWarning
        If it ran out of iterations first, saying how large the gradient still is.
    """
    whole = to_host(parameters).astype(np.float64)
    free = np.isfinite(whole)
    compute = _on_cpu(model, parameters, x, targets)

    def loss_and_gradient(at: np.ndarray) -> tuple[float, np.ndarray]:
        whole[free] = at
        loss, gradient = compute(whole)
        return loss, gradient[free]

    result = minimize(
        loss_and_gradient,
        whole[free],
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
    whole[free] = result.x
    return np.asarray(whole.astype(parameters.dtype), like=parameters), int(result.nfev)


def _on_cpu(
    model: Objective, parameters: np.ndarray, x: np.ndarray, targets: Any
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """Return the loss and its gradient as SciPy takes them: of a vector on the CPU.

    They are computed where ``parameters`` are.
    """

    def loss_and_gradient(at: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = model.loss_and_gradient(np.asarray(at, like=parameters), x, targets)
        return float(loss), to_host(gradient)

    return loss_and_gradient


def polish(
    model: Any,
    parameters: np.ndarray,
    x: np.ndarray,
    targets: Any,
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
    compute, there = _on_cpu(model, parameters, x, targets), parameters

    def gradient(at: np.ndarray) -> np.ndarray:
        return compute(at)[1]

    parameters = to_host(parameters)
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
    return np.asarray(parameters, like=there)


def expected_log_likelihood(
    model: NoiseModel,
    parameters: np.ndarray,
    x: np.ndarray,
    noisy_labels: np.ndarray,
    posterior: np.ndarray,
) -> float:
    """Return Q = sum_t sum_i c_ti (log q_ti + log theta_i,z_t), nats, summed over samples.

    The first part is S(w) of Eq. 5; the second is what Eq. 4 maximises. Entries with c_ti = 0
    contribute nothing.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.
    FloatingPointError
        If what the network makes of them leaves the range of their dtype.
    """
    model.check(parameters, x, noisy_labels)
    shape = (x.shape[0], model.network.n_classes)
    checks.check_floats("posterior", posterior, shape, parameters.dtype)
    checks.check_probability_rows("posterior", posterior)
    data = Completed(noisy_labels, posterior)
    expected = -len(x) * ExpectedModel(model).loss(parameters, x, data)
    if np.isnan(expected):
        raise FloatingPointError(
            f"the expected log-likelihood is nan: parameters and x leave the range of {x.dtype}"
        )
    return expected
