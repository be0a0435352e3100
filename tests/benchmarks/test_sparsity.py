"""The study of the number of links: its data, its measures, and going on after a kill."""

from dataclasses import replace

import numpy as np
import pytest

import kernels
from benchmarks import records, sparsity
from benchmarks.__main__ import main
from benchmarks.cells import Cell, Store
from benchmarks.methods import Task, cell_of, run_cell, s_model_of
from em_baseline import statements
from nalayer import SModel

SMALL = ["--classes", "10", "--kept", "1", "5", "--seeds", "2", "--epochs", "2", "--jobs", "1"]


def test_data_have_the_noise_that_they_claim():
    data = sparsity.draw(sparsity.Problem(15, 0, per_class=400))
    assert np.abs(data.theta.sum(axis=1) - 1).max() < 1e-12
    own = data.links.support == np.arange(15)[:, None]
    assert np.abs(data.theta[own] - (1 - sparsity.NOISE)).max() < 1e-12
    clusters = data.links.support // sparsity.CLUSTER
    assert (clusters == np.arange(15)[:, None] // sparsity.CLUSTER).all()
    assert data.x.dtype == np.float32
    assert len(data.x) + len(data.held_out[0]) == 15 * 400
    again = sparsity.draw(sparsity.Problem(15, 0, per_class=400))
    assert np.array_equal(again.noisy, data.noisy)
    assert not np.array_equal(sparsity.draw(sparsity.Problem(15, 1, 400)).noisy, data.noisy)


def test_recovered_counts_links_off_the_diagonal():
    data = sparsity.draw(sparsity.Problem(10, 0))
    # each class itself, one true neighbour, one class of the other cluster
    support = np.array([[i, i // 5 * 5 + (i + 1) % 5, (i + 5) % 10] for i in range(10)])
    found = sparsity.recovered(kernels.link_index(support), data)
    assert found["precision"] == 0.5
    assert found["recall"] == 0.25
    kept = sum(
        data.theta[i][data.links.support[i] == i // 5 * 5 + (i + 1) % 5].item() for i in range(10)
    )
    assert abs(found["noise_kept"] - kept / (10 * sparsity.NOISE)) < 1e-12
    alone = sparsity.recovered(kernels.link_index(np.arange(10)[:, None]), data)
    assert alone == {"precision": None, "recall": 0.0, "noise_kept": 0.0}
    assert sparsity.recovered(data.links, data)["recall"] == 1


def test_error_is_the_mean_total_variation():
    links = kernels.link_index(np.array([[0, 1], [1, 0]]))
    one, other = (
        sparsity.as_sparse(np.array(theta), links)
        for theta in ([[0.75, 0.25], [1.0, 0.0]], [[1.0, 0.0], [0.5, 0.5]])
    )
    assert sparsity.error_of(one, other) == 0.375


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("sparsity") / "rows.jsonl"
    picture = path.with_suffix(".png")
    assert main(["sparsity", *SMALL, "--json", str(path), "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    return records.read_rows(path)


def test_rows_hold_every_fit(rows):
    settings = [("hard", 1), ("hard", 5), ("soft", 1), ("soft", 5), ("hard", 0), ("true", 5)]
    assert sparsity.settings_in(rows) == [
        ("hard", 1), ("hard", 5), ("soft", 1), ("soft", 5), ("hard", 0), ("true", 5)
    ]  # fmt: skip
    assert len(rows) == 2 * (1 + len(settings))
    for seed in (0, 1):
        here = [row for row in rows if row["seed"] == seed]
        assert len({row["labels_hash"] for row in here}) == 1
    assert all(row["certificate"] >= 0 for row in rows if row["source"])
    table = "\n".join(sparsity.lines(rows))
    assert "K = 10, 50 samples of each class, 2 seeds" in table
    assert "| true links | 5 |" in table


def test_a_killed_run_goes_on_where_it_was(rows, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    kept = [row for row in rows if row["seed"] == 0]
    records.write_rows(records.unfinished(path), kept)
    fitted, fit = [], sparsity.rows_of
    monkeypatch.setattr(sparsity, "rows_of", lambda *given: fitted.append(given[0]) or fit(*given))
    assert main(["sparsity", *SMALL, "--json", str(path)]) == 0
    assert [problem.seed for problem in fitted] == [1]
    measured = ("command", "commit", "date", "seconds")
    strip = [
        [{key: value for key, value in row.items() if key not in measured} for row in one]
        for one in (records.read_rows(path), rows)
    ]
    assert strip[0] == strip[1]
    assert not records.unfinished(path).exists()


@pytest.mark.parametrize("wrong", [["--classes", "12"], ["--kept", "0"], ["--seeds", "0"]])
def test_refusals(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["sparsity", *wrong])
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_cells_of_accuracy_get_likelihood_and_certificate(tmp_path, capsys):
    store, path = Store(tmp_path / "cells"), tmp_path / "rows.jsonl"
    baseline = Cell(
        dataset="digits", network="mlp-8-no-dropout", method="baseline", noise=0.4,
        noise_kind="permutation", fraction=0.2, seed=0, epochs=3, patience=3, batch_size=64,
    )  # fmt: skip
    fresh = run_cell(baseline, {}, keep_parameters=True)
    store.save(baseline, fresh)
    ends = {}
    for method, n_kept in (("sparse-s", 1), ("sparse-s", 2), ("s", None)):
        cell = replace(cell_of(baseline, method), n_kept=n_kept)
        ends[n_kept] = run_cell(cell, fresh.arrays, keep_parameters=True)
        store.save(cell, ends[n_kept])
    command = ["sparsity", "--cells", str(store.folder), "--json", str(path)]
    assert main(command) == 0
    other = records.read_rows(path)[0] | {"fraction": 1.0}
    records.write_rows(path, [*records.read_rows(path), other])
    assert main(command) == 0  # a row takes the place of its own, and of no other data
    *found, last = records.read_rows(path)
    assert last == other
    assert all(row["certified_by"].startswith("python -m benchmarks sparsity") for row in found)
    assert all(row["certified_at"] for row in found)
    with pytest.raises(ValueError, match=r"several .*fraction"):
        list(sparsity.cell_lines([*found, other]))
    assert [row.get("n_kept") for row in found] == [1, 2, None]  # and none of the baseline
    # One link for each class: there is no other theta, but for rounding in float32.
    assert 0 <= found[0]["certificate"] < 1e-6 < found[1]["certificate"]
    task, end = Task(baseline), ends[2]
    model = s_model_of(task, end.arrays)
    parameters = end.arrays["parameters"]
    assert abs(found[1]["train_loss"] - model.nll(parameters, task.x, task.z)) < 1e-5
    bound = statements.certificate(
        statements.Point(
            task.network,
            *(part.astype(np.float64) for part in SModel(task.network).unpack(
                ends[None].arrays["parameters"]
            )),
            task.x.astype(np.float64),
            task.z,
        )
    )  # fmt: skip
    assert abs(found[2]["certificate"] - bound) < 1e-5
    table = list(sparsity.cell_lines([fresh.row, *found]))
    assert [line.split(" | ")[1] for line in table[2:]] == ["no noise layer", "1", "2", "all"]
    assert table[2].endswith("| - |")
    later = found[1] | {"test_accuracy": 0.0}
    assert "0.000" in list(sparsity.cell_lines([*found, later]))[3]


def test_cells_need_a_file_for_their_rows(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["sparsity", "--cells", str(tmp_path)])
    assert "--cells needs --json" in capsys.readouterr().err


def test_cells_refuse_what_they_would_ignore(tmp_path, capsys):
    given = ["--cells", str(tmp_path), "--json", str(tmp_path / "rows.jsonl")]
    with pytest.raises(SystemExit):
        main(["sparsity", *given, "--seeds", "1", "--dense-up-to", "5"])
    assert "so --seeds, --dense-up-to cannot go with it" in capsys.readouterr().err
