"""Gradients against an automatic differentiation that shares no code with the project.

HIPS autograd goes through the paper's formulas as they are printed, network included, written once
more here.
"""

from itertools import pairwise

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad

from em_baseline.statements import Point
from nalayer import PlainModel, SoftTargetModel
from nalayer.losses import EntropyModel, FixedChannelModel, ReedModel, UnbiasedModel
from tests.cases import MODEL_NAMES, asymmetric_noise_matrix, point, point_of, soft_targets

SIZES = (5, 7, 6, 4)
K = SIZES[-1]
P = point()
THETA = asymmetric_noise_matrix(K, np.random.default_rng(3))
TARGETS = soft_targets(P.n, K)
MISSING = np.where(np.arange(P.n) % 3 == 0, -1, P.noisy_labels)
ONE_HOT = np.eye(K)[P.noisy_labels]


def log_softmax(scores):
    return scores - anp.log(anp.exp(scores).sum(axis=-1, keepdims=True))


def network(flat, x):
    """Return log q and the last hidden layer: weights then bias, layer by layer."""
    start, h = 0, x
    for n_in, n_out in pairwise(SIZES):
        weight = anp.reshape(flat[start : start + n_in * n_out], (n_in, n_out))
        start += n_in * n_out
        below, h = h, anp.dot(h, weight) + flat[start : start + n_out]
        start += n_out
        if n_out != K:
            h = anp.maximum(h, 0)
    return log_softmax(h), below, flat[start:]


def noise_layer_loss(flat, p: Point):
    """Eqs. 2, 8-12, over the links that there are."""
    log_q, h, channel = network(flat, p.x)
    support = np.tile(np.arange(K), (K, 1)) if p.links is None else p.links.support
    n_kept = support.shape[1]
    scores = anp.reshape(channel[-K * n_kept :], (1, K, n_kept))
    if p.channel_weights is not None:
        u = anp.reshape(channel[: -K * n_kept], (K, n_kept, -1))
        scores = scores + anp.einsum("isd,td->tis", u, h)
    theta = anp.exp(log_softmax(scores))
    leads_to_z = support[None] == p.noisy_labels[:, None, None]
    of_label = (theta * leads_to_z).sum(axis=2)
    return -anp.log((anp.exp(log_q) * of_label).sum(axis=1)).sum() / p.n


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_noise_layer_s_gradient(name, seed):
    p = point_of(name, seed)
    _, gradient = p.model.loss_and_gradient(p.parameters, p.x, p.noisy_labels)
    expected = grad(noise_layer_loss)(p.parameters, p)
    assert np.abs(gradient - expected).max() <= 1e-13 * np.abs(expected).max()


def plain(log_q):
    return -(ONE_HOT * log_q).sum() / P.n


def reed_soft(log_q):
    own = (anp.exp(log_q) * log_q).sum(axis=1)
    return -(0.95 * (ONE_HOT * log_q).sum(axis=1) + 0.05 * own).sum() / P.n


def reed_hard(log_q):
    own = anp.max(log_q, axis=1)
    return -(0.8 * (ONE_HOT * log_q).sum(axis=1) + 0.2 * own).sum() / P.n


def entropy(log_q):
    labelled = (np.eye(K)[MISSING] * log_q).sum(axis=1)
    own = 0.1 * (anp.exp(log_q) * log_q).sum(axis=1)
    return -anp.where(MISSING == -1, own, labelled).sum() / P.n


def given_theta(log_q):
    return -anp.log((anp.exp(log_q) * THETA[:, P.noisy_labels].T).sum(axis=1)).sum() / P.n


def unbiased(log_q):
    return -(np.linalg.inv(THETA)[P.noisy_labels] * log_q).sum() / P.n


LOSSES = {
    "cross-entropy": (PlainModel(P.network), P.noisy_labels, plain),
    "soft targets": (
        SoftTargetModel(P.network),
        TARGETS,
        lambda log_q: -(TARGETS * log_q).sum() / P.n,
    ),
    "Reed soft": (ReedModel(P.network, kind="soft"), P.noisy_labels, reed_soft),
    "Reed hard": (ReedModel(P.network), P.noisy_labels, reed_hard),
    "Grandvalet & Bengio": (EntropyModel(P.network), MISSING, entropy),
    "Mnih & Hinton": (FixedChannelModel(P.network, theta=THETA), P.noisy_labels, given_theta),
    "Natarajan": (UnbiasedModel(P.network, theta=THETA), P.noisy_labels, unbiased),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_other_loss_s_gradient(name):
    model, targets, loss = LOSSES[name]
    _, gradient = model.loss_and_gradient(P.weights, P.x, targets)
    expected = grad(lambda flat: loss(network(flat, P.x)[0]))(P.weights)
    assert np.abs(gradient - expected).max() <= 1e-13 * np.abs(expected).max()
