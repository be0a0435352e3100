"""V1-V11 hold: at random and awkward points, for both backends."""

from dataclasses import replace

import numpy as np
import pytest

import kernels
from em_baseline import LBFGS, fit, statements
from em_baseline.statements import Literal, Point
from nalayer import c_start, channel_logits_of, mlp, noise_matrix, scatter_links, stream
from tests.cases import MODEL_NAMES, kept, point, point_of, zeros_outside


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def without_class_0(p: Point) -> np.ndarray:
    """Return weights whose bias makes class 0 impossible to the last bit of its posterior."""
    weights = p.weights.copy()
    *_, (_, bias) = p.network.unpack(weights)
    bias[0] = -2000
    return weights


def certain(p: Point) -> Point:
    """Return softmax regression on one-hot features that knows every label: L is nearly zero."""
    network = mlp(4, (), 4)
    return Point(
        network,
        np.concatenate([20 * np.eye(4).ravel(), np.zeros(4)]),
        np.where(np.eye(4) > 0, 20.0, 0.0),
        np.eye(4)[p.noisy_labels],
        p.noisy_labels,
    )


def awkward_points() -> dict[str, Point]:
    p = point()
    sharp = np.where(np.eye(4) > 0, 0.0, np.log(1e-8)) + 0.1 * rng().normal(size=(4, 4))
    zeros = p.channel_logits.copy()
    zeros[[0, 1, 3], [1, 3, 2]] = -np.inf
    return {
        "usual": p,
        "two classes": point(k=2),
        "one sample": point(n=1),
        "softmax regression": point(hidden_sizes=()),
        "near-deterministic channel": replace(p, channel_logits=sharp),
        "zeros in theta": replace(p, channel_logits=zeros),
        "a class without posterior": replace(p, weights=without_class_0(p)),
        "certain of every label": certain(p),
        "confident classifier": replace(p, weights=3 * p.weights),
    }


def identities(p: Point) -> list[statements.Statement]:
    """Return V1-V8 at a point."""
    return [
        *statements.same_function(p),
        *statements.backward_is_e_step(p, rng()),
        *statements.fisher_identity(p, rng()),
        *statements.em_step_is_preconditioned_gradient(p),
        *statements.exact_ledger("Eq. 4", [p, p.m_step()]),
        *statements.m_step_is_maximiser(p, p.m_step(), rng()),
        *statements.relabelling_invariance(p, rng()),
        *statements.collapses(p, rng()),
    ]


@pytest.mark.parametrize("backend", kernels.CPU_BACKENDS)
@pytest.mark.parametrize("name", awkward_points())
def test_v1_to_v8_hold_to_rounding(name, backend):
    rows = identities(replace(awkward_points()[name], backend=backend))
    assert {row.statement for row in rows} == {f"V{v}" for v in range(1, 9)}
    assert {row.model for row in rows} == {"s"}
    assert not [row for row in rows if not row.holds]


def points_of_other_models() -> dict[str, Point]:
    """Return usual and awkward points of the other three models, each named by its model first.

    Few features, many samples: a c-model's regressions then have finite maximisers.
    """
    points = {}
    for model in ("sparse-s", "c", "sparse-c"):
        usual = point_of(model)
        points |= {
            f"{model}: usual": usual,
            f"{model}: two classes": point_of(model, k=2, n_in=2, hidden_sizes=(), n_kept=2),
            f"{model}: softmax regression": point_of(model, n=200, n_in=2, k=3, hidden_sizes=()),
            f"{model}: a class without posterior": replace(usual, weights=without_class_0(usual)),
            f"{model}: confident classifier": replace(usual, weights=1.5 * usual.weights),
        }
    sparse, c = point_of("sparse-s"), point_of("c", n=200, n_in=2, k=3, hidden_sizes=())
    zeros = sparse.channel_logits.copy()
    zeros[0, 1] = -np.inf
    return points | {
        "sparse-s: one link a row": kept(point(), np.array([[0], [1], [2], [3]])),
        "sparse-s: all links": kept(point(), np.tile(np.arange(4), (4, 1))),
        "sparse-s: a zero among the links": replace(sparse, channel_logits=zeros),
        "sparse-s: one sample": point_of("sparse-s", n=1),
        "sparse-s: near-deterministic channel": replace(
            sparse, channel_logits=8 * sparse.channel_logits
        ),
        "sparse-c: two links a row": point_of("sparse-c", n=200, n_kept=2),
        "c: zeros in theta": zeros_outside(point_of("sparse-c", n=200, n_in=2, hidden_sizes=())),
        "c: started from the s-model": c.with_parameters(c_start(*s_model_of(c))[1]),
    }


def s_model_of(p: Point):
    s = replace(p, channel_weights=None)
    return s.model, s.parameters


@pytest.mark.parametrize("backend", kernels.CPU_BACKENDS)
@pytest.mark.parametrize("name", points_of_other_models())
def test_v1_to_v8_hold_to_rounding_for_the_other_models(name, backend):
    p = replace(points_of_other_models()[name], backend=backend)
    rows = identities(p)
    assert {row.statement for row in rows} == {f"V{v}" for v in range(1, 9)}
    assert {row.model for row in rows} == {name.partition(":")[0]}
    assert not [row for row in rows if not row.holds]


def test_v8_has_the_collapses_of_every_model():
    words = {
        name: {row.words.partition(":")[0] for row in statements.collapses(point_of(name), rng())}
        for name in MODEL_NAMES
    }
    both = {"noise matrix = identity", "all rows of the noise matrix equal"}
    assert words["s"] == both | {"two classes, fixed noise"}
    assert words["sparse-s"] == both | {"l = k, every link kept"}
    assert words["c"] == both | {"U = 0"}
    assert words["sparse-c"] == both | {"l = k, every link kept", "U = 0"}


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_v5_accounts_for_any_step_whatever_made_it(seed, name):
    before, generator = point_of(name, seed), np.random.default_rng(seed)
    after = before.with_parameters(
        before.parameters + generator.normal(size=before.parameters.size) * 10.0**-seed
    )
    (row,) = statements.exact_ledger("random step", [before, after, before])
    assert row.holds, row
    assert statements.ledger(before, after).divergence > 0


def test_v5_survives_a_posterior_that_underflows_in_the_noise_matrix():
    p = point()
    labels = np.where(np.arange(p.n) > 0, np.where(p.noisy_labels == 1, 0, p.noisy_labels), 1)
    channel = p.channel_logits.copy()
    channel[0, 1] = -745.1  # one sample's posterior is the smallest number that a float can hold,
    before = replace(p, channel_logits=channel, noisy_labels=labels)
    after = before.m_step()
    assert before.e_step().posterior[0, 0] == 5e-324
    assert np.isneginf(after.channel_logits[0, 1])  # and divided by n_i it is zero
    (row,) = statements.exact_ledger("underflow", [before, after])
    assert row.holds, row


def test_v5_says_how_many_steps_had_a_falling_q():
    before = point()
    gradient = before.model.loss_and_gradient(before.parameters, before.x, before.noisy_labels)[1]
    uphill = before.with_parameters(before.parameters + 0.1 * gradient)
    (row,) = statements.exact_ledger("uphill", [before, uphill])
    assert "dQ < 0 in 1" in row.detail


@pytest.mark.parametrize("seed", range(3))
def test_v9_to_v11_hold_at_the_limits_of_both_methods(seed):
    p = point(seed, n=300, n_in=2, hidden_sizes=(), k=3)
    limits = statements.find_limits(p, stream(0, "shuffling"))
    rows = [
        *statements.monotone(limits.history, p.n, every_half_step=True),
        *statements.same_stationary_points(limits, stream(0, "shuffling")),
        *statements.certified("EM", limits.em),
        *statements.certified("joint", limits.joint),
        *statements.certified("start", p),
    ]
    assert {row.statement for row in rows} == {"V9", "V10", "V11"}
    assert not [row for row in rows if not row.holds]
    # At its limit EM cannot gain by another noise matrix; from the start it can.
    assert statements.certificate(limits.em) <= 1e-5 + 10 * limits.em_moved
    assert statements.certificate(p) > 1e-3


@pytest.mark.parametrize(("name", "seed"), [("sparse-s", 0), ("c", 0), ("sparse-c", 1)])
def test_v9_to_v11_hold_at_the_limits_for_the_other_models(name, seed):
    p = point_of(name, seed, n=300, n_in=2, hidden_sizes=(), k=3, n_kept=2)
    limits = statements.find_limits(p, stream(0, "shuffling"), n_rounds=1000)
    rows = [
        *statements.monotone(limits.history, p.n, every_half_step=True, model=name),
        *statements.same_stationary_points(limits, stream(0, "shuffling")),
        *statements.certified("EM", limits.em),
        *statements.certified("start", p),
    ]
    assert {row.statement for row in rows} == {"V9", "V10", "V11"}
    assert {row.model for row in rows} == {name}
    assert not [row for row in rows if not row.holds]
    assert limits.em_moved <= 1e-4  # so V10 had no lenient bound
    for end in (limits.em, limits.joint):
        assert end.links is p.links
        gain = end.e_step().log_likelihood_t.sum() - p.e_step().log_likelihood_t.sum()
        assert gain > 1


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.5])
def test_v9_holds_for_plain_em_at_several_noise_levels(noise):
    p = point(n=200, hidden_sizes=(), k=3)
    generator = np.random.default_rng(1)
    truth = (p.x[:, :3]).argmax(axis=1)
    flipped = np.where(generator.random(200) < noise, (truth + 1) % 3, truth)
    result = fit(
        p.model,
        p.parameters,
        p.x,
        flipped,
        network_step=LBFGS(1e-7),
        n_rounds=8,
        fresh_posterior=True,
        shuffling=stream(0, "shuffling"),
    )
    (row,) = statements.monotone(result.history, p.n, every_half_step=True)
    assert row.holds, row


def test_v11_is_tight_at_the_em_on_theta_and_names_the_gap_elsewhere():
    p = point()
    best = statements.em_on_theta(p)
    # Where a row ends on the boundary EM slows down, so the last digits take their time.
    assert 0 <= statements.certificate(best) <= 1e-3 * statements.certificate(p)
    gain = (best.e_step().log_likelihood_t - p.e_step().log_likelihood_t).mean()
    assert 0 < gain <= statements.certificate(p)


@pytest.mark.parametrize("name", ["c", "sparse-c"])
def test_v11_of_a_c_model_is_about_the_best_s_model_on_its_network(name):
    p = point_of(name)
    none = replace(p, channel_weights=np.zeros_like(p.channel_weights))
    alone = replace(p, channel_weights=None)
    assert abs(statements.certificate(none) - statements.certificate(alone)) <= 1e-12
    # What the c-model gained by its M-step is so much less for a single matrix to gain.
    before, after = statements.certificate(p), statements.certificate(p.m_step())
    assert after < before


def test_certificate_of_a_c_model_has_no_pseudo_counts():
    with pytest.raises(ValueError, match="pseudo_count must be 0 for a c-model"):
        statements.certificate(point_of("c"), 1.0)


def test_v4_of_a_c_model_says_where_its_integral_is_too_short(monkeypatch):
    (row,) = statements.em_step_is_preconditioned_gradient(point_of("c"))
    assert row.holds
    assert row.detail == ""
    monkeypatch.setattr(statements, "MOST_PIECES", 1)
    (row,) = statements.em_step_is_preconditioned_gradient(point_of("c"))
    assert "too far for the integral" in row.detail


def test_a_zero_that_would_like_to_grow_is_counted_as_dead():
    p = point()
    assert statements.dead_entries(p) == 0
    theta = noise_matrix(statements.em_on_theta(p).channel_logits)
    i, j = np.unravel_index(np.argmax(np.where(np.eye(4) > 0, 0, theta)), theta.shape)
    assert theta[i, j] > 0.05
    theta[i, j] = 0
    theta /= theta.sum(axis=1, keepdims=True)
    stuck = statements.em_on_theta(replace(p, channel_logits=channel_logits_of(theta)), 200)
    assert noise_matrix(stuck.channel_logits)[i, j] == 0
    assert statements.dead_entries(stuck) >= 1


def test_a_residual_of_nan_does_not_hold():
    assert not statements.Statement("V1", "nothing", np.nan, 1.0).holds


def test_the_literal_formulas_are_the_paper_s_on_a_case_worked_out_by_hand():
    # q = (3/4, 1/4), theta = ((2/3, 1/3), (1/5, 4/5)), z = 1: m = 9/20, c = (5/9, 4/9)
    logits, channel_logits = np.log([[3.0, 1.0]]), np.log([[2.0, 1.0], [1.0, 4.0]])
    literal = Literal([logits], [channel_logits], np.array([1]))
    assert abs(literal.m[0] - 9 / 20) <= 1e-15
    assert np.abs(literal.c - [[5 / 9, 4 / 9]]).max() <= 1e-15
    # dL/dtheta_01 = q_0 / m = (3/4) / (9/20) = 5/3
    assert np.abs(literal.d_theta - [[0, 5 / 3], [0, 5 / 9]]).max() <= 1e-14


def test_the_literal_formulas_of_a_sparse_model_on_a_case_worked_out_by_hand():
    # Class 0 is seen as 2 or 0, class 1 as 1 or 0, class 2 as 2 or 1; z = 1:
    # q = (1, 1, 2) / 4, theta_i1 = (0, 3/4, 1/5), m = 3/16 + 1/10 = 23/80, c = (0, 15, 8) / 23
    links = kernels.link_index(np.array([[2, 0], [1, 0], [2, 1]]))
    channel_logits = np.log([[2.0, 1.0], [3.0, 1.0], [4.0, 1.0]])
    literal = Literal([np.log([[1.0, 1.0, 2.0]])], [channel_logits], np.array([1]), links)
    assert abs(literal.m[0] - 23 / 80) <= 1e-15
    assert np.abs(literal.c - [[0, 15 / 23, 8 / 23]]).max() <= 1e-15
    theta = [[1 / 3, 0, 2 / 3], [1 / 4, 3 / 4, 0], [0, 1 / 5, 4 / 5]]
    assert np.abs(literal.theta[0] - theta).max() <= 1e-15
    assert np.abs(scatter_links(noise_matrix(channel_logits), links, 0.0) - theta).max() <= 1e-15


def test_the_literal_formulas_of_a_c_model_on_a_case_worked_out_by_hand():
    # h = 1, U_0 = (log 2, 0), U_1 = (0, log 3), B = 0: theta = ((2/3, 1/3), (1/4, 3/4)).
    # With q = (1/2, 1/2) and z = 0: m = 11/24, c = (8/11, 3/11).
    u = np.log([[[2.0], [1.0]], [[1.0], [3.0]]])
    literal = Literal([np.zeros((1, 2)), np.ones((1, 1))], [u, np.zeros((2, 2))], np.array([0]))
    assert np.abs(literal.theta - [[[2 / 3, 1 / 3], [1 / 4, 3 / 4]]]).max() <= 1e-15
    assert np.abs(literal.c - [[8 / 11, 3 / 11]]).max() <= 1e-15
    # scores: c_i (theta_ij - 1{j=0}) = 8/11 (-1/3, 1/3), 3/11 (-3/4, 3/4)
    d_scores = np.array([[-8 / 33, 8 / 33], [-9 / 44, 9 / 44]])
    (d_hidden,), (d_u, d_b) = literal.through_noise_layer(literal.d_scores(literal.c))
    assert np.abs(d_b - d_scores).max() <= 1e-15
    assert np.abs(d_u[:, :, 0] - d_scores).max() <= 1e-15
    assert abs(d_hidden[0, 0] - (d_scores * u[:, :, 0]).sum()) <= 1e-15


def test_dead_entries_of_a_sparse_model_are_links_only():
    """Where there is no link, nothing is stuck: the model has no such parameter."""
    p = kept(point(), np.array([[0, 1], [1, 2], [2, 3], [3, 0]]))
    dense = zeros_outside(p)
    assert statements.dead_entries(dense) >= 1
    assert statements.dead_entries(p) == 0
    assert statements.dead_entries(point_of("c")) == 0
    assert statements.certificate(p) <= statements.certificate(dense)
