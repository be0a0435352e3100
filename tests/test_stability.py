"""A hundred thousand steps at the extremes: nothing becomes NaN, and a zero of theta stays zero."""

import numpy as np
import pytest

import kernels
from nalayer import log_softmax
from tests.cases import JIT

STAGES, STEPS = 20, 5_000
N, K, D = 8, 3, 2
LOGIT_STEP, CHANNEL_STEP, WIDE_STEP = 5.0, 5.0, 0.02
"""Far above what a stable descent allows; U and h multiply each other, and grow without bound."""


def start(dtype):
    """Return labels that contradict each other and a theta at the boundary of what it may be."""
    labels = np.arange(N) % K
    tiny = np.log(np.finfo(dtype).tiny)
    channel = np.array([[0, -np.inf, tiny], [-np.inf, 0, -np.inf], [200, -200, -1e4]], dtype)
    return labels, channel


def saturated(stage, dtype, rng):
    """Return logits of +-200 and, in later stages, up to a millionth of the largest number."""
    largest = np.log10(np.finfo(dtype).max) - 6
    scale = 10 ** (np.log10(200) + (largest - np.log10(200)) * stage / (STAGES - 1))
    return (rng.choice([-1, 1], size=(N, K)) * scale).astype(dtype)


@pytest.mark.skipif(not JIT, reason="a hundred thousand steps are for compiled code")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("model", ["s_model", "c_model"])
def test_no_nan_in_a_hundred_thousand_steps(model, dtype):
    rng, kernel = np.random.default_rng(0), getattr(kernels, f"{model}_nll")
    wide = ()
    if model == "c_model":
        wide = rng.normal(size=(N, D)).astype(dtype), rng.normal(size=(K, K, D)).astype(dtype)
    steps = [dtype(LOGIT_STEP), *(dtype(WIDE_STEP) for _ in wide), dtype(CHANNEL_STEP)]
    for stage in range(STAGES):
        logits, (labels, channel) = saturated(stage, dtype, rng), start(dtype)
        zeros = np.isneginf(channel)
        parameters = [logits, *wide, channel]
        if wide and stage % 2:
            wide[0][...] = 40 * rng.choice([-1, 1], size=(N, D))  # scores of theta in the hundreds
        before, total = [value.copy() for value in parameters], 0.0
        for _ in range(STEPS):
            nll, *gradients = kernel(*parameters, labels, check_values=False)
            total += float(nll) / STEPS
            for value, step, gradient in zip(parameters, steps, gradients, strict=True):
                value -= step * gradient
        assert 0 <= total < np.inf
        kernel(*parameters, labels)  # which looks at every number
        assert np.isfinite(logits).all()
        assert all(np.isfinite(value).all() for value in wide)
        assert np.isfinite(channel[~zeros]).all()
        assert np.isneginf(channel[zeros]).all()
        assert (np.exp(log_softmax(channel))[zeros] == 0).all()
        assert any((a != b).any() for a, b in zip(before, parameters, strict=True))
