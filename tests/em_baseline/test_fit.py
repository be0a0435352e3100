import warnings

import numpy as np
import pytest

import em_baseline
from em_baseline import LBFGS, LikelihoodDropWarning, MiniBatches, OneGradientStep, fit
from em_baseline.alternating import HalfStep, rounding_of
from em_baseline.statements import Literal, monotone
from nalayer import SGD, SModel, labels_hash, noise_matrix, stream
from tests.cases import point

P = point(n=80, hidden_sizes=())
DATA = (P.x[:60], P.noisy_labels[:60])


def run(p=P, data=DATA, **options):
    defaults = {
        "network_step": LBFGS(),
        "n_rounds": 6,
        "shuffling": stream(0, "shuffling"),
        "backend": "numpy",
    }
    return fit(p.network, p.weights, p.channel_logits, *data, **(defaults | options))


def literal_likelihood(p, weights, channel_logits, data) -> float:
    literal = Literal(p.network.logits(weights, data[0]), channel_logits, data[1])
    return literal.log_likelihood.real


@pytest.mark.parametrize("step", [LBFGS(), MiniBatches(2, 16)], ids=["lbfgs", "mini-batches"])
def test_history_belongs_to_the_parameters_of_its_half_step(step):
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LikelihoodDropWarning)
        result = run(network_step=step, on_half_step=lambda *state: seen.append(state))
    assert [(s.round, s.half) for s, *_ in seen[:3]] == [
        (0, "start"),
        (1, "noise matrix"),
        (1, "network"),
    ]
    assert [s for s, *_ in seen] == result.history
    for half_step, weights, channel_logits in seen:
        likelihood = literal_likelihood(P, weights, channel_logits, DATA)
        assert abs(half_step.log_likelihood - likelihood) <= 1e-13 * abs(likelihood)
        assert half_step.loss == -half_step.log_likelihood / 60


def test_the_result_is_the_last_half_step_without_validation():
    result = run()
    likelihood = literal_likelihood(P, result.weights, result.channel_logits, DATA)
    assert abs(result.history[-1].log_likelihood - likelihood) <= 1e-13 * abs(likelihood)
    assert result.best == result.history[-1]
    assert result.labels_hash == labels_hash(DATA[1])


def test_with_validation_the_best_round_comes_back():
    held_out = (P.x[60:], P.noisy_labels[60:])
    result = run(n_rounds=30, validation=held_out, patience=2)
    losses = {s.round: s.validation_loss for s in result.history if s.half != "noise matrix"}
    assert result.best.round == min(losses, key=losses.get)
    assert len(losses) == result.best.round + 1 + 3
    model = SModel(P.network)
    found = model.loss(model.pack(result.weights, result.channel_logits), *held_out)
    assert abs(found - result.best.validation_loss) <= 1e-14


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fresh", [True, False])
def test_exact_em_never_lowers_the_likelihood(seed, fresh):
    p = point(seed=seed, n=80, hidden_sizes=())
    with warnings.catch_warnings():
        # In plain order a network half-step may give back part of what the first half gained.
        warnings.simplefilter("error" if fresh else "ignore", LikelihoodDropWarning)
        result = run(p, (p.x, p.noisy_labels), fresh_posterior=fresh, n_rounds=15)
    (statement,) = monotone(result.history, p.n, every_half_step=fresh)
    assert statement.holds, statement
    assert result.history[-1].log_likelihood > result.history[0].log_likelihood


def test_a_falling_likelihood_is_warned_of_with_its_amount():
    with pytest.warns(LikelihoodDropWarning, match=r"half-step 'network' of round 1 lowered .* by"):
        result = run(network_step=OneGradientStep(SGD(-1.0)), n_rounds=1)
    drop = result.history[1].log_likelihood - result.history[2].log_likelihood
    assert drop > rounding_of(result.history[2].log_likelihood, 60)


def test_damping_moves_the_noise_matrix_by_its_share_and_still_climbs():
    whole, part = (run(n_rounds=1, damping=eta) for eta in (1.0, 0.25))
    start = noise_matrix(P.channel_logits)
    moved = [noise_matrix(r.channel_logits) - start for r in (whole, part)]
    assert np.abs(moved[1] - 0.25 * moved[0]).max() <= 1e-15
    assert part.history[1].log_likelihood > part.history[0].log_likelihood


def test_pseudo_counts_are_in_the_likelihood_and_keep_theta_inside():
    alpha = 1.5
    result = run(pseudo_count=alpha, fresh_posterior=True)
    theta = noise_matrix(result.channel_logits)
    likelihood = literal_likelihood(P, result.weights, result.channel_logits, DATA)
    penalised = likelihood + alpha * np.log(theta).sum()
    assert abs(result.history[-1].log_likelihood - penalised) <= 1e-12 * abs(penalised)
    assert theta.min() > alpha / (60 + 4 * alpha)
    model = SModel(P.network, alpha, 60)
    joint = model.loss(model.pack(result.weights, result.channel_logits), *DATA)
    assert abs(joint - result.history[-1].loss) <= 1e-14


def test_the_tolerance_ends_the_rounds():
    result = run(n_rounds=10_000, tolerance=1e-4, fresh_posterior=True)
    assert 2 < result.history[-1].round < 1000
    last, before = result.history[-1], result.history[-3]
    assert abs(last.loss - before.loss) <= 1e-4


def test_a_label_that_no_sample_has_becomes_an_exact_zero_column():
    labels = np.where(DATA[1] == 3, 0, DATA[1])
    result = run(data=(DATA[0], labels))
    assert np.isneginf(result.channel_logits[:, 3]).all()
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
        ({"damping": 0.0}, r"damping must lie in \(0, 1\]; found 0.0"),
        ({"damping": 1.5}, r"damping must lie in \(0, 1\]; found 1.5"),
        ({"pseudo_count": -1}, "pseudo_count must be finite and at least 0"),
        ({"data": (P.x[:60] * np.nan, DATA[1])}, "x must be finite"),
        ({"data": (P.x[:60], DATA[1] + 4)}, r"noisy_labels must lie in 0\.\.3"),
        ({"data": (P.x[:0], DATA[1][:0])}, "x must hold at least one sample"),
        ({"validation": (P.x[:3, :2], DATA[1][:3])}, "x must have shape"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_noise_matrix_with_a_zero_row_is_refused():
    channel = P.channel_logits.copy()
    channel[1] = -np.inf
    with pytest.raises(ValueError, match="channel_logits: row 1 holds only -inf"):
        fit(
            P.network,
            P.weights,
            channel,
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
            p.network,
            p.weights.astype(np.float32),
            p.channel_logits.astype(np.float32),
            p.x.astype(np.float32),
            p.noisy_labels,
            network_step=OneGradientStep(SGD(1.0)),
            n_rounds=600,
            fresh_posterior=True,
            shuffling=stream(0, "shuffling"),
        )
    # Near its end EM trembles by roundings of float32, which those of float64 would call a fall.
    assert rounding_of(-80.0, 60, np.float32) == 2**29 * rounding_of(-80.0, 60)
    assert result.weights.dtype == result.channel_logits.dtype == np.float32


def test_public_names_are_there():
    assert all(hasattr(em_baseline, name) for name in em_baseline.__all__)
    assert HalfStep.__doc__
