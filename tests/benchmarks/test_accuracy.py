"""The accuracy grid: what a cell depends on, and that nothing finished is ever lost."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import em_baseline
import nalayer
from benchmarks import accuracy, accuracy_figures, methods, records, summaries
from benchmarks.__main__ import main
from benchmarks.cells import Cell, CellError, Finished, Store
from benchmarks.methods import METHODS, Task, cell_of, run_cell
from nalayer.datasets import load_dataset
from nalayer.label_noise import labels_hash

ROOT = Path(__file__).parents[2]
CELL = Cell(
    dataset="digits",
    network="mlp",
    method="baseline",
    noise=0.4,
    noise_kind="permutation",
    fraction=1.0,
    seed=0,
    epochs=2,
    patience=4,
    batch_size=64,
    inner_epochs=1,
    n_kept=3,
    missing=0.5,
)
SMALL = ["--noise", "0.3", "0.4", "--seeds", "2", "--epochs", "2", "--methods", "s", "c", "em-s"]
TIMES = ("seconds", "date", "commit", "command", "machine")


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", "accuracy", *SMALL, "--out", str(out), *options]


def table(out: Path) -> list[dict]:
    """Return the rows of a run, without what may differ from run to run."""
    rows = records.read_rows(out / "accuracy.jsonl")
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """The folder of one run from beginning to end."""
    out = tmp_path_factory.mktemp("unbroken")
    assert main(["accuracy", *SMALL, "--jobs", "1", "--out", str(out)]) == 0
    return out


def test_table_has_every_cell_in_order_and_no_other(unbroken):
    rows = table(unbroken)
    asked = [(r["noise"], r["method"], r["seed"]) for r in rows]
    assert asked == [
        (noise, method, seed)
        for noise in (0.3, 0.4)
        for method in ("s", "c", "em-s")
        for seed in (0, 1)
    ]
    assert all(0 <= row["test_accuracy"] <= 1 for row in rows)
    # The baseline was not asked for, but the others start from it.
    assert len(list((unbroken / "cells").glob("*-baseline-*.npz"))) == 4


def test_grid_that_grows_in_the_same_folder_ends_with_the_table_of_one_run(unbroken, tmp_path):
    first = [*SMALL[: SMALL.index("--methods")], "--methods", "baseline", "--jobs", "1"]
    assert main(["accuracy", *first, "--out", str(tmp_path)]) == 0
    assert main(["accuracy", *SMALL, "--jobs", "1", "--out", str(tmp_path)]) == 0
    assert table(tmp_path) == table(unbroken)


def test_repeated_options_count_once(tmp_path):
    options = ["--noise", "0.3", "0.3", "--seeds", "1", "--epochs", "1", "--methods", "s", "s"]
    assert main(["accuracy", *options, "--jobs", "1", "--out", str(tmp_path)]) == 0
    assert len(table(tmp_path)) == 1


def test_all_methods_of_a_seed_and_level_have_the_same_noisy_labels(unbroken):
    hashes: dict[tuple, set] = {}
    for row in table(unbroken):
        hashes.setdefault((row["noise"], row["seed"]), set()).add(row["labels_hash"])
    assert all(len(found) == 1 for found in hashes.values())
    assert len(set.union(*hashes.values())) == len(hashes)


def test_finished_run_is_not_run_again(unbroken, capsys):
    before = {path: path.stat().st_mtime_ns for path in (unbroken / "cells").iterdir()}
    assert main(["accuracy", *SMALL, "--jobs", "1", "--out", str(unbroken)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (unbroken / "cells").iterdir()} == before
    assert "16 of them finished before" in capsys.readouterr().out


def test_number_of_cells_and_time_are_said_before_the_first_begins(tmp_path, monkeypatch, capsys):
    def said_before(cells, store, options, bar):
        said.append(capsys.readouterr().out)
        assert bar.total == 16
        return {}

    said: list[str] = []
    monkeypatch.setattr(accuracy, "run_grid", said_before)
    monkeypatch.setattr(accuracy, "seconds_per_epoch", lambda cell: 30.0)
    assert main(["accuracy", *SMALL, "--jobs", "2", "--out", str(tmp_path)]) == 0
    assert "12 cells and 4 that they start from, 0 of them finished before" in said[0]
    # Two epochs each, 12 without and 4 with five more a round (em-s): 72 of 30 s, on two cores.
    assert "16 to run: about 18 min on 2 of these cores" in said[0]


def test_killed_run_goes_on_and_ends_with_the_identical_table(unbroken, tmp_path):
    run = subprocess.Popen(
        command(tmp_path, "--jobs", "2"), cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "cells").glob("*.npz"))) < 3:
        assert run.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    kept = list((tmp_path / "cells").glob("*.npz"))
    assert not (tmp_path / "accuracy.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert main(["accuracy", *SMALL, "--jobs", "1", "--out", str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert table(tmp_path) == table(unbroken)


def test_damaged_cell_is_named_and_alone_run_anew(unbroken, tmp_path, capsys):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    victim = next((tmp_path / "cells").glob("*-baseline-*.npz"))
    whole = victim.read_bytes()
    others = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir() if p != victim}
    # A method that starts from it, so that it is read
    for cell in (tmp_path / "cells").glob("*-em-s-*.npz"):
        cell.unlink()
        others.pop(cell)
    again = ["accuracy", *SMALL, "--jobs", "1", "--out", str(tmp_path)]
    for damaged in (whole[: len(whole) // 2], _flipped(whole), b""):
        victim.write_bytes(damaged)
        assert main(again) == 1
        said = capsys.readouterr().err
        assert victim.name in said
        assert "delete it" in said
    victim.unlink()
    assert main(again) == 0
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert table(tmp_path) == table(unbroken)


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


TMPFS = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]


def can_mount() -> bool:
    try:
        return (
            subprocess.run([*TMPFS, "mount -t tmpfs t /mnt"], capture_output=True).returncode == 0
        )
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="no small file system can be mounted here")
def test_full_disk_is_named_and_what_was_finished_stays(unbroken, tmp_path):
    """On a file system of 300 kB, which holds some of the 16 cells but not all."""
    cells = tmp_path / "kept"
    script = (
        f"mount -t tmpfs -o size=300k t {tmp_path / 'small'} && "
        f"{' '.join(command(tmp_path / 'small', '--jobs', '1'))}; status=$?; "
        f"cp -r {tmp_path / 'small' / 'cells'} {cells}; exit $status"
    )
    (tmp_path / "small").mkdir()
    run = subprocess.run([*TMPFS, script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "make room and give the same command again" in run.stderr
    assert "No space left" in run.stderr
    kept = list(cells.iterdir())
    assert 0 < len(kept) < 16
    for path in kept:
        with np.load(path) as archive:
            assert {"row", "cell"} <= set(archive.files)
    assert {path.suffix for path in kept} == {".npz"}, "no half-written file is left"


def test_dask_cluster_that_loses_a_worker_ends_with_the_identical_table(unbroken, tmp_path):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        run = subprocess.Popen(
            command(tmp_path, "--dask", cluster.scheduler_address),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 120
        while not list((tmp_path / "cells").glob("*.npz")):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(cluster.workers[0].pid, signal.SIGKILL)
        assert len(list((tmp_path / "cells").glob("*.npz"))) < 16, "it had ended before"
        _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert table(tmp_path) == table(unbroken)


def test_dask_workers_with_threads_and_missing_clusters_are_refused(tmp_path, capsys):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        assert main(["accuracy", *SMALL, "--out", str(tmp_path), "--dask", address]) == 1
        assert "--nthreads 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["accuracy", *SMALL, "--out", str(tmp_path), "--dask", "nonsense"])
    assert "tcp://host:8786" in capsys.readouterr().err


def test_lost_local_process_is_named_and_what_was_finished_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "_attempt", _attempt_that_dies_at_s)
    assert main(["accuracy", *SMALL, "--jobs", "2", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "what ran the cells is gone" in said
    assert "fewer --jobs" in said
    assert len(list((tmp_path / "cells").glob("*-baseline-*.npz"))) == 4


def _attempt_that_dies_at_s(cell: Cell, *rest):
    if cell.method == "s":
        os.kill(os.getpid(), signal.SIGKILL)
    return ORIGINAL_ATTEMPT(cell, *rest)


ORIGINAL_ATTEMPT = accuracy._attempt


def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def half(file, **members):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).save(CELL, Finished({"test_accuracy": 0.5}))
    assert list(tmp_path.iterdir()) == []


def test_without_dask_the_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SystemExit):
        main(["accuracy", "--dask", "tcp://127.0.0.1:1", "--out", str(tmp_path)])
    assert "nalayer[dask]" in capsys.readouterr().err


def test_every_method_of_the_paper_trains(tmp_path):
    """All lines of the registry, each from what the method before it kept."""
    longer = replace(CELL, epochs=12)
    finished: dict[str, Finished] = {}
    for name, method in METHODS.items():
        start = finished[method.starts_from].arrays if method.starts_from else {}
        finished[name] = run_cell(cell_of(longer, name), start, keep_parameters=True)
        row = finished[name].row
        assert row["test_accuracy"] > 0.5, name  # guessing is .1
        assert row["method"] == name
    learned = {name for name, f in finished.items() if "noise_matrix_error" in f.row}
    assert learned == {
        "larsen", "sukhbaatar", "s", "s-clustered", "c", "sparse-s", "sparse-c", "em-s", "em-c"
    }  # fmt: skip
    assert len({f.row["labels_hash"] for f in finished.values()}) == 1
    results = [f.row["parameters_hash"] for f in finished.values()]
    assert len(set(results)) == len(results), "two methods gave the same network"
    assert (finished["sparse-s"].arrays["support"]).shape == (10, CELL.n_kept)


def test_linear_channel_learns_the_noise_on_top_of_the_baseline():
    """The method of Sukhbaatar & Fergus: it used to stay where it starts, at the baseline."""
    longer = replace(CELL, epochs=60, seed=1)  # of seed 1 uncut gradients replace rows of theta
    baseline = run_cell(cell_of(longer, "baseline"), {}, keep_parameters=True)
    row = run_cell(cell_of(longer, "sukhbaatar"), baseline.arrays, keep_parameters=False).row
    assert row["noise_matrix_error"] < CELL.noise / 2  # the identity's error is the noise
    assert row["test_accuracy"] > baseline.row["test_accuracy"] + 0.05


def test_a_share_of_the_plain_loss_and_a_prior_together_are_refused():
    both = replace(cell_of(CELL, "s"), plain_weight=0.5, pull=1.0)
    start = {"parameters": Task(both).initial_weights()}
    with pytest.raises(ValueError, match=r"found plain_weight 0\.5 and pull 1\.0"):
        run_cell(both, start, keep_parameters=False)


def test_no_method_is_trained_or_stopped_on_clean_labels(monkeypatch):
    """What reaches a trainer: samples of the training set, labels as noisy as they should be."""
    seen: list[tuple] = []
    real_train, real_fit = nalayer.train, em_baseline.fit

    def spy(real):
        def called(model, start, x, targets, **options):
            seen.append((x, targets, *options["validation"]))
            return real(model, start, x, targets, **options)

        return called

    monkeypatch.setattr(nalayer, "train", spy(real_train))
    monkeypatch.setattr(em_baseline, "fit", spy(real_fit))
    data, finished = load_dataset("digits", np.float32), {}
    clean_of = {row.tobytes(): label for row, label in zip(data.x_train, data.labels_train)}  # noqa: B905
    for name, method in METHODS.items():
        start = finished[method.starts_from].arrays if method.starts_from else {}
        finished[name] = run_cell(cell_of(CELL, name), start, keep_parameters=True)
        for x, targets in (seen[-1][:2], seen[-1][2:]):
            assert all(row.tobytes() in clean_of for row in x), name
            if targets.ndim == 2:
                targets = targets.argmax(axis=1)
                if targets.size > 500:
                    continue  # the baseline's own outputs, for distillation
            known = targets != -1
            clean = np.array([clean_of[row.tobytes()] for row in x])
            assert abs((targets != clean)[known].mean() - CELL.noise) < 0.06, name
    assert len(seen) == len(METHODS)


def test_result_trained_on_other_labels_is_refused():
    with pytest.raises(RuntimeError, match="trained on labels 0123"):
        methods._require_noisy_labels(Task(CELL), "0123")


def test_methods_begin_where_they_should(monkeypatch):
    """Without a single epoch, each returns its start."""
    still, finished = replace(CELL, epochs=1, patience=0), {}
    starts: dict[str, np.ndarray] = {}
    real_train, real_fit = nalayer.train, em_baseline.fit

    def spy(real):
        def called(model, start, *arguments, **options):
            starts["now"] = start.copy()
            return real(model, start, *arguments, **options)

        return called

    monkeypatch.setattr(nalayer, "train", spy(real_train))
    monkeypatch.setattr(em_baseline, "fit", spy(real_fit))
    n_weights = Task(still).network.n_weights
    fresh = Task(still).initial_weights()
    for name, method in METHODS.items():
        start = finished[method.starts_from].arrays if method.starts_from else {}
        finished[name] = run_cell(cell_of(still, name), start, keep_parameters=True)
        expected = start["parameters"] if start and name != "distillation" else fresh
        assert np.array_equal(starts["now"][:n_weights], expected[:n_weights]), name


def test_settings_reach_the_training(tmp_path):
    rows = {
        changes: run_cell(replace(CELL, **dict([changes])), {}, keep_parameters=False).row
        for changes in (("epochs", 2), ("epochs", 3), ("batch_size", 32))
    }
    assert [row["epochs"] for row in rows.values()] == [2, 3, 2]
    assert rows["batch_size", 32]["gradients"] > 1.9 * rows["epochs", 2]["gradients"]
    baseline = run_cell(CELL, {}, keep_parameters=True)
    em = [
        run_cell(replace(cell_of(CELL, "em-s"), inner_epochs=s), baseline.arrays, False).row
        for s in (1, 2)
    ]
    assert em[1]["gradients"] == 2 * em[0]["gradients"]


def test_figure_refuses_rows_that_do_not_belong_together(unbroken, tmp_path, capsys):
    rows = records.read_rows(unbroken / "accuracy.jsonl")
    records.write_rows(tmp_path / "two.jsonl", [*rows, rows[0] | {"dataset": "mnist"}])
    with pytest.raises(SystemExit):
        main(["figures", str(tmp_path / "two.jsonl"), str(tmp_path / "f.png")])
    assert "must hold one dataset" in capsys.readouterr().err


def test_figures_of_the_paper_have_their_grids():
    """MATH.md: 14 levels, 5 seeds, three sizes; Figures 3 and 4 on CIFAR-100 with the CNN."""
    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    found = {}
    for figure in (2, 3, 4):
        options = parser.parse_args(["--figure", str(figure)])
        accuracy.fill_in(options)
        cells = accuracy.grid(options)
        assert len({c.noise for c in cells}) == 14
        assert {c.fraction for c in cells} == {0.2, 0.5, 1.0}
        assert {c.seed for c in cells} == set(range(5))
        assert {(c.epochs, c.patience, c.batch_size) for c in cells} == {(40, 4, 256)}
        kind = {(c.dataset, c.network) for c in cells}
        found[figure] = kind, {c.method for c in cells}
    figure_2 = {"baseline", "reed-soft", "reed-hard", "s", "c"}
    assert found[2][0] == {("mnist", "mlp")}
    assert found[2][1] == figure_2 | {"em-s", "oracle"}
    assert found[3] == ({("cifar100", "cnn")}, figure_2)
    assert found[4] == ({("cifar100", "cnn")}, {"s", "c", "sparse-s", "sparse-c"})


def test_table_and_figure_show_means_of_the_seeds():
    rows = [
        {"dataset": "d", "network": "mlp", "method": m, "noise": 0.3, "fraction": 1.0, "seed": s,
         "noise_kind": "permutation", "n_samples": 9, "n_held_out": 1, "test_accuracy": a,
         "noise_matrix_error": a / 2}
        for m, values in (("s", (0.5, 0.7, 0.9)), ("c", (0.4, 0.4, 0.4)))
        for s, a in enumerate(values)
    ]  # fmt: skip
    assert summaries.summary_table(rows)[2].endswith(
        "| 0.700 [0.500, 0.900] | 0.400 [0.400, 0.400] |"
    )
    axes = accuracy_figures.plt.figure().add_subplot()
    accuracy_figures._curves(axes, rows, "test_accuracy", ["s", "c"])
    points = {line.get_label(): line.get_ydata() for line in axes.containers[0].get_children()[:1]}
    assert np.abs(next(iter(points.values())) - 0.7).max() <= 1e-12
    # The bar is the 95 % interval of 1000 resampled means of .5, .7, .9: with the seeds as they are
    # drawn there, from the least to the largest of them.
    (bar,) = axes.containers[0].get_children()[-1].get_segments()
    assert bar[:, 1].tolist() == pytest.approx(summaries.bootstrap_interval([0.5, 0.7, 0.9]))


def test_figure_shows_accuracy_and_the_error_of_theta_for_every_size(tmp_path, monkeypatch):
    """One column a size, the learned noise matrix's error below; means and intervals of both."""
    rows = [
        {"dataset": "d", "network": "mlp", "method": "s", "noise": noise, "fraction": fraction,
         "seed": seed, "noise_kind": "permutation", "n_samples": 9, "n_held_out": 1,
         "test_accuracy": 1 - noise + 0.1 * seed, "noise_matrix_error": noise / 2}
        for noise in (0.3, 0.4) for fraction in (0.2, 1.0) for seed in (0, 1)
    ]  # fmt: skip
    drawn = []
    monkeypatch.setattr(accuracy_figures.plt, "close", drawn.append)
    accuracy_figures.draw_accuracy(rows, tmp_path / "f.png")
    above_left, above_right, below_left, below_right = drawn[0].axes[:4]
    for axes in (above_left, above_right):
        assert axes.containers[0].lines[0].get_ydata().tolist() == pytest.approx([0.75, 0.65])
    for axes in (below_left, below_right):
        assert axes.containers[0].lines[0].get_ydata().tolist() == pytest.approx([0.15, 0.2])
    assert "error of theta" in below_left.get_ylabel()


def test_a_method_has_one_colour_in_both_panels(tmp_path, monkeypatch):
    """Natarajan's learns no noise matrix and is missing below; the others keep their colours."""
    rows = [
        {"dataset": "d", "network": "mlp", "method": method, "noise": 0.3, "fraction": 1.0,
         "seed": 0, "noise_kind": "permutation", "n_samples": 9, "n_held_out": 1,
         "test_accuracy": 0.5, "noise_matrix_error": error}
        for method, error in (("natarajan", None), ("sukhbaatar", 0.1))
    ]  # fmt: skip
    drawn = []
    monkeypatch.setattr(accuracy_figures.plt, "close", drawn.append)
    accuracy_figures.draw_accuracy(rows, tmp_path / "f.png")
    above, below = (axes.containers for axes in drawn[0].axes[:2])
    assert above[1].lines[0].get_color() == below[0].lines[0].get_color()
    assert above[0].lines[0].get_color() != above[1].lines[0].get_color()


def test_interval_is_that_of_a_thousand_resampled_means():
    """Percentiles 2.5 and 97.5 of the means of 1000 samples drawn again, as in the paper."""
    assert summaries.N_RESAMPLES == 1000
    values = [0.1, 0.2, 0.4, 0.8, 0.9]
    rng = np.random.default_rng(7)
    means = rng.choice(values, (100_000, 5)).mean(axis=1)
    exact = np.percentile(means, [2.5, 97.5])
    assert np.abs(summaries.bootstrap_interval(values) - exact).max() <= 0.03


def test_method_without_a_definition_says_so():
    """At a half, the ten-cycle's noise matrix has no inverse."""
    cell = cell_of(CELL, "natarajan")
    row = run_cell(replace(cell, noise=0.5), {}, keep_parameters=False).row
    assert row["test_accuracy"] is None
    assert "theta must be invertible" in row["reason"]


def test_cells_differ_where_their_results_could():
    names = {CELL.name}
    for key, value in {
        "dataset": "mnist",
        "network": "cnn",
        "noise": 0.41,
        "noise_kind": "cyclic",
        "fraction": 0.5,
        "seed": 1,
        "epochs": 3,
        "patience": 5,
        "batch_size": 65,
        "dtype": "float64",
        "backend": "numpy",
        "threads": 2,
        "inner_epochs": 2,
        "n_kept": 4,
        "missing": 0.4,
    }.items():
        names.add(replace(CELL, **{key: value}).name)
    assert len(names) == 16
    # A setting that a method does not read does not make it another cell.
    other = replace(CELL, inner_epochs=9, n_kept=2)
    assert cell_of(other, "s") == cell_of(CELL, "s")
    assert cell_of(other, "em-s") != cell_of(CELL, "em-s")


def test_waves_need_earlier_waves_only():
    cells = [cell_of(CELL, name) for name in ("em-c", "sparse-c", "oracle")]
    found = [[cell.method for cell in wave] for wave in accuracy.waves(cells)]
    assert [sorted(wave) for wave in found] == [
        ["baseline"],
        ["em-s", "oracle", "sparse-s"],
        ["em-c", "sparse-c"],
    ]


def test_task_holds_out_a_tenth_and_splits_by_class():
    task = Task(replace(CELL, fraction=0.5))
    n = task.z.size + task.validation[1].size
    assert n == len(task.data.labels_train) // 2
    assert abs(task.validation[1].size - n / 10) <= 1
    known = {row.tobytes(): label for row, label in zip(task.data.x_train, task.data.labels_train)}  # noqa: B905
    chosen = [known[row.tobytes()] for x in (task.x, task.validation[0]) for row in x]
    halves = np.bincount(task.data.labels_train) / 2
    assert np.abs(np.bincount(chosen) - halves).max() <= 1
    assert labels_hash(task.z) != labels_hash(Task(replace(CELL, seed=1)).z)


def test_store_refuses_another_cell_under_the_same_name(tmp_path):
    store = Store(tmp_path)
    store.save(CELL, Finished({"test_accuracy": 0.5}))
    other = replace(CELL, seed=7)
    shutil.copy(store.path(CELL), store.path(other))
    assert store.load(CELL).row == {"test_accuracy": 0.5}
    with pytest.raises(CellError, match="holds another cell"):
        store.load(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--noise", "1.5"], "noise"),
        (["--fractions", "0"], "--fractions"),
        (["--fractions", "0.01"], "too few members"),
        (["--seeds", "0"], "--seeds"),
        (["--network", "cnn"], "size must fit"),
        (["--n-kept", "11"], "--n-kept"),
        (["--missing", "1"], "--missing"),
        (["--methods", "magic"], "invalid choice"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["accuracy", *options, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_failed_cell_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fail(task, start):
        raise FloatingPointError("the training loss is nan after epoch 1")

    broken = METHODS["s"].__class__("s", "", "baseline", fail)
    monkeypatch.setitem(METHODS, "s", broken)
    assert main(["accuracy", *SMALL, "--jobs", "1", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "loss is nan after epoch 1" in said.err
    assert "8 cells failed" in said.err  # s, and c which starts from it
    assert {row["method"] for row in table(tmp_path)} == {"em-s"}


def test_figure_and_summary_are_drawn_from_the_rows(unbroken, tmp_path, capsys):
    assert main(["figures", str(unbroken / "accuracy.jsonl"), str(tmp_path / "f.png")]) == 0
    assert (tmp_path / "f.png").stat().st_size > 10_000
    assert (tmp_path / "f-theta.png").stat().st_size > 10_000
    lines = summaries.summary_table(records.read_rows(unbroken / "accuracy.jsonl"))
    assert len(lines) == 4
    assert lines[0] == "| data | share | noise | s | c | em-s |"


@pytest.mark.parametrize("results", ["accuracy-mnist", "accuracy-cifar100", "accuracy-digits"])
def test_readme_has_the_table_of_the_committed_rows(results):
    readme = (ROOT / "README.md").read_text()
    rows = records.read_rows(ROOT / "benchmarks" / "results" / f"{results}.jsonl")
    assert "\n".join(summaries.summary_table(rows)) in readme
    seeds = {row["seed"] for row in rows}
    by_label: dict[tuple, set] = {}
    for row in rows:
        key = (row["noise"], row["fraction"], row["seed"])
        by_label.setdefault(key, set()).add(row["labels_hash"])
    assert len(seeds) >= 2
    assert all(len(hashes) == 1 for hashes in by_label.values())


def test_committed_digits_have_every_method_of_the_registry():
    rows = records.read_rows(ROOT / "benchmarks" / "results" / "accuracy-digits.jsonl")
    cells = {(row["method"], row["noise"], row["seed"]) for row in rows}
    assert len(cells) == len(rows) == 3 * 5 * len(METHODS)
    assert {method for method, _, _ in cells} == set(METHODS)


def test_readme_explains_the_paper_s_marks_by_the_committed_rows():
    """Seed by seed, and what the c-model does wherever it leaves its start."""
    rows = records.read_rows(ROOT / "benchmarks" / "results" / "accuracy-mnist.jsonl")
    readme = " ".join((ROOT / "README.md").read_text().split())
    shown = ["baseline", "reed-hard", "s", "c", "s-clustered", "oracle"]
    assert " ".join(" ".join(summaries.seed_table(rows, 0.46, shown)).split()) in readme
    by_cell = {(r["method"], r["noise"], r["fraction"], r["seed"]): r for r in rows}
    c_models = {key[1:]: row for key, row in by_cell.items() if key[0] == "c" and key[1] < 0.5}
    left = {key: row for key, row in c_models.items() if row["best_epoch"] > 0}
    with_all = [key for key in left if key[1] == 1]
    said = f"below one half in {len(left)} of {len(c_models)} cells, {len(with_all)} of 15 with all"
    assert said in readme
    for key, row in left.items():
        start = by_cell["s", *key]
        assert row["test_accuracy"] < start["test_accuracy"]
        assert row["validation_loss"] < start["validation_loss"]
        assert row["noise_matrix_error"] > start["noise_matrix_error"]
