"""Where the end points of joint training and EM agree, and where they do not (V13).

From one start the two need not reach one optimum: the likelihood has many. So equal ends are
measured and not taken for granted. Ends are compared after the best relabelling of the classes, for
the likelihood cannot tell relabelled solutions apart (V7).

A Dirichlet pseudo-count alpha > 0 on theta, in the objective of both, does away with the optima at
the boundary: no entry can be zero, so every end, of either method, has the best theta for its
network. It does not do away with the others: the network's weights still have many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from em_baseline.statements import (
    Limits,
    Literal,
    Point,
    Statement,
    about,
    certificate,
    dead_entries,
)

SAME_LIKELIHOOD = 1e-8  # nats per sample
SAME_THETA = 1e-4  # probability mass
BEST_THETA = 1e-5  # certificate of an end with pseudo-counts, nats per sample
NEARLY_ZERO = 1e-6  # of theta: where an optimiser of the softmax leaves an entry that goes to zero


@dataclass(frozen=True)
class EndPoints:
    """How far apart two ends are."""

    likelihood_gap: float
    """L of EM minus L of joint training, nats per sample; pseudo-counts included"""
    theta_gap: float
    """largest mean over samples of c_ti |theta_t,ij - theta'_t,ij|, after relabelling"""
    same_predictions: float
    """share of samples that both give the same class, after relabelling"""

    @property
    def agree(self) -> bool:
        """Whether they are one optimum."""
        return abs(self.likelihood_gap) <= SAME_LIKELIHOOD and self.theta_gap <= SAME_THETA


def compare(em: Point, joint: Point, pseudo_count: float = 0.0) -> EndPoints:
    r"""Compare two points of one model on the same data.

    With a pseudo-count alpha the likelihood is the one climbed,
    :math:`L + \alpha \sum_{ij} \log\theta_{ij}`: L alone is not flat where that is.

    Classes are matched by what the two classifiers say, one to one: the assignment of classes l to
    i with the largest :math:`\sum_t q_{ti} q'_{tl}`.
    """
    a, b = Literal.at(em), Literal.at(joint)
    class_i, like_i = linear_sum_assignment(-(a.q.T @ b.q))
    other_theta = b.theta[:, like_i]
    gap = np.abs(a.theta - other_theta)
    label_of = np.empty_like(like_i)
    label_of[like_i] = class_i
    gap_ij = np.einsum("ti,tij->ij", a.c, np.broadcast_to(gap, (em.n, *gap.shape[1:]))) / em.n
    penalty = em.objective(pseudo_count).penalty
    penalty_gap = penalty(em.channel_logits)[0] - penalty(joint.channel_logits)[0]
    return EndPoints(
        float(np.log(a.m).mean() - np.log(b.m).mean() - penalty_gap),
        float(gap_ij.max()),
        float((a.q.argmax(axis=1) == label_of[b.q.argmax(axis=1)]).mean()),
    )


def end_points(limits: Limits) -> list[Statement]:
    """V13: ends with one likelihood are one optimum. Where they differ the detail says why.

    An end whose certificate (V11) is large, or that has dead entries (V10), has a theta that is not
    the best for its network: an entry fell to zero, from where neither a softmax's gradient nor EM
    brings it back. Two ends with small certificates are two optima. With pseudo-counts every
    certificate has to be small, and a second row says so.

    The first row has nothing to ask where the likelihoods differ: its residual is zero then.

    Bounds: an optimum found to a gradient g is off by g / curvature in theta and by g^2 / (2
    curvature) in L. :func:`~.statements.find_limits` goes to a gradient of 1e-8, and with EM until
    a round moves theta by 1e-7: 1e-4 in theta for curvatures down to 1e-4 and rates of EM up to
    .999, and far less than 1e-8 in L. A certificate adds
    up k entries of a gradient of theta, which is that of B over theta (V4): 1e-5.
    """
    alpha = limits.pseudo_count
    found = compare(limits.em, limits.joint, alpha)
    same = abs(found.likelihood_gap) <= SAME_LIKELIHOOD
    rows = [
        Statement(
            "V13",
            "ends of EM and joint training with equal L have equal theta, relabelled",
            found.theta_gap if same else 0.0,
            SAME_THETA,
            "probability",
            f"{'the same' if found.agree else 'different'} ends: L of EM minus joint "
            f"{found.likelihood_gap:+.1e} nats per sample, theta apart by {found.theta_gap:.1e} "
            f"of the mass, {found.same_predictions:.0%} of the predictions equal; "
            f"EM: {_why(limits.em, alpha)}; joint: {_why(limits.joint, alpha)}",
        )
    ]
    if alpha:
        rows.append(
            Statement(
                "V13",
                "with pseudo-counts both ends have the best theta for their networks",
                max(certificate(end, alpha) for end in (limits.em, limits.joint)),
                BEST_THETA,
                "nats per sample",
            )
        )
    return about(limits.em, *rows)


def _why(point: Point, pseudo_count: float) -> str:
    """Return what V10 and V11 say of an end."""
    if point.channel_weights is not None:
        return "no certificate"
    return (
        f"certificate {certificate(point, pseudo_count):.1e}, "
        f"{dead_entries(point, NEARLY_ZERO)} dead entries"
    )
