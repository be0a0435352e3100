"""Noisy labels from clean ones. Every kind of noise is a noise matrix (rows: true class).

Draw the corruption from a random stream of its own (:func:`nalayer.streams.stream`), so that all
methods of one seed see the same labels, and keep :func:`labels_hash` with the results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from kernels import LinkIndex, checks
from nalayer.devices import to_host
from nalayer.memory import require_memory

# Reed et al. (2014), used for MNIST in the paper: class y is observed as REED_PERMUTATION[y].
REED_PERMUTATION = (7, 9, 0, 4, 2, 1, 3, 5, 6, 8)

KINDS = ("permutation", "derangement", "cyclic", "symmetric", "pair-flip")
CYCLES = "cycles-"
"""Prefix of a further family of kinds, such as "cycles-3-3-4": see :func:`cycles_noise`."""


def _check_noise(noise: float) -> None:
    if not 0 <= noise <= 1:
        raise ValueError(f"noise must lie in [0, 1]; found {noise}")


def permutation_noise(permutation: Sequence[int], noise: float) -> np.ndarray:
    """Return (1-p) I + p P: class y is observed as ``permutation[y]`` with probability p.

    Examples
    --------
    >>> permutation_noise((1, 2, 0), 0.25)
    array([[0.75, 0.25, 0.  ],
           [0.  , 0.75, 0.25],
           [0.25, 0.  , 0.75]])
    """
    _check_noise(noise)
    k = len(permutation)
    if sorted(permutation) != list(range(k)):
        raise ValueError(f"permutation must hold 0..{k - 1} once each; found {tuple(permutation)}")
    return (1 - noise) * np.eye(k) + noise * np.eye(k)[list(permutation)]


def random_derangement(n_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a permutation without fixed points, uniformly (by rejection, e tries on average)."""
    checks.check_n_classes(n_classes)
    while True:
        permutation = rng.permutation(n_classes)
        if (permutation != np.arange(n_classes)).all():
            return permutation


def cyclic_noise(n_classes: int, noise: float, shift: int = 1) -> np.ndarray:
    """Return the noise that observes class y as y + shift (mod K) with probability p."""
    checks.check_n_classes(n_classes)
    if shift % n_classes == 0:
        raise ValueError(
            f"shift must not be a multiple of {n_classes}: nothing moves; found {shift}"
        )
    return permutation_noise([(y + shift) % n_classes for y in range(n_classes)], noise)


def cycles_noise(lengths: Sequence[int], noise: float) -> np.ndarray:
    """Return permutation noise whose permutation has cycles of these lengths.

    The first cycle goes through the first classes in their order, and so on; a class in a cycle of
    its own is never changed.

    Examples
    --------
    >>> cycles_noise((2, 1), 0.25)
    array([[0.75, 0.25, 0.  ],
           [0.25, 0.75, 0.  ],
           [0.  , 0.  , 1.  ]])
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths must be at least 1 each; found {tuple(lengths)}")
    starts = np.cumsum([0, *lengths[:-1]])
    permutation = [
        int(start + (place + 1) % length)
        for start, length in zip(starts, lengths, strict=True)
        for place in range(length)
    ]
    return permutation_noise(permutation, noise)


def _cycle_lengths(kind: str, n_classes: int) -> list[int]:
    """Read "cycles-3-3-4"."""
    parts = kind.removeprefix(CYCLES).split("-")
    lengths = [int(part) for part in parts] if all(map(str.isdecimal, parts)) else []
    if sum(lengths) != n_classes or 0 in lengths:
        raise ValueError(
            f"kind {kind!r} must name lengths of cycles that add up to the {n_classes} classes"
        )
    return lengths


def symmetric_noise(n_classes: int, noise: float) -> np.ndarray:
    """Return the noise that observes each other class with probability p / (K - 1)."""
    checks.check_n_classes(n_classes)
    _check_noise(noise)
    theta = np.full((n_classes, n_classes), noise / (n_classes - 1))
    np.fill_diagonal(theta, 1 - noise)
    return theta


def pair_flip_noise(n_classes: int, noise: float) -> np.ndarray:
    """Return pair-flip noise in the sense of Han et al. (2018): the next class, the last to 0.

    It is :func:`cyclic_noise` with shift 1 under the name that the literature uses.
    """
    return cyclic_noise(n_classes, noise, shift=1)


def make_noise_matrix(
    kind: str, n_classes: int, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Return the noise matrix (K, K) of a named kind.

    Parameters
    ----------
    kind : {"permutation", "derangement", "cyclic", "symmetric", "pair-flip"}
        "permutation" is Reed's for ten classes and a random derangement for any other number.
        Also "cycles-" with lengths, such as "cycles-3-3-4".
    n_classes : int
    noise : float
        Probability p that a label is changed.
    rng : Generator
        Used by the random kinds only.

    Raises
    ------
    ValueError
        Unknown kind, fewer than two classes, or noise outside [0, 1].
    MemoryError
        So many classes that (K, K) does not fit.
    """
    checks.check_n_classes(n_classes)
    require_memory("theta", (n_classes, n_classes), np.float64, "use noise over links")
    if kind == "permutation" and n_classes == len(REED_PERMUTATION):
        return permutation_noise(REED_PERMUTATION, noise)
    if kind in ("permutation", "derangement"):
        return permutation_noise(random_derangement(n_classes, rng).tolist(), noise)
    if kind == "cyclic":
        return cyclic_noise(n_classes, noise)
    if kind == "symmetric":
        return symmetric_noise(n_classes, noise)
    if kind == "pair-flip":
        return pair_flip_noise(n_classes, noise)
    if kind.startswith(CYCLES):
        return cycles_noise(_cycle_lengths(kind, n_classes), noise)
    raise ValueError(f"kind must be one of {KINDS}; found {kind!r}")


def _exact_counts(theta_i: np.ndarray, n: int) -> np.ndarray:
    """Return integers near n * theta_i that sum to n: largest remainders, ties to low classes."""
    ideal = theta_i * n
    counts = np.floor(ideal).astype(np.int64)
    order = np.argsort(-(ideal - counts), kind="stable")
    counts[order[: n - counts.sum()]] += 1
    return counts


def corrupt_labels(
    labels: np.ndarray,
    theta: np.ndarray,
    rng: np.random.Generator,
    *,
    stratified: bool = True,
    links: LinkIndex | None = None,
) -> np.ndarray:
    """Return noisy labels: each sample of class i gets label j with probability theta_ij.

    Parameters
    ----------
    labels : (n,) integer
        Clean labels; not written.
    theta : (K, K), or (K, l) with links
        Noise matrix, rows are the true class.
    rng : Generator
    stratified : bool
        True gives every class exact counts (to the nearest sample, as in the paper's code) and
        draws only who is hit; False draws each label on its own.
    links : LinkIndex, optional
        Where theta's columns lead, row by row: the noise of very many classes.

    Returns
    -------
    (n,) int64

    Raises
    ------
    TypeError, ValueError
        If theta is not row-stochastic or a label is out of range.
    """
    if links is None:
        checks.check_noise_matrix("theta", theta)
    else:
        checks.check_floats("theta", theta, links.support.shape)
        checks.check_probability_rows("theta", theta)
    checks.check_generator("rng", rng)
    k, width = theta.shape
    checks.check_labels("labels", labels, "n", k)
    noisy = np.empty(labels.shape, np.int64)
    order = np.argsort(labels, kind="stable")
    members_i = np.split(order, np.searchsorted(labels[order], np.arange(1, k)))
    for i, members in enumerate(members_i):
        targets = np.arange(k) if links is None else links.support[i]
        if stratified:
            noisy[rng.permutation(members)] = np.repeat(
                targets, _exact_counts(theta[i], members.size)
            )
        else:
            drawn = rng.choice(width, size=members.size, p=theta[i] / theta[i].sum())
            noisy[members] = targets[drawn]
    return noisy


def labels_hash(labels: np.ndarray) -> str:
    """Return a fingerprint of labels (or of soft targets): 16 hex digits of SHA-256.

    Integers are hashed as little-endian int64 and floats as float64, so neither the dtype nor the
    machine's byte order matters. Of labels with weights, the labels are. Raises TypeError for what
    are no numbers.

    Examples
    --------
    >>> labels_hash(np.array([0, 1])) == labels_hash(np.array([0, 1], dtype=np.uint8))
    True
    """
    labels = np.asarray(to_host(labels))
    if "label" in (labels.dtype.names or ()):
        labels = labels["label"]
    if labels.dtype.kind not in "biuf":
        raise TypeError(f"labels must be numbers; found {labels.dtype}")
    dtype = "<i8" if labels.dtype.kind in "iu" else "<f8"
    return hashlib.sha256(np.ascontiguousarray(labels, dtype=dtype).tobytes()).hexdigest()[:16]
