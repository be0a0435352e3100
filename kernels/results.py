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
    """Mean negative log-likelihood of the s-model, dense or sparse, and its gradients."""

    nll: Any
    """scalar, nats, mean over samples"""
    d_logits: Any
    """(n, K), gradient of ``nll``"""
    d_channel_logits: Any
    """(K, K), or (K, l) for the sparse model, gradient of ``nll``"""


class CModelNLL(NamedTuple):
    """Mean negative log-likelihood of the c-model and its gradients."""

    nll: Any
    """scalar, nats, mean over samples"""
    d_logits: Any
    """(n, K), gradient of ``nll``"""
    d_hidden: Any
    """(n, d), the part of the gradient that reaches h(x_t) through the noise layer"""
    d_channel_weights: Any
    """(K, K, d), or (K, l, d) for the sparse model, gradient of ``nll``"""
    d_channel_logits: Any
    """(K, K), or (K, l) for the sparse model, gradient of ``nll``"""


class SkippingCModelNLL(NamedTuple):
    """A :class:`CModelNLL` whose gradients leave some rows out, and how much that can be."""

    nll: Any
    """scalar, nats, mean over samples; exact"""
    d_logits: Any
    """(n, K); exact"""
    d_hidden: Any
    """(n, d)"""
    d_channel_weights: Any
    """(K, K, d)"""
    d_channel_logits: Any
    """(K, K)"""
    missing_i: Any
    """(K,) float64: what is missing of the gradients of row i's scores has at most this L1 norm"""


class Posterior(NamedTuple):
    """The E-step: each sample's log-likelihood and the posterior of its true label."""

    log_likelihood_t: Any
    """(n,), nats: log p(z_t | x_t)"""
    posterior: Any
    """(n, K): c_ti = p(y_t = i | x_t, z_t), rows sum to one"""
