from dataclasses import replace

import numpy as np
import pytest

from nalayer import c_start, noise_matrix, scatter_links
from nalayer.buffers import slices
from nalayer.learned_noise import learned_noise_matrix
from nalayer.losses import LinearChannelModel, OneParameterModel
from tests.cases import MODEL_NAMES, point, point_of


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_it_is_the_mean_of_the_samples_matrices_weighted_by_their_class(name, monkeypatch):
    monkeypatch.setattr("nalayer.learned_noise.slices", lambda n: slices(n, 7))
    p = point_of(name)
    found = learned_noise_matrix(p.model, p.parameters, p.x)
    weights, *channel = p.model.unpack(p.parameters)
    (logits, *hidden), _ = p.model.forward(weights, p.x)
    q = np.exp(logits - logits.max(axis=1, keepdims=True))
    q /= q.sum(axis=1, keepdims=True)
    k, links = p.network.n_classes, p.model.links
    expected = np.zeros((k, k))
    for t in range(p.n):
        scores = channel[-1] + (channel[0] @ hidden[0][t] if hidden else 0)
        theta = noise_matrix(scores)
        expected += q[t][:, None] * (theta if links is None else scatter_links(theta, links, 0.0))
    expected /= q.sum(axis=0)[:, None]
    assert np.abs(found - expected).max() <= 1e-14


def test_c_model_that_does_not_look_at_features_has_the_s_models_matrix():
    p = point()
    c_model, parameters = c_start(p.model, p.parameters)
    found = learned_noise_matrix(c_model, parameters, p.x)
    assert np.abs(found - noise_matrix(p.channel_logits)).max() <= 1e-14


def test_models_of_other_methods_give_their_own():
    p = point()
    one = OneParameterModel(p.network)
    theta = learned_noise_matrix(one, one.start(p.weights, 0.2), p.x)
    assert np.abs(np.diag(theta) - 0.8).max() <= 1e-15
    linear = LinearChannelModel(p.network)
    assert np.array_equal(learned_noise_matrix(linear, linear.start(p.weights), p.x), np.eye(4))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_of_float32_parameters_the_rows_sum_to_one_in_float64(name):
    p = point_of(name)
    found = learned_noise_matrix(p.model, p.parameters.astype("f4"), p.x.astype("f4"))
    assert found.dtype == np.float64
    assert np.abs(found.sum(axis=1) - 1).max() <= 1e-14


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_class_that_every_sample_speaks_against_has_its_row_too(dtype, monkeypatch):
    """Its probability is 0 in both dtypes; which samples speak least against it, is known."""
    monkeypatch.setattr("nalayer.learned_noise.slices", lambda n: slices(n, 7))
    p = point_of("c")
    bias = np.zeros(p.network.n_weights)
    bias[-4] = -2000
    found, expected = (
        learned_noise_matrix(p.model, q.parameters.astype(dtype), p.x.astype(dtype))
        for q in (replace(p, weights=p.weights + bias), replace(p, weights=p.weights + bias / 400))
    )
    # Beside so unlikely a class the others do not feel it: the weights of its row are e^a_t0 / Z_t
    # either way, and Z_t is that of the other three.
    assert np.abs(found[0].sum() - 1) <= 1e-14
    assert np.abs(found[0] - expected[0]).max() <= 0.05
    assert np.abs(found - expected).max() > 0
