r"""How fast EM on the noise layer converges, and why: what information the hidden labels take away.

The network is held fixed here. Near its limit EM's step in the noise layer is a linear map whose
matrix is I_c^-1 I_mis (Dempster, Laird & Rubin 1977): of I_c, the information that the data would
hold if the true labels were seen, I_mis is missing. EM's error shrinks by the largest eigenvalue at
every step: the fraction of missing information in the worst direction.

Coordinates are the channel as the model packs it, U and B. The eigenvalues do not depend on that
choice. With s_ti the gradient of log theta_t,i,z_t, that is (e_{z_t} - theta_t,i) (h_t, 1),

.. math::
    I_c   &= \sum_t \operatorname{blockdiag}_i\; c_{ti}
             (\operatorname{diag}\theta_{t,i} - \theta_{t,i}\theta_{t,i}^T)
             \otimes (h_t,1)(h_t,1)^T \\
    I_mis &= \sum_t \operatorname{Cov}(s_{t,y} \,|\, z_t) =
             \sum_t \big( \operatorname{blockdiag}_i c_{ti} s_{ti} s_{ti}^T
             - s_t s_t^T \big), \qquad s_t = (c_{t1} s_{t1}, \ldots, c_{tk} s_{tk}) \\
    I_obs &= I_c - I_mis = -\nabla^2 L \qquad \text{(Louis 1982)}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

from em_baseline.statements import (
    Literal,
    Point,
    Statement,
    about,
    certificate,
    frozen_network,
)
from em_baseline.steps import NoiseRegressions, minimise, polish
from nalayer.buffers import FRESH, Buffers
from nalayer.models import SModel
from nalayer.noise_layer import log_with_zeros, noise_matrix

# Of complete information: directions with less are those that a softmax does not have (adding a
# constant to a row of B), and entries of theta that have all but vanished.
NO_INFORMATION = 1e-10
C_MODEL_STEPS = 40


@dataclass(frozen=True)
class Information:
    """Complete and missing information about the noise layer: (p, p) each, sums over samples."""

    complete: np.ndarray
    missing: np.ndarray

    @property
    def observed(self) -> np.ndarray:
        """Louis' identity."""
        return self.complete - self.missing

    @property
    def rates(self) -> np.ndarray:
        """The eigenvalues of I_c^-1 I_mis, ascending, where there is information at all."""
        return self._rates_and_directions()[0]

    @property
    def slowest(self) -> np.ndarray:
        """The direction of the largest rate, of length one: (p,)."""
        direction = self._rates_and_directions()[1][:, -1]
        return direction / np.linalg.norm(direction)

    def _rates_and_directions(self) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = np.linalg.eigh(self.complete)
        kept = values > NO_INFORMATION * values[-1]
        scaled = vectors[:, kept] / np.sqrt(values[kept])
        rates, directions = scipy.linalg.eigh(scaled.T @ self.missing @ scaled)
        return rates, scaled @ directions


def information(point: Point) -> Information:
    """Return what the labels, seen and hidden, say of the noise layer (K, l, and d not large)."""
    literal = Literal.at(point)
    n, k = literal.c.shape
    features = np.ones((n, 1))
    if literal.hidden:
        features = np.concatenate([literal.hidden[0], features], axis=1)
    n_kept, f = literal.support.shape[1], features.shape[1]
    theta = np.broadcast_to(literal.theta, (n, k, k))[:, literal.rows, literal.support]
    seen = literal.is_z[:, 0][:, literal.support]  # (n, K, l): is this link's label the one seen?
    size = k * n_kept * f
    complete, missing = np.zeros((k, n_kept * f, k, n_kept * f)), np.zeros((size, size))
    scores_t = np.zeros((n, k, n_kept * f))
    for i in range(k):
        c_t, theta_tj = literal.c[:, i], theta[:, i]
        spread = -np.einsum("tj,tm->tjm", theta_tj, theta_tj)
        spread[:, np.arange(n_kept), np.arange(n_kept)] += theta_tj
        block = np.einsum("t,tjm,td,te->jdme", c_t, spread, features, features, optimize=True)
        complete[i, :, i] = block.reshape(n_kept * f, n_kept * f)
        s_ti = ((seen[:, i] - theta_tj)[:, :, None] * features[:, None]).reshape(n, -1)
        place = slice(i * n_kept * f, (i + 1) * n_kept * f)
        missing[place, place] = (c_t[:, None] * s_ti).T @ s_ti
        scores_t[:, i] = c_t[:, None] * s_ti
    flat = scores_t.reshape(n, size)
    missing -= flat.T @ flat
    # From (i, j, feature) to the model's order: all of U, then all of B
    order = np.arange(size).reshape(k, n_kept, f)
    packed = np.concatenate([order[:, :, :-1].ravel(), order[:, :, -1].ravel()])
    both = complete.reshape(size, size)[np.ix_(packed, packed)], missing[np.ix_(packed, packed)]
    return Information(*both)


def slowest_rate(limit: Point, zero: float = 1e-6) -> float:
    """Return by which factor each of EM's steps on theta shrinks the certificate in the end.

    The largest of what the missing information says (V12) and of g_ij / n_i, g = dL/dtheta, at
    which an entry of theta on its way to zero shrinks. Both move the certificate in proportion.
    Entries below ``zero`` are taken for those.

    Parameters
    ----------
    limit : Point
        Of an s-model, where EM on theta has converged.
    """
    literal = Literal.at(limit)
    shrink = literal.d_theta / literal.c.sum(axis=0)[:, None]
    vanishing = np.where(literal.theta[0] <= zero, shrink, 0)
    on_links = np.take_along_axis(vanishing, literal.support, axis=1)
    return float(max(information(limit).rates[-1], on_links.max()))


@dataclass(frozen=True)
class ChannelAlone:
    """The joint loss as a function of the channel, for an optimiser; the network is fixed."""

    point: Point

    def loss_and_gradient(
        self,
        parameters: np.ndarray,
        x: np.ndarray,
        targets: np.ndarray,
        rng: np.random.Generator | None = None,
        buffers: Buffers = FRESH,
    ) -> tuple[float, np.ndarray]:
        """Return the mean loss and its gradient."""
        outputs, model = self.point.outputs(), self.point.model
        channel = model.unpack_channel(parameters)
        nll, *gradients = self.point.joint_of(model, outputs, channel, targets)
        return float(nll), np.concatenate([d.ravel() for d in gradients[len(outputs) :]])


def channel_limit(point: Point) -> Point:
    """Return a limit of EM on the channel, the network fixed: where the joint gradient is zero.

    For s-models the best noise matrix (SQUAREM, certified); for c-models a local optimum of the
    joint likelihood (L-BFGS), which EM's steps then keep.
    """
    if point.channel_weights is None:
        return climb_theta(point, accelerate=True, tolerance=1e-13).point
    start = np.concatenate([values.ravel() for values in point.channel])
    channel, _ = minimise(ChannelAlone(point), start, point.x, point.noisy_labels, 1e-10)
    return point.with_parameters(np.concatenate([point.weights, channel]))


def observed_rate(
    limit: Point,
    rng: np.random.Generator,
    shift: float = 1e-2,
    n_steps: int = 1000,
    along: np.ndarray | None = None,
) -> float:
    """Move a limit of EM a little and return by which factor EM's steps back shrink in the end.

    Measured in probability mass, (n_i / n) |theta+ - theta|, which is what the likelihood sees. The
    move is random; ``along`` a direction (p,), where one is given, and a tenth of it random.
    """
    at = frozen_network(limit)
    size = shift if along is None else shift / 10
    moved = [b + size * rng.normal(size=b.shape) for b in at.channel]
    if along is not None:
        towards = at.model.unpack_channel(shift * np.sqrt(along.size) * along)
        moved = [b + part for b, part in zip(moved, towards, strict=True)]
    at = at.with_parameters(at.model.pack(at.weights, *moved))
    smallest = 1e-9  # far above rounding, far below the shift
    sizes: list[float] = []
    theta = Literal.at(at).theta
    weights = Literal.at(at).c.mean(axis=0)[:, None]
    for _ in range(n_steps):
        at = _exact_m_step(at)
        before, theta = theta, Literal.at(at).theta
        sizes.append(float(np.linalg.norm(weights * (theta - before))))
        if sizes[-1] < smallest:
            break
    ratios = np.array(sizes[1:]) / np.array(sizes[:-1])
    return float(np.median(ratios[-5:]))


def _exact_m_step(point: Point) -> Point:
    """Return the noise layer's M-step to rounding, also where L-BFGS has to find it."""
    after = point.m_step()
    if isinstance(point.model, SModel):
        return after
    channel = point.compute(
        polish,
        NoiseRegressions(point.model),
        np.concatenate([values.ravel() for values in after.channel]),
        point.outputs()[1],
        point.completed(),
    )
    return after.with_parameters(np.concatenate([point.weights, channel]))


def rate_of_convergence(
    limit: Point, rng: np.random.Generator, allowed: float = 0.05
) -> list[Statement]:
    """V12: EM's rate is the fraction of missing information, and Louis' identity.

    That is the rate of all that holds probability. An entry of theta on its way to zero shrinks by
    g_ij / n_i, g = dL/dtheta, which may be slower; by then it holds none that the likelihood sees.

    The numerical Hessian is a fourth-order difference of the project's gradient, which reaches
    about 1e-11 of its size; 1e-7 is allowed. The observed rate comes from a finite number of steps,
    in which slower directions have not quite outlived the others: ``allowed``, relative. A
    c-model's M-steps are dear: it is moved where it is predicted to be slowest, and fewer will do.

    Parameters
    ----------
    limit : Point
        Where EM on the channel, with this network, has converged.
    """
    info = information(limit)
    hessian = _hessian(limit)
    predicted = float(info.rates[-1])
    if limit.channel_weights is None:
        observed = observed_rate(limit, rng)
    else:
        observed = observed_rate(limit, rng, n_steps=C_MODEL_STEPS, along=info.slowest)
    return about(
        limit,
        Statement(
            "V12",
            "Louis: complete - missing information = numerical Hessian of -L",
            float(np.abs(info.observed - hessian).max() / np.abs(info.complete).max()),
            1e-7,
        ),
        Statement(
            "V12",
            "EM on the noise layer converges at the rate of the missing information",
            abs(observed - predicted) / predicted,
            allowed,
            detail=f"predicted {predicted:.4f}, observed {observed:.4f}",
        ),
    )


def _hessian(point: Point) -> np.ndarray:
    """Return the Hessian of -L in the channel, by differences of the joint gradient."""
    model, outputs, z = point.model, point.outputs(), point.noisy_labels
    start = np.concatenate([values.ravel() for values in point.channel])
    finite = np.isfinite(start)
    step = 1e-3

    def gradient(at: np.ndarray) -> np.ndarray:
        _, *gradients = point.joint_of(model, outputs, model.unpack_channel(at), z)
        return np.concatenate([d.ravel() for d in gradients[len(outputs) :]])

    columns = []
    for p in range(start.size):
        unit = np.zeros_like(start)
        unit[p] = step if finite[p] else 0.0
        near, far = (
            gradient(start + times * unit) - gradient(start - times * unit) for times in (1, 2)
        )
        columns.append((8 * near - far) / (12 * step))
    return point.n * np.array(columns)


# --- acceleration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ascent:
    """Where EM on theta got to, and at what price."""

    point: Point
    n_maps: int
    """EM steps, each an E-step and Eq. 4 over all samples"""
    certificate: float
    """V11's bound on what is left to gain, nats per sample"""


def climb_theta(
    start: Point, accelerate: bool, tolerance: float = 1e-8, max_maps: int = 20_000
) -> Ascent:
    """Climb L in theta alone until V11 certifies it to ``tolerance`` nats per sample. s-models.

    Plain EM, or SQUAREM: see :func:`theta_steps`.
    """
    for at, n_maps, _ in theta_steps(start, accelerate):
        left = certificate(at)
        if left <= tolerance or n_maps >= max_maps:
            break
    return Ascent(replace(start, channel_logits=at.channel_logits), n_maps, left)


def theta_steps(start: Point, accelerate: bool) -> Iterator[tuple[Point, int, int]]:
    r"""Yield where EM on theta stands after every step, with its maps and E-steps so far, for ever.

    The start comes first; points have the network frozen. Plain EM's step is one map. SQUAREM's
    (Varadhan & Roland 2008, scheme S3) is at most three, and two E-steps for the second safeguard:
    from two EM steps, with r = theta_1 - theta_0 and v = (theta_2 - theta_1) - r, it goes to

    .. math:: \theta_0 - 2 a r + a^2 v, \qquad a = -\|r\| / \|v\|,

    and takes an EM step from there. Rows keep their sum. Two safeguards: a is pulled towards -1
    (which is plain EM) until no entry is negative; and if L has fallen below that of theta_2, then
    theta_2 it is.
    """
    at, n_maps, n_e_steps = frozen_network(start), 0, 0

    def likelihood(point: Point) -> float:
        return float(point.e_step().log_likelihood_t.sum())

    while True:
        yield at, n_maps, n_e_steps
        one = at.m_step()
        if not accelerate:
            at, n_maps, n_e_steps = one, n_maps + 1, n_e_steps + 1
            continue
        two = one.m_step()
        n_maps, n_e_steps = n_maps + 2, n_e_steps + 2
        theta_0, theta_1, theta_2 = (noise_matrix(p.channel_logits) for p in (at, one, two))
        r, v = theta_1 - theta_0, theta_2 - 2 * theta_1 + theta_0
        at, jump = two, _jump(theta_0, r, v)
        if jump is not None:
            stabilised = replace(two, channel_logits=log_with_zeros(jump)).m_step()
            n_maps, n_e_steps = n_maps + 1, n_e_steps + 3
            if likelihood(stabilised) >= likelihood(two):
                at = stabilised


def _jump(theta_0: np.ndarray, r: np.ndarray, v: np.ndarray) -> np.ndarray | None:
    """Return SQUAREM's extrapolation on the simplex, None if it is no longer than EM's steps."""
    size = np.linalg.norm(v)
    a = -np.linalg.norm(r) / size if size else -1.0
    while a < -1:
        theta = theta_0 - 2 * a * r + a * a * v
        # A zero of theta would stay for ever; only EM itself may put one there.
        if theta[theta_0 > 0].min() > 0:
            return theta / theta.sum(axis=1, keepdims=True)
        a = (a - 1) / 2 if a < -1.01 else -1.0
    return None
