"""What the kernels return: one named tuple for each kind of result."""

from __future__ import annotations

from typing import Any, NamedTuple


class SoftmaxNLL(NamedTuple):
    """Mean negative log-likelihood of a softmax and its gradient."""

    nll: Any
    """scalar, nats, mean over samples"""
    d_logits: Any
    """(n, K), gradient of ``nll``"""


class SModelNLL(NamedTuple):
    """Mean negative log-likelihood of the s-model and its gradients."""

    nll: Any
    """scalar, nats, mean over samples"""
    d_logits: Any
    """(n, K), gradient of ``nll``"""
    d_channel_logits: Any
    """(K, K), gradient of ``nll``"""


class Posterior(NamedTuple):
    """The E-step: each sample's log-likelihood and the posterior of its true label."""

    log_likelihood_t: Any
    """(n,), nats: log p(z_t | x_t)"""
    posterior: Any
    """(n, K): c_ti = p(y_t = i | x_t, z_t), rows sum to one"""
