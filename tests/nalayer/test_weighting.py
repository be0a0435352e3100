from dataclasses import replace

import numpy as np
import pytest

from em_baseline import OneGradientStep, fit, statements
from em_baseline.estimator_parts import certificate
from em_baseline.statements import Literal
from nalayer import (
    SGD,
    PlainModel,
    SModel,
    check_gradient,
    clustered_start,
    confusion_start,
    labels_hash,
)
from nalayer.weighting import WeightedModel, parts_of, weighted_labels
from tests.cases import MODEL_NAMES, point, point_of, soft_targets

RNG = np.random.default_rng(0)
N = point().n
WEIGHTS = RNG.gamma(0.7, size=N)
COUNTS = RNG.integers(1, 5, size=N)


def copies(p, counts=COUNTS):
    return replace(p, x=p.x.repeat(counts, axis=0), noisy_labels=p.noisy_labels.repeat(counts))


def scaled(counts=COUNTS):
    return counts / counts.mean()


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_weighted_gradient_is_the_derivative_of_the_weighted_literal_likelihood(name):
    p = point_of(name)
    model, targets = WeightedModel(p.model), weighted_labels(p.noisy_labels, WEIGHTS)
    loss, gradient = model.loss_and_gradient(p.parameters, p.x, targets)

    def literal_loss(parameters: np.ndarray) -> complex:
        m = Literal.of(p.model, parameters, p.x, p.noisy_labels).m
        return -(WEIGHTS * np.log(m)).sum() / p.n

    assert abs(loss - literal_loss(p.parameters).real) <= 1e-14 * abs(loss)
    assert abs(loss - model.loss(p.parameters, p.x, targets)) <= 1e-14 * abs(loss)
    check = check_gradient(literal_loss, gradient, p.parameters, method="complex-step")
    assert check.relative_error <= 1e-13


def test_the_weighted_cross_entropy_has_the_derivative_of_its_formula():
    p = point()
    model = WeightedModel(PlainModel(p.network, "numpy"))
    targets = weighted_labels(p.noisy_labels, WEIGHTS)
    loss, gradient = model.loss_and_gradient(p.weights, p.x, targets)

    def literal_loss(weights: np.ndarray) -> complex:
        q = Literal._softmax(p.network.forward(weights, p.x)[0])
        return -(WEIGHTS * np.log(q[np.arange(p.n), p.noisy_labels])).sum() / p.n

    assert abs(loss - model.loss(p.weights, p.x, targets)) <= 1e-14 * abs(loss)
    check = check_gradient(literal_loss, gradient, p.weights, method="complex-step")
    assert check.relative_error <= 1e-13


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_counts_as_weights_are_copies_of_the_samples(name, dtype):
    p = point_of(name, backend=None)
    x, parameters = p.x.astype(dtype), p.parameters.astype(dtype)
    targets = weighted_labels(p.noisy_labels, scaled())
    a, d_a = WeightedModel(p.model).loss_and_gradient(parameters, x, targets)
    b, d_b = p.model.loss_and_gradient(
        parameters, x.repeat(COUNTS, axis=0), p.noisy_labels.repeat(COUNTS)
    )
    assert d_a.dtype == dtype
    assert abs(a - b) <= 20 * np.finfo(dtype).eps * abs(b)
    assert np.abs(d_a - d_b).max() <= 50 * np.finfo(dtype).eps * np.abs(d_b).max()


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_em_with_counts_as_weights_is_em_on_copies(name):
    p, step = point_of(name), OneGradientStep(SGD(0.5))
    options = {
        "n_rounds": 20,
        "network_step": step,
        "noise_step": step if name.endswith("c") else None,
    }
    held_out = p.x[:20], p.noisy_labels[:20]
    judges = held_out[0], weighted_labels(held_out[1], scaled(COUNTS[:20]))
    weighted = fit(
        p.model,
        p.parameters,
        p.x,
        weighted_labels(p.noisy_labels, scaled()),
        validation=judges,
        shuffling=np.random.default_rng(0),
        **options,
    )
    many = copies(p)
    repeated = fit(
        many.model,
        many.parameters,
        many.x,
        many.noisy_labels,
        validation=tuple(part.repeat(COUNTS[:20], axis=0) for part in held_out),
        shuffling=np.random.default_rng(0),
        **options,
    )
    for a, b in zip(weighted.history, repeated.history, strict=True):
        assert abs(a.loss - b.loss) <= 1e-12
        if a.validation_loss is not None:
            assert abs(a.validation_loss - b.validation_loss) <= 1e-12
    assert weighted.history[-1].loss < weighted.history[0].loss - 0.01


def test_em_with_weights_refuses_held_out_labels_without():
    p = point()
    with pytest.raises(TypeError, match="targets must be labels with weights"):
        fit(
            p.model,
            p.parameters,
            p.x,
            weighted_labels(p.noisy_labels, WEIGHTS),
            validation=(p.x, p.noisy_labels),
            network_step=OneGradientStep(SGD(0.5)),
            n_rounds=1,
            shuffling=np.random.default_rng(0),
        )


@pytest.mark.parametrize("name", ["s", "sparse-s"])
def test_the_certificate_is_that_of_v11_and_weights_count_as_copies(name):
    p = point_of(name)
    expected = statements.certificate(p)
    assert expected > 0.01
    found = certificate(p.model, p.parameters, p.x, p.noisy_labels)
    assert abs(found - expected) <= 1e-13
    weighted = certificate(p.model, p.parameters, p.x, weighted_labels(p.noisy_labels, scaled()))
    many = copies(p)
    repeated = certificate(p.model, p.parameters, many.x, many.noisy_labels)
    assert abs(weighted - repeated) <= 1e-13
    assert abs(weighted - found) > 1e-3


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_weights_count_in_the_confusion_start(kind):
    q, z = soft_targets(N, 4), point().noisy_labels
    weighted = confusion_start(q, z, kind, weights=scaled())
    repeated = confusion_start(q.repeat(COUNTS, axis=0), z.repeat(COUNTS), kind)
    assert np.abs(weighted - repeated).max() <= 1e-12
    assert np.abs(weighted - confusion_start(q, z, kind)).max() > 1e-2


def test_weights_count_in_the_clustered_start():
    q = np.full((40, 2), 0.1)
    q[:20, 0] = q[20:, 1] = 0.9
    z = np.arange(40) // 20
    z[:5] = 1  # a quarter of the first cluster, or a half if they count for three
    weights = np.where(np.arange(40) < 5, 3.0, 1.0)
    theta = np.exp(clustered_start(q, z, np.random.default_rng(0), weights=weights))
    assert abs(theta[0, 1] - 0.5) <= 1e-6


def test_weighted_labels_can_be_cut_and_are_hashed_as_labels():
    z = np.array([2, 0, 1])
    targets = weighted_labels(z, np.array([0.5, 1.0, 2.0]))
    labels, weights = parts_of(targets[[2, 0]])
    assert labels.tolist() == [1, 2]
    assert weights.tolist() == [2.0, 0.5]
    assert labels_hash(targets) == labels_hash(z)
    assert parts_of(z) == (z, None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: weighted_labels(np.zeros(2, int), np.array([1.0, 0.0])), ValueError, "positive"),
        (lambda: weighted_labels(np.zeros(2, int), np.array([1.0, np.nan])), ValueError, "finite"),
        (lambda: weighted_labels(np.zeros(2, int), np.ones(3)), ValueError, "weights must have"),
        (
            lambda: WeightedModel(SModel(point().network, 1.0, N)),
            ValueError,
            "model must have no pseudo_count; found 1.0",
        ),
        (
            lambda: WeightedModel(point().model).check(
                point().parameters, point().x, point().noisy_labels
            ),
            TypeError,
            "targets must be labels with weights",
        ),
    ],
)
def test_bad_weights_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
