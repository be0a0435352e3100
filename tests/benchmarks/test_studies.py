"""The studies: what their cells change, and what their tables and pictures are made of."""

import argparse
import json
from dataclasses import asdict, replace

import numpy as np
import pytest

import nalayer
from benchmarks import accelerations, initialisation, records, studies, timescale, transition
from benchmarks.__main__ import main
from benchmarks.cells import Cell, Store
from benchmarks.methods import Task, cell_of, hidden_layers, run_cell
from em_baseline import statements
from tests.benchmarks.test_accuracy import CELL

S_CELL = replace(cell_of(CELL, "s"), start="hard", channel_step=1.0)
QUICK = ["--seeds", "1", "--epochs", "1", "--inner-epochs", "1", "--jobs", "1"]


@pytest.fixture(scope="module")
def baseline() -> dict[str, np.ndarray]:
    return run_cell(cell_of(CELL, "baseline"), {}, keep_parameters=True).arrays


def theta_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return nalayer.noise_matrix(arrays["parameters"][-100:].reshape(10, 10).astype(np.float64))


def test_frozen_theta_stays_and_fast_theta_goes_further(baseline):
    start = nalayer.noise_matrix(Task(S_CELL).channel_start(baseline["parameters"]))
    moved = []
    for step in (0.0, 1.0, 100.0):
        cell = replace(S_CELL, channel_step=step, patience=100)
        theta = theta_of(run_cell(cell, baseline, keep_parameters=True).arrays)
        moved.append(float(np.abs(theta - start).max()))
    assert moved[0] <= 1e-6  # float32
    assert moved[0] < moved[1] < moved[2]


def test_heavy_prior_keeps_theta_where_it_starts(baseline):
    """The heavier it is, the less theta moves, of EM's full step and of a fast gradient step."""
    start = nalayer.noise_matrix(Task(S_CELL).channel_start(baseline["parameters"]))
    for cell in (
        replace(cell_of(CELL, "em-s"), start="hard", inner_epochs=1),
        replace(S_CELL, channel_step=30.0, patience=100),
    ):
        moved = []
        for pull in (None, 1.0, 100.0):
            arrays = run_cell(replace(cell, pull=pull), baseline, keep_parameters=True).arrays
            moved.append(float(np.abs(theta_of(arrays) - start).max()))
        assert moved[0] > moved[1] > moved[2]
        assert moved[2] <= 0.02


def test_every_start_of_theta_is_what_it_is_called(baseline):
    task = Task(S_CELL)
    starts = {
        name: nalayer.noise_matrix(task.channel_start(baseline["parameters"], name))
        for name in ("hard", "soft", "clustered", "true", "uniform", "random")
    }
    assert np.abs(starts["true"] - task.theta).max() <= 1e-6
    assert np.abs(np.diag(starts["uniform"]) - 0.9).max() <= 1e-6
    assert np.diag(starts["random"]).mean() < 0.3
    for a in starts:
        for b in starts:
            assert a == b or np.abs(starts[a] - starts[b]).max() > 1e-3


def test_damping_and_plain_weight_reach_the_training(baseline):
    em = replace(cell_of(CELL, "em-s"), start="hard", inner_epochs=1)
    ends = {
        json.dumps(asdict(cell)): run_cell(cell, baseline, keep_parameters=True).row
        for cell in (
            em,
            replace(em, damping=0.1),
            replace(em, pull=1.0),
            replace(S_CELL, pull=1.0),
            S_CELL,
            replace(S_CELL, plain_weight=0.5),
            replace(S_CELL, start="soft"),
        )
    }
    assert len({row["parameters_hash"] for row in ends.values()}) == 7


def test_row_tells_likelihood_certificate_and_relabelled_error(baseline):
    finished = run_cell(S_CELL, baseline, keep_parameters=True)
    row, task = finished.row, Task(S_CELL)
    model = nalayer.SModel(task.network)
    parameters = finished.arrays["parameters"].astype(np.float64)
    assert row["train_loss"] == pytest.approx(
        model.nll(parameters, task.x.astype(np.float64), task.z), rel=1e-6
    )
    weights, channel = model.unpack(parameters)
    point = statements.Point(task.network, weights, channel, task.x.astype(np.float64), task.z)
    assert row["certificate"] == pytest.approx(statements.certificate(point), rel=1e-6)
    assert row["relabelled_error"] <= row["noise_matrix_error"] + 1e-12
    assert row["relabelled_accuracy"] >= 0


def test_relabelled_accuracy_undoes_a_renaming(baseline):
    """Turn the classes of a trained classifier round: only what is relabelled stays the same."""
    from benchmarks.methods import Fit, _at_the_end

    task = Task(S_CELL)
    finished = run_cell(replace(S_CELL, start="true"), baseline, keep_parameters=True)
    parameters = finished.arrays["parameters"]
    theta = theta_of(finished.arrays)
    predicted = task.network.predict(parameters[:-100], task.data.x_test)
    order = np.roll(np.arange(10), 3)  # new class i was order[i]
    new_of = np.argsort(order)
    fit = Fit(parameters[:-100], theta[order], {}, {"parameters": parameters})
    row = _at_the_end(task, fit, new_of[predicted])
    right = (predicted == task.data.labels_test).mean()
    assert row["relabelled_accuracy"] == pytest.approx(right)


def test_cells_from_before_the_studies_keep_their_names(tmp_path):
    """Found by their settings: those that came later count only where they are set."""
    known = "digits-mlp-permutation-0.4-1-seed0-baseline-"
    assert cell_of(CELL, "baseline").name.startswith(known)
    assert set(cell_of(CELL, "s").settings) == set(asdict(CELL)) - {
        "start",
        "channel_step",
        "plain_weight",
        "damping",
        "pull",
    }
    assert replace(cell_of(CELL, "s"), start="hard").name != cell_of(CELL, "s").name
    store = Store(tmp_path)
    assert not store.has(S_CELL)


def test_networks_by_name():
    assert hidden_layers("mlp", "mnist") == ((500, 300), 0.5)
    assert hidden_layers("mlp-16", "mnist") == ((16,), 0.5)
    assert hidden_layers("mlp-512-256-no-dropout", "digits") == ((512, 256), 0.0)
    with pytest.raises(ValueError, match="network must look like"):
        hidden_layers("mlp-wide", "digits")


@pytest.mark.parametrize(
    ("study", "options", "words"),
    [
        ("timescale", ["--networks", "mlp-8"], "EM's step, prior 0.1"),
        ("transition", ["--kinds", "cycles-5-5", "--noise", "0.4", "0.5"], "cycles of 5+5"),
        ("initialisation", ["--noise", "0.4"], "certificate V11"),
    ],
)
def test_study_runs_prints_and_draws(study, options, words, tmp_path, capsys):
    picture = tmp_path / "p.png"
    arguments = [study, *QUICK, *options, "--out", str(tmp_path), "--picture", str(picture)]
    assert main(arguments) == 0
    assert words in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = records.read_rows(tmp_path / f"{study}.jsonl")
    assert {row["benchmark"] for row in rows} == {study}
    assert all(row["test_accuracy"] is not None for row in rows)


def test_bad_options_are_refused_before_anything_runs(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for arguments, words in (
        (["timescale", "--networks", "wide"], "network must look like"),
        (["transition", "--kinds", "cycles-4-4"], "add up to the 10 classes"),
        (["initialisation", "--seeds", "0"], "--seeds must be at least 1"),
        (["timescale", "--epochs", "0"], "--epochs must be at least 1"),
        (["timescale", "--jobs", "0"], "--jobs at least 1"),
        (["transition", "--dataset", "cifar100"], "invalid choice: 'cifar100'"),
        (["initialisation", "--noise", "1.5"], "noise must lie in"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, *out])
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_theta_figures_by_hand():
    """(1-p) I + p P of 2-cycles: eigenvalues 1 and 1-2p, rows |1-2p| apart."""
    assert transition.theta_figures("cycles-2-2-2-2-2", 0.4) == pytest.approx((0.2, 0.2))
    singular, distance = transition.theta_figures("cycles-5-5", 0.4)
    assert distance == pytest.approx(0.6)
    roots = np.exp(2j * np.pi * np.arange(5) / 5)
    assert singular == pytest.approx(np.abs(0.6 + 0.4 * roots).min())


def test_drop_is_where_a_tenth_is_lost():
    rows = [
        {"method": "oracle", "noise": noise, "test_accuracy": accuracy}
        for noise, accuracy in ((0.3, 1.0), (0.4, 0.95), (0.5, 0.85))
    ]
    assert transition.drop(rows, "oracle").endswith("below 0.9 of it from 0.5 on")
    assert "never below" in transition.drop(rows[:2], "oracle")


def test_grids_hold_every_combination_once():
    options = argparse.Namespace(
        dataset="digits", noise=[0.4], fractions=[1.0], seeds=2, epochs=None, patience=4,
        inner_epochs=5, dtype="float32", backend="numba", threads=1, networks=["mlp"],
        kinds=["symmetric"],
    )  # fmt: skip
    for study, n in ((timescale, 2 * 70), (transition, 2 * 8), (initialisation, 2 * 13)):
        options.arms = list(getattr(study, "ARMS", ()))
        cells = study.cells(options)
        assert len(cells) == len(set(cells)) == n
        assert all(isinstance(cell, Cell) for cell in cells)


def test_interval_and_table():
    assert studies.interval([]) == "-"
    assert studies.interval([0.5, 0.5]) == "0.500 [0.500, 0.500]"
    assert studies.table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


def test_accelerations_run_print_and_draw(tmp_path, capsys):
    picture, path = tmp_path / "p.png", tmp_path / "a.jsonl"
    arguments = ["accelerations", "--seeds", "1", "--noise", "0.4", "--rounds", "2"]
    arguments += ["--gradients", "20", "--epochs", "20", "--pseudo-counts", "0"]
    assert main([*arguments, "--json", str(path), "--picture", str(picture)]) == 0
    assert "ends where EM does" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = records.read_rows(path)
    theta = [row for row in rows if row["study"] == "theta alone"]
    assert len(theta) == 2 * 4
    assert len(rows) == 2 * 4 + 4
    for row in theta:
        if row["arm"] == accelerations.EM:
            assert row["certificate"] <= 1e-8
            steps = row["evaluations_1e-08"] - row["evaluations_1e-06"]
            assert abs(steps / row["predicted"] - 1) <= 0.25
        if row["arm"] == accelerations.SQUAREM:
            assert row["certificate"] <= 1e-8
    for options in (["--seeds", "0"], ["--rounds", "0"], ["--noise", "2"], ["--pseudo-counts=-1"]):
        with pytest.raises(SystemExit):
            main(["accelerations", *options])


def test_who_overtakes_whom_by_hand():
    em = accelerations.Trace([0, 1, 2, 3], [0.0] * 4, [1.0, 0.5, 0.25, 0.125])
    late = accelerations.Trace([1, 2, 3], [0.1, 0.2, 0.3], [0.9, 0.6, 0.1])
    assert accelerations.overtakes(late, em, 1e-9) == 3
    assert accelerations.overtakes(em, late, 1e-9) is None
    assert accelerations.overtakes(em, em, 1e-9) is None
    in_turns = accelerations.Trace([1, 2, 3], [0.0] * 3, [0.4, 0.4, 0.1])
    assert accelerations.overtakes(in_turns, em, 1e-9) == 3
    early = accelerations.Trace([1], [0.1], [0.3])
    assert accelerations.overtakes(em, early, 1e-9) == 2
    assert late.reaches(0.6) == (2, 0.2)
    assert late.reaches(0.01) is None
    # A failed trial, and one that is worse than before, change nothing
    trials = accelerations.Trace([1, 2, 3], [0.0] * 3, [0.4, np.nan, 0.7])
    assert trials.best(np.array([0, 1, 2, 3])).tolist() == [np.inf, 0.4, 0.4, 0.4]


def test_table_of_accelerations_by_hand():
    def theta(arm, seed, late, **others):
        return {
            "study": "theta alone", "network": "baseline", "noise": 0.4, "arm": arm, "seed": seed,
            "evaluations_1e-06": 10, "evaluations_1e-08": late, "seconds_1e-08": 0.002,
            "certificate": 1e-9,
        } | others  # fmt: skip

    rows = [
        theta("EM", 0, 20, rate=0.5, predicted=6.6),
        theta("EM", 1, 40, rate=0.7, predicted=12.9),
        theta("SQUAREM", 0, 15, overtakes=12, overtaken=None),
        theta("SQUAREM", 1, None, overtakes=None, overtaken=3, **{"seconds_1e-08": None}),
    ]
    ends = {"study": "everything", "noise": 0.4, "pseudo_count": 0.0, "evaluations": 7}
    ends |= {"seconds": 0.5, "gradient": 1e-9, "certificate": 1e-6, "dead_entries": 0}
    rows += [
        ends | {"arm": "EM", "seed": 0, "log_likelihood": -1.0},
        ends | {"arm": "joint, L-BFGS", "seed": 0, "log_likelihood": -1.5, "same_as_em": True},
    ]
    text = "\n".join(accelerations.lines(rows))
    assert "| baseline | 0.4 | EM | 10 | 30 (20 to 40) |  |  | 2 | 1e-09 |" in text
    squarem = "| 10 | 15, 1 of 2 | 12, 1 of 2 | 3, 1 of 2 | 2 | 1e-09 |"
    assert f"| baseline | 0.4 | SQUAREM {squarem}" in text
    assert "| baseline | 0.4 | 0.600 (0.500 to 0.700) | 10 (7 to 13) | 20 (10 to 30) |" in text
    joint = "-1.5000 | 7 | 0.5 | 1e-09 | 1e-06 | 0 | 1 of 1 | -, 0 of 1 | -, 0 of 1 |"
    assert f"| 0.4 | 0 | joint, L-BFGS | {joint}" in text
