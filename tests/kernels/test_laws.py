"""Laws that hold for any input (V7, V8), tried on inputs that hypothesis makes up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import kernels

EPS = np.finfo(np.float64).eps


@st.composite
def s_models(draw):
    n, k = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    scores = st.floats(-30, 30, allow_subnormal=False)
    logits = draw(arrays(np.float64, (n, k), elements=scores))
    channel = draw(arrays(np.float64, (k, k), elements=scores))
    labels = draw(arrays(np.int64, (n,), elements=st.integers(0, k - 1)))
    return logits, channel, labels


def worst(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


# Logs reach 90, so their roundings reach 90 eps; the gradients are at most 1.
BOUND = 1e4 * EPS


@pytest.mark.parametrize("backend", kernels.BACKENDS)
class TestLaws:
    @given(s_models(), st.randoms())
    @settings(deadline=None)
    def test_v7_relabelling_the_true_classes_changes_nothing(self, backend, model, random):
        logits, channel, labels = model
        order = list(range(logits.shape[1]))
        random.shuffle(order)
        here = kernels.s_model_nll(*model, backend=backend)
        there = kernels.s_model_nll(logits[:, order], channel[order], labels, backend=backend)
        assert worst(here.nll, there.nll) <= BOUND
        assert worst(here.d_logits[:, order], there.d_logits) <= BOUND
        assert worst(here.d_channel_logits[order], there.d_channel_logits) <= BOUND

    @given(s_models())
    @settings(deadline=None)
    def test_v8_identity_is_plain_cross_entropy(self, backend, model):
        logits, _, labels = model
        with np.errstate(divide="ignore"):
            identity = np.log(np.eye(logits.shape[1]))
        joint = kernels.s_model_nll(logits, identity, labels, backend=backend)
        plain = kernels.softmax_nll(logits, labels, backend=backend)
        assert worst(joint.nll, plain.nll) <= BOUND
        assert worst(joint.d_logits, plain.d_logits) <= BOUND
        assert worst(joint.d_channel_logits, 0) <= BOUND

    @given(s_models())
    @settings(deadline=None)
    def test_v8_equal_rows_are_a_dead_start(self, backend, model):
        logits, channel, labels = model
        equal_rows = np.tile(channel[0], (channel.shape[0], 1))
        joint = kernels.s_model_nll(logits, equal_rows, labels, backend=backend)
        assert worst(joint.d_logits, 0) <= BOUND

    @given(s_models())
    @settings(deadline=None)
    def test_posterior_rows_sum_to_one_and_gradients_to_zero(self, backend, model):
        e_step = kernels.s_model_posterior(*model, backend=backend)
        joint = kernels.s_model_nll(*model, backend=backend)
        assert worst(e_step.posterior.sum(axis=1), 1) <= BOUND
        assert worst(joint.d_logits.sum(axis=1), 0) <= BOUND
        assert worst(joint.d_channel_logits.sum(axis=1), 0) <= BOUND
        assert worst(joint.nll, -e_step.log_likelihood_t.mean()) <= BOUND

    @given(s_models(), st.floats(-50, 50), st.floats(-50, 50))
    @settings(deadline=None)
    def test_adding_a_constant_to_a_row_of_logits_changes_nothing(self, backend, model, a, b):
        logits, channel, labels = model
        here = kernels.s_model_nll(*model, backend=backend)
        there = kernels.s_model_nll(logits + a, channel + b, labels, backend=backend)
        assert worst(here.nll, there.nll) <= BOUND
        assert worst(here.d_logits, there.d_logits) <= BOUND
        assert worst(here.d_channel_logits, there.d_channel_logits) <= BOUND

    @given(s_models(), st.floats(0, 1))
    @settings(deadline=None)
    def test_soft_targets_mix_linearly(self, backend, model, share):
        logits, _, labels = model
        other = (labels + 1) % logits.shape[1]
        classes = np.eye(logits.shape[1])
        mixed = kernels.soft_target_nll(
            logits, share * classes[labels] + (1 - share) * classes[other], backend=backend
        )
        a = kernels.softmax_nll(logits, labels, backend=backend)
        b = kernels.softmax_nll(logits, other, backend=backend)
        assert worst(mixed.nll, share * a.nll + (1 - share) * b.nll) <= BOUND
        assert worst(mixed.d_logits, share * a.d_logits + (1 - share) * b.d_logits) <= BOUND
