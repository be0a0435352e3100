"""Laws that hold for any input (V7, V8), tried on inputs that hypothesis makes up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import kernels
from tests.cases import JIT

# What is not compiled is slow, and run for its indices, which the shapes alone decide.
examples = settings(deadline=None, max_examples=100 if JIT else 25)

OTHER_MODELS = ("sparse_s_model", "c_model", "sparse_c_model")

EPS = np.finfo(np.float64).eps


@st.composite
def s_models(draw):
    n, k = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    scores = st.floats(-30, 30, allow_subnormal=False)
    logits = draw(arrays(np.float64, (n, k), elements=scores))
    channel = draw(arrays(np.float64, (k, k), elements=scores))
    labels = draw(arrays(np.int64, (n,), elements=st.integers(0, k - 1)))
    return logits, channel, labels


@st.composite
def all_models(draw, names=OTHER_MODELS):
    """Draw a model's name and the arguments of its kernels; the diagonal is always a link."""
    name = draw(st.sampled_from(names))
    n, k, d = draw(st.integers(1, 6)), draw(st.integers(2, 5)), draw(st.integers(1, 3))
    n_kept = draw(st.integers(1, k)) if name.startswith("sparse") else k

    def floats(limit, *shape):
        elements = st.floats(-limit, limit, allow_subnormal=False)
        return draw(arrays(np.float64, shape, elements=elements))

    wide = (floats(3, n, d), floats(3, k, n_kept, d)) if name.endswith("c_model") else ()
    outputs, channel = (floats(30, n, k), *wide[:1]), (*wide[1:], floats(30, k, n_kept))
    links = ()
    if name.startswith("sparse"):
        others = [draw(st.permutations([j for j in range(k) if j != i])) for i in range(k)]
        links = (
            kernels.link_index(np.array([[i, *o[: n_kept - 1]] for i, o in enumerate(others)])),
        )
    labels = draw(arrays(np.int64, (n,), elements=st.integers(0, k - 1)))
    return name, outputs, channel, links, labels


def call(name, result, outputs, channel, links, labels, backend):
    kernel = getattr(kernels, f"{name}_{result}")
    return kernel(*outputs, *channel, *links, labels, backend=backend)


def dense_name(name: str) -> str:
    return name.removeprefix("sparse_")


def worst(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


# Logs reach 90, so their roundings reach 90 eps; the gradients are at most 1.
BOUND = 1e4 * EPS


@pytest.mark.parametrize("backend", kernels.CPU_BACKENDS)
class TestLaws:
    @given(s_models(), st.randoms())
    @examples
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
    @examples
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
    @examples
    def test_v8_equal_rows_are_a_dead_start(self, backend, model):
        logits, channel, labels = model
        equal_rows = np.tile(channel[0], (channel.shape[0], 1))
        joint = kernels.s_model_nll(logits, equal_rows, labels, backend=backend)
        assert worst(joint.d_logits, 0) <= BOUND

    @given(s_models())
    @examples
    def test_posterior_rows_sum_to_one_and_gradients_to_zero(self, backend, model):
        e_step = kernels.s_model_posterior(*model, backend=backend)
        joint = kernels.s_model_nll(*model, backend=backend)
        assert worst(e_step.posterior.sum(axis=1), 1) <= BOUND
        assert worst(joint.d_logits.sum(axis=1), 0) <= BOUND
        assert worst(joint.d_channel_logits.sum(axis=1), 0) <= BOUND
        assert worst(joint.nll, -e_step.log_likelihood_t.mean()) <= BOUND

    @given(s_models(), st.floats(-50, 50), st.floats(-50, 50))
    @examples
    def test_adding_a_constant_to_a_row_of_logits_changes_nothing(self, backend, model, a, b):
        logits, channel, labels = model
        here = kernels.s_model_nll(*model, backend=backend)
        there = kernels.s_model_nll(logits + a, channel + b, labels, backend=backend)
        assert worst(here.nll, there.nll) <= BOUND
        assert worst(here.d_logits, there.d_logits) <= BOUND
        assert worst(here.d_channel_logits, there.d_channel_logits) <= BOUND

    @given(s_models(), st.floats(0, 1))
    @examples
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


# Sums of up to 15 terms as large as h or u, 3, and scores that reach 60.
WIDE_BOUND = 100 * BOUND


@pytest.mark.parametrize("backend", kernels.CPU_BACKENDS)
class TestLawsOfTheOtherModels:
    @given(all_models(), st.randoms())
    @examples
    def test_v7_relabelling_the_true_classes_changes_nothing(self, backend, model, random):
        name, (logits, *hidden), channel, links, labels = model
        order = list(range(logits.shape[1]))
        random.shuffle(order)
        nll, d_logits, *here = call(name, "nll", *model[1:], backend)
        renamed_nll, d_renamed_logits, *there = call(
            name,
            "nll",
            (logits[:, order], *hidden),
            [values[order] for values in channel],
            [kernels.link_index(index.support[order]) for index in links],
            labels,
            backend,
        )
        assert worst(nll, renamed_nll) <= WIDE_BOUND
        assert worst(d_logits[:, order], d_renamed_logits) <= WIDE_BOUND
        for d_hidden, d_same in zip(here[: len(hidden)], there, strict=False):
            assert worst(d_hidden, d_same) <= WIDE_BOUND
        d_channel, d_renamed = here[len(hidden) :], there[len(hidden) :]
        for d_values, d_moved in zip(d_channel, d_renamed, strict=True):
            assert worst(d_values[order], d_moved) <= WIDE_BOUND

    @given(all_models())
    @examples
    def test_posterior_rows_sum_to_one_and_gradients_to_zero(self, backend, model):
        name, (_, *hidden), *_ = model
        e_step = call(name, "posterior", *model[1:], backend)
        joint = call(name, "nll", *model[1:], backend)
        assert worst(e_step.posterior.sum(axis=1), 1) <= WIDE_BOUND
        assert worst(joint.d_logits.sum(axis=1), 0) <= WIDE_BOUND
        assert worst(joint.nll, -e_step.log_likelihood_t.mean()) <= WIDE_BOUND
        for d_values in joint[2 + len(hidden) :]:  # over the links of every row
            assert worst(d_values.sum(axis=1), 0) <= WIDE_BOUND

    @given(all_models(), st.floats(-50, 50), st.floats(-50, 50))
    @examples
    def test_adding_a_constant_to_a_row_of_scores_changes_nothing(self, backend, model, a, b):
        name, (logits, *hidden), channel, links, labels = model
        here = call(name, "nll", *model[1:], backend)
        # A vector added to every u_i1 ... u_il adds the same number to all scores of a row.
        moved = [*(u + b / 50 for u in channel[:-1]), channel[-1] + b]
        there = call(name, "nll", (logits + a, *hidden), moved, links, labels, backend)
        for value, same in zip(here, there, strict=True):
            assert worst(value, same) <= WIDE_BOUND

    @given(all_models())
    @examples
    def test_a_posterior_is_zero_where_no_link_leads_to_the_label(self, backend, model):
        name, _, _, links, labels = model
        posterior = call(name, "posterior", *model[1:], backend).posterior
        for index in links:
            linked = (index.support[None] == labels[:, None, None]).any(axis=2)
            assert not posterior[~linked].any()

    @given(all_models(("sparse_s_model", "sparse_c_model")))
    @examples
    def test_a_sparse_model_is_the_dense_one_with_zeros_outside_its_links(self, backend, model):
        name, outputs, channel, (index,), labels = model
        k = outputs[0].shape[1]
        rows = np.arange(k)[:, None]
        dense = [np.zeros((k, k, *values.shape[2:])) for values in channel]
        dense[-1][:] = -np.inf
        for whole, values in zip(dense, channel, strict=True):
            whole[rows, index.support] = values
        sparse = call(name, "nll", *model[1:], backend)
        whole = call(dense_name(name), "nll", outputs, dense, (), labels, backend)
        n_outputs = 1 + len(outputs)
        for a, b in zip(sparse[:n_outputs], whole[:n_outputs], strict=True):
            assert worst(a, b) <= WIDE_BOUND
        for a, b in zip(sparse[n_outputs:], whole[n_outputs:], strict=True):
            assert worst(a, b[rows, index.support]) <= WIDE_BOUND

    @given(all_models(("c_model", "sparse_c_model")))
    @examples
    def test_v8_without_weights_it_is_the_s_model(self, backend, model):
        name, outputs, (u, channel_logits), links, labels = model
        c = call(name, "nll", outputs, (0 * u, channel_logits), links, labels, backend)
        s_name = name.replace("c_model", "s_model")
        s = call(s_name, "nll", outputs[:1], (channel_logits,), links, labels, backend)
        assert worst(c.nll, s.nll) <= BOUND
        assert worst(c.d_logits, s.d_logits) <= BOUND
        assert worst(c.d_channel_logits, s.d_channel_logits) <= BOUND
        assert not c.d_hidden.any()

    @given(all_models(("sparse_s_model", "sparse_c_model")))
    @examples
    def test_v8_one_link_a_row_on_the_diagonal_is_plain_cross_entropy(self, backend, model):
        name, outputs, channel, _, labels = model
        diagonal = kernels.link_index(np.arange(outputs[0].shape[1])[:, None])
        one = [values[:, :1] for values in channel]
        joint = call(name, "nll", outputs, one, (diagonal,), labels, backend)
        plain = kernels.softmax_nll(outputs[0], labels, backend=backend)
        assert worst(joint.nll, plain.nll) <= BOUND
        assert worst(joint.d_logits, plain.d_logits) <= BOUND
        for nothing in joint[2:]:
            assert worst(nothing, 0) <= BOUND

    @given(all_models())
    @examples
    def test_v8_equal_rows_are_a_dead_start_for_the_logits(self, backend, model):
        name, outputs, channel, links, labels = model
        k = outputs[0].shape[1]
        equal = [np.tile(values[:1], (k, *(1,) * (values.ndim - 1))) for values in channel]
        for index in links:
            labels = index.support[0][labels % index.support.shape[1]]
        rows = [kernels.link_index(np.tile(index.support[:1], (k, 1))) for index in links]
        joint = call(name, "nll", outputs, equal, rows, labels, backend)
        assert worst(joint.d_logits, 0) <= WIDE_BOUND
