"""The other methods that the paper names, as models: a loss of the flat vector and its gradient.

Each is the objective of its own paper in a form for many classes, and can be trained and checked
like the models of :mod:`nalayer.models`; how it is optimised may differ, and is said. t sample, i
true class, j observed class; q_ti are the network's probabilities and a_ti its logits, c_ti the
posterior of Eq. 3. All losses are means over samples, in nats, and all gradients are of that mean.

These losses cost little beside the network under them and are plain array operations, which CuPy
takes over for its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from scipy.special import logit

import kernels
from kernels import LinkIndex, checks, counts_by_label, log_softmax
from nalayer.devices import to_host
from nalayer.models import (
    NO_PENALTY,
    NoiseModel,
    PlainModel,
    SModel,
    check_features,
    unread,
)
from nalayer.network import Network

REED_LABEL_WEIGHTS = {"soft": 0.95, "hard": 0.8}
"""Reed et al.'s beta, by kind"""
LEAST_PROBABILITY = 1e-6
"""of an entry of a linear channel after its projection"""
MISSING = -1
"""the label of a sample that has none"""


def _mean(score_t: np.ndarray) -> np.floating:
    return score_t.mean(dtype=np.float64)


def _certainty(log_q_ti: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Return the negative entropy :math:`e_t = \sum_i q_{ti} \log q_{ti}` and its derivative.

    .. math:: \partial e_t / \partial a_{ti} = q_{ti} (\log q_{ti} - e_t)
    """
    q_ti = np.exp(log_q_ti)
    e_t = (q_ti * log_q_ti).sum(axis=1)
    return e_t, q_ti * (log_q_ti - e_t[:, None])


@dataclass(frozen=True)
class ReedModel(PlainModel):
    r"""Bootstrapping (Reed et al. 2014): the target is part label, part the network's own opinion.

    .. math::
        \text{soft: } & \beta \log q_{t,z_t} + (1-\beta) \sum_i q_{ti} \log q_{ti} \\
        \text{hard: } & \beta \log q_{t,z_t} + (1-\beta) \log \max_i q_{ti}

    are maximised. The gradient of the loss for a_ti is, with 1_i the indicator of the arg max,

    .. math::
        \text{soft: } & \beta (q_{ti} - 1\{i=z_t\})
                        - (1-\beta)\, q_{ti} (\log q_{ti} - \textstyle\sum_j q_{tj}\log q_{tj}) \\
        \text{hard: } & q_{ti} - \beta 1\{i=z_t\} - (1-\beta) 1\{i=\arg\max_j q_{tj}\}

    Parameters
    ----------
    network, backend
        As for :class:`~nalayer.PlainModel`.
    kind : {"hard", "soft"}
    label_weight : float, optional
        beta in [0, 1]; Reed's .95 for soft and .8 for hard when None.
    """

    kind: str = "hard"
    label_weight: float | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown kind and weights outside [0, 1]."""
        if self.kind not in REED_LABEL_WEIGHTS:
            raise ValueError(f"kind must be 'hard' or 'soft'; found {self.kind!r}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"label_weight must lie in [0, 1]; found {self.label_weight}")

    @property
    def beta(self) -> float:
        """The weight of the label."""
        return REED_LABEL_WEIGHTS[self.kind] if self.label_weight is None else self.label_weight

    def _nll(self, logits: np.ndarray, targets: np.ndarray) -> kernels.SoftmaxNLL:
        log_q_ti = log_softmax(logits, check_values=False)
        rows, beta = np.arange(len(logits), like=logits), self.beta
        if self.kind == "hard":
            guess_t = log_q_ti.argmax(axis=1)
            own_t, d_logits = log_q_ti[rows, guess_t], np.exp(log_q_ti)
            d_logits[rows, guess_t] -= 1 - beta
        else:
            own_t, d_own = _certainty(log_q_ti)
            d_logits = beta * np.exp(log_q_ti) - (1 - beta) * d_own
        d_logits[rows, targets] -= beta
        d_logits /= len(logits)
        return kernels.SoftmaxNLL(
            -_mean(beta * log_q_ti[rows, targets] + (1 - beta) * own_t), d_logits
        )


@dataclass(frozen=True)
class MixedModel(SModel):
    r"""The s-model with a share of the plain loss mixed in, as an option of the authors' code has.

    Maximises :math:`(1-\beta) \log m_t + \beta \log q_{t,z_t}`; both gradients are those of their
    kernels.

    Parameters
    ----------
    network, pseudo_count, n_samples, backend, links
        As for :class:`~nalayer.SModel`.
    plain_weight : float
        beta in [0, 1]. 0 is the s-model.
    """

    plain_weight: float = 0.1

    def __post_init__(self) -> None:
        """Refuse weights outside [0, 1]."""
        super().__post_init__()
        if not 0 <= self.plain_weight <= 1:
            raise ValueError(f"plain_weight must lie in [0, 1]; found {self.plain_weight}")

    def joint(
        self,
        outputs: Sequence[np.ndarray],
        channel: Sequence[np.ndarray],
        noisy_labels: np.ndarray,
        check_values: bool = False,
    ) -> kernels.SModelNLL:
        """Return the mixed loss and its gradients."""
        beta = float(self.plain_weight)
        alone = super().joint(outputs, channel, noisy_labels, check_values)
        plain = kernels.softmax_nll(
            outputs[0], noisy_labels, backend=self.backend, check_values=check_values
        )
        return kernels.SModelNLL(
            (1 - beta) * alone.nll + beta * plain.nll,
            (1 - beta) * alone.d_logits + beta * plain.d_logits,
            (1 - beta) * alone.d_channel_logits,
        )


@dataclass(frozen=True, eq=False)
class DirichletPriorModel(SModel):
    r"""The s-model with a Dirichlet prior on theta's rows whose mode is a given noise matrix.

    Pseudo-counts in proportion to that matrix, :math:`\alpha_{ij} = \alpha \pi_{ij}`, add
    :math:`\sum_{ij} \alpha_{ij} \log\theta_{ij}` to the likelihood: each true class has alpha
    samples more, whose labels follow :math:`\pi_i`. The gradient of that is
    :math:`\alpha (\pi_{ij} - \theta_{ij})`, and EM's step is
    :math:`(N_{ij} + \alpha \pi_{ij}) / (n_i + \alpha)`.

    Parameters
    ----------
    network, pseudo_count, n_samples, backend, links
        As for :class:`~nalayer.SModel`, but ``pseudo_count`` is alpha here, for a whole row.
    prior_mode : (K, l)
        pi, row-stochastic. Where it is zero there are no pseudo-counts, and theta may be zero too.
    """

    prior_mode: np.ndarray = field(kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what is no noise matrix."""
        super().__post_init__()
        shape = (self.network.n_classes, self.n_kept)
        checks.check_floats("prior_mode", self.prior_mode, shape)
        checks.check_probability_rows("prior_mode", self.prior_mode)

    @property
    def pseudo_counts(self) -> np.ndarray:
        """What EM's M-step adds to the counts N_ij."""
        return self.pseudo_count * self.prior_mode

    def penalty(self, channel_logits: np.ndarray) -> tuple[float, np.ndarray | float]:
        """Return -(alpha/n) sum_ij pi_ij log theta_ij and its gradient."""
        if not self.pseudo_count or not self.n_samples:
            return NO_PENALTY
        share = self.pseudo_count / self.n_samples
        log_theta_ij = log_softmax(channel_logits, check_values=False)
        # 0 log 0 = 0
        log_where_pi_ij = np.where(self.prior_mode > 0, log_theta_ij, 0)
        total = unread((self.prior_mode * log_where_pi_ij).sum())
        return -share * total, -share * (self.prior_mode - np.exp(log_theta_ij))


@dataclass(frozen=True)
class EntropyModel(PlainModel):
    r"""Entropy regularisation (Grandvalet & Bengio 2005): some labels are missing, z_t = -1.

    A labelled sample contributes :math:`\log q_{t,z_t}`, one without a label
    :math:`\lambda \sum_i q_{ti} \log q_{ti}`: it pushes the network to be sure of something. The
    gradient of the loss is :math:`q_{ti} - 1\{i=z_t\}` for the former,
    :math:`-\lambda q_{ti} (\log q_{ti} - \sum_j q_{tj} \log q_{tj})` for the latter.

    Parameters
    ----------
    network, backend
        As for :class:`~nalayer.PlainModel`.
    certainty_weight : float
        lambda >= 0. 1 is all of the entropy.
    """

    certainty_weight: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a negative weight."""
        if not 0 <= self.certainty_weight < np.inf:
            raise ValueError(
                f"certainty_weight must be finite and at least 0; found {self.certainty_weight}"
            )

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit; labels of -1 do."""
        check_features(self.network, parameters, x, self.n_parameters)
        checks.check_array("labels", targets, (x.shape[0],))
        known = targets != MISSING
        checks.check_labels("labels", targets[known], "n", self.network.n_classes)

    def _nll(self, logits: np.ndarray, targets: np.ndarray) -> kernels.SoftmaxNLL:
        log_q_ti = log_softmax(logits, check_values=False)
        # Both terms for every sample, of which one counts: no look at how many labels are missing
        known, rows = targets != MISSING, np.arange(len(logits), like=logits)
        z_t = np.where(known, targets, 0)
        d_known = np.exp(log_q_ti)
        d_known[rows, z_t] -= 1
        e_t, d_e = _certainty(log_q_ti)
        score_t = np.where(known, log_q_ti[rows, z_t], self.certainty_weight * e_t)
        d_logits = np.where(known[:, None], d_known, -self.certainty_weight * d_e)
        d_logits /= len(logits)
        return kernels.SoftmaxNLL(-_mean(score_t), d_logits)


@dataclass(frozen=True, eq=False)
class GivenNoiseModel(PlainModel):
    """What has a noise matrix that is given and stays as it is.

    Parameters
    ----------
    network : Network
    backend : {"numpy", "numba"}, optional
    theta : (K, K)
        Row-stochastic; rows are the true class.

    Raises
    ------
    TypeError, ValueError
        For what is no such matrix.
    """

    theta: np.ndarray = field(kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what is no noise matrix for the network."""
        checks.check_noise_matrix("theta", self.theta)
        checks.check_array("theta", self.theta, (self.network.n_classes, self.network.n_classes))


@dataclass(frozen=True, eq=False)
class UnbiasedModel(GivenNoiseModel):
    r"""The unbiased loss of Natarajan et al. (2013) for a known noise matrix, with many classes.

    The loss of label z is :math:`\sum_j (\theta^{-1})_{zj} (-\log q_{tj})`. Its mean over the noisy
    labels of a sample of true class i is :math:`-\log q_{ti}`, the loss of the clean label, because
    :math:`\theta \theta^{-1} = I`. The gradient is :math:`q_{ti} - (\theta^{-1})_{z_t,i}`. Entries
    of the inverse are negative, so the loss has no lower bound: nothing keeps a network that can
    learn the training labels by heart from running away.

    Raises
    ------
    TypeError, ValueError
        For a matrix that is not row-stochastic or has no inverse.
    """

    def __post_init__(self) -> None:
        """Refuse a matrix that has no inverse."""
        super().__post_init__()
        smallest = float(np.linalg.svd(to_host(self.theta), compute_uv=False)[-1])
        if smallest < np.sqrt(np.finfo(np.float64).eps):
            raise ValueError(
                f"theta must be invertible; found one with a singular value of {smallest:.2g}"
            )

    @cached_property
    def _inverse(self) -> np.ndarray:
        inverse = np.linalg.inv(to_host(self.theta).astype(np.float64))
        return np.asarray(inverse, like=self.theta)

    def _nll(self, logits: np.ndarray, targets: np.ndarray) -> kernels.SoftmaxNLL:
        # Not kernels.soft_target_nll: that takes what is not positive for zero.
        weights_ti = self._inverse[targets].astype(logits.dtype)
        log_q_ti = log_softmax(logits, check_values=False)
        score_t = (weights_ti * log_q_ti).sum(axis=1)
        return kernels.SoftmaxNLL(-_mean(score_t), (np.exp(log_q_ti) - weights_ti) / len(logits))


@dataclass(frozen=True, eq=False)
class FixedChannelModel(GivenNoiseModel):
    r"""A noise matrix that is given and stays as it is (Mnih & Hinton 2012, for many classes).

    Maximises :math:`\log \sum_i q_{ti} \theta_{i,z_t}` in the network's weights alone. The gradient
    for the logits is c - q with the posterior c taken anew for every mini-batch, which is what Mnih
    & Hinton call EM. With the true noise matrix it is the comparison's oracle.
    """

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, and labels that no class can be seen as."""
        super().check(parameters, x, targets)
        checks.check_labels_reachable("labels", targets, "log(theta)", self._channel_logits)

    @cached_property
    def _channel_logits(self) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(self.theta.astype(np.float64))

    def _nll(self, logits: np.ndarray, targets: np.ndarray) -> kernels.SoftmaxNLL:
        channel_logits = self._channel_logits.astype(logits.dtype)
        nll, d_logits, _ = kernels.s_model_nll(
            logits, channel_logits, targets, backend=self.backend, check_values=False
        )
        return kernels.SoftmaxNLL(nll, d_logits)


class ChannelNLL(NamedTuple):
    """Loss of a noise layer with parameters of its own, and its gradients."""

    nll: np.floating
    d_logits: np.ndarray
    d_channel: np.ndarray


@dataclass(frozen=True)
class OneParameterModel(NoiseModel):
    r"""Larsen et al. (1998): one noise parameter, every wrong label equally likely.

    .. math:: \theta = (1-\varepsilon) I + \frac{\varepsilon}{K-1} (1 - I), \qquad
              \varepsilon = \frac{1}{1 + e^{-s}}

    trained jointly in the weights and s (Larsen et al. fit epsilon on held-out samples). With
    B = log theta, and N_ij and n_i as for the s-model, the loss has
    :math:`\partial/\partial B_{ij} = -(N_{ij} - n_i \theta_{ij}) / n`, and
    :math:`\partial B_{ii} / \partial s = -\varepsilon`,
    :math:`\partial B_{ij} / \partial s = 1 - \varepsilon`.

    The flat vector is the network's weights followed by s, see :meth:`start`.
    """

    letter: ClassVar[str] = "larsen"
    network: Network
    backend: str | None = None
    links: LinkIndex | None = None

    @property
    def channel_shapes(self) -> dict[str, tuple[int, ...]]:
        """One number."""
        return {"noise_logit": (1,)}

    def start(self, weights: np.ndarray, noise: float) -> np.ndarray:
        """Return the flat vector with a given epsilon in (0, 1)."""
        if not 0 < noise < 1:
            raise ValueError(f"noise must lie in (0, 1); found {noise}")
        return self.pack(weights, np.array([logit(noise)], weights.dtype))

    def check_parameters(self, parameters: np.ndarray) -> None:
        """Refuse parameters of another shape or dtype, NaN and infinities."""
        checks.check_floats("parameters", parameters, (self.n_parameters,))
        checks.check_finite("parameters", parameters)

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, once per data set."""
        _check(self, parameters, x, targets)

    def channel_logits(self, noise_logit: np.ndarray) -> np.ndarray:
        """Return B = log theta, (K, K), for s."""
        k = self.network.n_classes
        log_wrong = -np.logaddexp(0, -noise_logit) - np.log(k - 1)
        log_right = -np.logaddexp(0, noise_logit)
        log_theta_ij = np.where(_is_diagonal(k, noise_logit), log_right, log_wrong)
        return log_theta_ij.astype(noise_logit.dtype)

    def noise_matrix(self, channel: Sequence[np.ndarray]) -> np.ndarray:
        """Return theta, (K, K)."""
        return np.exp(self.channel_logits(channel[0]))

    def joint(
        self,
        outputs: Sequence[np.ndarray],
        channel: Sequence[np.ndarray],
        noisy_labels: np.ndarray,
        check_values: bool = False,
    ) -> Any:
        """Return the loss and its gradients for the logits and s."""
        nll, d_logits, d_channel_logits = kernels.s_model_nll(
            outputs[0],
            self.channel_logits(channel[0]),
            noisy_labels,
            backend=self.backend,
            check_values=check_values,
        )
        total, right = d_channel_logits.sum(dtype=np.float64), np.trace(d_channel_logits)
        epsilon = np.exp(-np.logaddexp(0, -channel[0]))
        return ChannelNLL(nll, d_logits, (1 - epsilon) * (total - right) - epsilon * right)


@dataclass(frozen=True)
class LinearChannelModel(NoiseModel):
    r"""Sukhbaatar & Fergus (2014): a linear layer where the paper has its second softmax.

    The noise matrix itself is the parameter, started at the identity; after each update its rows
    are projected onto the simplex (:meth:`project`, for :class:`~nalayer.optimisers.Projected`), of
    which entries below 1e-6 are left out: m_t stays positive. At the identity the likelihood is the
    baseline's, so theta is pulled away from it: the loss is

    .. math:: -\frac1n \sum_t \log m_t + \frac{\lambda}{K} \operatorname{tr} \theta, \qquad
              m_t = \sum_i q_{ti} \theta_{i,z_t}

    with gradients q - c for the logits and
    :math:`-\frac1n \sum_t 1\{z_t=j\} q_{ti}/m_t + \frac{\lambda}{K} 1\{i=j\}` for theta_ij.

    How strong the pull has to be: take balanced classes, a share p of whose labels goes to one
    other class, and a baseline that has learned these probabilities. At the identity the gradient
    is then :math:`-(1-\lambda)/K` for theta_ii and :math:`-(1-p)/K` for the theta_ij of the flipped
    labels, so theta stays at the identity unless lambda > p. With lambda = 1 any noise moves it,
    and clean labels (p = 0) do not. That is for labels that go one way round; where two classes
    swap theirs, as with K = 2, the latter gradient is -1/K and any lambda > 0 moves theta.

    A sample that the network is sure is of another class has a tiny m_t and a gradient for theta
    that may replace a whole row at once: let the rule cut it (``SGD(..., clip=1)``).

    Parameters
    ----------
    network : Network
    trace_weight : float
        lambda >= 0.
    backend : {"numpy", "numba"}, optional
        Of the network's layers.
    """

    letter: ClassVar[str] = "linear"
    network: Network
    trace_weight: float = 1.0
    backend: str | None = None
    links: LinkIndex | None = None

    def __post_init__(self) -> None:
        """Refuse a negative weight."""
        if not 0 <= self.trace_weight < np.inf:
            raise ValueError(
                f"trace_weight must be finite and at least 0; found {self.trace_weight}"
            )

    @property
    def channel_shapes(self) -> dict[str, tuple[int, ...]]:
        """The noise matrix."""
        return {"theta": (self.network.n_classes, self.network.n_classes)}

    def start(self, weights: np.ndarray) -> np.ndarray:
        """Return the flat vector with theta = I."""
        return self.pack(weights, np.eye(self.network.n_classes, dtype=weights.dtype))

    def check_parameters(self, parameters: np.ndarray) -> None:
        """Refuse parameters of another shape or dtype, or whose theta is no noise matrix."""
        checks.check_floats("parameters", parameters, (self.n_parameters,))
        checks.check_finite("parameters", parameters)
        checks.check_noise_matrix("theta", self.unpack(parameters)[1])

    def check(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
        """Refuse arguments that do not fit, once per data set."""
        _check(self, parameters, x, targets)

    def noise_matrix(self, channel: Sequence[np.ndarray]) -> np.ndarray:
        """Return theta, (K, K)."""
        return channel[0]

    def project(self, parameters: np.ndarray) -> None:
        """Replace the rows of theta by the nearest points of the simplex, in place."""
        _, theta = self.unpack(parameters)
        k = len(theta)
        nearest = nearest_distributions(theta, check_values=False)
        theta[...] = LEAST_PROBABILITY + (1 - k * LEAST_PROBABILITY) * nearest

    def joint(
        self,
        outputs: Sequence[np.ndarray],
        channel: Sequence[np.ndarray],
        noisy_labels: np.ndarray,
        check_values: bool = False,
    ) -> Any:
        """Return the loss, without the pull, and its gradients for the logits and theta."""
        logits, theta = outputs[0], channel[0]
        log_q_ti = log_softmax(logits, check_values=False)
        with np.errstate(divide="ignore"):
            scores_ti = log_q_ti + np.log(theta).T[noisy_labels]
        top_t = scores_ti.max(axis=1, keepdims=True)
        log_m_t = top_t + np.log(np.exp(scores_ti - top_t).sum(axis=1, keepdims=True))
        d_logits = np.exp(log_q_ti) - np.exp(scores_ti - log_m_t)
        d_theta = counts_by_label(np.exp(log_q_ti - log_m_t), noisy_labels, check_values=False)
        n = len(logits)
        return ChannelNLL(-_mean(log_m_t), d_logits / n, -d_theta.astype(theta.dtype) / n)

    def penalty(self, channel_logits: np.ndarray) -> tuple[float, np.ndarray | float]:
        """Return the pull away from the identity and its gradient; the argument is theta."""
        k = self.network.n_classes
        share = self.trace_weight / k
        return share * np.trace(channel_logits), share * _is_diagonal(k, channel_logits)

    def validation_loss(self, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> float:
        """Return the loss with the pull: the likelihood alone is best where theta starts."""
        return self.loss(parameters, x, targets)


def _is_diagonal(k: int, like: np.ndarray) -> np.ndarray:
    """Return 1{i=j}, (K, K), where the other array is; ``np.eye`` would not go there."""
    i = np.arange(k, like=like)
    return i[:, None] == i


def _check(model: NoiseModel, parameters: np.ndarray, x: np.ndarray, targets: np.ndarray) -> None:
    model.check_parameters(parameters)
    model.network.check_features(x, parameters.dtype)
    checks.check_labels("noisy_labels", targets, x.shape[0], model.network.n_classes)


def nearest_distributions(rows: np.ndarray, check_values: bool = True) -> np.ndarray:
    """Return each row's Euclidean projection onto the simplex: (m, K) -> (m, K).

    It is max(row - shift, 0) with the one shift for which it sums to 1, found by sorting (Duchi et
    al. 2008, Figure 1).

    Examples
    --------
    >>> nearest_distributions(np.array([[0.5, 0.7, -1.0]])).round(12)
    array([[0.4, 0.6, 0. ]])
    """
    checks.check_floats("rows", rows, ("m", "K"))
    if check_values:
        checks.check_finite("rows", rows)
    rows = rows - rows.max(axis=1, keepdims=True)  # the shift takes it back; nothing is lost of 1
    falling = -np.sort(-rows, axis=1)
    # The shift if the 1, 2, ... largest entries were those that stay positive
    shifts = (np.cumsum(falling, axis=1) - 1) / np.arange(1, rows.shape[1] + 1, like=rows)
    n_positive = (falling > shifts).sum(axis=1)
    shift = np.take_along_axis(shifts, n_positive[:, None] - 1, axis=1)
    return np.maximum(rows - shift, 0).astype(rows.dtype)
