"""The checks reject every known wrong implementation; if one passes, they are not finished."""

import argparse
from dataclasses import replace

import numpy as np
import pytest

import em_baseline
import kernels
import nalayer
from benchmarks import equivalence
from em_baseline import LBFGS, alternating, statements, steps
from kernels import compare
from nalayer import SModel, check_gradient, stream, train, training
from nalayer.datasets import load_dataset
from nalayer.training import Epoch
from tests import mutants
from tests.cases import MODEL_NAMES, REGIMES, model_inputs, point, point_of, s_model_inputs
from tests.nalayer import test_training

P = point()


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def failing(rows: list[statements.Statement]) -> set[str]:
    return {row.statement for row in rows if not row.holds}


def identities(p: statements.Point = P) -> list[statements.Statement]:
    """Return V1-V8 at a point."""
    after = p.m_step()
    return [
        *statements.same_function(p),
        *statements.backward_is_e_step(p, rng()),
        *statements.fisher_identity(p, rng()),
        *statements.em_step_is_preconditioned_gradient(p),
        *statements.exact_ledger("Eq. 4", [p, after]),
        *statements.m_step_is_maximiser(p, after, rng()),
        *statements.relabelling_invariance(p, rng()),
        *statements.collapses(p, rng()),
    ]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_right_implementation_passes_what_the_mutants_have_to_fail(name):
    assert failing(identities(point_of(name))) == set()


# --- mutants of the loss and its gradient -------------------------------------------------------

# What each has to be caught by, besides the comparison with the exact values.
CAUGHT_BY = {
    "theta_transposed": {"V1", "V2", "V3", "V4", "V7"},
    "logits_fed_where_probabilities_belong": {"V1", "V2", "V3", "V4", "V8"},
    "k_binary_log_losses": {"V1", "V2", "V3", "V4", "V8"},
    "posterior_not_normalised": {"V2", "V3", "V4", "V8"},
    "log_of_p_plus_1e_8": {"V1", "V2", "V3", "V4"},
    "last_sample_lost": {"V1", "V2", "V3", "V4", "V8"},
    "sum_where_the_mean_belongs": {"V1", "V2", "V3", "V4", "V8"},
    "gradients_swapped_in_sign": {"V2", "V3", "V4", "V8"},
}


@pytest.mark.parametrize("name", mutants.KERNELS)
def test_kernel_mutant_is_rejected_by_the_exact_values(name):
    found = [
        compare.worst_error("s_model_nll", mutants.KERNELS[name](*arrays), *arrays)
        for regime in REGIMES
        if regime not in ("minus infinity", "saturated")
        for arrays in [s_model_inputs(regime, 40, 5)]
    ]
    assert any(not worst <= compare.ALLOWED_UNITS for worst in found)


@pytest.mark.parametrize("name", mutants.KERNELS)
def test_kernel_mutant_is_rejected_by_the_statements(name, monkeypatch):
    monkeypatch.setattr(kernels, "s_model_nll", mutants.KERNELS[name])
    assert CAUGHT_BY[name] <= failing(identities())


def test_every_kernel_mutant_is_tried():
    assert set(CAUGHT_BY) == set(mutants.KERNELS)


# The same for the kernels of the other models.
OTHERS_CAUGHT_BY = {
    "hidden_gradient_lost": {"V2", "V3"},
    "hidden_gradient_with_the_wrong_sign": {"V2", "V3"},
    "last_kept_link_dropped": {"V1", "V2", "V3"},
    "transposed_index_stale": {"V1", "V2", "V3"},
}
OTHERS = [
    pytest.param(mutant, model, id=f"{mutant.__name__}-{model}")
    for mutant, models in mutants.OTHER_KERNELS.items()
    for model in models
]


def test_every_mutant_of_the_other_kernels_is_tried():
    assert {mutant.__name__ for mutant in mutants.OTHER_KERNELS} == set(OTHERS_CAUGHT_BY)


@pytest.mark.parametrize(("mutant", "model"), OTHERS)
def test_mutant_of_another_kernel_is_rejected_by_the_exact_values(mutant, model):
    arrays = model_inputs(model, "usual", 30, 5)
    right = getattr(kernels, f"{model}_nll")(*arrays, backend="numpy")
    kernel = f"{model}_nll"
    assert compare.worst_error(kernel, right, *arrays) <= compare.ALLOWED_UNITS
    assert not compare.worst_error(kernel, mutant(*arrays), *arrays) <= compare.ALLOWED_UNITS


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("mutant", "model"), OTHERS)
def test_mutant_of_another_kernel_is_rejected_by_the_statements(mutant, model, monkeypatch):
    p = point_of(model.removesuffix("_model").replace("_", "-"))
    monkeypatch.setattr(kernels, f"{model}_nll", mutant)
    assert OTHERS_CAUGHT_BY[mutant.__name__] <= failing(identities(p))


@pytest.mark.parametrize(("mutant", "model"), OTHERS)
def test_mutant_of_another_kernel_is_rejected_by_the_gradient_check(mutant, model, monkeypatch):
    p = point_of(model.removesuffix("_model").replace("_", "-"))

    def relative_error() -> float:
        _, gradient = p.model.loss_and_gradient(p.parameters, p.x, p.noisy_labels)
        return check_gradient(
            lambda at: (
                -statements.Literal.of(p.model, at, p.x, p.noisy_labels).log_likelihood / p.n
            ),
            gradient,
            p.parameters,
            method="complex-step",
        ).relative_error

    assert relative_error() <= 1e-13
    monkeypatch.setattr(kernels, f"{model}_nll", mutant)
    assert not relative_error() <= 1e-3


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_class_that_is_favoured_is_rejected_by_the_statements(name, monkeypatch):
    """An identity that treats all classes alike holds for no model with a thumb on the scales."""
    kernel = f"{name.replace('-', '_')}_model_nll"
    right = getattr(kernels, kernel)

    def mutant(logits, *arrays, **options):
        return right(logits + 0.1 * np.eye(logits.shape[1])[0], *arrays, **options)

    monkeypatch.setattr(kernels, kernel, mutant)
    assert {"V1", "V2", "V3", "V4", "V7", "V8"} <= failing(identities(point_of(name)))


@pytest.mark.parametrize("name", ["c", "sparse-c"])
def test_lost_gradient_of_h_would_hide_where_u_is_zero(name, monkeypatch):
    """Why nothing is tested at a c-model's start."""
    p = point_of(name)
    start = replace(p, channel_weights=np.zeros_like(p.channel_weights))
    kernel = f"{p.model.name.replace('-', '_')}_model_nll"
    monkeypatch.setattr(kernels, kernel, mutants.hidden_gradient_lost)
    assert "V2" not in failing(statements.backward_is_e_step(start, rng()))
    assert "V2" in failing(statements.backward_is_e_step(p, rng()))


@pytest.mark.parametrize("name", ["c", "sparse-c"])
def test_network_m_step_without_the_gradient_of_h_is_rejected_by_v3(name, monkeypatch):
    p = point_of(name)
    monkeypatch.setattr(steps.NetworkHalf, "loss_and_gradient", mutants.network_half_without_h)
    assert failing(statements.fisher_identity(p, rng())) == {"V3"}


def test_theta_transposed_would_hide_under_symmetric_noise(monkeypatch):
    """Why the tests use a noise matrix without symmetry."""
    symmetric = replace(P, channel_logits=np.log(0.6 * np.eye(4) + 0.1))
    monkeypatch.setattr(kernels, "s_model_nll", mutants.theta_transposed)
    assert "V1" not in failing(statements.same_function(symmetric))
    assert "V1" in failing(statements.same_function(P))


NAN_IS_CAUGHT_BY = {
    "nll": {"V1", "V7", "V8"},
    "d_logits": {"V2", "V7", "V8"},
    "d_channel_logits": {"V2", "V3", "V4", "V7"},
}


@pytest.mark.parametrize("field", NAN_IS_CAUGHT_BY)
def test_nan_in_the_loss_or_a_gradient_is_rejected(field, monkeypatch):
    right = kernels.s_model_nll

    def with_nan(*arrays, **options):
        result = right(*arrays, **options)
        return result._replace(**{field: getattr(result, field) * np.nan})

    monkeypatch.setattr(kernels, "s_model_nll", with_nan)
    assert NAN_IS_CAUGHT_BY[field] <= failing(identities())


def test_nan_in_the_e_step_is_rejected_by_v1_and_v5(monkeypatch):
    right = steps.e_step

    def with_nan(*arrays, **options):
        return right(*arrays, **options)._replace(log_likelihood_t=np.full(P.n, np.nan))

    monkeypatch.setattr(steps, "e_step", with_nan)
    assert {"V1", "V5"} <= failing(identities())


def test_nan_late_in_a_path_is_rejected_by_v5(monkeypatch):
    right = statements.ledger

    def with_nan(before, after):
        entry = right(before, after)
        return entry if before is P else replace(entry, gain=np.nan)

    monkeypatch.setattr(statements, "ledger", with_nan)
    after = P.m_step()
    assert not failing(statements.exact_ledger("one step", [P, after]))
    assert failing(statements.exact_ledger("two steps", [P, after, P])) == {"V5"}


# --- mutants of EM ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:L-BFGS stopped:RuntimeWarning")
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_posterior_not_normalised_is_rejected_by_v3_v4_v5_and_v6(name, monkeypatch):
    monkeypatch.setattr(steps, "e_step", mutants.e_step_not_normalised)
    assert {"V3", "V4", "V5", "V6"} <= failing(identities(point_of(name)))


@pytest.mark.filterwarnings("ignore:L-BFGS stopped:RuntimeWarning")
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_prior_in_place_of_the_posterior_is_rejected_by_v3_v4_v5_and_v6(name, monkeypatch):
    monkeypatch.setattr(steps, "e_step", mutants.e_step_returns_the_prior)
    assert {"V3", "V4", "V5", "V6"} <= failing(identities(point_of(name)))


@pytest.mark.filterwarnings("ignore:L-BFGS stopped:RuntimeWarning")
@pytest.mark.parametrize("name", ["s", "c"])
def test_theta_transposed_in_the_e_step_is_rejected_by_v1_v3_v4_and_v6(name, monkeypatch):
    monkeypatch.setattr(steps, "e_step", mutants.e_step_with_theta_transposed)
    assert {"V1", "V3", "V4", "V6"} <= failing(identities(point_of(name)))


@pytest.mark.parametrize("name", ["s", "sparse-s"])
def test_rows_normalised_by_dividing_columns_is_rejected_by_v4_and_v6(name, monkeypatch):
    def mutant(counts, previous):
        return mutants.rows_normalised_by_dividing_columns(counts, previous)

    # K = l, so that the wrong division goes through for the sparse model as well
    p = point_of(name, n_kept=4)
    monkeypatch.setattr(steps, "noise_matrix_m_step", mutant)
    assert {"V4", "V6"} <= failing(identities(p))


@pytest.mark.parametrize("name", ["c", "sparse-c"])
def test_regressions_not_stored_are_rejected_by_v4_and_v6_though_v5_is_content(name, monkeypatch):
    p = point_of(name)
    assert failing(statements.m_step_is_maximiser(p, p, rng())) == {"V6"}
    assert not failing(statements.exact_ledger("nothing", [p, p]))
    monkeypatch.setattr(statements.Point, "m_step", lambda self: self)
    assert failing(statements.em_step_is_preconditioned_gradient(p)) == {"V4"}


def test_update_that_is_not_stored_is_rejected_by_v6_though_v5_and_v9_are_content(monkeypatch):
    monkeypatch.setattr(steps, "noise_matrix_m_step", mutants.m_step_forgets_to_store)
    assert {"V4", "V6"} <= failing(identities())
    assert not failing(statements.exact_ledger("nothing", [P, P.m_step()]))
    monkeypatch.setattr(alternating, "noise_matrix_m_step", mutants.m_step_forgets_to_store)
    history = exact_em(fresh_posterior=True).history
    assert not failing(statements.monotone(history, 60, every_half_step=True))


SMALL = point(hidden_sizes=(), n_in=3)


def exact_em(p: statements.Point = SMALL, **options) -> em_baseline.EMFit:
    defaults = {
        "network_step": LBFGS(),
        "noise_step": None if p.channel_weights is None else LBFGS(),
        "n_rounds": 8,
        "shuffling": stream(0, "shuffling"),
    }
    return em_baseline.fit(p.model, p.parameters, p.x, p.noisy_labels, **(defaults | options))


@pytest.mark.filterwarnings("ignore::em_baseline.LikelihoodDropWarning")
@pytest.mark.filterwarnings("ignore:L-BFGS stopped:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "every_half_step"), [("s", False), *((name, True) for name in MODEL_NAMES)]
)
def test_m_step_with_the_prior_is_rejected_by_v9(name, monkeypatch, every_half_step):
    start = point_of(name, hidden_sizes=(), n_in=3)
    options = {"fresh_posterior": every_half_step}
    if name.endswith("c"):  # whose exact M-steps are dear; V9 needs none
        some = LBFGS(max_iterations=20)
        options |= {"network_step": some, "noise_step": some, "n_rounds": 4}
    right = exact_em(start, **options)
    assert not failing(statements.monotone(right.history, 60, every_half_step, name))
    # From a bad start even a wrong step may climb; from where EM has climbed to, it cannot.
    end = start.with_parameters(right.parameters)
    monkeypatch.setattr(alternating, "e_step", mutants.e_step_returns_the_prior)
    wrong = exact_em(end, **options)
    assert failing(statements.monotone(wrong.history, 60, every_half_step, name)) == {"V9"}


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_em_that_never_moves_is_rejected_by_v10_though_v9_is_content(name):
    start = point_of(name, n=60, n_in=2, hidden_sizes=(), k=3, n_kept=2)
    still = exact_em(start, n_rounds=0).history * 2
    limits = statements.Limits(start, start, still, em_moved=0.0)
    assert not failing(statements.monotone(still, start.n, every_half_step=True, model=name))
    rows = statements.same_stationary_points(limits, rng())
    assert [row.holds for row in rows] == [False, False, False]


@pytest.mark.filterwarnings("ignore::em_baseline.LikelihoodDropWarning")
@pytest.mark.parametrize("mutant", ["e_step_returns_the_prior", "e_step_with_theta_transposed"])
def test_wrong_e_step_is_rejected_by_v10(monkeypatch, mutant):
    p = point(n=300, n_in=2, hidden_sizes=(), k=3)
    monkeypatch.setattr(alternating, "e_step", getattr(mutants, mutant))
    limits = statements.find_limits(p, stream(0, "shuffling"), n_rounds=100)
    assert failing(statements.same_stationary_points(limits, stream(0, "shuffling"))) == {"V10"}


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_certificate_with_the_mean_in_place_of_the_maximum_is_rejected_by_v11(name, monkeypatch):
    here = point_of(name)
    if name.endswith("c"):  # all but an s-model, or a single matrix would have too little to gain
        here = replace(here, channel_weights=0.01 * here.channel_weights)

    def mean(p: statements.Point) -> float:
        literal = statements.Literal.at(p)
        return float((literal.d_theta.mean(axis=1) - literal.c.sum(axis=0)).sum() / p.n)

    assert not failing(statements.certified("right", here))
    monkeypatch.setattr(statements, "certificate", mean)
    assert failing(statements.certified("wrong", here)) == {"V11"}


def test_kl_the_wrong_way_round_is_rejected_by_v5():
    after = P.m_step()
    right = statements.ledger(P, after)
    reverse = statements.ledger(after, P)
    wrong = statements.Ledger(right.gain, right.expected, reverse.divergence)
    assert right.residual <= 1e-10 < wrong.residual


# --- mutants of training ------------------------------------------------------------------------


class StaleLoss(SModel):
    """Reports the loss of the parameters it saw the time before."""

    def loss(self, parameters, x, targets):
        previous = getattr(self, "_previous", None)
        current = super().loss(parameters, x, targets)
        object.__setattr__(self, "_previous", current)
        return current if previous is None else previous


def history_is_of_its_own_parameters(model: SModel) -> bool:
    """Train, and recompute every reported loss from the parameters reported with it."""
    seen: list[tuple[Epoch, np.ndarray]] = []
    train(
        model,
        P.parameters,
        P.x,
        P.noisy_labels,
        n_epochs=4,
        batch_size=16,
        shuffling=stream(0, "shuffling"),
        on_epoch=lambda epoch, parameters: seen.append((epoch, parameters.copy())),
    )
    judge = SModel(P.network)
    return all(epoch.loss == judge.loss(p, P.x, P.noisy_labels) for epoch, p in seen)


def test_likelihood_of_the_previous_parameters_is_rejected_in_joint_training():
    assert history_is_of_its_own_parameters(SModel(P.network))
    assert not history_is_of_its_own_parameters(StaleLoss(P.network))


def test_likelihood_of_the_previous_parameters_is_rejected_in_em(monkeypatch):
    def histories_agree() -> bool:
        seen = []
        exact_em(on_half_step=lambda *state: seen.append(state))
        p = SMALL
        return all(
            abs(step.log_likelihood - literal.log_likelihood.real)
            <= 1e-12 * abs(step.log_likelihood)
            for step, parameters in seen
            for literal in [statements.Literal.of(p.model, parameters, p.x, p.noisy_labels)]
        )

    assert histories_agree()
    right, memory = alternating.e_step, []

    def stale(*arguments, **options):
        memory.append(right(*arguments, **options))
        return memory[max(0, len(memory) - 2)]._replace(posterior=memory[-1].posterior)

    monkeypatch.setattr(alternating, "e_step", stale)
    monkeypatch.setattr(alternating, "_warn_of_drop", lambda *_: None)
    assert not histories_agree()


def test_last_batch_lost_is_rejected_by_the_test_of_the_batches(monkeypatch):
    check = test_training.test_batches_hold_every_sample_exactly_once
    check(10, 3)
    right = training.minibatches
    monkeypatch.setattr(test_training, "minibatches", lambda *a: right(*a)[:-1])
    with pytest.raises(AssertionError):
        check(10, 3)


def test_clean_labels_leaking_into_training_or_validation_are_rejected(monkeypatch):
    options = argparse.Namespace(
        noise_kind="permutation",
        noise=0.4,
        epochs=1,
        backend="numpy",
        start="hard",
        pseudo_count=0.0,
        channel_step=1.0,
        inner_epochs=1,
        damping=0.05,
        no_early_stopping=False,
    )
    dataset = load_dataset("digits")
    task = equivalence.make_task(options, dataset, seed=0)
    fits = equivalence.fit_all(task, options, lambda words: None)
    assert len({fit.labels_hash for fit in fits}) == 1

    kept, held_out = equivalence.validation_split(
        dataset.labels_train.size,
        task_labels := nalayer.corrupt_labels(
            dataset.labels_train, task.noise_matrix, stream(0, "label noise")
        ),
        equivalence.VALIDATION_SHARE,
        stream(0, "split"),
    )
    assert np.array_equal(task.noisy_labels, task_labels[kept])
    clean_training = replace(task, noisy_labels=dataset.labels_train[kept])
    clean_validation = replace(
        task, validation=(task.validation[0], dataset.labels_train[held_out])
    )
    right = equivalence.fit_baseline
    for leaking in (clean_training, clean_validation):
        with monkeypatch.context() as patch:
            patch.setattr(equivalence, "fit_baseline", lambda _, o, leak=leaking: right(leak, o))
            with pytest.raises(RuntimeError, match="baseline, seed 0: trained on labels"):
                equivalence.fit_all(task, options, lambda words: None)
