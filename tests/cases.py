"""Inputs that kernels and statements are tested on: regimes, sizes, dtypes."""

import os
from dataclasses import replace

import numpy as np

from em_baseline.statements import Point
from kernels import link_index
from nalayer import gather_links, mlp, scatter_links

JIT = os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"

DTYPES = (np.float32, np.float64)
REGIMES = ("usual", "flat", "saturated", "near-deterministic", "minus infinity")
MODELS = ("s_model", "sparse_s_model", "c_model", "sparse_c_model")
SIZES = ((1, 2), (2, 3), (67, 13), (129, 7), (5, 65))


def s_model_inputs(regime: str, n: int, k: int, dtype: type = np.float64, seed: int = 0):
    """Return logits, channel logits and noisy labels; every label is reachable."""
    rng = np.random.default_rng([seed, n, k, REGIMES.index(regime)])
    logits = 2 * rng.normal(size=(n, k))
    channel = rng.normal(size=(k, k)) + 2 * np.eye(k)
    labels = rng.integers(k, size=n)
    if regime == "flat":
        logits, channel = np.zeros((n, k)), np.zeros((k, k))
    elif regime == "saturated":
        logits += np.where(rng.random((n, k)) < 0.5, 200, -200)
    elif regime == "near-deterministic":
        channel = np.where(np.eye(k) > 0, 0.0, np.log(1e-8)) + 0.1 * rng.normal(size=(k, k))
    elif regime == "minus infinity":
        logits[rng.random((n, k)) < 0.3] = -np.inf
        logits[np.arange(n), labels] = rng.normal(size=n)
        channel[(rng.random((k, k)) < 0.3) & ~np.eye(k, dtype=bool)] = -np.inf
    return logits.astype(dtype), channel.astype(dtype), labels


def random_support(k: int, n_kept: int, rng: np.random.Generator) -> np.ndarray:
    """Return (K, l) links in no order, the diagonal among them."""
    others = [rng.permutation(np.delete(np.arange(k), i))[: n_kept - 1] for i in range(k)]
    return np.array([rng.permutation(np.append(row, i)) for i, row in enumerate(others)])


def model_inputs(
    model: str,
    regime: str,
    n: int,
    k: int,
    dtype: type = np.float64,
    n_hidden: int = 6,
    n_kept: int = 3,
    seed: int = 0,
) -> tuple[np.ndarray, ...]:
    """Return the arguments of a model's loss and posterior, in the order of its kernels."""
    logits, channel, labels = s_model_inputs(regime, n, k, dtype, seed)
    rng = np.random.default_rng([seed, n, k, 77])
    hidden = rng.normal(size=(n, n_hidden))
    weights = 0.7 * rng.normal(size=(k, k, n_hidden))
    if regime == "flat":
        weights = np.zeros_like(weights)
    elif regime == "saturated":
        hidden *= 40
    if model.startswith("sparse"):
        support = random_support(k, min(n_kept, k), rng)
        rows = np.arange(k)[:, None]
        channel = np.ascontiguousarray(channel[rows, support])
        # the diagonal is every label's way out, in the regime with -inf as well
        channel[np.isneginf(channel) & (support == rows)] = 0
        weights = np.ascontiguousarray(weights[rows, support])
    wide = (hidden.astype(dtype), weights.astype(dtype)) if model.endswith("c_model") else ()
    sparse = (support,) if model.startswith("sparse") else ()
    return logits, *wide, channel, *sparse, labels


def soft_targets(n: int, k: int, dtype: type = np.float64, seed: int = 0) -> np.ndarray:
    """Return rows that sum to one, some of them with zeros."""
    rng = np.random.default_rng([seed, n, k])
    targets = rng.dirichlet(np.full(k, 0.3), size=n)
    targets[targets < 0.02] = 0
    return (targets / targets.sum(axis=1, keepdims=True)).astype(dtype)


def asymmetric_noise_matrix(k: int, rng: np.random.Generator) -> np.ndarray:
    """Return a noise matrix with no symmetry that could hide a transposed index."""
    return 0.6 * np.eye(k) + 0.4 * rng.dirichlet(np.full(k, 0.5), size=k)


def point(
    seed: int = 0,
    n: int = 60,
    n_in: int = 5,
    hidden_sizes: tuple[int, ...] = (7, 6),
    k: int = 4,
    backend: str | None = "numpy",
) -> Point:
    """Return a small network with random weights and biases (not zero) on random data."""
    rng = np.random.default_rng(seed)
    network = mlp(n_in, hidden_sizes, k)
    weights = network.initial_weights(rng) + 0.3 * rng.normal(size=network.n_weights)
    channel = np.log(asymmetric_noise_matrix(k, rng))
    return Point(
        network, weights, channel, rng.normal(size=(n, n_in)), rng.integers(k, size=n), backend
    )


MODEL_NAMES = ("s", "sparse-s", "c", "sparse-c")


def point_of(model: str, seed: int = 0, n_kept: int = 3, **options) -> Point:
    """Return a point of any of the four models, all with the same network and data."""
    p = point(seed, **options)
    k, rng = p.network.n_classes, np.random.default_rng([seed, 55])
    weights = 0.7 * rng.normal(size=(k, k, p.network.n_hidden))
    if model.endswith("c"):
        p = replace(p, channel_weights=weights)
    return kept(p, random_support(k, min(n_kept, k), rng)) if model.startswith("sparse") else p


def kept(p: Point, support: np.ndarray) -> Point:
    """Return the sparse point that keeps these links of a dense one."""
    links, u = link_index(support), p.channel_weights
    return replace(
        p,
        channel_logits=gather_links(p.channel_logits, links),
        channel_weights=None if u is None else gather_links(u, links),
        links=links,
    )


def zeros_outside(p: Point) -> Point:
    """Return the dense point with the same noise matrices as a sparse one: -inf where no link is.

    The weights of dead links, which no probability depends on, are arbitrary.
    """
    assert p.links is not None
    rows, u = np.arange(len(p.links.support))[:, None], p.channel_weights
    if u is not None:
        dense = np.random.default_rng(1).normal(size=(len(u), len(u), u.shape[2]))
        dense[rows, p.links.support] = u
        u = dense
    channel_logits = scatter_links(p.channel_logits, p.links, missing=-np.inf)
    return replace(p, channel_logits=channel_logits, channel_weights=u, links=None)
