"""The statements that tie joint training and EM together, as functions that return numbers.

V1-V8 hold at every parameter value, to rounding. V9-V11 hold along EM's way or at an optimum.
Each function returns :class:`Statement` rows: what is claimed in words, the residual seen, the
bound that arithmetic allows, and whether it holds.

The two sides of an identity must not come from the same lines of code. One side is the project's
kernels and steps, as a user would call them. The other is written here from the paper's formulas
in plain probabilities (:class:`Literal`), without log-sum-exp and without the fused derivatives,
and goes through with complex numbers too, for the complex step. Laws (V7, two of V8) compare a
kernel with itself or with another on related inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.special import expit, log_softmax

import kernels
from em_baseline import steps
from em_baseline.alternating import HalfStep, fit, rounding_of
from nalayer.gradient_check import check_gradient
from nalayer.models import SModel, SoftTargetModel
from nalayer.network import Network, mlp
from nalayer.noise_layer import channel_logits_of, log_with_zeros, noise_matrix


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

    @property
    def holds(self) -> bool:
        """Whether the residual is within the bound."""
        return bool(self.residual <= self.bound)


@dataclass(frozen=True)
class Point:
    """Parameters of the s-model together with the data at which they are judged (float64)."""

    network: Network
    weights: np.ndarray
    channel_logits: np.ndarray
    x: np.ndarray
    noisy_labels: np.ndarray
    backend: str | None = None

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.x.shape[0]

    @property
    def model(self) -> SModel:
        """The joint model at this point."""
        return SModel(self.network, backend=self.backend)

    @property
    def parameters(self) -> np.ndarray:
        """Weights and channel logits as one flat vector."""
        return self.model.pack(self.weights, self.channel_logits)

    def logits(self) -> np.ndarray:
        """Return the classifier's logits (n, K)."""
        return self.network.logits(self.weights, self.x)

    def e_step(self) -> kernels.Posterior:
        """Return the project's E-step here."""
        return steps.e_step(self.logits(), self.channel_logits, self.noisy_labels, self.backend)

    def joint(self) -> kernels.SModelNLL:
        """Return the project's joint loss and gradients here."""
        return kernels.s_model_nll(
            self.logits(), self.channel_logits, self.noisy_labels, backend=self.backend
        )

    def m_step(self) -> Point:
        """Return the point after the noise matrix's closed-form update (Eq. 4)."""
        counts_ij = steps.expected_counts(self.e_step().posterior, self.noisy_labels)
        theta = steps.noise_matrix_m_step(counts_ij, noise_matrix(self.channel_logits))
        return replace(self, channel_logits=log_with_zeros(theta))

    def with_parameters(self, parameters: np.ndarray) -> Point:
        """Return the same data at other parameters."""
        weights, channel_logits = self.model.unpack(parameters)
        return replace(self, weights=weights, channel_logits=channel_logits)


class Literal:
    """The paper's formulas as printed, in plain probabilities, real or complex.

    Good while no probability of an observed label underflows (logits within some hundreds);
    beyond that the 40-digit decimals of :mod:`kernels.exact` are the judge.

    ``q`` (n, K) is Eq. 7, ``theta`` (K, K) Eq. 10, ``joint_ti`` q_ti theta_i,z_t, ``m`` (n,)
    Eq. 11, ``c`` (n, K) Eq. 3.
    """

    def __init__(self, logits: np.ndarray, channel_logits: np.ndarray, noisy_labels: np.ndarray):
        self.z = noisy_labels
        self.q = self._softmax(logits)
        self.theta = self._softmax(channel_logits)
        self.joint_ti = self.q * self.theta[:, noisy_labels].T
        self.m = self.joint_ti.sum(axis=1)
        self.c = self.joint_ti / self.m[:, None]

    @staticmethod
    def _softmax(scores: np.ndarray) -> np.ndarray:
        weights = np.exp(scores - scores.real.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    @classmethod
    def at(cls, point: Point) -> Literal:
        """Return the formulas at a point."""
        return cls(point.logits(), point.channel_logits, point.noisy_labels)

    @property
    def log_likelihood(self) -> complex:
        """L of Eq. 2: sum over samples of log sum_i theta_i,z_t q_ti."""
        return np.log(self.m).sum()

    @property
    def counts_ij(self) -> np.ndarray:
        """N_ij = sum_t c_ti 1{z_t=j}, the numerator of Eq. 4."""
        return self.c.T @ np.eye(self.theta.shape[0])[self.z]

    @property
    def d_theta(self) -> np.ndarray:
        """dL/dtheta_ij = sum_t 1{z_t=j} q_ti / m_t: no division by theta, so zeros are fine."""
        return (self.q / self.m[:, None]).T @ np.eye(self.theta.shape[0])[self.z]

    def expected(self, c: np.ndarray) -> complex:
        """Q = sum_t sum_i c_ti log(q_ti theta_i,z_t) for a given posterior."""
        return np.where(c > 0, c * np.log(np.where(c > 0, self.joint_ti, 1)), 0).sum()


def _worst(*residuals: Any) -> float:
    """Return the largest residual; unlike Python's ``max``, NaN if any of them is NaN."""
    return float(np.max([np.max(residual) for residual in residuals]))


def _relative(difference: np.ndarray, terms: np.ndarray) -> float:
    """Return max |difference| / max |terms|.

    Gradients here are differences of two terms, such as q - c. Near an optimum they vanish and the
    terms do not, so errors are measured against the terms.
    """
    return float(np.abs(difference).max() / np.abs(terms).max())


def _terms(point: Point) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the parts that q and theta alone contribute to the gradients of the mean loss.

    Of the logits (q/n), the channel logits (n_i theta_ij / n) and the weights (q/n, backwards).
    """
    literal = Literal.at(point)
    q, n_i = literal.q / point.n, literal.c.sum(axis=0)[:, None]
    _, caches = point.network.forward(point.weights, point.x)
    return q, n_i * literal.theta / point.n, point.network.backward(point.weights, caches, q)


def _typical_derivative(*terms: np.ndarray) -> float:
    """Return the size of the terms' derivative along a random unit direction."""
    flat = np.concatenate([term.ravel() for term in terms])
    return float(np.linalg.norm(flat) / np.sqrt(flat.size))


def same_function(point: Point) -> list[Statement]:
    """V1: L the EM way (Eq. 2, literally) equals S the network way (Eq. 12, our kernel)."""
    em_way = Literal.at(point).log_likelihood.real
    network_way = -point.n * float(point.joint().nll)
    mean_way = float(point.e_step().log_likelihood_t.sum())
    # Each log carries its own rounding: near L = 0, n of them and not L set the scale.
    scale = max(abs(em_way), point.n)
    residual = _worst(abs(em_way - network_way), abs(em_way - mean_way)) / scale
    return [
        Statement("V1", "EM's likelihood (Eq. 2) = the network's score (Eq. 12)", residual, 1e-12)
    ]


def backward_is_e_step(point: Point, rng: np.random.Generator) -> list[Statement]:
    """V2: the backward pass is the E-step, against formulas, differences and complex step.

    Differences are taken with respect to logits and channel logits, where the loss is smooth; the
    complex step goes through the whole network, kinks and all.
    """
    n, z = point.n, point.noisy_labels
    literal, joint = Literal.at(point), point.joint()
    q_terms, theta_terms, weight_terms = _terms(point)
    closed = _worst(
        _relative(joint.d_logits + literal.c / n - q_terms, q_terms),
        _relative(joint.d_channel_logits + literal.counts_ij / n - theta_terms, theta_terms),
    )
    logits = point.logits()
    split = logits.size

    def on_outputs(
        loss: Callable[[np.ndarray, np.ndarray], complex],
    ) -> Callable[[np.ndarray], complex]:
        return lambda flat: loss(
            flat[:split].reshape(logits.shape), flat[split:].reshape(point.channel_logits.shape)
        )

    outputs = np.concatenate([logits.ravel(), point.channel_logits.ravel()])
    d_outputs = np.concatenate([joint.d_logits.ravel(), joint.d_channel_logits.ravel()])
    differences = check_gradient(
        on_outputs(lambda a, b: float(kernels.s_model_nll(a, b, z, backend=point.backend).nll)),
        d_outputs,
        outputs,
        n_directions=8,
        rng=rng,
    )
    _, gradient = point.model.loss_and_gradient(point.parameters, point.x, z)

    def whole_network(parameters: np.ndarray) -> complex:
        weights, channel_logits = point.model.unpack(parameters)
        a = point.network.logits(weights, point.x)
        return -Literal(a, channel_logits, z).log_likelihood / n

    complex_step = check_gradient(
        whole_network, gradient, point.parameters, method="complex-step", n_directions=8, rng=rng
    )
    return [
        Statement("V2", "dL/da = c - q and dL/dB = N - n theta (our backward pass)", closed, 1e-12),
        Statement(
            "V2",
            "backward pass = fourth-order differences of the loss",
            differences.error / _typical_derivative(q_terms, theta_terms),
            1e-7,
        ),
        Statement(
            "V2",
            "whole network's backward pass = complex-step derivative of Eq. 2",
            complex_step.error / _typical_derivative(weight_terms, theta_terms),
            1e-12,
        ),
    ]


def fisher_identity(point: Point, rng: np.random.Generator) -> list[Statement]:
    """V3: the joint gradient equals the gradient of EM's M-step objective, for every parameter.

    Q is differentiated through the whole network by the complex step, with the literal posterior
    held fixed; then the gradient that the project's M-step uses is compared parameter by parameter;
    then Eq. 6 as printed, sum_t (c_ti - q_ti) h(x_t), with the last layer's.
    """
    n, z = point.n, point.noisy_labels
    literal = Literal.at(point)
    _, joint = point.model.loss_and_gradient(point.parameters, point.x, z)
    d_weights, d_channel_logits = point.model.unpack(joint)
    _, theta_terms, weight_terms = _terms(point)

    def q_of(parameters: np.ndarray) -> complex:
        weights, channel_logits = point.model.unpack(parameters)
        logits = point.network.logits(weights, point.x)
        return -Literal(logits, channel_logits, z).expected(literal.c) / n

    fisher = check_gradient(
        q_of, joint, point.parameters, method="complex-step", n_directions=8, rng=rng
    )

    posterior = point.e_step().posterior
    _, d_s = SoftTargetModel(point.network, point.backend).loss_and_gradient(
        point.weights, point.x, posterior
    )
    # d/dB_ij of sum_ij N_ij log theta_ij, through the Jacobian of log softmax, row by row.
    counts_ij = steps.expected_counts(posterior, z)
    k = counts_ij.shape[0]
    d_q = -np.stack([counts_ij[i] @ (np.eye(k) - literal.theta[i]) for i in range(k)]) / n
    m_step = _worst(
        _relative(d_weights - d_s, weight_terms), _relative(d_channel_logits - d_q, theta_terms)
    )

    _, caches = point.network.forward(point.weights, point.x)
    h = caches[-1]
    eq_6 = sum(np.outer(h[t], literal.c[t] - literal.q[t]) for t in range(n))
    d_u, u_terms = (list(point.network.unpack(flat))[-1][0] for flat in (d_weights, weight_terms))
    return [
        Statement(
            "V3",
            "joint gradient = complex-step derivative of Q, whole network",
            fisher.error / _typical_derivative(weight_terms, theta_terms),
            1e-12,
        ),
        Statement("V3", "joint gradient = gradient that EM's M-step uses", m_step, 1e-12),
        Statement(
            "V3",
            "last layer's gradient = Eq. 6 as printed",
            _relative(d_u + eq_6 / n, u_terms),
            1e-12,
        ),
    ]


def em_step_is_preconditioned_gradient(point: Point) -> list[Statement]:
    """V4: theta+ - theta = (dL/dB_i) / n_i = P_i dL/dtheta_i (Xu & Jordan 1996)."""
    literal = Literal.at(point)
    n_i = literal.c.sum(axis=0)[:, None]
    em_move = noise_matrix(point.m_step().channel_logits) - literal.theta
    gradient = -point.n * point.joint().d_channel_logits
    d_theta = literal.d_theta
    natural = np.stack(
        [(np.diag(row) - np.outer(row, row)) @ d_theta[i] for i, row in enumerate(literal.theta)]
    )
    # A class without any posterior mass keeps its row (n_i = 0: nothing to divide by).
    residual = _worst(
        *(
            np.abs(em_move - np.divide(move, n_i, out=np.zeros_like(move), where=n_i != 0))
            for move in (gradient, natural)
        )
    )
    return [
        Statement(
            "V4",
            "EM's step of the noise matrix = preconditioned gradient step",
            float(residual),
            1e-12,
            "absolute",
        )
    ]


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

    def log_joint(point: Point) -> np.ndarray:
        log_q = log_softmax(point.logits(), axis=1)
        return log_q + log_softmax(point.channel_logits, axis=1)[:, point.noisy_labels].T

    joint_0, joint_1 = log_joint(before), log_joint(after)
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


def exact_ledger(name: str, path: Sequence[Point]) -> list[Statement]:
    """V5 along a path of points: every gain in likelihood is accounted for to the last digit.

    The bound is 1e-10 of the largest part, plus what rounding does to the sums behind it: that
    counts when a step hardly moves anything. The row is the step closest to its bound; steps with
    dQ < 0, which mini-batches and Adam do take, are counted in the detail.
    """
    entries = [ledger(before, after) for before, after in pairwise(path)]
    rounding = rounding_of(float(path[0].e_step().log_likelihood_t.sum()), path[0].n)
    bounds = [1e-10 + rounding / entry.moved for entry in entries]
    residuals = [entry.residual for entry in entries]
    worst = int(np.argmax(np.divide(residuals, bounds)))  # NaN counts as the largest
    entry = entries[worst]
    return [
        Statement(
            "V5",
            f"{name}: dL = dQ + sum_t KL(c_t || c_t+)",
            entry.residual,
            bounds[worst],
            "of the largest part",
            f"step {worst + 1} of {len(entries)}: {entry.gain:+.4g} = {entry.expected:+.4g} "
            f"{entry.divergence:+.4g} nats; largest residual {_worst(*residuals):.1e}; "
            f"dQ < 0 in {sum(e.expected < 0 for e in entries)}",
        )
    ]


def m_step_is_maximiser(
    point: Point, after: Point, rng: np.random.Generator, n_trials: int = 64
) -> list[Statement]:
    """V6: the noise matrix *stored after* the M-step maximises Q for the posterior before it.

    The gradient of Q vanishes there, and none of ``n_trials`` perturbations of theta, near and
    far, does better. Catches an update that was computed and not stored.
    """
    literal = Literal.at(point)
    counts_ij = literal.counts_ij
    theta = noise_matrix(after.channel_logits)
    n_i = counts_ij.sum(axis=1, keepdims=True)
    stationary = float(np.abs(counts_ij - n_i * theta).max() / point.n)

    def q_of(matrix: np.ndarray) -> float:
        return float(
            np.where(counts_ij > 0, counts_ij * np.log(np.maximum(matrix, 1e-300)), 0).sum()
        )

    best = q_of(theta)
    k = theta.shape[0]
    shares = np.geomspace(1e-3, 1, n_trials)
    others = [(1 - s) * theta + s * rng.dirichlet(np.ones(k), size=k) for s in shares]
    better = _worst(0.0, *(q_of(other) - best for other in others))
    return [
        Statement(
            "V6",
            "Eq. 4 leaves no gradient of Q in the noise matrix",
            stationary,
            1e-12,
            "per sample",
        ),
        Statement(
            "V6",
            f"none of {n_trials} other noise matrices has a higher Q",
            better / point.n,
            1e-12,
            "nats per sample",
        ),
    ]


def relabelling_invariance(point: Point, rng: np.random.Generator) -> list[Statement]:
    """V7: permuting the true classes (columns of q, rows of theta) leaves L unchanged."""
    permutation = rng.permutation(point.network.n_classes)
    here = point.joint()
    there = kernels.s_model_nll(
        point.logits()[:, permutation],
        point.channel_logits[permutation],
        point.noisy_labels,
        backend=point.backend,
    )
    q_terms, theta_terms, _ = _terms(point)
    residual = _worst(
        abs(float(here.nll - there.nll)) / max(abs(float(here.nll)), 1.0),
        _relative(here.d_logits[:, permutation] - there.d_logits, q_terms),
        _relative(here.d_channel_logits[permutation] - there.d_channel_logits, theta_terms),
    )
    return [
        Statement(
            "V7", "renaming the true classes changes nothing: k! equal optima", residual, 1e-12
        )
    ]


def collapses(point: Point, rng: np.random.Generator) -> list[Statement]:
    """V8: theta = I is plain cross-entropy; equal rows are a dead start; k=2 is Mnih & Hinton."""
    logits, z, n = point.logits(), point.noisy_labels, point.n
    k = logits.shape[1]
    s_model = kernels.s_model_nll(logits, channel_logits_of(np.eye(k)), z, backend=point.backend)
    plain = kernels.softmax_nll(logits, z, backend=point.backend)
    identity = _worst(
        abs(float(s_model.nll - plain.nll)) / max(float(plain.nll), 1.0),
        _relative(s_model.d_logits - plain.d_logits, np.ones(1) / n),
    )
    equal_rows = np.tile(rng.normal(size=k), (k, 1))
    dead = kernels.s_model_nll(logits, equal_rows, z, backend=point.backend)

    # Mnih & Hinton (2012): two classes, theta given, one logit s = a_1 - a_0.
    theta = rng.dirichlet(np.ones(2), size=2)
    pair, bits = np.ascontiguousarray(logits[:, :2]), z % 2
    p = expit(pair[:, 1] - pair[:, 0])
    m = theta[0, bits] * (1 - p) + theta[1, bits] * p
    d_s = -(theta[1, bits] - theta[0, bits]) * p * (1 - p) / m / n
    ours = kernels.s_model_nll(pair, channel_logits_of(theta), bits, backend=point.backend)
    binary = _worst(
        abs(float(ours.nll) + np.log(m).mean()) / max(float(ours.nll), 1.0),
        _relative(ours.d_logits - np.stack([-d_s, d_s], axis=1), p / n),
    )
    return [
        Statement("V8", "noise matrix = identity: plain cross-entropy", identity, 1e-12),
        Statement(
            "V8",
            "all rows of the noise matrix equal: the classifier gets no gradient",
            float(np.abs(dead.d_logits).max() * n),
            1e-12,
            "per sample",
        ),
        Statement("V8", "two classes, fixed noise: Mnih & Hinton (2012)", binary, 1e-12),
    ]


def monotone(history: Sequence[HalfStep], n: int, every_half_step: bool) -> list[Statement]:
    """V9: EM with an exact M-step never lowers L.

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
            rounding_of(float(np.abs(values).max()), n),
            "nats",
            f"{gains.size} half-steps, L from {values[0]:.6g} to {values[-1]:.6g}",
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


def find_limits(
    start: Point,
    rng: np.random.Generator,
    n_rounds: int = 3000,
    tolerance: float = 1e-7,
    on_half_step: Callable[..., None] | None = None,
) -> Limits:
    """Run EM with exact M-steps to its limit, and L-BFGS on the joint likelihood to its own.

    Meant for softmax regression on few features, where the M-step is concave and data that noise
    has mixed keeps its maximiser finite. EM repeats the E-step between its halves; the joint
    optimum is polished by Newton steps. ``on_half_step`` as in :func:`em_baseline.fit`.
    """
    last_thetas = [noise_matrix(start.channel_logits)]

    def watch(step: HalfStep, weights: np.ndarray, channel_logits: np.ndarray) -> None:
        if step.half == "noise matrix":
            last_thetas[:] = [last_thetas[-1], noise_matrix(channel_logits)]
        if on_half_step is not None:
            on_half_step(step, weights, channel_logits)

    em = fit(
        start.network,
        start.weights,
        start.channel_logits,
        start.x,
        start.noisy_labels,
        network_step=steps.LBFGS(tolerance / 10),
        n_rounds=n_rounds,
        fresh_posterior=True,
        tolerance=tolerance,
        on_half_step=watch,
        shuffling=rng,
        backend=start.backend,
    )
    joint, _ = steps.minimise(
        start.model, start.parameters, start.x, start.noisy_labels, tolerance / 10
    )
    joint = steps.polish(start.model, joint, start.x, start.noisy_labels)
    return Limits(
        replace(start, weights=em.weights, channel_logits=em.channel_logits),
        start.with_parameters(joint),
        em.history,
        float(np.abs(last_thetas[-1] - last_thetas[0]).max()),
    )


def same_stationary_points(limits: Limits, rng: np.random.Generator) -> list[Statement]:
    """V10: the joint gradient is zero at EM's limit; EM stays where the joint optimum is.

    What EM moves is measured in likelihood and in probability mass, (n_i / n) |theta+ - theta|: a
    class without samples has a row that nothing determines, and a flat likelihood lets weights
    wander without consequence. EM converges linearly and may be far from its limit after any number
    of rounds; the gradient may then be as large as EM's own last step, to which V4 ties it.
    """
    em, joint = limits.em, limits.joint
    _, gradient = em.model.loss_and_gradient(em.parameters, em.x, em.noisy_labels)
    moved = fit(
        joint.network,
        joint.weights,
        joint.channel_logits,
        joint.x,
        joint.noisy_labels,
        # Tighter than the joint optimum was found, so that EM has every chance to move.
        network_step=steps.LBFGS(tolerance=0.0),
        n_rounds=1,
        fresh_posterior=True,
        shuffling=rng,
        backend=joint.backend,
    )
    theta_moved = np.abs(noise_matrix(moved.channel_logits) - noise_matrix(joint.channel_logits))
    mass = Literal.at(joint).c.mean(axis=0)[:, None]
    gain = (moved.history[-1].log_likelihood - moved.history[0].log_likelihood) / joint.n
    em_likelihood, joint_likelihood = (
        float(point.e_step().log_likelihood_t.sum()) for point in (em, joint)
    )
    return [
        Statement(
            "V10",
            "at EM's limit the joint gradient is zero",
            _worst(np.abs(gradient)),
            # Never so large that an EM which wanders for ever would pass.
            1e-6 + min(10 * limits.em_moved, 1e-3),
            "nats per sample",
            f"L = {em_likelihood:.6g} after {limits.history[-1].round} rounds, the last of which "
            f"moved theta by {limits.em_moved:.1g}; "
            f"{dead_entries(em)} dead entries of theta",
        ),
        Statement(
            "V10",
            "from the joint optimum EM moves no mass in theta",
            _worst(mass * theta_moved),
            1e-6,
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
    ]


def dead_entries(point: Point, zero: float = 1e-12) -> int:
    """Return how many zeros of theta are merely stuck: g_ij > n_i, so that growing would help.

    theta_ij = 0 is a fixed point of EM and out of reach for a softmax; it is a true optimum only
    if g_ij = dL/dtheta_ij <= n_i.
    """
    literal = Literal.at(point)
    n_i = literal.c.sum(axis=0)[:, None]
    return int(((literal.theta <= zero) & (literal.d_theta > n_i * (1 + 1e-6))).sum())


def certificate(point: Point) -> float:
    """Return V11's bound on what a better noise matrix could gain, in nats per sample.

    For a fixed network L is concave in theta, so with g = dL/dtheta

        0 <= L* - L(theta) <= sum_i (max_j g_ij - n_i).
    """
    literal = Literal.at(point)
    return float((literal.d_theta.max(axis=1) - literal.c.sum(axis=0)).sum() / point.n)


def em_on_theta(point: Point, n_steps: int = 2000, tolerance: float = 1e-10) -> Point:
    """Return where EM on theta alone, the network fixed, gets to: at best to ``tolerance``.

    Zeros of theta stay, so from a start with zeros that is not always the best noise matrix.
    """
    k = point.network.n_classes
    # The same logits from an identity map, so that the network is not run again at every step.
    frozen = replace(
        point,
        network=mlp(k, (), k),
        weights=np.concatenate([np.eye(k).ravel(), np.zeros(k)]),
        x=point.logits(),
    )
    for _ in range(n_steps):
        if certificate(frozen) <= tolerance:
            break
        frozen = frozen.m_step()
    return replace(point, channel_logits=frozen.channel_logits)


def certified(name: str, point: Point) -> list[Statement]:
    """V11 for one fit: the certificate bounds the gain that EM on theta alone then finds."""
    bound = certificate(point)
    best = em_on_theta(point)
    gain = float((best.e_step().log_likelihood_t - point.e_step().log_likelihood_t).mean())
    return [
        Statement(
            "V11",
            f"{name}: EM on theta gains no more than the certificate",
            _worst(gain - bound, -gain, 0.0),
            rounding_of(Literal.at(point).log_likelihood.real, point.n) / point.n,
            "nats per sample",
            f"theta is within {bound:.2g} nats per sample of the best for its network "
            f"(found {gain:.2g}, left {certificate(best):.1g})",
        )
    ]
