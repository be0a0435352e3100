"""Where the end points of joint training and EM agree, and where they do not (V13).

From one start the two need not reach one optimum: the likelihood has many. So equal ends are
measured and not taken for granted. Ends are compared after the best relabelling of the classes, for
the likelihood cannot tell relabelled solutions apart (V7).
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
NEARLY_ZERO = 1e-6  # of theta: where an optimiser of the softmax leaves an entry that goes to zero


@dataclass(frozen=True)
class EndPoints:
    """How far apart two ends are."""

    likelihood_gap: float
    """L of EM minus L of joint training, nats per sample"""
    theta_gap: float
    """largest mean over samples of c_ti |theta_t,ij - theta'_t,ij|, after relabelling"""
    same_predictions: float
    """share of samples that both give the same class, after relabelling"""

    @property
    def agree(self) -> bool:
        """Whether they are one optimum."""
        return abs(self.likelihood_gap) <= SAME_LIKELIHOOD and self.theta_gap <= SAME_THETA


def compare(em: Point, joint: Point) -> EndPoints:
    r"""Compare two points of one model on the same data.

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
    return EndPoints(
        float(np.log(a.m).mean() - np.log(b.m).mean()),
        float(gap_ij.max()),
        float((a.q.argmax(axis=1) == label_of[b.q.argmax(axis=1)]).mean()),
    )


def end_points(limits: Limits) -> list[Statement]:
    """V13: ends with one likelihood are one optimum. Where they differ the detail says why.

    An end whose certificate (V11) is large, or that has dead entries (V10), has a theta that is not
    the best for its network: an entry fell to zero, from where neither a softmax's gradient nor EM
    brings it back. Two ends with small certificates are two optima.

    The row has nothing to ask where the likelihoods differ: its residual is zero then.
    """
    found = compare(limits.em, limits.joint)
    same = abs(found.likelihood_gap) <= SAME_LIKELIHOOD
    return about(
        limits.em,
        Statement(
            "V13",
            "ends of EM and joint training with equal L have equal theta, relabelled",
            found.theta_gap if same else 0.0,
            SAME_THETA,
            "probability",
            f"{'the same' if found.agree else 'different'} ends: L of EM minus joint "
            f"{found.likelihood_gap:+.1e} nats per sample, theta apart by {found.theta_gap:.1e} "
            f"of the mass, {found.same_predictions:.0%} of the predictions equal; "
            f"EM: {_why(limits.em)}; joint: {_why(limits.joint)}",
        ),
    )


def _why(point: Point) -> str:
    """Return what V10 and V11 say of an end."""
    if point.channel_weights is not None:
        return "no certificate"
    return f"certificate {certificate(point):.1e}, {dead_entries(point, NEARLY_ZERO)} dead entries"
