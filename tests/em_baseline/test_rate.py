"""V12: the rate at which EM on the noise layer converges, and how to overtake it."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

import nalayer
from em_baseline import rate
from em_baseline.rate import (
    Information,
    channel_limit,
    climb_theta,
    information,
    slowest_rate,
    theta_steps,
)
from em_baseline.statements import Point, certificate
from tests.cases import MODEL_NAMES, point, point_of


def small(name: str, seed: int = 0) -> Point:
    return point_of(name, seed, n=250, n_in=2, hidden_sizes=(), k=3, n_kept=2)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_rate_and_louis_identity_hold_for_every_model(name):
    rows = rate.rate_of_convergence(channel_limit(small(name)), np.random.default_rng(0))
    assert [row.statement for row in rows] == ["V12", "V12"]
    assert all(row.holds for row in rows), rows
    assert {row.model for row in rows} == {name}
    assert rows[0].residual <= 1e-10
    assert rows[1].residual <= 1e-3


@pytest.mark.parametrize("noise", [0.2, 0.4, 0.6])
def test_rate_is_as_predicted_on_a_well_specified_problem(noise):
    """Labels drawn from the model itself, whose network is the truth; symmetric noise."""
    row = rate.rate_of_convergence(well_specified(noise), np.random.default_rng(0))[1]
    assert row.holds, row.detail  # eigenvalues lie close together: the last outlives slowly


def well_specified(noise: float) -> Point:
    rng = np.random.default_rng(0)
    p = point(n=3000, hidden_sizes=(), k=4)
    theta = nalayer.make_noise_matrix("symmetric", 4, noise, rng)
    q = np.exp(nalayer.log_softmax(p.logits()))
    true = np.array([rng.choice(4, p=row) for row in q])
    z = nalayer.corrupt_labels(true, theta, rng, stratified=False)
    return channel_limit(replace(p, noisy_labels=z, channel_logits=np.log(theta)))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_wrong_information_is_rejected(name, monkeypatch):
    """The covariance's second part lost: as if every true label were seen for itself."""
    limit = channel_limit(small(name))
    right = information(limit)
    wrong = Information(right.complete, 0.9 * right.missing)
    monkeypatch.setattr(rate, "information", lambda point: wrong)
    rows = rate.rate_of_convergence(limit, np.random.default_rng(0))
    assert [row.holds for row in rows] == [False, False]


def test_information_is_positive_and_less_is_missing_than_there_is():
    info = information(channel_limit(small("s")))
    assert info.rates.min() >= -1e-12
    assert info.rates.max() < 1
    assert np.abs(info.complete - info.complete.T).max() <= 1e-12 * np.abs(info.complete).max()


@pytest.mark.parametrize("name", ["s", "sparse-s"])
def test_squarem_gets_to_the_same_matrix_in_fewer_steps(name):
    start = small(name, seed=1)
    plain, fast = (climb_theta(start, accelerate) for accelerate in (False, True))
    assert max(plain.certificate, fast.certificate) <= 1e-8
    assert fast.n_maps < plain.n_maps / 2
    likelihoods = [a.point.e_step().log_likelihood_t.mean() for a in (plain, fast)]
    assert abs(likelihoods[0] - likelihoods[1]) <= 1e-8


def test_squarem_never_lowers_the_likelihood(monkeypatch):
    start, seen = small("s", seed=2), []
    real = rate.certificate

    def watch(at: Point) -> float:
        seen.append(float(at.e_step().log_likelihood_t.sum()))
        return real(at)

    monkeypatch.setattr(rate, "certificate", watch)
    climb_theta(start, accelerate=True)
    assert min(np.diff(seen)) >= -1e-12 * abs(seen[0])


@pytest.mark.parametrize("accelerate", [False, True])
def test_e_steps_are_counted(accelerate, monkeypatch):
    taken = 0
    real = Point.e_step

    def count(at: Point):
        nonlocal taken
        taken += 1
        return real(at)

    monkeypatch.setattr(Point, "e_step", count)
    for _, n_maps, n_e_steps in islice(theta_steps(small("s"), accelerate), 8):
        assert n_e_steps == taken
        assert n_maps <= taken
    assert accelerate == (n_maps < taken)


@pytest.mark.parametrize("name", ["s", "sparse-s"])
@pytest.mark.parametrize("seed", range(3))
def test_slowest_rate_is_that_of_the_certificate(name, seed):
    start = small(name, seed)
    limit = climb_theta(start, accelerate=True, tolerance=1e-12).point
    left = [1.0]
    for at, _, _ in theta_steps(start, accelerate=False):
        left.append(certificate(at))
        if left[-1] <= 1e-9:
            break
    assert abs(left[-1] / left[-2] / slowest_rate(limit) - 1) <= 0.01
