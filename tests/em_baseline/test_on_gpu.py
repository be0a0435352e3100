"""EM and the statements with the project's side on a GPU; without one on the stand-in for CuPy.

The stand-in runs the CUDA sources and refuses NumPy's arrays beside its own. It is slow: samples
are few there, and what takes thousands of gradients is left to a GPU.
"""

import argparse
import functools
import warnings
from dataclasses import replace

import numpy as np
import pytest

import nalayer
from benchmarks import equivalence, suite
from em_baseline import (
    LBFGS,
    LikelihoodDropWarning,
    MiniBatches,
    e_step_statistics,
    expected_log_likelihood,
    fit,
    statements,
    with_m_step,
)
from em_baseline.steps import polish
from nalayer import stream
from nalayer.datasets import load_dataset
from nalayer.devices import to_device, to_host
from tests.cases import MODEL_NAMES, point_of
from tests.em_baseline.test_statements import identities
from tests.kernels.gpu_fixtures import cases_of

STEPS = {"mini-batches": MiniBatches(2, 5), "lbfgs": LBFGS(max_iterations=2)}


def small(name):
    """Return a point of a few samples that follows its arrays to a GPU."""
    return replace(point_of(name, n=12, n_in=2, k=3, hidden_sizes=(2,)), backend=None)


def fitted(arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LikelihoodDropWarning)
        warnings.filterwarnings("ignore", "L-BFGS stopped", RuntimeWarning)
        return fit(*arguments, n_rounds=2, shuffling=stream(0, "shuffling"), **options)


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("step", STEPS)
def test_em_is_the_cpus_to_rounding(cupy, name, step):
    p = small(name)
    arguments = p.model, p.parameters, p.x, p.noisy_labels
    held_out = p.x[:9], p.noisy_labels[:9]
    options = {"network_step": STEPS[step], "tolerance": 1e-9}
    options |= {"noise_step": STEPS[step]} if name.endswith("c") else {"damping": 0.5}
    expected = fitted(arguments, validation=held_out, **options)
    found = fitted(to_device(arguments), validation=to_device(held_out), **options)
    assert isinstance(found.parameters, cupy.ndarray)
    assert np.abs(to_host(found.parameters) - expected.parameters).max() <= 1e-9
    assert np.abs(expected.parameters - p.parameters).max() >= 1e-3
    assert found.labels_hash == expected.labels_hash
    assert [s.half for s in found.history] == [s.half for s in expected.history]
    for a, b in zip(found.history, expected.history, strict=True):
        assert type(a.log_likelihood) is type(a.validation_loss or 0.0) is float
        assert abs(a.log_likelihood - b.log_likelihood) <= 1e-9


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_v1_to_v8_hold_to_rounding(cupy, name):
    rows = identities(replace(small(name), backend="cupy"))
    assert {row.statement for row in rows} >= {"V1", "V2", "V3", "V5", "V6", "V7", "V8"}
    assert not [row for row in rows if not row.holds]


def test_pseudo_counts_and_the_expected_likelihood_are_the_cpus(cupy):
    p = small("sparse-s")
    model = p.objective(pseudo_count=0.5)
    arguments = model, p.parameters, p.x, p.noisy_labels
    step = {"network_step": STEPS["mini-batches"]}
    expected, found = fitted(arguments, **step), fitted(to_device(arguments), **step)
    assert np.abs(to_host(found.parameters) - expected.parameters).max() <= 1e-11
    arguments = p.model, p.parameters, p.x, p.noisy_labels, p.e_step().posterior
    expected = expected_log_likelihood(*arguments)
    assert abs(expected_log_likelihood(*to_device(arguments)) - expected) <= 1e-12 * abs(expected)


def test_newton_steps_are_the_cpus(cupy):
    p = point_of("s", n=12, n_in=1, k=2, hidden_sizes=())
    model = nalayer.PlainModel(p.network)
    arguments = model, p.weights, p.x, p.noisy_labels
    found = polish(*to_device(arguments), max_steps=1)
    assert isinstance(found, cupy.ndarray)
    assert np.abs(to_host(found) - polish(*arguments, max_steps=1)).max() <= 1e-6
    assert np.abs(to_host(found) - p.weights).max() >= 1e-3


@pytest.mark.parametrize("name", ["s", "sparse-s"])
def test_statistics_of_a_part_are_the_cpus(cupy, name):
    p = small(name)
    arguments = p.model, p.parameters, p.x, p.noisy_labels
    expected, there = e_step_statistics(*arguments), to_device(arguments)
    found = e_step_statistics(*there)
    assert isinstance(found.counts, cupy.ndarray)
    assert np.abs(to_host(found.counts) - expected.counts).max() <= 1e-13
    stepped = to_host(with_m_step(*there[:2], found))
    assert np.abs(stepped - with_m_step(*arguments[:2], expected)).max() <= 1e-13


def test_arrays_of_two_kinds_are_refused(cupy):
    p = small("s")
    arrays = p.parameters, p.x, p.noisy_labels
    on_gpu = to_device(arrays)
    step = {"network_step": STEPS["mini-batches"]}
    for place, name in enumerate(("parameters", "x", "noisy_labels")):
        mixed = *on_gpu[:place], arrays[place], *on_gpu[place + 1 :]
        with pytest.raises(TypeError, match=rf"{name} .*cupy\.asarray or cupy\.asnumpy"):
            fitted((p.model, *mixed), **step)
    with pytest.raises(TypeError, match="validation is a NumPy array"):
        fitted((p.model, *on_gpu), validation=arrays[1:], **step)
    with pytest.raises(TypeError, match="CuPy has no arrays of records"):
        nalayer.weighting.weighted_labels(on_gpu[2], on_gpu[1][:, 0])


# A c-model's exact M-steps, by tens of thousands of small products, would take minutes.
@pytest.mark.parametrize("name", cases_of("device", ("s", "sparse-s")))
def test_every_statement_holds_on_some_digits(device, name):
    head = "softmax regression"
    where = suite.Configuration("digits", name, head, "permutation", 0.4, 0, backend="cupy")
    rows = list(suite.statements_of(where))
    assert {row.statement for row in rows} >= {"V1", "V5", "V8", "V9", "V10", "V12", "V13"}
    assert not [row for row in rows if not row.holds]


@pytest.mark.parametrize("epochs", cases_of("device", [1]))
def test_v1_to_v8_and_v11_hold_on_all_digits(device, epochs, monkeypatch):
    # For V11. It holds after any number of steps; 2000, which gain hardly more, take half a minute.
    hundred_steps = functools.partial(statements.em_on_theta, n_steps=100)
    monkeypatch.setattr(statements, "em_on_theta", hundred_steps)
    parser = argparse.ArgumentParser()
    equivalence.add_arguments(parser)
    options = parser.parse_args(["--backend", "cupy", "--epochs", str(epochs)])
    task = equivalence.make_task(options, load_dataset("digits"), seed=0)
    fits = equivalence.fit_all(task, options, lambda words: None)
    rows = list(equivalence.identities(task, fits, options))
    assert {row.statement for row in rows} == {f"V{v}" for v in (*range(1, 9), 11)}
    assert not [row for row in rows if not row.holds]
