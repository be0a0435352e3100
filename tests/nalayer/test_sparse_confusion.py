"""Sparse confusion matrices against the dense ones, and in parts."""

import tracemalloc

import numpy as np
import pytest

from kernels import counts_by_label, link_index
from nalayer import (
    SModel,
    confusion_counts,
    confusion_start,
    corrupt_labels,
    gather_links,
    make_noise_matrix,
    mlp,
    scatter_links,
    sparse_confusion_start,
    sparse_start,
    top_support,
)

RNG = np.random.default_rng(3)
N, K = 200, 7
Q = RNG.dirichlet(np.full(K, 0.4), size=N)
Q[Q.argmax(axis=1) == 6] = np.eye(K)[0]  # class 6 is never predicted
Z = RNG.integers(K, size=N)
EPS = np.finfo(np.float64).eps


def test_one_candidate_counts_the_arg_max():
    found = confusion_counts(Q, Z)
    assert np.array_equal(found.toarray(), counts_by_label(np.eye(K)[Q.argmax(axis=1)], Z))
    assert found.sum() == N


def test_all_candidates_are_the_soft_confusion():
    found = confusion_counts(Q, Z, n_candidates=K).toarray()
    assert np.abs(found - counts_by_label(Q, Z)).max() <= 2 * N * EPS


def test_some_candidates_are_the_most_probable_ones():
    found = confusion_counts(Q, Z, n_candidates=2).toarray()
    kept = np.where(np.sort(Q, axis=1)[:, [-2]] <= Q, Q, 0)
    assert np.abs(found - counts_by_label(kept, Z)).max() <= 2 * N * EPS


def test_parts_of_hard_counts_add_up_exactly():
    for cut in (1, 50, 199):
        parts = confusion_counts(Q[:cut], Z[:cut]) + confusion_counts(Q[cut:], Z[cut:])
        assert np.array_equal(parts.toarray(), confusion_counts(Q, Z).toarray())


@pytest.mark.parametrize(("kind", "n_candidates"), [("hard", 1), ("soft", K)])
def test_start_is_the_dense_start_cut_down(kind, n_candidates):
    confusion = confusion_counts(Q, Z, n_candidates)
    links = link_index(top_support(confusion, 3))
    model = SModel(mlp(2, (), K))
    dense = model.pack(np.zeros(model.network.n_weights), confusion_start(Q, Z, kind))
    sparse, parameters = sparse_start(model, dense, links)
    expected = np.exp(sparse.unpack(parameters)[1])
    found = np.exp(sparse_confusion_start(confusion, links))
    expected /= expected.sum(axis=1, keepdims=True)
    assert np.abs(found - expected).max() <= 1e3 * EPS
    if kind == "hard":
        assert np.abs(found[6] - 1 / 3).max() <= 10 * EPS


def test_a_million_classes_take_no_square_of_it():
    k, n = 10**6, 50
    classes, z = np.random.default_rng(0).integers(k, size=(2, n))
    logits = np.zeros((1, k), np.float32)
    tracemalloc.start()
    confusion = confusion_counts(logits, z[:1])
    for t in range(1, n):
        logits[0, classes[t]] = 1
        confusion = confusion + confusion_counts(logits, z[t : t + 1])
        logits[0, classes[t]] = 0
    links = link_index(top_support(confusion, 2))
    start = sparse_confusion_start(confusion, links)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert start.shape == (k, 2)
    assert peak < 1e9  # K x K float64 would be 8e12


def test_labels_over_links_are_the_dense_ones():
    support = np.array([[0, 1, 3], [1, 2, 3], [0, 2, 1], [3, 0, 2]])
    links = link_index(support)
    theta = np.random.default_rng(0).dirichlet(np.ones(3), size=4)
    labels = np.random.default_rng(1).integers(4, size=300)
    dense = scatter_links(theta, links, missing=0.0)
    found = corrupt_labels(labels, theta, np.random.default_rng(2), links=links)
    for i in range(4):
        counts = np.bincount(found[labels == i], minlength=4)
        n_i = (labels == i).sum()
        assert np.abs(counts - n_i * dense[i]).max() < 1  # to the nearest sample
    drawn = corrupt_labels(labels, theta, np.random.default_rng(2), stratified=False, links=links)
    assert (dense[labels, drawn] > 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: confusion_counts(Q, Z[:3]), "noisy_labels must have shape"),
        (lambda: confusion_counts(Q, Z, 0), r"n_candidates must lie in 1\.\.7; found 0"),
        (lambda: confusion_counts(Q, Z, 8), r"n_candidates must lie in 1\.\.7; found 8"),
        (
            lambda: sparse_confusion_start(
                confusion_counts(Q[:, :6], Z % 6),
                link_index(np.eye(7, dtype=int).argmax(1)[:, None]),
            ),
            r"confusion must have shape \(7, 7\)",
        ),
        (
            lambda: sparse_confusion_start(
                confusion_counts(Q, Z), link_index(np.arange(7)[:, None]), floor=0
            ),
            "floor must be positive",
        ),
        (
            lambda: corrupt_labels(
                Z, np.ones((7, 2)), RNG, links=link_index(np.arange(7)[:, None])
            ),
            "theta must have shape",
        ),
        (
            lambda: corrupt_labels(
                Z, np.full((7, 1), 0.5), RNG, links=link_index(np.arange(7)[:, None])
            ),
            "theta must have non-negative rows",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_dense_links_are_the_noise_matrix():
    theta = make_noise_matrix("symmetric", 5, 0.3, RNG)
    links = link_index(np.tile(np.arange(5), (5, 1)))
    labels = np.random.default_rng(1).integers(5, size=99)
    args = (labels, gather_links(theta, links), np.random.default_rng(2))
    assert np.array_equal(
        corrupt_labels(*args, links=links), corrupt_labels(labels, theta, np.random.default_rng(2))
    )
