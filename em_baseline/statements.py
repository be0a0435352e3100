"""The statements that tie joint training and EM together, as functions that return numbers.

V1-V8 hold at every parameter value, to rounding. V9-V11 hold along EM's way or at an optimum.
Each function returns :class:`Statement` rows: what is claimed in words, the residual seen, the
bound that arithmetic allows, and whether it holds.

The two sides of an identity must not come from the same lines of code. One side is the project's
kernels and steps, as a user would call them. The other is written here from the paper's formulas
in plain probabilities (:class:`Literal`), without log-sum-exp and without the fused derivatives,
and goes through with complex numbers too, for the complex step. Laws (V7, two of V8) compare a
kernel with itself or with another on related inputs.

With the backend "cupy" the project's side is computed on the GPU, and :meth:`Point.compute` is
where arrays go there and results come back; the formulas stay on the CPU.

They are stated for all four models. A c-model's noise layer has no M-step in closed form; the
preconditioner of V4 is then the mean information over the step. Its L is not concave in U and B;
V11 then says how much better a single noise matrix for all samples could be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.special import expit, log_softmax

import kernels
from em_baseline import steps
from em_baseline.alternating import HalfStep, fit, rounding_of
from nalayer.completed import Completed, expected_counts
from nalayer.devices import to_device, to_host
from nalayer.gradient_check import check_gradient
from nalayer.models import CModel, NoiseModel, SModel
from nalayer.network import Network, mlp
from nalayer.noise_layer import channel_logits_of, log_with_zeros, noise_matrix
from nalayer.support import gather_links, scatter_links

ROUNDING = 1e-12
"""What an identity may be off by, relative to the largest of the terms that it adds up.

With u = eps / 2: to round a score is to change its exp by |score| u; a sum of m terms loses at most
m u of their sizes (Higham 2002, section 4.2); the rest are a few factors, u each. So the way from
the features through a network with w units in all, the softmaxes over K classes and the sum over n
samples costs at most (|score| + w + K + n) u on either side of an identity. That stays below 1e-12
up to 4500 of them, more than are tried here; seen are some 1e-15, for errors cancel. A complex step
subtracts nothing, and its truncation, h^2 = 1e-60, is no part of that.
"""
DIFFERENCES = 1e-7
"""What fourth-order differences may be off by, relative to a typical derivative.

Truncation h^4 and rounding eps |L| / h, with h = eps^(1/5) = 7e-4, are some 3e-13 each, times |L|
and its derivatives (tens where a network is sure), over a typical derivative: not below 1e-4 here.
"""
REGRESSIONS = 1e-6
"""How large a gradient of Q, mean over samples, may be where L-BFGS stops.

It stops where it sees no more gain: Q, of size one, has steps of eps, and a gradient g gains
g^2 / 2 over the curvature, at most one for features of size one. So g may be sqrt(2 eps) = 2e-8,
and more by what the gradient itself changes between two points that look alike: 1e-6 allows for
fifty of these.
"""
MOST_PIECES = 1000
"""of V4's integral for c-models; each takes the formulas 16 times"""


@dataclass(frozen=True)
class Statement:
    """One claim with its evidence. It holds if ``residual <= bound`` (never with NaN)."""

    statement: str
    """ "V1" ... "V11" """
    words: str
    residual: float
    bound: float
    unit: str = "relative"
    detail: str = ""
    """what was seen in this case, in words"""
    model: str = "s"
    """ "s", "c", "sparse-s" or "sparse-c" """

    @property
    def holds(self) -> bool:
        """Whether the residual is within the bound."""
        return bool(self.residual <= self.bound)


@dataclass(frozen=True)
class Point:
    """Parameters of one of the four models, with the data at which they are judged (float64).

    With ``channel_weights`` (K, l, d) it is a c-model, without them an s-model; with ``links`` it
    is sparse, without them l = K. The arrays are NumPy's, whatever the ``backend``.
    """

    network: Network
    weights: np.ndarray
    channel_logits: np.ndarray
    x: np.ndarray
    noisy_labels: np.ndarray
    backend: str | None = None
    channel_weights: np.ndarray | None = None
    links: kernels.LinkIndex | None = None

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.x.shape[0]

    @property
    def model(self) -> SModel | CModel:
        """The joint model at this point."""
        if self.channel_weights is None:
            return SModel(self.network, backend=self.backend, links=self.links)
        return CModel(self.network, self.backend, self.links)

    def objective(self, pseudo_count: float = 0.0) -> SModel | CModel:
        """Return the joint model with pseudo-counts on theta, for s-models, over these samples."""
        model = self.model
        if not pseudo_count:
            return model
        if isinstance(model, CModel):
            raise ValueError(f"pseudo_count must be 0 for a c-model; found {pseudo_count}")
        return replace(model, pseudo_count=pseudo_count, n_samples=self.n)

    @property
    def channel(self) -> tuple[np.ndarray, ...]:
        """The noise layer's parameters, as the model has them."""
        weights = () if self.channel_weights is None else (self.channel_weights,)
        return *weights, self.channel_logits

    @property
    def parameters(self) -> np.ndarray:
        """Weights and channel as one flat vector."""
        return self.model.pack(self.weights, *self.channel)

    def there(self, *values: Any) -> tuple[Any, ...]:
        """Return arrays, or what holds some, where the project computes: for "cupy" on the GPU."""
        return to_device(values) if self.backend == "cupy" else values

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function of the project gives for arguments on the CPU, on the CPU.

        With the backend "cupy" it is called with everything on the GPU.
        """
        return to_host(function(*self.there(*arguments)))

    def outputs(self) -> tuple[np.ndarray, ...]:
        """Return what the noise layer reads: logits (n, K) and, in a c-model, h(x) (n, d)."""
        return self.compute(_outputs, self.model, self.weights, self.x)

    def logits(self) -> np.ndarray:
        """Return the classifier's logits (n, K)."""
        return self.compute(self.network.logits, self.weights, self.x)

    def e_step(self) -> kernels.Posterior:
        """Return the project's E-step here."""
        return self.compute(
            steps.e_step, self.model, self.outputs(), self.channel, self.noisy_labels
        )

    def completed(self) -> Completed:
        """Return the labels with the project's posterior here."""
        return Completed(self.noisy_labels, self.e_step().posterior)

    def joint(self) -> kernels.SModelNLL | kernels.CModelNLL:
        """Return the project's joint loss and gradients here."""
        return self.joint_of(self.model, self.outputs(), self.channel, self.noisy_labels)

    def joint_of(
        self,
        model: SModel | CModel,
        outputs: Sequence[np.ndarray],
        channel: Sequence[np.ndarray],
        noisy_labels: np.ndarray,
    ) -> kernels.SModelNLL | kernels.CModelNLL:
        """Return the project's joint loss and gradients of any model, outputs and labels."""
        return self.compute(_joint, model, tuple(outputs), tuple(channel), noisy_labels)

    def gradient(self, objective: Any, parameters: np.ndarray, x: Any, targets: Any) -> np.ndarray:
        """Return the project's gradient of any objective."""
        return self.compute(_gradient, objective, parameters, x, targets)

    def joint_gradient(self) -> np.ndarray:
        """Return the project's joint gradient here, a flat vector like the parameters."""
        return self.gradient(self.model, self.parameters, self.x, self.noisy_labels)

    def m_step(self) -> Point:
        """Return the point after the noise layer's half of the M-step.

        For an s-model the closed form (Eq. 4), for a c-model L-BFGS to its limit.
        """
        if self.channel_weights is None:
            theta = self.compute(_closed_form, self.completed(), self.channel_logits, self.links)
            return replace(self, channel_logits=log_with_zeros(theta))
        _, hidden = self.outputs()
        channel, _ = self.compute(
            steps.minimise,
            steps.NoiseRegressions(CModel(self.network, self.backend, self.links)),
            np.concatenate([values.ravel() for values in self.channel]),
            hidden,
            self.completed(),
        )
        return self.with_parameters(np.concatenate([self.weights, channel]))

    def with_parameters(self, parameters: np.ndarray) -> Point:
        """Return the same data at other parameters."""
        weights, *channel_weights, channel_logits = self.model.unpack(parameters)
        return replace(
            self,
            weights=weights,
            channel_weights=channel_weights[0] if channel_weights else None,
            channel_logits=channel_logits,
        )


# The project's functions as Point.compute calls them


def _outputs(model: NoiseModel, weights: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, ...]:
    return model.forward(weights, x)[0]


def _joint(
    model: NoiseModel,
    outputs: Sequence[np.ndarray],
    channel: Sequence[np.ndarray],
    noisy_labels: np.ndarray,
) -> kernels.SModelNLL | kernels.CModelNLL:
    return model.joint(outputs, channel, noisy_labels, check_values=True)


def _gradient(objective: Any, parameters: np.ndarray, x: np.ndarray, targets: Any) -> np.ndarray:
    return objective.loss_and_gradient(parameters, x, targets)[1]


def _closed_form(
    data: Completed, channel_logits: np.ndarray, links: kernels.LinkIndex | None
) -> np.ndarray:
    counts_ij = expected_counts(data.posterior, data.noisy_labels, links)
    return steps.noise_matrix_m_step(counts_ij, noise_matrix(channel_logits))


class Literal:
    """The paper's formulas as printed, in plain probabilities, real or complex.

    Good while no probability of an observed label underflows (logits within some hundreds);
    beyond that the 40-digit decimals of :mod:`kernels.exact` are the judge.

    ``q`` (n, K) is Eq. 7; ``theta`` Eq. 10, (1, K, K), or Eq. 8 of a c-model, (n, K, K), with
    zeros where a sparse model has no link; ``joint_ti`` q_ti theta_i,z_t; ``m`` (n,) Eqs. 9 and 11;
    ``c`` (n, K) Eq. 3.

    Parameters
    ----------
    outputs : sequence of arrays
        Logits and, for a c-model, h(x), as :meth:`nalayer.SModel.forward` returns them.
    channel : sequence of arrays
        Channel logits and, for a c-model, channel weights before them.
    noisy_labels : (n,) integer
    links : LinkIndex, optional
        Of a sparse model.
    """

    def __init__(
        self,
        outputs: Sequence[np.ndarray],
        channel: Sequence[np.ndarray],
        noisy_labels: np.ndarray,
        links: kernels.LinkIndex | None = None,
    ) -> None:
        logits, *self.hidden = outputs
        *self.channel_weights, channel_logits = channel
        n, k = logits.shape
        self.z, self.is_z = noisy_labels, np.eye(k)[noisy_labels][:, None, :]
        self.rows = np.arange(k)[:, None]
        self.support = np.tile(np.arange(k), (k, 1)) if links is None else links.support
        self.q = self._softmax(logits)
        scores = channel_logits[None]
        for u, h in zip(self.channel_weights, self.hidden, strict=True):
            scores = scores + np.einsum("ijd,td->tij", u, h)
        self.theta = np.zeros((len(scores), k, k), scores.dtype)
        self.theta[:, self.rows, self.support] = self._softmax(scores)
        theta_tij = np.broadcast_to(self.theta, (n, k, k))
        self.joint_ti = self.q * theta_tij[np.arange(n), :, noisy_labels]
        self.m = self.joint_ti.sum(axis=1)
        self.c = self.joint_ti / self.m[:, None]

    @staticmethod
    def _softmax(scores: np.ndarray) -> np.ndarray:
        weights = np.exp(scores - scores.real.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    @classmethod
    def of(
        cls, model: NoiseModel, parameters: np.ndarray, x: np.ndarray, noisy_labels: np.ndarray
    ) -> Literal:
        """Return the formulas on top of a network, at real or complex parameters."""
        weights, *channel = model.unpack(parameters)
        return cls(model.forward(weights, x)[0], channel, noisy_labels, model.links)

    @classmethod
    def at(cls, point: Point) -> Literal:
        """Return the formulas at a point."""
        return cls.of(point.model, point.parameters, point.x, point.noisy_labels)

    @property
    def log_likelihood(self) -> complex:
        """L of Eq. 2: sum over samples of log sum_i theta_i,z_t q_ti."""
        return np.log(self.m).sum()

    @property
    def counts_ij(self) -> np.ndarray:
        """N_ij = sum_t c_ti 1{z_t=j}, the numerator of Eq. 4: (K, K)."""
        return self.c.T @ self.is_z[:, 0]

    @property
    def d_theta(self) -> np.ndarray:
        """An s-model's dL/dtheta_ij = sum_t 1{z_t=j} q_ti / m_t, (K, K).

        No division by theta, so zeros are fine; those outside a support have one too.
        """
        return (self.q / self.m[:, None]).T @ self.is_z[:, 0]

    def expected(self, c: np.ndarray) -> complex:
        """Q = sum_t sum_i c_ti log(q_ti theta_i,z_t) for a given posterior."""
        return np.where(c > 0, c * np.log(np.where(c > 0, self.joint_ti, 1)), 0).sum()

    def d_scores(self, c: np.ndarray) -> np.ndarray:
        """-dQ/d(score) for a given posterior: c_ti (theta_tij - 1{j=z_t}), (n, K, K)."""
        return c[:, :, None] * (self.theta - self.is_z)

    def through_noise_layer(
        self, d_scores: np.ndarray, size: bool = False
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return what gradients of the scores are for h(x), if it is read, and for the channel.

        ``size=True`` adds up without signs: how large the terms are.
        """
        on_links = d_scores[:, self.rows, self.support]
        d_channel_logits = on_links.sum(axis=0)
        if not self.hidden:
            return [], [d_channel_logits]
        u, h = self.channel_weights[0], self.hidden[0]
        if size:
            u, h = np.abs(u), np.abs(h)
        d_hidden = np.einsum("tij,ijd->td", on_links, u)
        return [d_hidden], [np.einsum("tij,td->ijd", on_links, h), d_channel_logits]


def about(point: Point, *rows: Statement) -> list[Statement]:
    """Return statements with the name of the model that they are about."""
    return [replace(row, model=point.model.name) for row in rows]


def _worst(*residuals: Any) -> float:
    """Return the largest residual; unlike Python's ``max``, NaN if any of them is NaN."""
    return float(np.max([np.max(residual) for residual in residuals]))


def _relative(difference: np.ndarray, terms: np.ndarray) -> float:
    """Return max |difference| / max |terms|.

    Gradients here are differences of two terms, such as q - c. Near an optimum they vanish and the
    terms do not, so errors are measured against the terms.
    """
    worst = float(np.abs(difference).max())
    scale = float(np.abs(terms).max())
    return worst / scale if scale else (0.0 if worst == 0 else np.nan)


@dataclass(frozen=True)
class _Terms:
    """The parts that q and theta alone contribute to the gradients of the mean loss: their size."""

    outputs: list[np.ndarray]
    """of the logits, q/n, and of h(x) through the noise layer"""
    channel: list[np.ndarray]
    """of the channel: for channel logits n_i theta_ij / n"""
    weights: np.ndarray
    """of the network's weights: ``outputs`` backwards"""

    @classmethod
    def at(cls, point: Point) -> _Terms:
        literal = Literal.at(point)
        d_hidden, d_channel = literal.through_noise_layer(
            literal.c[:, :, None] * literal.theta / point.n, size=True
        )
        d_logits = literal.q / point.n
        _, caches = point.network.forward(point.weights, point.x)
        d_weights = point.network.backward(
            point.weights, caches, d_logits, d_hidden[0] if d_hidden else None
        )
        return cls([d_logits, *d_hidden], d_channel, d_weights)


def _typical_derivative(*terms: np.ndarray) -> float:
    """Return the size of the terms' derivative along a random unit direction."""
    flat = np.concatenate([term.ravel() for term in terms])
    return float(np.linalg.norm(flat) / np.sqrt(flat.size))


def same_function(point: Point) -> list[Statement]:
    """V1: L the EM way (Eq. 2, literally) equals S the network way (Eqs. 9, 12, our kernel).

    The bound is :data:`ROUNDING`, of L or of n: near L = 0 each of the n logs still has its own.
    """
    em_way = Literal.at(point).log_likelihood.real
    network_way = -point.n * float(point.joint().nll)
    mean_way = float(point.e_step().log_likelihood_t.sum())
    scale = max(abs(em_way), point.n)
    residual = _worst(abs(em_way - network_way), abs(em_way - mean_way)) / scale
    words = "EM's likelihood (Eq. 2) = the network's score (Eq. 12)"
    return about(point, Statement("V1", words, residual, ROUNDING))


def backward_is_e_step(point: Point, rng: np.random.Generator) -> list[Statement]:
    """V2: the backward pass is the E-step, against formulas, differences and complex step.

    Differences are taken with respect to the network's outputs and the channel, where the loss is
    smooth; the complex step goes through the whole network, kinks and all.

    Bounds, of the terms whose differences the gradients are: :data:`ROUNDING` for formulas and
    complex steps, :data:`DIFFERENCES` for differences.
    """
    n, z, model = point.n, point.noisy_labels, point.model
    literal, terms = Literal.at(point), _Terms.at(point)
    outputs = point.outputs()
    _, *gradients = point.joint()
    d_hidden, d_channel = literal.through_noise_layer(literal.d_scores(literal.c) / n)
    expected = [(literal.q - literal.c) / n, *d_hidden, *d_channel]
    sizes = [*terms.outputs, *terms.channel]
    closed = _worst(
        *(_relative(g - e, t) for g, e, t in zip(gradients, expected, sizes, strict=True))
    )
    arrays = [*outputs, *point.channel]
    cuts = np.cumsum([array.size for array in arrays])[:-1]

    def on_outputs(flat: np.ndarray) -> float:
        parts = [
            part.reshape(array.shape)
            for part, array in zip(np.split(flat, cuts), arrays, strict=True)
        ]
        split = len(outputs)
        return float(point.joint_of(model, parts[:split], parts[split:], z).nll)

    differences = check_gradient(
        on_outputs,
        np.concatenate([g.ravel() for g in gradients]),
        np.concatenate([array.ravel() for array in arrays]),
        n_directions=8,
        rng=rng,
    )
    complex_step = check_gradient(
        lambda parameters: -Literal.of(model, parameters, point.x, z).log_likelihood / n,
        point.joint_gradient(),
        point.parameters,
        method="complex-step",
        n_directions=8,
        rng=rng,
    )
    words = "dL/da = c - q and dL/dB = N - n theta (our backward pass)"
    if isinstance(model, CModel):
        words = "dL/da = c - q; dL/dB, dL/dU, dL/dh from c (1 - theta) (our backward pass)"
    return about(
        point,
        Statement("V2", words, closed, ROUNDING),
        Statement(
            "V2",
            "backward pass = fourth-order differences of the loss",
            differences.error / _typical_derivative(*sizes),
            DIFFERENCES,
        ),
        Statement(
            "V2",
            "whole network's backward pass = complex-step derivative of Eq. 2",
            complex_step.error / _typical_derivative(terms.weights, *terms.channel),
            ROUNDING,
        ),
    )


def fisher_identity(point: Point, rng: np.random.Generator) -> list[Statement]:
    """V3: the joint gradient equals the gradient of EM's M-step objective, for every parameter.

    Q is differentiated through the whole network by the complex step, with the literal posterior
    held fixed; then the gradients that the project's M-step uses, half by half and all at once, are
    compared parameter by parameter; then Eq. 6 as printed, sum_t (c_ti - q_ti) h(x_t), with the
    last layer's. The bound of all three is :data:`ROUNDING`, of the terms.
    """
    n, z, model = point.n, point.noisy_labels, point.model
    literal, terms = Literal.at(point), _Terms.at(point)
    joint = point.joint_gradient()
    fisher = check_gradient(
        lambda parameters: -Literal.of(model, parameters, point.x, z).expected(literal.c) / n,
        joint,
        point.parameters,
        method="complex-step",
        n_directions=8,
        rng=rng,
    )

    whole = point.gradient(steps.ExpectedModel(model), point.parameters, point.x, point.completed())
    halves = np.concatenate([_network_half(point), *(d.ravel() for d in _noise_half(point))])
    m_step = _worst(
        *(
            _relative(d_joint - d_em, size)
            for em in (whole, halves)
            for d_joint, d_em, size in zip(
                model.unpack(joint), model.unpack(em), (terms.weights, *terms.channel), strict=True
            )
        )
    )

    _, caches = point.network.forward(point.weights, point.x)
    h = caches[-1]
    eq_6 = sum(np.outer(h[t], literal.c[t] - literal.q[t]) for t in range(n))
    d_u, u_terms = (
        list(point.network.unpack(flat))[-1][0] for flat in (model.unpack(joint)[0], terms.weights)
    )
    return about(
        point,
        Statement(
            "V3",
            "joint gradient = complex-step derivative of Q, whole network",
            fisher.error / _typical_derivative(terms.weights, *terms.channel),
            ROUNDING,
        ),
        Statement("V3", "joint gradient = gradient that EM's M-step uses", m_step, ROUNDING),
        Statement(
            "V3",
            "last layer's gradient = Eq. 6 as printed",
            _relative(d_u + eq_6 / n, u_terms),
            ROUNDING,
        ),
    )


def _network_half(point: Point) -> np.ndarray:
    """Return the gradient that the network's half of the project's M-step uses."""
    objective = steps.NetworkHalf(point.model, point.channel)
    return point.gradient(objective, point.weights, point.x, point.completed())


def _noise_half(point: Point) -> Sequence[np.ndarray]:
    """Return the gradient of -Q/n in the channel, from what the project's M-step uses.

    For a c-model that of the regressions. For an s-model, whose M-step takes no gradient, that of
    sum_ij N_ij log theta_ij through the Jacobian of log softmax, row by row.
    """
    model, data = point.model, point.completed()
    if isinstance(model, CModel):
        flat = np.concatenate([values.ravel() for values in point.channel])
        objective = steps.NoiseRegressions(model)
        return model.unpack_channel(point.gradient(objective, flat, point.outputs()[1], data))
    counts_ij = point.compute(expected_counts, data.posterior, data.noisy_labels, point.links)
    theta_ij = Literal._softmax(point.channel_logits)
    jacobians = (np.eye(counts_ij.shape[1]) - row for row in theta_ij)
    return [-np.stack([counts_ij[i] @ j for i, j in enumerate(jacobians)]) / point.n]


def em_step_is_preconditioned_gradient(point: Point) -> list[Statement]:
    """V4: theta+ - theta = (dL/dB_i) / n_i = P_i dL/dtheta_i (Xu & Jordan 1996), over the links.

    For a c-model see :func:`_regressions_are_a_preconditioned_gradient`. Both sides divide sums
    over samples with the weights c_ti by their sum n_i, so a class with few samples costs no
    digits: the bound is that of sums (:data:`ROUNDING`), absolute, for theta <= 1.
    """
    if point.channel_weights is not None:
        return _regressions_are_a_preconditioned_gradient(point)
    literal = Literal.at(point)
    n_i = literal.c.sum(axis=0)[:, None]
    em_move = (_theta(point.m_step()) - _theta(point))[0]
    gradient = _dense(-point.n * point.joint().d_channel_logits, point.links)
    d_theta = literal.d_theta
    natural = np.stack(
        [(np.diag(row) - np.outer(row, row)) @ d_theta[i] for i, row in enumerate(literal.theta[0])]
    )
    # A class without any posterior mass keeps its row (n_i = 0: nothing to divide by).
    residual = _worst(
        *(
            np.abs(em_move - np.divide(move, n_i, out=np.zeros_like(move), where=n_i != 0))
            for move in (gradient, natural)
        )
    )
    return about(
        point,
        Statement(
            "V4",
            "EM's step of the noise matrix = preconditioned gradient step",
            float(residual),
            ROUNDING,
            "absolute",
        ),
    )


def _regressions_are_a_preconditioned_gradient(point: Point) -> list[Statement]:
    """V4 of a c-model: H (B+ - B) = dL/dB, H the complete information in the mean over the step.

    H = int_0^1 I_c(B + s (B+ - B)) ds with c as it is before the step; I_c is minus the Hessian of
    Q, positive semidefinite, and so is H. As dQ/dB is dL/dB before the step (V3) and zero after it,
    that is the fundamental theorem of calculus. B stands for U and B.

    The integral is a sum by Gauss and Legendre, over pieces on which a score moves by at most 2.
    Two scores then move by at most 4 against each other, and the softmax's nearest pole is pi / 2
    half-pieces away: 16 nodes err by some 3.4^-32, less than rounding. What the bound allows is the
    gradient of Q at which L-BFGS stops (:data:`REGRESSIONS`). Where a score moves so far that it
    takes more than :data:`MOST_PIECES`, these are longer and the sum is less exact: the statement
    may then fail without being wrong, and its detail says so.
    """
    after, c = point.m_step(), Literal.at(point).c
    step = [
        np.subtract(b, a, out=np.zeros_like(a), where=np.isfinite(a))  # a zero of theta stays
        for a, b in zip(point.channel, after.channel, strict=True)
    ]
    d_weights, d_logits = step
    _, hidden = point.outputs()
    d_scores = np.einsum("ijd,td->tij", d_weights, hidden) + d_logits
    farthest = float(np.abs(d_scores).max())
    n_pieces = int(np.clip(np.ceil(farthest / 2), 1, MOST_PIECES))
    nodes, node_weights = np.polynomial.legendre.leggauss(16)
    moved = [np.zeros_like(part) for part in step]
    for piece in range(n_pieces):
        for node, weight in zip(nodes, node_weights, strict=True):
            s = (piece + (node + 1) / 2) / n_pieces
            channel = [b + s * part for b, part in zip(point.channel, step, strict=True)]
            there = Literal.at(point.with_parameters(point.model.pack(point.weights, *channel)))
            along = np.zeros_like(there.theta)
            along[:, there.rows, there.support] = d_scores
            centred = along - (there.theta * along).sum(axis=2, keepdims=True)
            _, parts = there.through_noise_layer(c[:, :, None] * there.theta * centred)
            for total, part in zip(moved, parts, strict=True):
                total += weight / (2 * n_pieces) * part
    _, _, _, *gradients = point.joint()
    return about(
        point,
        Statement(
            "V4",
            "EM's step of the noise layer = gradient through the mean information",
            _worst(*(np.abs(m / point.n + d) for m, d in zip(moved, gradients, strict=True))),
            REGRESSIONS,
            "per sample",
            f"a score moves by {farthest:.2g}, too far for the integral"
            if farthest > 2 * n_pieces
            else "",
        ),
    )


def _dense(values: np.ndarray, links: kernels.LinkIndex | None, missing: float = 0.0) -> np.ndarray:
    """Return (K, l) values of links as a (K, K) matrix; those of a dense model as they are."""
    return values if links is None else scatter_links(values, links, missing)


def _theta(point: Point) -> np.ndarray:
    """Return the noise matrix, (1, K, K), or one for each sample, (n, K, K)."""
    if point.channel_weights is None:
        return _dense(noise_matrix(point.channel_logits), point.links)[None]
    return Literal.at(point).theta


@dataclass(frozen=True)
class Ledger:
    """The three parts of V5, in nats, summed over samples: gain = expected + divergence."""

    gain: float
    expected: float
    divergence: float

    @property
    def residual(self) -> float:
        """|gain - expected - divergence| relative to the largest of the three."""
        return abs(self.gain - self.expected - self.divergence) / self.moved

    @property
    def moved(self) -> float:
        """The largest of the three parts."""
        return _worst(abs(self.gain), abs(self.expected), self.divergence, 1e-300)


def ledger(before: Point, after: Point) -> Ledger:
    """Return V5's account of a step: dL = dQ + sum_t KL(c_t || c_t+), for any step at all.

    L and both posteriors come from our E-step; Q is written out in the log domain from SciPy's
    log-softmax, and so is the log of a posterior that is too small for a float.
    """
    joint_0, joint_1 = _log_joint(before), _log_joint(after)
    e_0, e_1 = before.e_step(), after.e_step()
    c, c_plus = e_0.posterior, e_1.posterior
    # A posterior at the edge of what a float can hold adds nothing, and the noise matrix counted
    # from it may underflow to zero, whose log would be infinite.
    c = np.where(c > 1e-290, c, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        moved = np.where(c > 0, joint_1 - joint_0, 0.0)
        log_c_plus = np.where(
            c_plus > np.finfo(np.float64).tiny,
            np.log(c_plus),
            joint_1 - e_1.log_likelihood_t[:, None],
        )
        divergence = np.where(c > 0, c * (np.log(c) - log_c_plus), 0.0)
    gain = (e_1.log_likelihood_t - e_0.log_likelihood_t).sum()
    return Ledger(float(gain), float((c * moved).sum()), float(divergence.sum()))


def _log_joint(point: Point) -> np.ndarray:
    """Return log(q_ti theta_i,z_t), (n, K), -inf where there is no link."""
    logits, *hidden = point.outputs()
    scores = point.channel_logits[None]
    if point.channel_weights is not None:
        scores = scores + np.tensordot(hidden[0], point.channel_weights, axes=(1, 2))
    log_theta = log_softmax(scores, axis=2)
    if point.links is not None:
        on_links = log_theta
        log_theta = np.full((len(on_links), *2 * logits.shape[1:]), -np.inf)
        np.put_along_axis(log_theta, point.links.support[None], on_links, axis=2)
    t = np.arange(point.n)
    log_theta = np.broadcast_to(log_theta, (point.n, *log_theta.shape[1:]))
    return log_softmax(logits, axis=1) + log_theta[t, :, point.noisy_labels]


def exact_ledger(name: str, path: Sequence[Point]) -> list[Statement]:
    """V5 along a path of points: every gain in likelihood is accounted for to the last digit.

    The bound is 1e-10 of the largest part: each part adds up n K terms good to
    :data:`ROUNDING`, of both signs, which may be a hundred times larger than what is left of them.
    To that comes what rounding does to the two L, whose difference the gain is: it counts when a
    step hardly moves anything. The row is the step closest to its bound; steps with
    dQ < 0, which mini-batches and Adam do take, are counted in the detail.
    """
    entries = [ledger(before, after) for before, after in pairwise(path)]
    # Near L = 0 it is no longer L but the n logs that set the scale, one rounding each. Samples of
    # one label share that of theta, so these do not cancel as independent ones would.
    likelihood = float(path[0].e_step().log_likelihood_t.sum())
    rounding = rounding_of(max(abs(likelihood), path[0].n ** 0.5), path[0].n)
    bounds = [1e-10 + rounding / entry.moved for entry in entries]
    residuals = [entry.residual for entry in entries]
    worst = int(np.argmax(np.divide(residuals, bounds)))  # NaN counts as the largest
    entry = entries[worst]
    return about(
        path[0],
        Statement(
            "V5",
            f"{name}: dL = dQ + sum_t KL(c_t || c_t+)",
            entry.residual,
            bounds[worst],
            "of the largest part",
            f"step {worst + 1} of {len(entries)}: {entry.gain:+.4g} = {entry.expected:+.4g} "
            f"{entry.divergence:+.4g} nats; largest residual {_worst(*residuals):.1e}; "
            f"dQ < 0 in {sum(e.expected < 0 for e in entries)}",
        ),
    )


def m_step_is_maximiser(
    point: Point, after: Point, rng: np.random.Generator, n_trials: int = 64
) -> list[Statement]:
    """V6: the noise layer *stored after* the M-step maximises Q for the posterior before it.

    The gradient of Q vanishes there, and none of ``n_trials`` perturbations, near and far, does
    better. Catches an update that was computed and not stored. The bound is :data:`ROUNDING`: the
    gradient is the difference of two counts, at most n, and rounding is all by which another Q can
    be higher than the maximum. For a c-model, whose regressions are solved by L-BFGS, it is the
    gradient at which that stops.
    """
    if point.channel_weights is not None:
        return _regressions_are_solved(point, after, rng, n_trials)
    literal = Literal.at(point)
    counts_ij = literal.counts_ij
    (theta,) = _theta(after)
    n_i = counts_ij.sum(axis=1, keepdims=True)
    stationary = float(np.abs(counts_ij - n_i * theta).max() / point.n)

    def q_of(matrix: np.ndarray) -> float:
        return float(
            np.where(counts_ij > 0, counts_ij * np.log(np.maximum(matrix, 1e-300)), 0).sum()
        )

    best = q_of(theta)
    k, n_kept = point.channel_logits.shape
    shares = np.geomspace(1e-3, 1, n_trials)
    others = (
        (1 - s) * theta + s * _dense(rng.dirichlet(np.ones(n_kept), size=k), point.links)
        for s in shares
    )
    better = _worst(0.0, *(q_of(other) - best for other in others))
    return about(
        point,
        Statement(
            "V6",
            "Eq. 4 leaves no gradient of Q in the noise matrix",
            stationary,
            ROUNDING,
            "per sample",
        ),
        Statement(
            "V6",
            f"none of {n_trials} other noise matrices has a higher Q",
            better / point.n,
            ROUNDING,
            "nats per sample",
        ),
    )


def _regressions_are_solved(
    point: Point, after: Point, rng: np.random.Generator, n_trials: int
) -> list[Statement]:
    """V6 of a c-model; Q and its gradient in U and B come from the literal formulas.

    The gradient may be :data:`REGRESSIONS`. Q is concave, so a step d gains at most g d; where
    L-BFGS reached the 1e-9 that it is asked for, that is 1e-9 for steps of size one, and longer
    ones lose by the curvature.
    """
    c = Literal.at(point).c
    there = Literal.at(after)
    _, d_channel = there.through_noise_layer(there.d_scores(c) / point.n)

    def other(size: float) -> Point:
        moved = [values + size * rng.normal(size=values.shape) for values in after.channel]
        return after.with_parameters(after.model.pack(after.weights, *moved))

    others = (Literal.at(other(size)) for size in np.geomspace(1e-3, 1, n_trials))
    gains = (literal.expected(c).real - there.expected(c).real for literal in others)
    return about(
        point,
        Statement(
            "V6",
            "k regressions leave no gradient of Q in the noise layer",
            _worst(*(np.abs(d) for d in d_channel)),
            REGRESSIONS,
            "per sample",
        ),
        Statement(
            "V6",
            f"none of {n_trials} other noise layers has a higher Q",
            _worst(0.0, *gains) / point.n,
            1e-9,
            "nats per sample",
        ),
    )


def relabelling_invariance(point: Point, rng: np.random.Generator) -> list[Statement]:
    """V7: permuting the true classes (columns of q, rows of theta) leaves L unchanged.

    The same terms are added in another order: the bound is :data:`ROUNDING`.
    """
    permutation = rng.permutation(point.network.n_classes)
    model, (logits, *hidden) = point.model, point.outputs()
    if point.links is not None:
        model = replace(model, links=kernels.link_index(point.links.support[permutation]))
    nll, *here = point.joint()
    renamed_nll, *there = point.joint_of(
        model,
        (logits[:, permutation], *hidden),
        [values[permutation] for values in point.channel],
        point.noisy_labels,
    )
    # Logits have the classes in their columns, h(x) nowhere, the channel in its rows.
    here[0] = here[0][:, permutation]
    n_outputs = 1 + len(hidden)
    here[n_outputs:] = [gradient[permutation] for gradient in here[n_outputs:]]
    terms = _Terms.at(point)
    residual = _worst(
        abs(float(nll - renamed_nll)) / max(abs(float(nll)), 1.0),
        *(
            _relative(a - b, size)
            for a, b, size in zip(here, there, terms.outputs + terms.channel, strict=True)
        ),
    )
    words = "renaming the true classes changes nothing: k! equal optima"
    return about(point, Statement("V7", words, residual, ROUNDING))


def collapses(point: Point, rng: np.random.Generator) -> list[Statement]:
    """V8: special cases in which a model is another one.

    All: theta = I, or one link a row on the diagonal, is plain cross-entropy; equal rows are a dead
    start. Dense s-model: k=2 is Mnih & Hinton. Sparse: l = k is dense. c-models: U = 0 is the
    s-model, with every gradient that the two share. One formula is another on these inputs, and
    the bound is :data:`ROUNDING`, of the largest terms.
    """
    rows = [_identity_is_cross_entropy(point), _equal_rows_are_a_dead_start(point, rng)]
    if point.links is not None:
        rows.append(_all_links_are_dense(point, rng))
    if point.channel_weights is not None:
        rows.append(_no_weights_are_the_s_model(point))
    if point.links is None and point.channel_weights is None:
        rows.append(_two_classes_are_mnih_and_hinton(point, rng))
    return about(point, *rows)


def _apart(
    found: kernels.SModelNLL | kernels.CModelNLL, expected: Sequence[Any], sizes: Sequence[Any]
) -> float:
    """Return how far a loss and its gradients are from others, in units of ``sizes``."""
    nll, *gradients = found
    expected_nll, *others = expected
    return _worst(
        abs(float(nll - expected_nll)) / max(abs(float(expected_nll)), 1.0),
        *(_relative(a - b, size) for a, b, size in zip(gradients, others, sizes, strict=True)),
    )


def _identity_is_cross_entropy(point: Point) -> Statement:
    outputs, z, n, model = point.outputs(), point.noisy_labels, point.n, point.model
    k = outputs[0].shape[1]
    *channel_weights, channel_logits = point.channel
    if point.links is None:
        channel_logits = channel_logits_of(np.eye(k))
    else:
        model = replace(model, links=kernels.link_index(np.arange(k)[:, None]))
        channel_logits = channel_logits[:, :1]
        channel_weights = [u[:, :1] for u in channel_weights]
    found = point.joint_of(model, outputs, [*channel_weights, channel_logits], z)
    plain = point.compute(partial(kernels.softmax_nll, backend=point.backend), outputs[0], z)
    # What is left is the classifier's gradient; neither h(x) nor the channel has one.
    nothing = [np.zeros(1)] * (len(found) - 2)
    sizes = [np.ones(1) / n] * (len(found) - 1)
    words = "noise matrix = identity: plain cross-entropy"
    return Statement("V8", words, _apart(found, [*plain, *nothing], sizes), ROUNDING)


def _equal_rows_are_a_dead_start(point: Point, rng: np.random.Generator) -> Statement:
    logits, *hidden = point.outputs()
    k, n_kept = point.channel_logits.shape
    model, z = point.model, point.noisy_labels
    if point.links is not None:
        row = point.links.support[0]
        model = replace(model, links=kernels.link_index(np.tile(row, (k, 1))))
        z = row[z % n_kept]  # only these can be observed
    channel = [np.tile(rng.normal(size=n_kept), (k, 1))]
    if hidden:
        row_weights = rng.normal(size=(n_kept, hidden[0].shape[1]))
        channel.insert(0, np.tile(row_weights, (k, 1, 1)))
    dead = point.joint_of(model, (logits, *hidden), channel, z)
    words = "all rows of the noise matrix equal: the classifier gets no gradient"
    residual = float(np.abs(dead.d_logits).max() * point.n)
    return Statement("V8", words, residual, ROUNDING, "per sample")


def _all_links_are_dense(point: Point, rng: np.random.Generator) -> Statement:
    outputs, z, model = point.outputs(), point.noisy_labels, point.model
    k = outputs[0].shape[1]
    channel: list[np.ndarray] = [
        np.asarray(rng.normal(size=(k, k, *values.shape[2:]))) for values in point.channel
    ]
    nll, *gradients = point.joint_of(replace(model, links=None), outputs, channel, z)
    every = kernels.link_index(np.array([rng.permutation(k) for _ in range(k)]))
    split = len(outputs)
    expected = gradients[:split] + [gather_links(d, every) for d in gradients[split:]]
    on_links = [gather_links(values, every) for values in channel]
    sparse = point.joint_of(replace(model, links=every), outputs, on_links, z)
    # Gradients that add up terms of mixed signs: each is judged by the largest term, at most 1/n
    # times u or h for each sample.
    factors: list[np.ndarray] = [*outputs[1:], *channel[:-1]]
    scale = _worst(1.0, *(np.abs(factor) for factor in factors))
    sizes = [np.full(1, scale / point.n)] * split + [np.full(1, scale)] * (len(expected) - split)
    words = "l = k, every link kept: the dense model"
    return Statement("V8", words, _apart(sparse, [nll, *expected], sizes), ROUNDING)


def _no_weights_are_the_s_model(point: Point) -> Statement:
    outputs, z = point.outputs(), point.noisy_labels
    assert point.channel_weights is not None
    none = np.zeros_like(point.channel_weights)
    s_model = SModel(point.network, backend=point.backend, links=point.links)
    s = point.joint_of(s_model, outputs[:1], [point.channel_logits], z)
    c = point.joint_of(point.model, outputs, [none, point.channel_logits], z)
    assert isinstance(c, kernels.CModelNLL)
    shared = kernels.SModelNLL(c.nll, c.d_logits, c.d_channel_logits)
    sizes = [np.full(1, 1 / point.n), np.ones(1)]
    residual = _worst(_apart(shared, s, sizes), np.abs(c.d_hidden))
    words = "U = 0: the s-model, with every shared gradient, and none reaches h"
    return Statement("V8", words, residual, ROUNDING)


def _two_classes_are_mnih_and_hinton(point: Point, rng: np.random.Generator) -> Statement:
    """Mnih & Hinton (2012): two classes, theta given, one logit s = a_1 - a_0."""
    logits, n = point.logits(), point.n
    theta = rng.dirichlet(np.ones(2), size=2)
    pair, bits = np.ascontiguousarray(logits[:, :2]), point.noisy_labels % 2
    p = expit(pair[:, 1] - pair[:, 0])
    m = theta[0, bits] * (1 - p) + theta[1, bits] * p
    d_s = -(theta[1, bits] - theta[0, bits]) * p * (1 - p) / m / n
    s_model_nll = partial(kernels.s_model_nll, backend=point.backend)
    ours = point.compute(s_model_nll, pair, channel_logits_of(theta), bits)
    residual = _worst(
        abs(float(ours.nll) + np.log(m).mean()) / max(float(ours.nll), 1.0),
        _relative(ours.d_logits - np.stack([-d_s, d_s], axis=1), p / n),
    )
    return Statement("V8", "two classes, fixed noise: Mnih & Hinton (2012)", residual, ROUNDING)


def monotone(
    history: Sequence[HalfStep], n: int, every_half_step: bool, model: str = "s"
) -> list[Statement]:
    """V9: EM with an exact M-step never lowers L, nor does any M-step that does not lower Q.

    The bound is rounding of the two L that are compared: n log-likelihoods, each with an error of
    eps of its size and as likely up as down, add up to eps |L| sqrt(n) or less, times 4 for the
    tail. The minimum of all gains is judged, not their mean.

    Parameters
    ----------
    history : sequence of HalfStep
        Of a fit with an exact M-step.
    n : int
        Number of samples, for the rounding allowed.
    every_half_step : bool
        True for a fit with ``fresh_posterior``: every half-step has to climb. False for plain EM:
        both half-steps have to end no lower than the round began (the second half works with the
        posterior of the round's start and may give back part of what the first half gained).
    model : {"s", "c", "sparse-s", "sparse-c"}
        Whose history it is, for the report.
    """
    values = [step.log_likelihood for step in history]
    if every_half_step:
        gains = np.diff(values)
    else:
        start_of = {s.round + 1: s.log_likelihood for s in history if s.half != "noise matrix"}
        gains = np.array([s.log_likelihood - start_of[s.round] for s in history[1:]])
    words = (
        "EM with a fresh posterior: no half-step lowers L"
        if every_half_step
        else "plain EM: no half-step ends below the start of its round"
    )
    return [
        Statement(
            "V9",
            words,
            _worst(0.0, -gains.min()) + 0.0 if gains.size else np.nan,
            # A c-model's M-step ends where L-BFGS sees no gain for rounding; L may then fall by as
            # much again.
            (2 if model.endswith("c") else 1) * rounding_of(float(np.abs(values).max()), n),
            "nats",
            f"{gains.size} half-steps, L from {values[0]:.6g} to {values[-1]:.6g}",
            model,
        )
    ]


@dataclass(frozen=True)
class Limits:
    """EM's limit and the joint optimum, from one start."""

    em: Point
    joint: Point
    history: list[HalfStep]
    em_moved: float
    """by how much EM's last round still moved an entry of theta"""
    pseudo_count: float = 0.0
    """alpha, on every entry of theta, of both"""

    @property
    def model(self) -> SModel | CModel:
        """The model whose objective both climbed, pseudo-counts included."""
        return self.em.objective(self.pseudo_count)


def find_limits(
    start: Point,
    rng: np.random.Generator,
    n_rounds: int = 3000,
    tolerance: float = 1e-7,
    on_half_step: Callable[..., None] | None = None,
    pseudo_count: float = 0.0,
) -> Limits:
    """Run EM with exact M-steps to its limit, and L-BFGS on the joint likelihood to its own.

    Meant for softmax regression on few features, where the M-step is concave and data that noise
    has mixed keeps its maximiser finite. EM repeats the E-step between its halves; the joint
    optimum is polished by Newton steps. ``on_half_step`` as in :func:`em_baseline.fit`. A
    ``pseudo_count``, for s-models, is in the objective of both.
    """
    model = start.objective(pseudo_count)
    last_thetas = [_theta(start)]

    def watch(step: HalfStep, parameters: np.ndarray) -> None:
        if step.half == "noise matrix":
            here = start.with_parameters(to_host(parameters))
            last_thetas[:] = [last_thetas[-1], _theta(here)]
        if on_half_step is not None:
            on_half_step(step, parameters)

    exact = steps.LBFGS(tolerance / 10)
    there = start.there(model, start.parameters, start.x, start.noisy_labels)
    em = fit(
        *there,
        network_step=exact,
        noise_step=None if start.channel_weights is None else exact,
        n_rounds=n_rounds,
        fresh_posterior=True,
        tolerance=tolerance,
        on_half_step=watch,
        shuffling=rng,
    )
    model, parameters, x, noisy_labels = there
    joint, _ = steps.minimise(model, parameters, x, noisy_labels, tolerance / 10)
    joint = steps.polish(model, joint, x, noisy_labels)
    return Limits(
        start.with_parameters(to_host(em.parameters)),
        start.with_parameters(to_host(joint)),
        em.history,
        float(np.abs(last_thetas[-1] - last_thetas[0]).max()),
        pseudo_count,
    )


def same_stationary_points(limits: Limits, rng: np.random.Generator) -> list[Statement]:
    """V10: the joint gradient is zero at EM's limit; EM stays where the joint optimum is.

    What EM moves is measured in likelihood and in probability mass, (n_i / n) |theta+ - theta|: a
    class without samples has a row that nothing determines, and a flat likelihood lets weights
    wander without consequence. EM converges linearly and may be far from its limit after any number
    of rounds; the gradient may then be as large as EM's own last step, to which V4 ties it.

    Bounds: 1e-6 is the gradient at which L-BFGS stops (:data:`REGRESSIONS`), plus ten times EM's
    last move. A gradient of 1e-6 moves theta by as much mass where the curvature is one, and gains
    its square over twice the curvature: 1e-8 allows directions as flat as 1e-4.
    """
    em, joint = limits.em, limits.joint
    gradient = em.gradient(limits.model, em.parameters, em.x, em.noisy_labels)
    # Tighter than the joint optimum was found, so that EM has every chance to move.
    exact = steps.LBFGS(tolerance=0.0)
    moved = fit(
        *joint.there(limits.model, joint.parameters, joint.x, joint.noisy_labels),
        network_step=exact,
        noise_step=None if joint.channel_weights is None else exact,
        n_rounds=1,
        fresh_posterior=True,
        shuffling=rng,
    )
    after = joint.with_parameters(to_host(moved.parameters))
    theta_moved = np.abs(_theta(after) - _theta(joint))
    mass_moved = (Literal.at(joint).c[:, :, None] * theta_moved).mean(axis=0)
    gain = (moved.history[-1].log_likelihood - moved.history[0].log_likelihood) / joint.n
    em_likelihood, joint_likelihood = (
        float(point.e_step().log_likelihood_t.sum()) for point in (em, joint)
    )
    return about(
        em,
        Statement(
            "V10",
            "at EM's limit the joint gradient is zero",
            _worst(np.abs(gradient)),
            # Never so large that an EM which wanders for ever would pass.
            REGRESSIONS + min(10 * limits.em_moved, 1e-3),
            "nats per sample",
            f"L = {em_likelihood:.6g} after {limits.history[-1].round} rounds, the last of which "
            f"moved theta by {limits.em_moved:.1g}; "
            f"{dead_entries(em)} dead entries of theta",
        ),
        Statement(
            "V10",
            "from the joint optimum EM moves no mass in theta",
            _worst(mass_moved),
            REGRESSIONS,
            "probability",
            f"L = {joint_likelihood:.6g}",
        ),
        Statement(
            "V10",
            "from the joint optimum a whole round of EM gains no likelihood",
            abs(gain),
            1e-8,
            "nats per sample",
            f"network M-step by {moved.history[-1].gradients} gradients of L-BFGS",
        ),
    )


def dead_entries(point: Point, zero: float = 1e-12) -> int:
    """Return how many zeros of theta are merely stuck: g_ij > n_i, so that growing would help.

    theta_ij = 0 is a fixed point of EM and out of reach for a softmax; it is a true optimum only
    if g_ij = dL/dtheta_ij <= n_i. Links that a sparse model does not have are not counted. A
    c-model, of whose theta_t,ij none is a parameter, has none. Entries up to ``zero`` count as
    zeros.
    """
    if point.channel_weights is not None:
        return 0
    literal = Literal.at(point)
    n_i = literal.c.sum(axis=0)[:, None]
    would_grow = (literal.theta[0] <= zero) & (literal.d_theta > n_i * (1 + 1e-6))
    return int(np.take_along_axis(would_grow, literal.support, axis=1).sum())


def certificate(point: Point, pseudo_count: float = 0.0) -> float:
    """Return V11's bound on what a better noise matrix could gain, in nats per sample.

    For a fixed network L is concave in theta, so with g = dL/dtheta

        0 <= L* - L(theta) <= sum_i (max_j g_ij - n_i),

    over the links of a sparse model, among noise matrices with the same links. At a c-model L* is
    still that of the best single noise matrix, an s-model's (see :func:`certified`).

    A pseudo-count adds alpha sum_ij log theta_ij to L, concave too: alpha / theta_ij to g_ij and
    l alpha to n_i. At a c-model, which has none, it is a ValueError.
    """
    point.objective(pseudo_count)  # refuses what a model does not have
    literal = Literal.at(point)
    on_links = np.take_along_axis(literal.d_theta, literal.support, axis=1)
    n_i = literal.c.sum(axis=0)
    if pseudo_count:
        theta = np.take_along_axis(literal.theta[0], literal.support, axis=1)
        on_links = on_links + pseudo_count / theta
        n_i = n_i + pseudo_count * theta.shape[1]
    return float((on_links.max(axis=1) - n_i).sum() / point.n)


def frozen_network(point: Point) -> Point:
    """Return a point with the same outputs whose network is not run again at every step.

    Of an s-model, the logits come out of an identity map; a c-model also reads h(x) and stays as it
    is.
    """
    if point.channel_weights is not None:
        return point
    k = point.network.n_classes
    identity = np.concatenate([np.eye(k).ravel(), np.zeros(k)])
    return replace(point, network=mlp(k, (), k), weights=identity, x=point.logits())


def em_on_theta(point: Point, n_steps: int = 2000, tolerance: float = 1e-10) -> Point:
    """Return where EM on theta alone, the network fixed, gets to: at best to ``tolerance``.

    Zeros of theta stay, so from a start with zeros that is not always the best noise matrix. For
    s-models.
    """
    frozen = frozen_network(point)
    for _ in range(n_steps):
        if certificate(frozen) <= tolerance:
            break
        frozen = frozen.m_step()
    return replace(point, channel_logits=frozen.channel_logits)


def certified(name: str, point: Point) -> list[Statement]:
    """V11 for one fit: the certificate bounds the gain that EM on theta alone then finds.

    For a c-model, whose L is not concave in U and B, it says how much better a single noise matrix
    for all samples could be. L is concave in all the theta_t at once, so the bound holds for it as
    well; below zero it certifies that reading the features has paid.

    The bound is an inequality without slack, so all that is allowed is rounding of the two L.
    """
    if point.channel_weights is not None:
        return _certified_against_one_matrix(name, point)
    bound = certificate(point)
    best = em_on_theta(point)
    gain = float((best.e_step().log_likelihood_t - point.e_step().log_likelihood_t).mean())
    return about(
        point,
        Statement(
            "V11",
            f"{name}: EM on theta gains no more than the certificate",
            _worst(gain - bound, -gain, 0.0),
            rounding_of(Literal.at(point).log_likelihood.real, point.n) / point.n,
            "nats per sample",
            f"theta is within {bound:.2g} nats per sample of the best for its network "
            f"(found {gain:.2g}, left {certificate(best):.1g})",
        ),
    )


def _certified_against_one_matrix(name: str, point: Point) -> list[Statement]:
    """V11 of a c-model: the best s-model on its network gains no more than the certificate."""
    literal, bound = Literal.at(point), certificate(point)
    theta = np.einsum("ti,tij->ij", literal.c, literal.theta) / literal.c.sum(axis=0)[:, None]
    start = log_with_zeros(np.take_along_axis(theta, literal.support, axis=1))
    best = em_on_theta(replace(point, channel_weights=None, channel_logits=start))
    gain = float((best.e_step().log_likelihood_t - point.e_step().log_likelihood_t).mean())
    return about(
        point,
        Statement(
            "V11",
            f"{name}: the best single noise matrix gains no more than the certificate",
            _worst(gain - bound, 0.0),
            rounding_of(literal.log_likelihood.real, point.n) / point.n,
            "nats per sample",
            f"one noise matrix for all samples gains at most {bound:+.2g} nats per sample for this "
            f"network (found {gain:+.2g}, left {certificate(best):.1g})",
        ),
    )
