"""The demonstrations of the scikit-learn estimator: what it is better at, measured."""

import numpy as np
import pytest

from benchmarks import estimator, records
from benchmarks.__main__ import main
from nalayer.datasets import load_digits


def test_on_digits_with_noisy_labels_it_beats_scikit_learns_mlp():
    """One seed of the five that docs/your_data.md runs, with their intervals."""
    found = {row["method"]: row["test_accuracy"] for row in estimator.accuracy(0, 0.4)}
    ours = found.pop(estimator.OURS)
    assert found.keys() == {estimator.MLP, estimator.MLP_STOPPED}
    assert ours > max(found.values()) + 0.1


@pytest.fixture(scope="module")
def search_rows():
    return {row["method"]: row for row in estimator.search(0, 0.3)}


def test_label_errors_of_digits_are_found(search_rows):
    row = search_rows[estimator.OUR_ERRORS]
    data = load_digits()
    assert row["n_wrong"] == (estimator._noisy(data, 0.3, 0) != data.labels_train).sum()
    assert 0.29 < row["n_wrong"] / len(data.labels_train) < 0.31
    assert row["precision"] > 0.95
    assert row["recall"] > 0.9


def test_label_errors_are_found_as_well_as_by_cleanlab(search_rows):
    """On the same held-out probabilities: more precise, at a recall that is not far behind."""
    pytest.importorskip("cleanlab")
    ours = search_rows[estimator.OUR_ERRORS]
    theirs = [row for name, row in search_rows.items() if name.startswith(estimator.CLEANLAB)]
    assert len(theirs) == 3
    for row in theirs:
        assert row["labels_hash"] == ours["labels_hash"]
        assert row["precision"] > 0.8
        assert ours["precision"] > row["precision"]
        assert ours["recall"] > row["recall"] - 0.05


def test_the_command_writes_rows_and_prints_them(tmp_path, capsys, monkeypatch):
    def accuracy(seed, noise):
        yield {"method": "a", "noise": noise, "test_accuracy": 0.5 + seed / 10}

    def search(seed, noise):
        yield {"method": "b", "noise": noise, "precision": 1.0, "recall": 0.25}

    monkeypatch.setattr(estimator, "accuracy", accuracy)
    monkeypatch.setattr(estimator, "search", search)
    path = tmp_path / "rows.jsonl"
    assert main(["estimator", "--seeds", "2", "--json", str(path)]) == 0
    rows = records.read_rows(path)
    assert [(row["method"], row["seed"], row["noise"]) for row in rows] == [
        ("a", 0, 0.4),
        ("b", 0, 0.3),
        ("a", 1, 0.4),
        ("b", 1, 0.3),
    ]
    assert all("cleanlab" in row["versions"] for row in rows)
    shown = capsys.readouterr().out
    assert "| a | 0.550 [0.500, 0.600] |" in shown
    assert "| b | 1.000 [1.000, 1.000] | 0.250 [0.250, 0.250] |" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1; found 0"),
        (["--noise", "1.5"], "noise must lie in"),
        (["--json", "/"], "cannot write to /"),
    ],
)
def test_what_cannot_be_run_is_refused_first(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["estimator", *arguments])
    assert message in capsys.readouterr().err


def test_the_committed_rows_say_what_the_tests_say():
    rows = records.read_rows(records.ROOT / "benchmarks" / "results" / "estimator.jsonl")
    assert {row["seed"] for row in rows} == set(range(5))
    mean = {
        method: np.mean([r["test_accuracy"] for r in rows if r["method"] == method])
        for method in (estimator.OURS, estimator.MLP, estimator.MLP_STOPPED)
    }
    assert mean[estimator.OURS] > max(mean[estimator.MLP], mean[estimator.MLP_STOPPED]) + 0.1
    assert not any(row["commit"].endswith("-dirty") for row in rows)
