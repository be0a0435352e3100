"""The report, the suite and the gradient study."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gradients, records, report, suite, summaries
from benchmarks.__main__ import main
from em_baseline.statements import Literal
from nalayer import stream
from nalayer.datasets import load_dataset

ROOT = Path(__file__).parents[2]
SOFTMAX_S = suite.Configuration("digits", "s", "softmax regression", "permutation", 0.4, 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The report of the committed rows."""
    out = tmp_path_factory.mktemp("report")
    assert main(["report", "--out", str(out)]) == 0
    return out


def test_report_has_every_statement_and_study(written):
    text = (written / "report.md").read_text()
    for name, formula in report.FORMULAS.items():
        assert f"| {name} | {formula} |" in text
    for study in report.STUDIES:
        assert f"## {study.title}" in text
    assert "## Speed" in text
    assert "FAIL" not in text


def test_html_holds_its_pictures_and_needs_no_network(written):
    page = (written / "report.html").read_text()
    pictures = re.findall(r'<img[^>]*src="([^"]{1,40})', page)
    assert len(pictures) >= 6
    assert all(start.startswith("data:image/png;base64,") for start in pictures)
    assert not re.search(r'(src|href)="(https?:|//)', page)
    assert 'name="viewport"' in page


def test_pictures_of_the_markdown_are_there(written):
    found = re.findall(r"\]\((images/[^)]+)\)", (written / "report.md").read_text())
    assert found
    assert all((written / name).stat().st_size > 1000 for name in found)


def test_committed_report_is_that_of_the_committed_rows(written):
    assert (ROOT / "docs" / "report.md").read_text() == (written / "report.md").read_text()


def test_committed_page_on_scaling_is_that_of_the_committed_rows(written):
    page = (written / "scaling.md").read_text()
    assert (ROOT / "docs" / "scaling.md").read_text() == page
    assert "nan" not in page
    pictures = re.findall(r"\]\((images/[^)]+)\)", page)
    assert pictures
    assert all((ROOT / "docs" / name).exists() for name in pictures)


def test_committed_times_of_the_four_versions_are_those_of_the_rows(written):
    page = (written / "kernel_versions.md").read_text()
    assert (ROOT / "docs" / "kernel_versions.md").read_text() == page
    assert "nan" not in page


def test_report_of_nothing_is_short(tmp_path):
    assert main(["report", "--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "## " not in (tmp_path / "out" / "report.md").read_text()


def test_suite_judges_every_statement_that_a_model_has():
    rows = suite.rows_of(SOFTMAX_S)
    assert {row["statement"] for row in rows} == {f"V{v}" for v in range(1, 14)}
    assert all(row["holds"] for row in rows), [row for row in rows if not row["holds"]]
    table = suite.table(rows)
    assert len(table) == 2 + len(rows)
    assert "FAIL" not in "".join(table)
    broken = [rows[0] | {"holds": False}, *rows[1:]]
    assert "**1 of 1 FAIL**" in "".join(suite.table(broken))


def test_suite_command_writes_rows_and_fails_with_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "configurations", lambda options: [SOFTMAX_S] * 2)
    wrong = {"holds": False, "residual": 1.0}
    honest = [
        {"statement": "V1", "words": "w", "bound": 1e-9, "residual": 0.0, "holds": True}
        | {"detail": "", "head": "h", "model": "s", "noise_kind": "k", "seed": 0}
    ]
    for found, status in ((honest, 0), ([honest[0] | wrong], 1)):
        monkeypatch.setattr(suite, "measure", lambda options, found=found: iter([found]))
        path = tmp_path / "suite.jsonl"
        assert main(["equivalence", "--suite", "--json", str(path)]) == status
        (row,) = records.read_rows(path)
        assert row["holds"] is (status == 0)
    assert "FAILS: V1" in capsys.readouterr().out


def test_suite_takes_the_models_and_heads_asked_for():
    asked = argparse.Namespace(
        dataset="digits", noise=0.3, seeds=2, models=["c"], heads=["mlp"], backend=None,
        suite=True, noise_kind="cyclic",
    )  # fmt: skip
    found = suite.configurations(asked)
    assert len(found) == len(set(found)) == 3 * 2
    assert {(c.model, c.head, c.noise) for c in found} == {("c", "mlp", 0.3)}
    asked.suite, asked.models = False, None
    assert [(c.model, c.noise_kind, c.seed) for c in suite.configurations(asked)] == [
        (model, "cyclic", seed) for model in suite.MODELS for seed in range(2)
    ]


def test_certificate_of_one_model_is_printed_in_full(monkeypatch, capsys, tmp_path):
    def here(options):
        return map(suite.rows_of, suite.configurations(options))

    monkeypatch.setattr(suite, "measure", here)
    path = tmp_path / "rows.jsonl"
    asked = ["--models", "c", "--heads", "mlp", "--noise-kind", "cyclic", "--seeds", "1"]
    assert main(["equivalence", *asked, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "c-model, mlp, digits, 40% cyclic noise, 1 seed" in printed
    rows = records.read_rows(path)
    judged = {row["statement"] for row in rows}
    assert judged == {f"V{v}" for v in (*range(1, 10), 11)}
    for line in [*summaries.statement_table(rows), *(f"{v}: not judged" for v in suite.NOT_JUDGED)]:
        assert line in printed


@pytest.mark.parametrize("model", suite.MODELS)
def test_labels_drawn_from_a_model_follow_it(model):
    point = suite.drawn_from(
        suite.start_of(replace(SOFTMAX_S, model=model)), stream(0, "directions")
    )
    literal = Literal.at(point)
    probability = np.einsum(
        "ti,tij->tj", literal.q, np.broadcast_to(literal.theta, (point.n, 4, 4))
    )
    expected, found = probability.sum(axis=0), np.bincount(point.noisy_labels, minlength=4)
    deviation = np.sqrt((probability * (1 - probability)).sum(axis=0))
    assert (np.abs(found - expected) <= 5 * deviation).all()


def options(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"noise": 0.4, "noise_kind": "permutation", "epochs": 2} | given)


def test_gradient_study_by_hand():
    setting = gradients.Setting(options(), load_dataset("digits"), seed=0)
    fresh = setting.network.initial_weights(stream(0, "initialisation"))
    rows = {row["samples"]: row for row in gradients.sample_rows(setting, "baseline", 0, fresh)}
    # Without a noise layer a sample's descent is to its label, right or wrong.
    assert rows["clean"]["to_label"] == rows["clean"]["to_true"] == 1
    assert rows["corrupted"]["to_label"] == 1
    assert rows["corrupted"]["to_true"] == 0
    assert abs(rows["clean"]["cosine"] - 1) <= 1e-12
    assert rows["clean"]["n"] + rows["corrupted"]["n"] == setting.z.size
    # With the noise layer it is the kernel's own gradient, sample by sample.
    parameters = setting.s_start(fresh)
    own = gradients.output_gradients(setting, "s-model", parameters)
    outputs, channel = (setting.network.logits(fresh, setting.x),), setting.model.unpack(parameters)
    whole = setting.model.joint(outputs, channel[1:], setting.z)
    assert np.abs(own / setting.z.size - whole.d_logits).max() <= 1e-15
    inner = list(gradients.inner_rows(setting, parameters))
    assert abs(inner[0]["cosine"] - 1) <= 1e-12
    assert inner[-1]["cosine"] < 0.999


def test_gradient_check_has_its_v_and_the_complex_step_does_not():
    setting = gradients.Setting(options(), load_dataset("digits"), seed=0)
    fresh = setting.network.initial_weights(stream(0, "initialisation"))
    errors: dict[str, list[float]] = {}
    for row in gradients.check_rows(setting, setting.s_start(fresh)):
        errors.setdefault(row["method"], []).append(row["error"])
    for name in ("central, second order", "central, fourth order"):
        best = int(np.argmin(errors[name]))
        assert 0 < best < len(errors[name]) - 1
        assert errors[name][-1] > 1e3 * errors[name][best]
    assert min(errors["central, fourth order"]) < min(errors["central, second order"])
    assert errors["complex step, through ReLUs"][-1] <= 1e-13


def test_gradients_command(tmp_path, capsys):
    picture, rows = tmp_path / "g.png", tmp_path / "g.jsonl"
    arguments = ["gradients", "--seeds", "1", "--epochs", "2"]
    assert main([*arguments, "--picture", str(picture), "--json", str(rows)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "raise the true class most" in capsys.readouterr().out
    studies = {row["study"] for row in records.read_rows(rows)}
    assert studies == {"samples", "layers", "inner steps", "gradient check"}
    with pytest.raises(SystemExit):
        main(["gradients", "--seeds", "0"])
