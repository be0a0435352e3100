"""The scaling benchmark: its naive layers, its steps, its exponents; and a million classes."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks import kernel_cases, records, scaling, scaling_arms, timing, worker
from benchmarks.__main__ import main
from benchmarks.kernel_cases import Case

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", [Case("s_model", 9, 6), Case("c_model", 9, 6, 4)])
def test_naive_layers_are_the_same_function(case):
    exact = kernel_cases.build_reference(asdict(case)).results()
    naive = scaling_arms.build_naive(asdict(case)).results()
    assert worker.relative_error(naive, exact) <= timing.tolerance(np.float32)


@pytest.mark.parametrize(
    "case",
    [Case("softmax_nll", 8, 12), Case("s_model", 8, 12), Case("sparse_s_model", 8, 12, n_kept=3)],
)
def test_steps_train_and_have_the_gradient_of_the_reference(case):
    step = scaling_arms.build_step(asdict(case), "numpy")
    exact = scaling_arms.build_step_reference(asdict(case)).results()
    assert worker.relative_error(step.results(), exact) <= timing.tolerance(np.float32)
    before, _ = step.results()
    step.call()  # moves a copy of the parameters: what is compared stays
    assert step.results()[0] == before


def outcome(arm: str, seconds: list[float]) -> timing.Outcome:
    return timing.Outcome(timing.Arm(arm), seconds=seconds)


def test_exponents_are_of_the_own_time_and_of_the_range_that_they_name():
    times: scaling.Times = {}
    series = next(one for one in scaling.SERIES if one.name == "s-own")
    for case in series.cases:
        softmax = 1e-3 * case.k
        own = 1e-6 * case.k**0.5
        arms = [
            outcome(scaling.sparse_name(5), [softmax + own] * 3),
            outcome(scaling.SOFTMAX, [softmax] * 3),
        ]
        scaling.remember(times, series, case, arms)
    own_time = times["s-own", scaling.sparse_name(5) + scaling.OWN]
    own_time[10] = np.full(3, 1.0)  # outside the range: must not count
    found = [row for row in scaling.exponent_rows(times) if "theory" in row]
    assert [(row["arm"], row["k_from"], row["k_to"]) for row in found] == [
        (scaling.sparse_name(5) + scaling.OWN, 100, 10**6)
    ]
    assert abs(found[0]["exponent"] - 0.5) < 1e-6
    assert found[0]["theory"] == 1
    assert "0.50 [0.50, 0.50], theory 1" in scaling.exponent_lines(found)[0]
    own = [row for row in scaling.exponent_rows(times) if "own_ms" in row]
    assert [row["k"] for row in own] == [10, *series.ks]
    assert abs(own[1]["own_ms"] - 1e3 * 1e-5) < 1e-9


def test_what_does_not_fit_is_not_run_and_says_its_size(monkeypatch):
    monkeypatch.setattr(kernel_cases, "available_bytes", lambda: 20 * 2**30)
    series = next(one for one in scaling.SERIES if one.name == "s")
    found = scaling.arms_of(series, Case("s_model", 256, 10**5), "numba", with_peers=True)
    arms = {arm.name: arm for arm in found}
    for name in (scaling.DENSE, scaling.NAIVE):
        assert arms[name].skip == "not run"
        assert "GiB" in arms[name].detail
    assert not arms[scaling.sparse_name(5)].skip
    assert next(iter(arms)) == scaling.sparse_name(5)  # what ratios are to


def test_command_writes_rows(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--no-peers", "--series", "s", "--largest", "10", "--backend", "numpy"]
    assert main(["scaling", *arguments, "--json", str(path)]) == 0
    rows = records.read_rows(path)
    timed = {row["arm"] for row in rows if row.get("status") == "timed"}
    sparse = {scaling.sparse_name(1), scaling.sparse_name(5)}
    assert timed == sparse | {scaling.DENSE, scaling.NAIVE, scaling.SOFTMAX}
    assert {row["arm"] for row in rows if "own_ms" in row} == {a + scaling.OWN for a in sparse}
    assert all(row["k"] == 10 and row["series"] == "s" for row in rows)
    assert "naive dense" in capsys.readouterr().out


MILLION = """
import resource
import numpy as np
import kernels
from benchmarks.kernel_cases import random_support

bound = 6 * 10**9
resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
n, k, kept = 256, 10**6, 5
rng = np.random.default_rng(0)
links = kernels.link_index(random_support(k, kept, rng))
logits = np.empty((n, k), np.float32)
rng.standard_normal(out=logits, dtype=np.float32)
channel = rng.standard_normal((k, kept), dtype=np.float32)
labels = rng.integers(k, size=n)
found = kernels.sparse_s_model_nll(logits, channel, links, labels)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
assert np.isfinite(found.nll)
assert abs(found.d_logits[0].sum(dtype=np.float64)) < 1e-6
print(peak)
"""


def test_a_million_classes_run_forward_and_backward_in_six_gigabytes():
    if kernel_cases.available_bytes() < 8e9:
        pytest.skip("needs 8 GB of free memory")
    found = subprocess.run(
        [sys.executable, "-c", MILLION], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert 2e9 < int(found.stdout) < 6e9  # logits and their gradient alone are 2.0e9
