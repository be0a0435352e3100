"""Statistics of parts add up to those of the whole, for every model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import em_baseline
from em_baseline import partial, statements
from em_baseline.statements import Point
from em_baseline.steps import e_step
from kernels import link_index
from nalayer import CModel, SModel, mlp, noise_matrix
from nalayer.completed import expected_counts
from nalayer.models import NoiseModel
from nalayer.weighting import weighted_labels
from tests.cases import random_support

N, K = 41, 4
RNG = np.random.default_rng(5)
X, Z = RNG.normal(size=(N, 3)), RNG.integers(K, size=N)
LINKS = link_index(random_support(K, 3, RNG))
NETWORK = mlp(3, (5,), K)
MODELS = [kind(NETWORK, links=links) for kind in (SModel, CModel) for links in (None, LINKS)]
# Every count is a sum of at most N posteriors below 1, in another order.
ROUNDING = N * N * np.finfo(np.float64).eps


def parameters_of(model: NoiseModel) -> np.ndarray:
    return np.random.default_rng(1).normal(size=model.n_parameters)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_whole_is_the_plain_e_step(model, monkeypatch):
    monkeypatch.setattr(partial, "POSTERIOR_BYTES", 7 * K * 8)  # seven samples at a time
    parameters = parameters_of(model)
    found = em_baseline.e_step_statistics(model, parameters, X, Z)
    weights, *channel = model.unpack(parameters)
    outputs, _ = model.forward(weights, X)
    plain = e_step(model, outputs, channel, Z)
    counts = expected_counts(plain.posterior, Z, model.links)
    assert np.abs(found.counts - counts).max() <= ROUNDING
    assert abs(found.log_likelihood - plain.log_likelihood_t.sum()) <= ROUNDING
    assert found.n_samples == N
    assert abs(found.counts.sum() - N) <= ROUNDING


@given(st.lists(st.integers(0, N), max_size=6), st.sampled_from(MODELS[:2]))
@settings(deadline=None, max_examples=40)
def test_any_partition_gives_the_same_noise_matrix(cuts, model):
    parameters = parameters_of(model)
    order = np.random.default_rng(len(cuts)).permutation(N)
    parts = [part for part in np.split(order, sorted(cuts)) if part.size]
    together = em_baseline.sum_of(
        em_baseline.e_step_statistics(model, parameters, X[part], Z[part]) for part in parts
    )
    whole = em_baseline.e_step_statistics(model, parameters, X, Z)
    thetas = [
        noise_matrix(model.unpack(em_baseline.with_m_step(model, parameters, found))[-1])
        for found in (together, whole)
    ]
    assert np.abs(thetas[0] - thetas[1]).max() <= ROUNDING
    assert np.abs(together.d_theta - whole.d_theta).max() <= ROUNDING * whole.d_theta.max()
    assert together.n_samples == N
    weights, _ = model.unpack(em_baseline.with_m_step(model, parameters, together))
    assert np.array_equal(weights, model.unpack(parameters)[0])


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_weight_counts_as_that_many_copies(model):
    copies = 1 + np.arange(N) % 3
    share = N / copies.sum()  # weights have mean one
    weighted = weighted_labels(Z, share * copies)
    found = em_baseline.e_step_statistics(model, parameters_of(model), X, weighted)
    many = em_baseline.e_step_statistics(
        model, parameters_of(model), X.repeat(copies, axis=0), Z.repeat(copies)
    )
    assert np.abs(found.counts - share * many.counts).max() <= ROUNDING
    assert abs(found.log_likelihood - share * many.log_likelihood) <= ROUNDING * N
    if many.d_theta is not None:
        assert np.abs(found.d_theta - share * many.d_theta).max() <= ROUNDING * many.d_theta.max()


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("model", MODELS[:2], ids=lambda model: model.name)
def test_certificate_is_that_of_the_statements(model, with_zeros):
    parameters = parameters_of(model)
    weights, channel_logits = model.unpack(parameters)
    if with_zeros:
        channel_logits[[0, 2], [1, 0]] = -np.inf  # in the parameters too
    support = None if model.links is None else model.links.support
    if support is None:
        point = Point(NETWORK, weights, channel_logits, X, Z)
    else:
        point = Point(NETWORK, weights, channel_logits, X, Z, links=model.links)
    statistics = em_baseline.e_step_statistics(model, parameters, X, Z)
    found = partial.certificate(statistics)
    expected = statements.certificate(point)
    assert abs(found - expected) <= 1e3 * np.finfo(np.float64).eps * expected
    assert found > 0
    # A step of EM cannot gain more.
    stepped = em_baseline.with_m_step(model, parameters, statistics)
    after = em_baseline.e_step_statistics(model, stepped, X, Z)
    gain = (after.log_likelihood - statistics.log_likelihood) / N
    assert 0 < gain <= found


@pytest.mark.parametrize("model", MODELS[:2], ids=lambda model: model.name)
def test_a_network_that_is_sure_of_what_theta_rules_out_gives_no_warning(model):
    """Of class 0, which is seen as z with a probability of e^-100: q/m = e^100."""
    model = SModel(mlp(3, (), K), links=model.links)
    z = np.full(5, 1 if model.links is None else model.links.support[0, 1])

    def found(surprise, dtype):
        weights, channel_logits = np.zeros(model.network.n_weights), np.zeros((K, model.n_kept))
        weights[-K], channel_logits[0, 1] = 2 * surprise, -surprise  # the bias of class 0
        parameters = model.pack(weights, channel_logits).astype(dtype)
        return em_baseline.e_step_statistics(model, parameters, np.zeros((5, 3), dtype), z)

    narrow, wide = found(100, np.float32), found(100, np.float64)
    assert narrow.d_theta[0, 1] > np.finfo(np.float32).max
    assert abs(narrow.d_theta[0, 1] / wide.d_theta[0, 1] - 1) <= 100 * np.finfo(np.float32).eps
    assert abs(partial.certificate(narrow) / partial.certificate(wide) - 1) <= 1e-4
    assert partial.certificate(found(800, np.float64)) == np.inf


def test_m_step_is_that_of_the_fit():
    model = MODELS[0]
    parameters = parameters_of(model)
    stepped = []

    class NoStep:
        def initial_state(self, weights):
            return None

        def run(self, objective, weights, *others):
            return weights, 0

    em_baseline.fit(
        model,
        parameters,
        X,
        Z,
        network_step=NoStep(),
        n_rounds=1,
        shuffling=np.random.default_rng(0),
        on_half_step=lambda step, here: stepped.append(here),
    )
    statistics = em_baseline.e_step_statistics(model, parameters, X, Z)
    found = em_baseline.with_m_step(model, parameters, statistics)
    assert np.abs(np.exp(found) - np.exp(stepped[1])).max() <= ROUNDING


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: em_baseline.sum_of([]), "parts must hold"),
        (
            lambda: em_baseline.sum_of(
                em_baseline.e_step_statistics(model, parameters_of(model), X, Z)
                for model in (MODELS[0], MODELS[2])
            ),
            "statistics of an SModel and of a CModel",
        ),
        (
            lambda: em_baseline.e_step_statistics(
                SModel(NETWORK, 1.0, N), parameters_of(MODELS[0]), X, weighted_labels(Z, np.ones(N))
            ),
            "model must have no pseudo_count",
        ),
        (
            lambda: em_baseline.with_m_step(MODELS[2], parameters_of(MODELS[2]), None),
            "model must be an SModel",
        ),
        (
            lambda: em_baseline.with_m_step(
                MODELS[0],
                parameters_of(MODELS[0]),
                em_baseline.e_step_statistics(MODELS[1], parameters_of(MODELS[1]), X, Z),
            ),
            r"statistics.counts must have shape \(4, 4\)",
        ),
        (
            lambda: partial.certificate(
                em_baseline.e_step_statistics(MODELS[2], parameters_of(MODELS[2]), X, Z)
            ),
            "statistics must be those of an SModel",
        ),
        (
            lambda: em_baseline.e_step_statistics(MODELS[0], parameters_of(MODELS[0]), X, Z[:5]),
            "noisy_labels must have shape",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()
