import warnings
from dataclasses import replace

import numpy as np
import pytest

import em_baseline
from em_baseline import LBFGS, LikelihoodDropWarning, MiniBatches, OneGradientStep, fit
from em_baseline.alternating import HalfStep, rounding_of
from em_baseline.statements import Literal, exact_ledger, ledger, monotone
from nalayer import SGD, Adam, SModel, c_start, gather_links, labels_hash, noise_matrix, stream
from nalayer.losses import DirichletPriorModel
from tests.cases import MODEL_NAMES, point, point_of, zeros_outside

P = point(n=80, hidden_sizes=())
DATA = (P.x[:60], P.noisy_labels[:60])
NEVER_3 = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]])


def run(p=P, data=DATA, model=None, **options):
    defaults = {
        "network_step": LBFGS(),
        "n_rounds": 6,
        "shuffling": stream(0, "shuffling"),
    }
    if p.channel_weights is not None:
        defaults["noise_step"] = LBFGS()
    return fit(model or p.model, p.parameters, *data, **(defaults | options))


def literal_likelihood(p, parameters, data) -> float:
    return Literal.of(p.model, parameters, *data).log_likelihood.real


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("step", [LBFGS(), MiniBatches(2, 16)], ids=["lbfgs", "mini-batches"])
def test_history_belongs_to_the_parameters_of_its_half_step(step, name):
    p, seen = point_of(name, n=80, hidden_sizes=()), []
    noise_step = {"noise_step": step} if name.endswith("c") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LikelihoodDropWarning)
        result = run(
            p,
            n_rounds=3,
            network_step=step,
            on_half_step=lambda *state: seen.append(state),
            **noise_step,
        )
    assert [(s.round, s.half) for s, *_ in seen[:3]] == [
        (0, "start"),
        (1, "noise matrix"),
        (1, "network"),
    ]
    assert [s for s, *_ in seen] == result.history
    for half_step, parameters in seen:
        likelihood = literal_likelihood(p, parameters, DATA)
        assert abs(half_step.log_likelihood - likelihood) <= 1e-13 * abs(likelihood)
        assert half_step.loss == -half_step.log_likelihood / 60


def test_the_result_is_the_last_half_step_without_validation():
    result = run()
    likelihood = literal_likelihood(P, result.parameters, DATA)
    assert abs(result.history[-1].log_likelihood - likelihood) <= 1e-13 * abs(likelihood)
    assert result.best == result.history[-1]
    assert result.labels_hash == labels_hash(DATA[1])


def test_with_validation_the_best_round_comes_back():
    held_out = (P.x[60:], P.noisy_labels[60:])
    result = run(n_rounds=30, validation=held_out, patience=2)
    losses = {s.round: s.validation_loss for s in result.history if s.half != "noise matrix"}
    assert result.best.round == min(losses, key=losses.get)
    assert len(losses) == result.best.round + 1 + 3
    found = SModel(P.network).loss(result.parameters, *held_out)
    assert abs(found - result.best.validation_loss) <= 1e-14


@pytest.mark.parametrize(
    ("name", "seed"), [("s", 0), ("s", 1), ("s", 2), ("sparse-s", 0), ("c", 0), ("sparse-c", 0)]
)
@pytest.mark.parametrize("fresh", [True, False])
def test_exact_em_never_lowers_the_likelihood(name, seed, fresh):
    # Few features and many samples keep the maximisers of Q finite.
    p = point_of(name, seed, n=300, n_in=2, k=3, hidden_sizes=())
    with warnings.catch_warnings():
        # In plain order a network half-step may give back part of what the first half gained.
        warnings.simplefilter("error" if fresh else "ignore", LikelihoodDropWarning)
        result = run(p, (p.x, p.noisy_labels), fresh_posterior=fresh, n_rounds=15)
    (statement,) = monotone(result.history, p.n, every_half_step=fresh, model=name)
    assert statement.holds, statement
    assert statement.model == name
    assert result.history[-1].log_likelihood > result.history[0].log_likelihood


def test_a_falling_likelihood_is_warned_of_with_its_amount():
    with pytest.warns(LikelihoodDropWarning, match=r"half-step 'network' of round 1 lowered .* by"):
        result = run(network_step=OneGradientStep(SGD(-1.0)), n_rounds=1)
    drop = result.history[1].log_likelihood - result.history[2].log_likelihood
    assert drop > rounding_of(result.history[2].log_likelihood, 60)


def channel_of(result, p=P) -> np.ndarray:
    """Return the channel logits that a fit ended with."""
    return p.model.unpack(result.parameters)[-1]


def test_damping_moves_the_noise_matrix_by_its_share_and_still_climbs():
    whole, part = (run(n_rounds=1, damping=eta) for eta in (1.0, 0.25))
    start = noise_matrix(P.channel_logits)
    moved = [noise_matrix(channel_of(r)) - start for r in (whole, part)]
    assert np.abs(moved[1] - 0.25 * moved[0]).max() <= 1e-15
    assert part.history[1].log_likelihood > part.history[0].log_likelihood


def test_pseudo_counts_are_in_the_likelihood_and_keep_theta_inside():
    alpha = 1.5
    model = SModel(P.network, alpha, 60)
    result = run(model=model, fresh_posterior=True)
    theta = noise_matrix(channel_of(result))
    likelihood = literal_likelihood(P, result.parameters, DATA)
    penalised = likelihood + alpha * np.log(theta).sum()
    assert abs(result.history[-1].log_likelihood - penalised) <= 1e-12 * abs(penalised)
    assert theta.min() > alpha / (60 + 4 * alpha)
    joint = model.loss(result.parameters, *DATA)
    assert abs(joint - result.history[-1].loss) <= 1e-14


def test_the_tolerance_ends_the_rounds():
    result = run(n_rounds=10_000, tolerance=1e-4, fresh_posterior=True)
    assert 2 < result.history[-1].round < 1000
    last, before = result.history[-1], result.history[-3]
    assert abs(last.loss - before.loss) <= 1e-4


def test_a_label_that_no_sample_has_becomes_an_exact_zero_column():
    labels = np.where(DATA[1] == 3, 0, DATA[1])
    result = run(data=(DATA[0], labels))
    assert np.isneginf(channel_of(result)[:, 3]).all()
    assert np.isfinite(result.history[-1].log_likelihood)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_rounds": -1}, "n_rounds must be at least 0; found -1"),
        ({"patience": -1}, "patience must be at least 0; found -1"),
        (
            {"data": (P.x[:60], np.minimum(DATA[1], 2)), "validation": (P.x[:1], np.array([3]))},
            "validation holds label 3, which no training sample has",
        ),
        (
            {
                "data": (P.x[:60], np.minimum(DATA[1], 2)),
                "validation": (P.x[:1], np.array([3])),
                "model": DirichletPriorModel(P.network, 1.0, 60, prior_mode=NEVER_3),
            },
            "validation holds label 3, which no training sample has",
        ),
        ({"damping": 0.0}, r"damping must lie in \(0, 1\]; found 0.0"),
        ({"damping": 1.5}, r"damping must lie in \(0, 1\]; found 1.5"),
        ({"model": SModel(P.network, 1.0, 80)}, r"model.n_samples must be 60.*found 80"),
        ({"noise_step": LBFGS()}, "noise_step must be None for an s-model"),
        ({"data": (P.x[:60] * np.nan, DATA[1])}, "x must be finite"),
        ({"data": (P.x[:60], DATA[1] + 4)}, r"noisy_labels must lie in 0\.\.3"),
        ({"data": (P.x[:0], DATA[1][:0])}, "x must hold at least one sample"),
        ({"validation": (P.x[:3, :2], DATA[1][:3])}, "x must have shape"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize("name", ["s", "sparse-s"])
def test_a_pseudo_count_lets_labels_be_held_out_that_were_never_seen(name):
    p = point_of(name, n=80, hidden_sizes=())
    data, held_out = (P.x[:60], np.minimum(DATA[1], 2)), (P.x[:1], np.array([3]))
    prior = np.full((4, p.model.n_kept), 1 / p.model.n_kept)
    for model in (
        replace(p.model, pseudo_count=1.0, n_samples=60),
        DirichletPriorModel(p.network, 1.0, 60, links=p.links, prior_mode=prior),
    ):
        result = run(p, data, model=model, validation=held_out)
        assert np.isfinite([s.validation_loss for s in result.history[::2]]).all()


def test_a_noise_matrix_with_a_zero_row_is_refused():
    channel = P.channel_logits.copy()
    channel[1] = -np.inf
    with pytest.raises(ValueError, match="channel_logits: row 1 holds only -inf"):
        fit(
            P.model,
            P.model.pack(P.weights, channel),
            *DATA,
            network_step=LBFGS(),
            n_rounds=1,
            shuffling=stream(0, "shuffling"),
        )


def test_float32_has_its_own_rounding_and_no_false_alarms():
    p = point(hidden_sizes=())
    with warnings.catch_warnings():
        warnings.simplefilter("error", LikelihoodDropWarning)
        result = fit(
            SModel(p.network),
            p.parameters.astype(np.float32),
            p.x.astype(np.float32),
            p.noisy_labels,
            network_step=OneGradientStep(SGD(1.0)),
            n_rounds=600,
            fresh_posterior=True,
            shuffling=stream(0, "shuffling"),
        )
    # Near its end EM trembles by roundings of float32, which those of float64 would call a fall.
    assert rounding_of(-80.0, 60, np.float32) == 2**29 * rounding_of(-80.0, 60)
    assert result.parameters.dtype == np.float32


@pytest.mark.parametrize("name", ["sparse-s", "sparse-c"])
@pytest.mark.parametrize("fresh", [True, False])
def test_dense_em_started_with_zeros_outside_the_links_is_sparse_em(name, fresh):
    """EM preserves zeros of theta, so it *is* the sparse model's EM: iterate by iterate."""
    sparse = point_of(name, n=80)
    dense = zeros_outside(sparse)
    paths = []
    for p in (sparse, dense):
        steps = {"network_step": MiniBatches(2, 16)}
        if name.endswith("c"):
            steps["noise_step"] = MiniBatches(2, 16, SGD(0.5))
        path = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LikelihoodDropWarning)
            run(
                p,
                fresh_posterior=fresh,
                on_half_step=lambda step, parameters, to=path: to.append((step, parameters)),
                shuffling=stream(0, "shuffling"),
                **steps,
            )
        paths.append(path)
    assert len(paths[0]) == len(paths[1]) == 13
    for (step, parameters), (dense_step, dense_parameters) in zip(*paths, strict=True):
        assert abs(step.loss - dense_step.loss) <= 1e-12
        weights, *channel = sparse.model.unpack(parameters)
        dense_weights, *dense_channel = dense.model.unpack(dense_parameters)
        assert np.abs(weights - dense_weights).max() <= 1e-10
        dead = ~np.isfinite(dense.channel_logits)
        assert np.array_equal(~np.isfinite(dense_channel[-1]), dead)
        for values, whole in zip(channel, dense_channel, strict=True):
            assert np.abs(values - gather_links(whole, sparse.links)).max() <= 1e-10


@pytest.mark.parametrize("name", ["c", "sparse-c"])
@pytest.mark.parametrize(
    "noise_step",
    [OneGradientStep(SGD(0.3)), MiniBatches(3, 16), LBFGS(1e-4)],
    ids=["one gradient", "epochs", "lbfgs"],
)
def test_v5_accounts_for_every_half_step_of_generalised_em(name, noise_step):
    p, seen = point_of(name, n=80), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LikelihoodDropWarning)
        result = run(
            p,
            (p.x, p.noisy_labels),
            network_step=MiniBatches(2, 16),
            noise_step=noise_step,
            on_half_step=lambda step, parameters: seen.append(p.with_parameters(parameters)),
        )
    (row,) = exact_ledger("generalised EM", seen)
    assert row.holds, row
    assert row.model == name
    assert len(seen) == len(result.history) == 13
    # Every second step is the noise layer's: it moves the channel and leaves the network alone.
    for start, noise, network in zip(seen[0::2], seen[1::2], seen[2::2], strict=False):
        assert np.array_equal(start.weights, noise.weights)
        assert np.array_equal(noise.channel_weights, network.channel_weights)
        assert np.abs(noise.channel_weights - start.channel_weights).max() > 0
    # A small or an exact step of the noise layer, with the posterior of where it starts, climbs.
    if not isinstance(noise_step, MiniBatches):
        gains = [ledger(a, b).expected for a, b in zip(seen[0::2], seen[1::2], strict=False)]
        assert min(gains) > 0


@pytest.mark.parametrize("name", ["s", "sparse-s"])
def test_em_of_a_c_model_goes_on_from_an_s_model(name):
    p = point_of(name, n=300, n_in=2, k=3, hidden_sizes=())
    data = (p.x, p.noisy_labels)
    s = run(p, data, fresh_posterior=True, n_rounds=30)
    model, start = c_start(p.model, s.parameters)
    c = fit(
        model,
        start,
        *data,
        network_step=LBFGS(),
        noise_step=LBFGS(),
        n_rounds=6,
        fresh_posterior=True,
        shuffling=stream(0, "shuffling"),
    )
    assert abs(c.history[0].log_likelihood - s.history[-1].log_likelihood) <= 1e-10
    assert c.history[-1].log_likelihood > s.history[-1].log_likelihood + 1
    assert model.unpack(c.parameters)[1].any()


def test_gradients_of_both_halves_are_counted():
    p = point_of("c", n=80)
    result = run(p, network_step=OneGradientStep(SGD(0.1)), noise_step=MiniBatches(2, 20))
    assert [step.gradients for step in result.history[:5]] == [0, 6, 7, 13, 14]


def test_the_optimiser_of_the_noise_layer_lives_on():
    """Adam's second round goes on with the moments of the first."""
    p = point_of("c", n=80)
    twice, once = (
        run(
            p,
            n_rounds=n_rounds,
            network_step=OneGradientStep(SGD(0.0)),
            noise_step=OneGradientStep(Adam(0.1)),
        )
        for n_rounds in (2, 1)
    )
    again = run(
        p.with_parameters(once.parameters),
        n_rounds=1,
        network_step=OneGradientStep(SGD(0.0)),
        noise_step=OneGradientStep(Adam(0.1)),
    )
    assert np.abs(twice.parameters - again.parameters).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_step": None}, "noise_step must say how to fit a c-model's noise layer"),
        ({"damping": 0.5}, "damping must be 1 for a c-model.*found 0.5"),
    ],
)
def test_settings_that_a_c_model_has_no_use_for_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(point_of("c", n=80), **options)


def test_a_c_model_may_hold_out_labels_that_it_never_saw():
    """Its regressions never reach an exact zero, unlike Eq. 4."""
    p = point_of("c", n=80)
    data = (P.x[:60], np.minimum(DATA[1], 2))
    held_out = (P.x[:1], np.array([3]))
    result = run(p, data, validation=held_out, noise_step=MiniBatches(), network_step=MiniBatches())
    assert np.isfinite(result.best.validation_loss)


def test_public_names_are_there():
    assert all(hasattr(em_baseline, name) for name in em_baseline.__all__)
    assert HalfStep.__doc__
