"""V13: where joint training and EM end in one optimum, and where they do not."""

from dataclasses import replace

import numpy as np
import pytest

import kernels
import nalayer
from em_baseline import end_points
from em_baseline.statements import (
    Limits,
    Point,
    certificate,
    dead_entries,
    find_limits,
    same_stationary_points,
)
from em_baseline.steps import noise_matrix_m_step
from nalayer import stream
from nalayer.completed import expected_counts
from tests.cases import MODEL_NAMES, point, point_of


def drawn_from_a_model(kind: str, seed: int, k: int) -> Point:
    """Labels drawn from a softmax regression and a noise matrix; theta starts symmetric."""
    rng = np.random.default_rng(seed)
    p = point(seed, n=600, n_in=3, hidden_sizes=(), k=k)
    p = replace(p, weights=2 * p.weights)
    q = np.exp(nalayer.log_softmax(p.logits()))
    true = np.array([rng.choice(k, p=row) for row in q])
    theta = nalayer.make_noise_matrix(kind, k, 0.3, rng)
    z = nalayer.corrupt_labels(true, theta, rng, stratified=False)
    start = np.log(nalayer.make_noise_matrix("symmetric", k, 0.2, rng))
    return replace(p, noisy_labels=z, channel_logits=start)


@pytest.fixture(scope="module")
def together() -> Limits:
    start = drawn_from_a_model("symmetric", seed=1, k=4)
    return find_limits(start, stream(0, "shuffling"), tolerance=1e-8)


@pytest.fixture(scope="module")
def apart() -> Limits:
    start = drawn_from_a_model("cyclic", seed=0, k=3)
    return find_limits(start, stream(0, "shuffling"), tolerance=1e-8)


def test_ends_in_one_basin_are_the_same(together):
    found = end_points.compare(together.em, together.joint)
    assert found.agree
    assert found.same_predictions == 1
    (row,) = end_points.end_points(together)
    assert row.holds
    assert row.detail.startswith("the same ends")
    # V11 says of both that they are where this network's theta belongs
    assert max(certificate(together.em), certificate(together.joint)) <= 1e-6


def test_ends_that_differ_are_explained_by_the_certificate(apart):
    """Joint training lets entries of theta fall to zero that EM keeps: dead for a softmax."""
    found = end_points.compare(apart.em, apart.joint)
    assert not found.agree
    assert found.likelihood_gap > 1e-3
    assert certificate(apart.em) <= 1e-5
    assert certificate(apart.joint) > 1e-4
    assert dead_entries(apart.joint, end_points.NEARLY_ZERO) >= 1
    (row,) = end_points.end_points(apart)
    assert row.holds
    assert row.detail.startswith("different ends")


def relabelled(p: Point, order: list[int]) -> Point:
    """The same function with its true classes in another order."""
    k = p.network.n_classes
    w, b = p.weights[:-k].reshape(-1, k), p.weights[-k:]
    weights = np.concatenate([w[:, order].ravel(), b[order]])
    u, links = p.channel_weights, p.links
    return replace(
        p,
        weights=weights,
        channel_logits=p.channel_logits[order],
        channel_weights=None if u is None else u[order],
        links=None if links is None else kernels.link_index(links.support[order]),
    )


def test_relabelled_end_is_the_same_end(together):
    turned = replace(together, joint=relabelled(together.joint, [2, 0, 3, 1]))
    assert np.abs(turned.joint.weights - together.joint.weights).max() > 0.1
    found = end_points.compare(turned.em, turned.joint)
    assert found.agree
    assert found.same_predictions == 1


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_mutant_that_does_not_relabel_is_rejected(name, monkeypatch):
    end = point_of(name, hidden_sizes=())
    turned = Limits(end, relabelled(end, [2, 0, 3, 1]), [], 0.0)
    (row,) = end_points.end_points(turned)
    assert row.holds
    assert row.detail.startswith("the same ends")
    as_they_are = np.arange(4)
    monkeypatch.setattr(
        end_points, "linear_sum_assignment", lambda cost: (as_they_are, as_they_are)
    )
    assert not end_points.end_points(turned)[0].holds


def with_pseudo_counts(alpha: float) -> Limits:
    """From the start of ``apart``."""
    start = drawn_from_a_model("cyclic", seed=0, k=3)
    return find_limits(start, stream(0, "shuffling"), tolerance=1e-8, pseudo_count=alpha)


@pytest.fixture(scope="module")
def brought_together() -> Limits:
    return with_pseudo_counts(0.01)


def test_pseudo_counts_bring_the_ends_together_that_dead_entries_kept_apart(
    apart, brought_together
):
    assert not end_points.compare(apart.em, apart.joint).agree
    found = end_points.compare(brought_together.em, brought_together.joint, 0.01)
    assert found.agree
    assert found.same_predictions == 1
    assert dead_entries(brought_together.joint, end_points.NEARLY_ZERO) == 0
    same, best = end_points.end_points(brought_together)
    assert same.holds
    assert same.detail.startswith("the same ends")
    assert best.holds
    # V10 is about what both climbed
    assert all(row.holds for row in same_stationary_points(brought_together, stream(0, "split")))


def test_pseudo_counts_leave_other_optima_apart():
    """Both noise matrices are the best for their networks, to 1e-5 nats; the networks differ."""
    limits = with_pseudo_counts(1.0)
    found = end_points.compare(limits.em, limits.joint, 1.0)
    em, joint = (
        limits.model.loss(p.parameters, p.x, p.noisy_labels) for p in (limits.em, limits.joint)
    )
    assert joint - em > 1e-4
    assert abs(found.likelihood_gap - (joint - em)) <= 1e-13
    different, best = end_points.end_points(limits)
    assert different.detail.startswith("different ends")
    assert best.holds
    assert all(row.holds for row in same_stationary_points(limits, stream(0, "split")))


def test_pseudo_counts_forgotten_in_the_certificate_are_noticed(brought_together):
    forgotten = replace(brought_together, pseudo_count=1e-9)
    assert not end_points.end_points(forgotten)[1].holds
    assert not same_stationary_points(forgotten, stream(0, "split"))[1].holds


@pytest.mark.parametrize("name", ["s", "sparse-s"])
def test_certificate_with_pseudo_counts_bounds_what_em_gains(name):
    start, alpha = point_of(name, hidden_sizes=()), 0.7
    here = start
    for _ in range(500):
        counts = expected_counts(here.e_step().posterior, here.noisy_labels, here.links)
        theta = noise_matrix_m_step(counts, nalayer.noise_matrix(here.channel_logits), alpha)
        here = replace(here, channel_logits=np.log(theta))
    model = start.objective(alpha)
    loss, best = (model.loss(p.parameters, p.x, p.noisy_labels) for p in (start, here))
    assert 0.01 < loss - best <= certificate(start, alpha)
    assert -1e-12 <= certificate(here, alpha) <= 1e-8


def test_c_models_have_no_pseudo_counts():
    with pytest.raises(ValueError, match="pseudo_count must be 0 for a c-model; found"):
        find_limits(point_of("c"), stream(0, "shuffling"), pseudo_count=0.5)
