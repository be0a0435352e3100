import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nalayer import corrupt_labels, labels_hash, make_noise_matrix, stream
from nalayer.label_noise import (
    KINDS,
    REED_PERMUTATION,
    cyclic_noise,
    pair_flip_noise,
    permutation_noise,
    random_derangement,
    symmetric_noise,
)

LABELS = np.repeat(np.arange(10), [50, 51, 52, 53, 54, 55, 56, 57, 58, 59])


def confusion(clean, noisy, k=10):
    counts = np.zeros((k, k), int)
    np.add.at(counts, (clean, noisy), 1)
    return counts


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.475, 1.0])
def test_permutation_noise_changes_an_exact_stratified_count(noise):
    theta = permutation_noise(REED_PERMUTATION, noise)
    counts = confusion(LABELS, corrupt_labels(LABELS, theta, stream(0, "label noise")))
    for y, target in enumerate(REED_PERMUTATION):
        n = (y + 50) * noise
        assert abs(counts[y, target] - n) <= 0.5
        assert counts[y, y] + counts[y, target] == y + 50


@given(st.integers(2, 6), st.integers(0, 40), st.integers(0, 10**6))
def test_stratified_counts_are_within_one_of_the_matrix_for_any_matrix(k, n, seed):
    rng = np.random.default_rng(seed)
    theta = rng.dirichlet(np.ones(k), size=k)
    labels = rng.integers(k, size=n)
    noisy = corrupt_labels(labels, theta, rng)
    counts = confusion(labels, noisy, k)
    assert np.array_equal(counts.sum(axis=1), np.bincount(labels, minlength=k))
    assert np.abs(counts - theta * counts.sum(axis=1, keepdims=True)).max() < 1


def test_bernoulli_draws_follow_the_matrix():
    theta = symmetric_noise(4, 0.3)
    labels = np.repeat(np.arange(4), 10_000)
    counts = confusion(
        labels, corrupt_labels(labels, theta, stream(0, "label noise"), stratified=False), 4
    )
    deviation = np.sqrt(10_000 * theta * (1 - theta))
    assert (np.abs(counts - 10_000 * theta) <= 5 * deviation).all()
    assert (counts != 10_000 * theta).any()


def test_who_is_hit_is_random_and_repeatable():
    theta = permutation_noise(REED_PERMUTATION, 0.4)
    a, b, c = (corrupt_labels(LABELS, theta, stream(s, "label noise")) for s in (1, 1, 2))
    assert np.array_equal(a, b)
    assert (a != c).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 10, 13])
def test_named_kinds_are_row_stochastic_with_the_noise_off_the_diagonal(kind, k):
    theta = make_noise_matrix(kind, k, 0.4, stream(0, "label noise"))
    assert np.abs(theta.sum(axis=1) - 1).max() <= 1e-15
    assert np.abs(np.diag(theta) - 0.6).max() <= 1e-15


def test_the_kinds_are_what_their_names_say():
    reed = make_noise_matrix("permutation", 10, 1.0, stream(0, "label noise"))
    assert reed.argmax(axis=1).tolist() == [7, 9, 0, 4, 2, 1, 3, 5, 6, 8]
    assert cyclic_noise(4, 1.0, shift=3).argmax(axis=1).tolist() == [3, 0, 1, 2]
    assert np.array_equal(pair_flip_noise(4, 0.2), cyclic_noise(4, 0.2, shift=1))
    assert np.abs(symmetric_noise(5, 0.4)[0] - [0.6, 0.1, 0.1, 0.1, 0.1]).max() <= 1e-15


@pytest.mark.parametrize("seed", range(20))
def test_derangements_have_no_fixed_point(seed):
    permutation = random_derangement(5, np.random.default_rng(seed))
    assert sorted(permutation) == list(range(5))
    assert (permutation != np.arange(5)).all()


def test_derangements_of_four_are_drawn_evenly():
    rng = np.random.default_rng(0)
    drawn = [tuple(random_derangement(4, rng).tolist()) for _ in range(9000)]
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert counts.size == 9
    assert np.abs(counts - 1000).max() <= 5 * np.sqrt(1000)


def test_cycles_have_the_lengths_that_their_name_says():
    theta = make_noise_matrix("cycles-3-2-1", 6, 0.3, stream(0, "split"))
    moved = np.where(np.eye(6) == 1, 0, theta)
    order = np.array([moved[i].argmax() if moved[i].any() else i for i in range(6)])
    np.testing.assert_array_equal(order, [1, 2, 0, 4, 3, 5])
    np.testing.assert_array_equal(np.diag(theta), [0.7] * 5 + [1.0])


def test_hash_depends_on_labels_only():
    little_endian = hashlib.sha256(struct.pack("<3q", 1, 2, 3)).hexdigest()
    assert labels_hash(np.array([1, 2, 3])) == little_endian[:16] == "e2e2033ae7e19d68"
    assert labels_hash(np.array([1, 2, 3], dtype=">i2")) == labels_hash(np.array([1, 2, 3]))
    assert labels_hash(np.array([3, 2, 1])) != labels_hash(np.array([1, 2, 3]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permutation_noise((0, 0, 1), 0.1), r"permutation must hold 0\.\.2 once each"),
        (lambda: permutation_noise((1, 0), 1.5), r"noise must lie in \[0, 1\]; found 1.5"),
        (lambda: symmetric_noise(3, -0.1), r"noise must lie in \[0, 1\]; found -0.1"),
        (
            lambda: random_derangement(1, stream(0, "split")),
            "n_classes must be at least 2; found 1",
        ),
        (
            lambda: make_noise_matrix("cycles-3-3", 10, 0.1, stream(0, "split")),
            "must name lengths of cycles that add up to the 10 classes",
        ),
        (
            lambda: make_noise_matrix("cycles-10-0", 10, 0.1, stream(0, "split")),
            "must name lengths of cycles",
        ),
        (
            lambda: make_noise_matrix("cycles-a", 10, 0.1, stream(0, "split")),
            "must name lengths of cycles",
        ),
        (lambda: make_noise_matrix("white", 3, 0.1, stream(0, "split")), "kind must be one of"),
        (lambda: make_noise_matrix("cyclic", 1, 0.1, stream(0, "split")), "n_classes must be at"),
        (
            lambda: corrupt_labels(LABELS, np.eye(9), stream(0, "split")),
            r"labels must lie in 0\.\.8",
        ),
        (lambda: corrupt_labels(LABELS, np.ones((10, 10)), stream(0, "split")), "theta must have"),
        (lambda: symmetric_noise(1, 0.1), "n_classes must be at least 2; found 1"),
        (lambda: cyclic_noise(4, 0.1, 8), "shift must not be a multiple of 4.*found 8"),
        (
            lambda: corrupt_labels(LABELS, np.ones((2, 3)) / 3, stream(0, "split")),
            "theta must have",
        ),
        (lambda: stream(0, "luck"), "purpose must be one of"),
        (lambda: stream(-1, "split"), "seed must not be negative; found -1"),
    ],
)
def test_impossible_noise_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
