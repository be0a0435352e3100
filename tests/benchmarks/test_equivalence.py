"""The main command on one seed and few epochs: report, rows, picture, exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import equivalence, figures, records, summaries
from em_baseline import statements

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "equivalence",
    "--seeds",
    "1",
    "--epochs",
    "2",
    "--inner-epochs",
    "1",
    "--backend",
    "numpy",
]
PROVENANCE = {
    "command",
    "blas_threads",
    "benchmark",
    "commit",
    "date",
    "machine",
    "device",
    "backend",
    "threads",
    "versions",
}


@pytest.fixture
def without_exact_m_steps(monkeypatch):
    """Leave out V9 and V10, which take most of the time."""
    monkeypatch.setattr(equivalence, "at_the_optimum", lambda *arguments: iter(()))


def test_the_whole_command_on_one_seed(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert command.main([*SHORT, "--out", str(out), "--json", str(tmp_path / "rows.jsonl")]) == 0
    printed = capsys.readouterr().out
    for words in ("(a) Who ends where", "(b) What ties them together", "(c) In words", "Picture:"):
        assert words in printed
    assert "FAIL" not in printed
    assert (out / "equivalence.png").read_bytes().startswith(b"\x89PNG")

    rows = records.read_rows(tmp_path / "rows.jsonl")
    assert rows == records.read_rows(out / "equivalence.jsonl")
    assert all(row.keys() >= PROVENANCE for row in rows)
    proofs = [row for row in rows if "statement" in row]
    assert {row["statement"] for row in proofs} == {f"V{v}" for v in range(1, 14)}
    assert all(row.keys() >= {"model", "residual", "bound", "holds", "seed"} for row in proofs)
    assert all(row["holds"] is True for row in proofs)
    ends = [row for row in rows if "test_accuracy" in row]
    assert [row["method"] for row in ends] == [
        "baseline",
        summaries.JOINT,
        summaries.EM,
        summaries.DAMPED,
    ]
    assert len({row["labels_hash"] for row in ends}) == 1
    keys = {"dataset", "network", "noise", "fraction", "seed", "noise_matrix_error"}
    assert all(row.keys() >= keys for row in ends[1:])


@pytest.mark.usefixtures("without_exact_m_steps")
@pytest.mark.parametrize("residual", [1.0, np.nan, np.inf])
def test_a_statement_that_fails_makes_the_exit_status_1(residual, monkeypatch, tmp_path, capsys):
    def broken(point):
        return [statements.Statement("V1", "broken on purpose", residual, 1e-12)]

    monkeypatch.setattr(statements, "same_function", broken)
    assert command.main([*SHORT, "--json", str(tmp_path / "rows")]) == 1
    broken_rows = [row for row in records.read_rows(tmp_path / "rows") if row.get("holds") is False]
    assert [row["words"] for row in broken_rows] == ["broken on purpose"]
    printed = capsys.readouterr().out
    assert "broken on purpose" in printed
    assert "FAILS" in printed
    assert "NOT the same function" in printed


@pytest.mark.usefixtures("without_exact_m_steps")
def test_the_same_seed_gives_the_same_figures(tmp_path):
    runs = []
    for name in ("a", "b"):
        command.main([*SHORT, "--json", str(tmp_path / name)])
        of_the_run = dict.fromkeys(("seconds", "date", "command"), "")
        runs.append([{**row, **of_the_run} for row in records.read_rows(tmp_path / name)])
    assert runs[0] == runs[1]


@pytest.mark.usefixtures("without_exact_m_steps")
@pytest.mark.parametrize(
    "options",
    [
        ["--noise-kind", "symmetric", "--start", "soft"],
        ["--start", "uniform", "--noise", "0.2", "--pseudo-count", "1"],
        ["--noise", "0", "--channel-step", "0", "--damping", "1"],
        ["--no-early-stopping"],
    ],
    ids=" ".join,
)
def test_the_options_work(options):
    assert command.main([*SHORT, *options]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--noise", "1.5"], "noise must lie in [0, 1]; found 1.5"),
        (["--seeds", "0"], "--seeds must be at least 1; found 0"),
        (["--epochs", "0"], "--inner-epochs and --epochs must be at least 1"),
        (["--damping", "2"], "--damping must lie in (0, 1]; found 2.0"),
        (["--channel-step", "-1"], "--channel-step must be at least 0; found -1.0"),
        (["--channel-step", "inf"], "--channel-step must be at least 0; found inf"),
        (["--json", "/"], "cannot write to /"),
        (["--out", __file__], "cannot write to"),
        (["--pseudo-count", "-1"], "pseudo_count must be finite and at least 0; found -1.0"),
        (["--dataset", "letters"], "invalid choice: 'letters'"),
        (["--dataset", "mnist"], "--dataset mnist needs --models, --heads or --suite"),
        (["--heads", "mlp", "--epochs", "3"], "--epochs has no meaning with --suite, --models or"),
        (["--suite", "--noise-kind", "cyclic"], "--noise-kind has no meaning with --suite\n"),
        (["--suite", "--models", "t"], "invalid choice: 't'"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["equivalence", *options])
    assert message in capsys.readouterr().err


def test_figures_are_drawn_from_a_results_file_alone(tmp_path, capsys):
    committed = ROOT / "benchmarks" / "results" / "equivalence.jsonl"
    assert command.main(["figures", str(committed), str(tmp_path / "picture.svg")]) == 0
    assert "<svg" in (tmp_path / "picture.svg").read_text()
    half = '{"curve": "s-model, joint"}'
    for content, message in (
        ("", "not a complete run"),
        (half, "not a complete run"),
        ("{", "line 1: not JSON"),
    ):
        (tmp_path / "rows").write_text(content)
        with pytest.raises(SystemExit, match="2"):
            command.main(["figures", str(tmp_path / "rows"), str(tmp_path / "p.png")])
        assert message in capsys.readouterr().err
    for picture, message in (("p.txt", "must end in one of"), ("rows/p.png", "cannot write to")):
        with pytest.raises(SystemExit, match="2"):
            command.main(["figures", str(committed), str(tmp_path / picture)])
        assert message in capsys.readouterr().err
    assert figures.STYLES.keys() <= {summaries.JOINT, summaries.EM, summaries.DAMPED}


def test_a_killed_run_keeps_its_rows_and_leaves_the_last_complete_file_alone(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"an earlier": "run"}\n')

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(equivalence, "at_the_optimum", interrupted)
    assert command.main([*SHORT, "--json", str(path)]) == 130
    assert records.read_rows(path) == [{"an earlier": "run"}]
    kept = records.read_rows(records.unfinished(path))
    assert [row["seed"] for row in kept if "test_accuracy" in row] == [0, 0, 0, 0]
    assert f"Rows so far: {records.unfinished(path)}" in capsys.readouterr().err


def test_rows_replace_a_file_in_one_step_and_survive_a_failure(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.write_rows(path, [{"a": 1}])
    with pytest.raises(TypeError, match="not JSON serializable"):
        records.write_rows(path, [{"a": 2}, {"a": object()}])
    assert records.read_rows(path) == [{"a": 1}]
    records.write_rows(path, [{"a": np.nan, "b": -np.inf}])
    assert records.read_rows(path) == [{"a": None, "b": None}]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_line_that_is_no_object_is_named(tmp_path):
    (tmp_path / "rows").write_text('{"a": 1}\n[2]\n')
    with pytest.raises(ValueError, match=r"line 2: expected an object, found '\[2\]'"):
        records.read_rows(tmp_path / "rows")


def test_piped_output_holds_no_progress_bar(tmp_path):
    code = (
        "import sys; from benchmarks import __main__ as m, equivalence as e; "
        "e.at_the_optimum = lambda *arguments: iter(()); sys.exit(m.main(sys.argv[1:]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *SHORT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


# --- the committed results, from which the README quotes ----------------------------------------


@pytest.fixture(scope="module")
def committed() -> list[records.Row]:
    return records.read_rows(ROOT / "benchmarks" / "results" / "equivalence.jsonl")


def test_committed_results_hold_on_five_seeds_and_keep_the_promise(committed):
    assert {row["seed"] for row in committed if "test_accuracy" in row} == set(range(5))
    assert all(row["holds"] for row in committed if "statement" in row)
    words = "\n".join(summaries.conclusions(committed))
    assert "Joint training ends above the baseline" in words
    assert "the intervals do not overlap" in words


def test_readme_quotes_the_committed_results(committed):
    readme = (ROOT / "README.md").read_text()
    for line in [*summaries.accuracy_table(committed), *summaries.conclusions(committed)]:
        assert line in readme
    for line in summaries.statement_table(committed):
        assert line in readme
    for line in summaries.variations_table(variations()):
        assert line in readme


def variations() -> dict[str, list[records.Row]]:
    """Return the committed runs of the README's second table, each under its options."""
    runs = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("equivalence-*.jsonl")):
        rows = records.read_rows(path)
        given = rows[0]["command"].removeprefix("python -m benchmarks equivalence")
        runs[f"`{given.partition('--json')[0].strip()}`"] = rows
    return runs


def test_committed_bounds_are_those_of_the_code(committed, tmp_path):
    """Old rows would quote old bounds: every claim and its fixed bound come from this code."""
    command.main([*SHORT, "--json", str(tmp_path / "rows")])
    now = {
        (row["statement"], row["words"])
        for row in records.read_rows(tmp_path / "rows")
        if "statement" in row
    }
    assert now == {(row["statement"], row["words"]) for row in committed if "statement" in row}


def test_conclusions_follow_the_numbers():
    """Swap the methods' figures, and the sentences change."""

    def rows(joint, em, joint_l, em_l):
        return [
            {
                "method": method,
                "test_accuracy": accuracy + 0.001 * seed,
                "log_likelihood": likelihood,
                "validation_log_likelihood": likelihood,
                "noise_matrix_start_error": 0.1,
                "noise_matrix_first_move": 0.1,
                "noise_matrix_diagonal": 0.6,
                "network_log_likelihood": likelihood,
                "early_stopping": True,
                "likelihood_drops": 0,
                "noise": 0.4,
                "damping": 0.05,
            }
            for seed in range(5)
            for method, accuracy, likelihood in (
                (summaries.BASELINE, 0.8, -1.0),
                (summaries.JOINT, joint, joint_l),
                (summaries.EM, em, em_l),
                (summaries.DAMPED, 0.9, -0.8),
            )
        ]

    better_joint = "\n".join(summaries.conclusions(rows(0.95, 0.85, -0.7, -0.6)))
    assert "Joint training ends above the baseline" in better_joint
    assert "EM ends with the higher training likelihood" in better_joint
    assert "joint training with the better classifier" in better_joint
    better_em = "\n".join(summaries.conclusions(rows(0.75, 0.85, -0.6, -0.7)))
    assert "Joint training does not end above the baseline" in better_em
    assert "joint training ends with the higher training likelihood" in better_em
    assert "EM with the better classifier" in better_em
    json.dumps(better_em)
