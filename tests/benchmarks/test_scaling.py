"""The scaling benchmark: its naive layers, its steps, its exponents; and a million classes."""

import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks import kernel_cases, records, scaling, scaling_arms, scaling_page, timing, worker
from benchmarks.__main__ import main
from benchmarks.kernel_cases import Case

ROOT = Path(__file__).parents[2]
SPARSE = scaling.sparse_name(5)


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


def timed(series: str, arm: str, k: int, rounds_ms: list[float]) -> records.Row:
    median = float(np.median(rounds_ms))
    row = {"commit": "old", "series": series, "arm": arm, "k": k, "median_ms": median}
    return row | {"rounds_ms": rounds_ms}


def own_series(ks: Iterable[int]) -> list[records.Row]:
    """The softmax takes k microseconds, the sparse layer the root of that beside."""
    return [
        timed("s-own", arm, k, [1e-3 * k + own] * 3)
        for k in ks
        for arm, own in ((scaling.SOFTMAX, 0.0), (SPARSE, 1e-3 * k**0.5))
    ]


def test_exponents_are_of_the_own_time_and_of_the_range_that_they_name():
    ks = next(one for one in scaling.SERIES if one.name == "s-own").ks
    # A size outside the range must not count.
    rows = [*own_series(ks), *(row | {"k": 10} for row in own_series([10**6]))]
    found = scaling.exponent_rows(scaling.times_of(rows))
    fitted = [row for row in found if "theory" in row]
    assert [(row["arm"], row["k_from"], row["k_to"]) for row in fitted] == [
        (SPARSE + scaling.OWN, 100, 10**6)
    ]
    assert abs(fitted[0]["exponent"] - 0.5) < 1e-6
    assert fitted[0]["theory"] == 1
    assert "0.50 [0.50, 0.50], theory 1" in scaling.exponent_lines(fitted)[0]
    own = [row for row in found if "own_ms" in row]
    assert [row["k"] for row in own] == [10, *ks]
    assert abs(own[1]["own_ms"] - 1e-2) < 1e-9


def test_own_times_are_of_one_run():
    softmax, sparse = own_series([100])
    own = "s-own", SPARSE + scaling.OWN
    assert own in scaling.times_of([softmax, sparse])
    assert own not in scaling.times_of([softmax, sparse | {"commit": "new"}])


def test_on_a_gpu_exponents_are_of_the_series_that_is_there():
    rows = [timed("s", SPARSE, k, [k / 1e3] * 3) for k in (100, 1000, 10**6)]
    assert not scaling.exponent_rows(scaling.times_of(rows))  # of new memory on the CPU: none
    (fitted,) = scaling.exponent_rows(scaling.times_of(rows), "cuda")
    assert (fitted["series"], fitted["k_from"], fitted["k_to"]) == ("s", 1000, 10**6)


@pytest.mark.parametrize(
    ("span", "stays"), [((1000, 10**4), True), ((3162, 10**5), True), ((10, 10**4), False)]
)
def test_merged_rows_take_the_place_of_the_same_arm_and_size_and_are_fitted_with_the_others(
    span, stays
):
    first = [*own_series([100, 1000]), timed("c", SPARSE, 100, [5.0])]
    gone = {"series": "s", "arm": scaling.DENSE, "theory": 2.0, "k_from": 10, "k_to": 100}
    wider = {"series": "s-kept", "arm": SPARSE, "theory": 1.0}
    wider |= {"k_from": span[0], "k_to": span[1]}
    new = [row | {"commit": "new"} for row in own_series([1000, 10**4])]
    new += [timed("s-kept", SPARSE, k, [1.0]) for k in (3162, 10**4)]
    found = scaling.merged([*first, gone, wider], new)
    times = [(r["series"], r["arm"], r["k"], r["commit"]) for r in found if "median_ms" in r]
    assert len(times) == len(set(times)) == 9
    assert ("s-own", SPARSE, 1000, "new") in times
    assert ("s-own", SPARSE, 1000, "old") not in times
    assert ("s-own", SPARSE, 100, "old") in times
    fitted = {row["series"]: row for row in found if "theory" in row}
    assert fitted.keys() == {"s-kept", "s-own"}  # of `gone` theory says nothing any more
    # It was fitted over more than there is now; but not from sizes that theory leaves out.
    assert (fitted["s-kept"] == wider) == stays
    assert (fitted["s-own"]["k_from"], fitted["s-own"]["k_to"]) == (100, 10**4)
    assert fitted["s-own"]["commit"] == "new"
    assert scaling.merged(found, new) == found


def test_page_sets_new_memory_beside_kept_memory_where_arrays_are_large():
    rows = [
        timed(series, SPARSE, k, rounds)
        for k in (1000, 10**6)
        for series, rounds in (("s", [120.0, 800.0, 2300.0]), ("s-kept", [100.0, 101.0, 99.5]))
    ]
    lines = [line for line in scaling_page.new_memory(rows) if line.startswith("| s |")]
    assert lines == [f"| s | {SPARSE} | 1000000 | 800 (120 to 2300) | 100 (99.5 to 101) |"]
    assert not list(scaling_page.new_memory(rows[::2]))  # nothing with kept memory
    assert scaling_page.best_of(rows, "s", SPARSE) == {1000: 100.0, 10**6: 100.0}


def test_where_one_overtakes_the_other_is_said_of_kept_memory_and_says_so():
    new = [timed("s", SPARSE, k, [800.0]) for k in (1000, 10**4)]
    new += [timed("s", scaling.DENSE, k, [200.0]) for k in (1000, 10**4)]
    kept = [timed("s-kept", SPARSE, k, [100.0]) for k in (1000, 10**4)]
    assert "| not up to K = 10000 | 0.25 times" in list(scaling_page.crossovers(new))[2]
    line = list(scaling_page.crossovers([*new, *kept]))[2]
    assert "| at every size up to K = 10000 | 2 times" in line
    assert not list(scaling_page.which_memory(new))
    assert "of series s from K = 1000 to 10000 are" in "".join(
        scaling_page.which_memory([*new, *kept])
    )


def test_an_arm_that_would_take_too_long_is_not_run_and_says_how_long():
    arms = [timing.Arm(scaling.DENSE), timing.Arm(scaling.NAIVE), timing.Arm(SPARSE)]
    done = {scaling.DENSE: {100: 9.0, 1000: 1.4}, SPARSE: {1000: 5.0}}
    dense, naive, sparse = scaling.without_too_long(arms, 3162, done)
    assert (dense.skip, naive.skip, sparse.skip) == (timing.NOT_RUN, "", "")
    assert dense.detail == "a call would take about 14 s, by that at K = 1000"
    assert not any(arm.skip for arm in scaling.without_too_long(arms, 2000, done))


KEPT_MEMORY = """
import resource
import numpy as np
from benchmarks import scaling_arms, timing

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24, np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

arm = timing.Arm("", "builtins:dict", {"call": 1})
[kept] = scaling_arms.with_kept_memory([arm])
new = faults(), faults()
assert scaling_arms.build_with_kept_memory(**kept.arguments) == {"call": 1}
print(new[1], (faults(), faults())[1])
"""


def test_an_arm_that_is_not_run_keeps_its_reason_where_memory_cannot_be_kept(monkeypatch):
    monkeypatch.setattr(scaling_arms.ctypes, "CDLL", lambda name: object())
    too_large = timing.Arm("large", skip=timing.NOT_RUN, detail="would need about 149 GiB")
    large, other = scaling_arms.with_kept_memory([too_large, timing.Arm("other")])
    assert (large.skip, large.detail) == (timing.NOT_RUN, "would need about 149 GiB")
    assert (other.skip, other.detail) == ("missing", "needs mallopt of the C library")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's mallopt")
def test_kept_memory_is_not_asked_for_again():
    found = subprocess.run(
        [sys.executable, "-c", KEPT_MEMORY], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    new, kept = map(int, found.stdout.split())
    assert new >= 32  # 64 MiB, by huge pages at the most
    assert kept <= 2


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


def test_command_writes_rows(tmp_path, capsys, monkeypatch):
    kept = []
    wrapped = scaling_arms.with_kept_memory
    monkeypatch.setattr(scaling_arms, "with_kept_memory", lambda a: kept.append(a) or wrapped(a))
    path = tmp_path / "rows.jsonl"
    merged = tmp_path / "merged.jsonl"
    merged.write_text("")
    arguments = ["--quick", "--no-peers", "--series", "s-kept", "--largest", "10"]
    arguments += ["--backend", "numpy"]
    assert main(["scaling", *arguments, "--json", str(path), "--merge", str(merged)]) == 0
    assert len(records.read_rows(merged)) == len(records.read_rows(path))
    rows = records.read_rows(path)
    timed = {row["arm"] for row in rows if row.get("status") == "timed"}
    sparse = {scaling.sparse_name(1), scaling.sparse_name(5)}
    assert timed == sparse | {scaling.DENSE, scaling.NAIVE, scaling.SOFTMAX}
    assert {row["arm"] for row in rows if "own_ms" in row} == {a + scaling.OWN for a in sparse}
    assert all(row["k"] == 10 and row["series"] == "s-kept" for row in rows)
    assert len(kept) == 1
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
